"""What is exported: the items of a page, or all hits of a search, as an evidence package."""

import datetime
import re
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from typing import Any

from fastapi import Response
from fastapi.responses import StreamingResponse

from upperson_console.accounts import Account
from upperson_console.evidence import write_package
from upperson_console.models import iso_time
from upperson_console.problems import ProblemError, missing
from upperson_console.results import calibrated_hits
from upperson_console.search import MOST_BY_TIME, MOST_HITS, PAGE_HITS, Search
from upperson_console.service import BLURRING_S, ConsoleService
from upperson_rt.errors import InputError
from upperson_rt.gallery import Item
from upperson_rt.printable import count_of, visible_text
from upperson_rt.search.service import SearchResult

MOST_EXPORTED = 2000
"""Items of one export."""
_WORDS, _LONGEST_WORDS = 6, 60


def export_response(
    service: ConsoleService,
    account: Account,
    ids: Sequence[int] | None,
    search: Search,
    *,
    tracks: bool = False,
    likely: bool = False,
    reason: str = "",
) -> Response:
    """Return an evidence package, which is logged before it is sent.

    It has the items with ``ids``, or all hits of a search (the likely ones if ``likely``), and with
    ``tracks`` the other items of their tracks that pass the search's filter. For ``reason`` see
    `ConsoleService.shows_all`.
    """
    shows_all = service.shows_all(account, reason)
    found = _found(service, account, search, needed=ids is None)
    if ids is None:
        judged = zip(found[-1].hits, found[-1].labels, strict=True) if found else ()
        ids = [hit.id for hit, label in judged if label == "likely" or not likely]
    chosen = _chosen(service, account, ids, search if tracks else None)
    if not chosen:
        raise missing("none of these pictures is there; they may have been deleted")
    items = chosen[:MOST_EXPORTED]
    query_jpeg, queried = _query_picture(service, account, search)
    shown = {**dict(items), **queried}
    arguments = {"ids": [*shown], "address": search.address(), "reason": reason}
    unblurred = service.blur and shows_all
    service.approvals.require(account, "export", len(shown), **arguments, unblurred=unblurred)
    if unblurred:
        service.note_items(
            account, "unblur", items, {"export": True, "reason": visible_text(reason)}
        )
    stated = ("purpose", "case", "approval", "approved_by")
    given = {name: getattr(account.context, name) for name in stated}
    given["reason"] = visible_text(reason)
    until = time.monotonic() + BLURRING_S
    file, sha256, facts = write_package(
        account,
        items,
        service.pictures,
        {
            "user": account.name,
            "role": account.role,
            **{name: value for name, value in given.items() if value},
            "model": service.encoder.fingerprint,
            "variant": service.encoder.variant,
            "log_chain": service.last_chain(),
            "gone": len({*ids} - {id_ for id_, _ in chosen}),
        },
        _query(search, found),
        {id_: match for result in reversed(found) for id_, match in _matches(result).items()},
        service.seal,
        query_jpeg=query_jpeg,
        hide=None if shows_all else partial(service.blurred_clip, account, until=until),
        left_out=len(chosen) - len(items),
    )
    logged = ("pictures", "missing", "timestamp", "timestamp_missing")
    kept = {name: facts[name] for name in logged if name in facts}
    details = {"sha256": sha256, **kept, "search": search.address()}
    try:
        service.note_items(account, "export", shown.items(), details)
    except ProblemError:
        file.close()
        raise

    def blocks() -> Iterator[bytes]:
        with file:
            yield from iter(partial(file.read, 1 << 16), b"")

    name = _file_name(search.sentence, facts["pictures"])
    return StreamingResponse(
        blocks(),
        media_type="application/zip",
        headers={"content-disposition": f'attachment; filename="{name}"'},
    )


def _found(
    service: ConsoleService, account: Account, search: Search, needed: bool
) -> list[SearchResult]:
    """Return the hits of a search as its first page judges them, and all hits.

    There are none if nothing was searched, or the search cannot be repeated and need not be.
    """
    if needed:
        search.require_query()
    if search.is_empty:
        return []
    counts = [MOST_BY_TIME] if search.order == "time" else [PAGE_HITS + 1, MOST_HITS]
    try:
        results = [calibrated_hits(service, account, search, count) for count in counts]
    except ProblemError as error:  # Such as a query picture that is not kept any more.
        if needed or error.code == "sentence_refused":
            raise
        return []
    return [result for result in results if result is not None]


def _chosen(
    service: ConsoleService, account: Account, ids: Sequence[int], tracks_of: Search | None
) -> list[tuple[int, Item]]:
    """Return the items that an account may see, each once, with those of their tracks."""
    found = service.gallery.get(ids)
    chosen: dict[int, Item] = {}
    where = None if tracks_of is None else tracks_of.filter_at(time.time())
    done = set()
    for id_ in ids:
        if id_ not in found or not account.sees((item := found[id_][0]).camera):
            continue
        chosen.setdefault(id_, item)
        track = item.camera, item.track
        if where is not None and item.track is not None and track not in done:
            done.add(track)
            views = service.views(account, item.camera, item.track, where)
            chosen |= sorted(views, key=lambda view: (view[1].time or 0.0, view[0]))
    return list(chosen.items())


def _matches(found: SearchResult) -> dict[int, dict[str, Any]]:
    judged = zip(found.hits, found.likelihoods, found.labels, strict=True)
    return {
        hit.id: {
            "rank": rank,
            "score": hit.score,
            "likelihood": how and round(how, 4),
            "match": label,
        }
        for rank, (hit, how, label) in enumerate(judged, 1)
    }


def _query(search: Search, found: list[SearchResult]) -> dict[str, Any]:
    """Return a search and its verdict as JSON values."""
    where = search.filter_at(time.time())
    conditions = {**asdict(where), "since": iso_time(where.since), "until": iso_time(where.until)}
    verdict = found[0].verdict if found else None
    return {
        "sentence": search.sentence.strip(),
        "picture": search.picture,
        "like": None if search.like is None else str(search.like),
        "filter": {name: value for name, value in conditions.items() if value},
        "by_track": search.by_track,
        "yes": [str(id_) for id_ in search.yes],
        "no": [str(id_) for id_ in search.no],
        "verdict": None if verdict is None else verdict.as_json(),
    }


def _query_picture(
    service: ConsoleService, account: Account, search: Search
) -> tuple[bytes | None, dict[int, Item]]:
    """Return the picture of a search, if it is kept, and the item that it shows, by id."""
    with suppress(ProblemError, InputError):  # It is not kept any more, or damaged.
        if search.picture is not None:
            return service.query_pictures.get(search.picture).jpeg, {}
        if search.like is not None:
            item, _ = service.item(account, search.like)
            if (made := service.pictures.jpeg(item, "view")) is not None:
                return made[0], {search.like: item}
    return None, {}


def _file_name(sentence: str, pictures: int) -> str:
    """Return a name with the day, the first words of a sentence, and the number of pictures."""
    plain = unicodedata.normalize("NFKD", sentence).encode("ascii", "ignore").decode().lower()
    words = "-".join(re.findall("[a-z0-9]+", plain)[:_WORDS])[:_LONGEST_WORDS].strip("-")
    day = datetime.datetime.now().astimezone().date().isoformat()
    return f"{day}-{words or 'export'}-{count_of(pictures, 'picture').replace(' ', '-')}.zip"
