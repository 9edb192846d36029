"""A store: galleries in the memory of one process, ``memory://NAME``. Nothing is durable.

`Gallery` checks all arguments, so that a store implements only what follows the checks: the methods
with an underscore, and a few without arguments.
"""

import json
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import UsageError
from upperson_rt.gallery import CameraInfo, Filter, Gallery, GalleryInfo, Hit, IndexInfo, Item
from upperson_rt.gallery.protocol import Meta, known_keys, made_now, no_gallery
from upperson_rt.gallery.records import (
    Track,
    TrackSpan,
    attributes_as_json,
    first_of_tracks,
    length_problem,
    track_of_hit,
    with_spans,
)


@dataclass(frozen=True)
class Row:
    """What is stored of one item."""

    id: int
    item: Item
    vector_D: NDArray[np.float32]
    variant: str | None


@dataclass
class State:
    """One gallery, which several objects may have opened."""

    meta: Meta
    rows: dict[str, Row] = field(default_factory=dict)
    """By key, in the order of their ids."""
    next_id: int = 0
    lock: threading.RLock = field(default_factory=threading.RLock)


GALLERIES: dict[str, State] = {}


class MemoryGallery(Gallery):
    """Opened by `Gallery.open("memory://NAME", ...)`."""

    def __init__(self, location: str, state: State) -> None:
        super().__init__(location, state.meta)
        self._open_state: State | None = state

    @classmethod
    def _open(cls, location: str, create: tuple[str, int] | None) -> "MemoryGallery":
        if location not in GALLERIES:
            if create is None:
                raise no_gallery(location)
            fingerprint, embed_dim = create
            meta = Meta(
                schema_version=1, fingerprint=fingerprint, embed_dim=embed_dim, **made_now()
            )
            GALLERIES.setdefault(location, State(meta))
        return cls(location, GALLERIES[location])

    def close(self) -> None:
        """Close this object; the gallery stays."""
        self._open_state = None

    @property
    def _state(self) -> State:
        if self._open_state is None:
            raise UsageError(
                f"gallery {self.location} is closed: open it again", code="gallery_closed"
            )
        return self._open_state

    def _rows(self, where: Filter | None = None) -> list[Row]:
        with self._state.lock:
            return [
                row for row in self._state.rows.values() if where is None or passes(row.item, where)
            ]

    def _add(
        self, items: Sequence[Item], vectors_ND: NDArray[np.float32], variant: str | None
    ) -> list[str]:
        new = [replace(item, attributes=json.loads(attributes_as_json(item))) for item in items]
        with self._state.lock:
            before = self.ids([item.key for item in new])
            for item, vector_D in zip(new, vectors_ND, strict=True):
                there = self._state.rows.get(item.key)
                if there is None:
                    number = self._state.next_id
                    self._state.next_id += 1
                else:
                    number = there.id
                    item = replace(item, camera=item.camera or there.item.camera)
                self._state.rows[item.key] = Row(number, item, vector_D.copy(), variant)
        return list(before)

    def _search(
        self, queries_QD: NDArray[np.float32], k: int, where: Filter, by_track: bool
    ) -> list[list[Hit]]:
        rows = self._rows(where)
        vectors_ND = self._stacked(rows)
        found = []
        for query_D in queries_QD:
            # Summed row by row: equal vectors have equal scores, whatever their place.
            scores_N = (vectors_ND * query_D).sum(axis=1)
            order = np.lexsort(([row.id for row in rows], -scores_N))
            hits = [Hit(id=rows[n].id, score=float(scores_N[n]), item=rows[n].item) for n in order]
            found.append((first_of_tracks(hits, track_of_hit) if by_track else hits)[:k])
        return with_spans(found, lambda _: spans(row.item for row in rows)) if by_track else found

    def _stacked(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        vectors = [row.vector_D for row in rows]
        return np.array(vectors, np.float32).reshape(len(rows), self.embed_dim)

    def _count(self, where: Filter) -> int:
        return len(self._rows(where))

    def _items(self, where: Filter) -> Iterator[Item]:
        return iter([row.item for row in self._rows(where)])

    def _sample(self, count: int) -> list[Item]:
        rows = self._rows()
        return [row.item for row in rows[:: max(1, -(-len(rows) // count))]]

    def _vectors(
        self, where: Filter, batch_size: int
    ) -> Iterator[tuple[list[Item], NDArray[np.float32]]]:
        rows = self._rows(where)
        for first in range(0, len(rows), batch_size):
            part = rows[first : first + batch_size]
            yield [row.item for row in part], self._stacked(part)

    def _get(self, ids: Sequence[int]) -> dict[int, tuple[Item, NDArray[np.float32]]]:
        wanted = set(ids)
        return {row.id: (row.item, row.vector_D.copy()) for row in self._rows() if row.id in wanted}

    def _vectors_of(self, ids: set[int]) -> dict[int, NDArray[np.float32]]:
        return {number: vector_D for number, (_, vector_D) in self._get(sorted(ids)).items()}

    def ids(self, keys: Sequence[str]) -> dict[str, int]:
        """Return `Hit.id` for those of the keys that are there."""
        with self._state.lock:
            rows = self._state.rows
            return {key: rows[key].id for key in known_keys(keys) if key in rows}

    def delete(self, keys: Sequence[str]) -> int:
        """Delete items by key; return how many were there."""
        with self._state.lock:
            there = self.ids(keys)
            for key in there:
                del self._state.rows[key]
        return len(there)

    def _delete_where(self, where: Filter) -> int:
        with self._state.lock:
            return self.delete([row.item.key for row in self._rows(where)])

    def _prune(self, too_old: Filter | None, keep_newest: int | None, scope: Filter) -> int:
        with self._state.lock:
            count = 0 if too_old is None else self._delete_where(too_old)
            if keep_newest is not None:
                rows = sorted(self._rows(scope), key=newest_last)
                extra = rows[: max(0, len(rows) - keep_newest)]
                count += self.delete([row.item.key for row in extra])
        return count

    def by_camera(self) -> dict[str, CameraInfo]:
        """Return what is there of each camera, by name."""
        found: dict[str, list[Item]] = {}
        for row in self._rows():
            if row.item.camera is not None:
                found.setdefault(row.item.camera, []).append(row.item)
        return {name: CameraInfo(**period(items)) for name, items in sorted(found.items())}

    def info(self) -> GalleryInfo:
        """Return what the gallery holds."""
        rows, meta = self._rows(), self._state.meta
        items = [row.item for row in rows]
        times = period(items)
        return GalleryInfo(
            location=self.location,
            items=times.pop("pictures"),
            embed_dim=meta.embed_dim,
            fingerprint=meta.fingerprint,
            created=meta.created,
            generator=meta.generator,
            schema_version=meta.schema_version,
            size_bytes=None,
            cameras={name: camera.pictures for name, camera in self.by_camera().items()},
            variants=dict(Counter(row.variant for row in rows if row.variant is not None)),
            tracks=len(spans(items)),
            index=IndexInfo(kind="exact", rows=len(rows)),
            **times,
        )

    def verify(self) -> list[str]:
        """Return what is wrong, one line each."""
        problems = ((row.item.key, length_problem(row.vector_D)) for row in self._rows())
        return [f"item {key}: {problem}" for key, problem in problems if problem]

    def rebuild(self) -> None:
        """Search is exact: there is no index."""


def passes(item: Item, where: Filter) -> bool:
    """Return whether an item passes a filter."""
    if where.cameras is not None and item.camera not in where.cameras:
        return False
    if where.track is not None and item.track != where.track:
        return False
    if where.since is not None and (item.time is None or item.time < where.since):
        return False
    if where.until is not None and (item.time is None or item.time >= where.until):
        return False
    return all(
        name in item.attributes and is_same(item.attributes[name], value)
        for name, value in where.attributes.items()
    )


def is_same(value: Any, wanted: str | int | float | bool) -> bool:
    """Compare texts with texts, numbers with numbers, true and false only with themselves."""
    if isinstance(wanted, str | bool) or isinstance(value, bool):
        return type(value) is type(wanted) and bool(value == wanted)
    return isinstance(value, int | float) and value == wanted


def newest_last(row: Row) -> tuple[bool, float, int]:
    """Return a key to sort by: items without a time are the oldest."""
    return row.item.time is not None, row.item.time or 0.0, row.id


def period(items: Sequence[Item]) -> dict[str, Any]:
    """Return number, first and last time of some items."""
    times = [item.time for item in items if item.time is not None]
    first, last = min(times, default=None), max(times, default=None)
    return {"pictures": len(items), "first_time": first, "last_time": last}


def spans(items: Iterable[Item]) -> Mapping[Track, TrackSpan]:
    """Return the span of each track."""
    tracks: dict[Track, list[Item]] = {}
    for item in items:
        if item.track is not None:
            tracks.setdefault((item.camera, item.track), []).append(item)
    return {track: TrackSpan(**period(own)) for track, own in tracks.items()}
