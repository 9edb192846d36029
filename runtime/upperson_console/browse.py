"""All people without a query: one hit a track, newest first, in pages.

A gallery yields its items by id. So windows of time are read, the newest one first, until a page is
full. Items without a time come last.
"""

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TypeAlias

from upperson_console.accounts import Account
from upperson_console.search import MOST_HITS, Cursor, Page, Search, make_cursor, read_cursor
from upperson_console.service import ConsoleService, span_of
from upperson_rt.gallery import Filter, Gallery, Hit, Item

_FIRST_WINDOW_S = 60.0
_MOST_READ = 2000
"""Items of a window, unless it is shorter than a second."""
_DAY_S = 86400.0
_NEWEST = 8
_MOST_CAMERAS = 12
_Place: TypeAlias = tuple[float, int]
"""In the order of pages: minus the time and a hash of the key, or infinity and a number."""


def browse(
    service: ConsoleService, account: Account, search: Search, limit: int, cursor: str | None = None
) -> Page:
    """Return and log a page of all that passes the filter of a search without a query."""
    after = None if cursor is None else read_cursor(cursor, search).last
    where = account.visible(search.filter_at(time.time()))
    found: list[tuple[_Place, Hit]] = []
    if where is not None:
        found = _read(service, where, limit + 1, search.by_track, after)
    shown = [hit for _, hit in found[:limit]]
    service.note_search(account, search, shown, limit, {}, action="browse")
    following = (
        make_cursor(search, Cursor(last=found[limit - 1][0])) if len(found) > limit else None
    )
    return Page(shown, 1, following)


def newest_by_camera(service: ConsoleService, account: Account) -> dict[str | None, list[Hit]]:
    """Return and log the newest people of some cameras, each of its last day; None for all."""
    cameras = service.cameras(account)
    latest: list[str | None] = [*cameras]
    latest.sort(key=lambda name: -(cameras[str(name)].last_time or 0.0))
    found: dict[str | None, list[Hit]] = {}
    for name in latest[:_MOST_CAMERAS] or [None]:
        last = None if name is None else cameras[name].last_time
        since, until = (None, None) if last is None else (last - _DAY_S, last + _FIRST_WINDOW_S)
        where = account.visible(Filter(camera=name, since=since, until=until))
        if where is not None:
            found[name] = [hit for _, hit in _read(service, where, _NEWEST)]
    hits = [hit for of_camera in found.values() for hit in of_camera]
    service.note_search(account, Search(order="time"), hits, len(hits), {}, action="browse")
    return found


def _read(
    service: ConsoleService,
    where: Filter,
    count: int,
    by_track: bool = True,
    after: _Place | None = None,
) -> list[tuple[_Place, Hit]]:
    gallery, info = service.gallery, service.current.now().info()
    placed: list[tuple[_Place, Sequence[Item]]] = []
    if info.first_time is not None and info.last_time is not None:
        begin = max(info.first_time, info.first_time if where.since is None else where.since)
        end = math.nextafter(max(info.last_time, time.time()), math.inf)
        end = min(end, math.inf if where.until is None else where.until)
        if after is not None:
            end = min(end, math.nextafter(-after[0], math.inf))
        placed += islice(_timed(gallery, where, by_track, begin, end, after), count)
    if len(placed) < count and where.since is None and where.until is None:
        timeless = _timeless(gallery, info.first_time, where, by_track, after)
        placed += islice(timeless, count - len(placed))
    shown = [(place, views[len(views) // 2], views) for place, views in placed]
    ids = gallery.ids([item.key for _, item, _ in shown])
    return [
        (place, Hit(id=ids[item.key], score=0.0, item=item, span=span_of([(0, v) for v in views])))
        for place, item, views in shown
        if item.key in ids  # Not deleted meanwhile.
    ]


def _timed(
    gallery: Gallery, where: Filter, by_track: bool, begin: float, end: float, after: _Place | None
) -> Iterator[tuple[_Place, Sequence[Item]]]:
    """Yield the items of tracks, by time, with the place of the newest; those after a place."""
    width_s, seen = _FIRST_WINDOW_S, set[tuple[str | None, str]]()
    while begin < end:
        window = replace(where, since=max(begin, end - width_s), until=end)
        count = gallery.count(window)
        if count > _MOST_READ and width_s >= 1:
            width_s /= 4
            continue
        for item in sorted(gallery.items(window), key=_place) if count else ():
            if _is_first(item, by_track, seen):
                views = _views(gallery, where, item, by_track)
                place = min(map(_place, views), default=None)
                # A track that goes on after this place was on an earlier page.
                if place is not None and (after is None or place > after):
                    yield place, views
        width_s, end = 2 * width_s, window.since or begin


def _timeless(
    gallery: Gallery,
    first_time: float | None,
    where: Filter,
    by_track: bool,
    after: _Place | None,
) -> Iterator[tuple[_Place, Sequence[Item]]]:
    """Yield what has no time, in the order of the gallery, as `_timed` does."""
    if first_time is not None and gallery.count(where) == gallery.count(
        replace(where, since=first_time)
    ):
        return
    start, seen = after[1] if after and after[0] == math.inf else 0, set[tuple[str | None, str]]()
    items = (item for item in gallery.items(where) if item.time is None)
    firsts = (item for item in items if _is_first(item, by_track, seen))
    # Read at once: while items are yielded no others can be.
    for number, item in enumerate([*islice(firsts, start, MOST_HITS)], start + 1):
        views = _views(gallery, where, item, by_track)
        if views and all(view.time is None for view in views):
            yield (math.inf, number), views


def _is_first(item: Item, by_track: bool, seen: set[tuple[str | None, str]]) -> bool:
    """Return whether no item of a track was seen before."""
    if not by_track or item.track is None:
        return True
    track = item.camera, item.track
    is_first = track not in seen
    seen.add(track)
    return is_first


def _views(gallery: Gallery, where: Filter, item: Item, by_track: bool) -> list[Item]:
    if not by_track or item.track is None:
        return [item]
    camera = where.camera if item.camera is None else item.camera
    found = gallery.items(replace(where, camera=camera, track=item.track))
    views = [view for view in found if view.camera == item.camera]
    return sorted(views, key=lambda view: view.time or 0.0)


def _place(item: Item) -> _Place:
    if item.time is None:
        return math.inf, 0
    digest = hashlib.blake2b(item.key.encode("utf-8", "surrogatepass"), digest_size=7).digest()
    return -item.time, int.from_bytes(digest, "big")
