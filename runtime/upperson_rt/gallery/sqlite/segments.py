"""Parts of the search index: exact ones of faiss, and a growing tail beside them.

Shapes: Q queries, N rows, K candidates, D dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import BackendError
from upperson_rt.gallery.records import Filter
from upperson_rt.gallery.sqlite.rows import STORED, Block

Candidates: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Scores and item ids, (Q, K) each, in no order; where there is none the id is -1."""

_P = TypeVar("_P", bound="Part")

_GEMM_FROM_QUERIES = 20  # Measured: decoding pays off from about there on.
_GEMM_ROWS = 4096


def load_faiss() -> Any:
    """Import faiss when it is first needed; its type hints are incomplete."""
    try:
        return import_module("faiss")
    except ImportError as error:
        raise BackendError(
            "searching a gallery needs the package 'faiss', which is not installed: run "
            " pip install faiss-cpu"
        ) from error


@dataclass(frozen=True)
class Part:
    """Which items an index of faiss is about."""

    ids: NDArray[np.int64]
    """(N,) ascending."""
    checksums: NDArray[np.int64]
    """(N,) of the rows of the database that they were made from."""
    index: Any
    dead: NDArray[np.bool_] | None = field(default=None, kw_only=True)
    """(N,) items that are gone or have been replaced."""
    dead_count: int = field(default=0, kw_only=True)

    @property
    def alive(self) -> int:
        """Items that count."""
        return len(self.ids) - self.dead_count

    @cached_property
    def total(self) -> int:
        """Sum of the checksums of the items that count."""
        return total_of(self.checksums, self.dead)

    @property
    def alive_ids(self) -> NDArray[np.int64]:
        """Items that count, ascending."""
        return self.ids if self.dead is None else self.ids[~self.dead]

    def checksums_of(self, ids: NDArray[np.int64]) -> dict[int, int]:
        """Return the checksums of those of the items (ascending) that count here, by id."""
        rows = rows_of(self.ids, ids)
        if self.dead is not None:
            rows = rows[~self.dead[rows]]
        return dict(zip(self.ids[rows].tolist(), self.checksums[rows].tolist(), strict=True))

    def without(self: _P, ids: NDArray[np.int64]) -> _P:
        """Return the part with these items marked as gone."""
        rows = rows_of(self.ids, ids)
        if not len(rows):
            return self
        dead = np.zeros(len(self.ids), np.bool_) if self.dead is None else self.dead.copy()
        dead[rows] = True
        return replace(self, dead=dead, dead_count=int(np.count_nonzero(dead)))


class Segment(Part):
    """An exact index, of float16; its row n is item n of ``ids``."""

    def search(
        self, queries: NDArray[np.float32], k: int, only: NDArray[np.int64] | None
    ) -> Candidates:
        """Find the best rows for (Q, D) queries; with ``only`` (ascending) among those items."""
        faiss = load_faiss()
        allowed: NDArray[np.bool_] | None = None
        if only is not None:
            allowed = np.zeros(len(self.ids), np.bool_)
            allowed[rows_of(self.ids, only)] = True
            if self.dead is not None:
                allowed &= ~self.dead
        elif self.dead_count and self.dead is not None:
            allowed = ~self.dead
        k = min(k, len(self.ids) if allowed is None else int(np.count_nonzero(allowed)))
        if k == 0:
            return nothing(len(queries))
        if len(queries) >= _GEMM_FROM_QUERIES:
            scores, rows = self._search_many(queries, k, allowed)
        else:
            parameters = None
            if allowed is not None:
                bits = np.packbits(allowed, bitorder="little")
                parameters = faiss.SearchParameters(sel=faiss.IDSelectorBitmap(bits))
            scores, rows = self.index.search(queries, k, params=parameters)
        return scores, np.where(rows >= 0, self.ids[rows], -1)

    def _search_many(
        self, queries: NDArray[np.float32], k: int, allowed: NDArray[np.bool_] | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Same for many queries: matrix products of blocks; faiss goes pair by pair."""
        codes = stored_rows(self.index)
        best = np.full((len(queries), k), -np.inf, np.float32)
        rows = np.full((len(queries), k), -1, np.int64)
        for start in range(0, len(self.ids), _GEMM_ROWS):
            part = slice(start, start + _GEMM_ROWS)
            scores = queries @ self.index.sa_decode(codes[part]).T
            if allowed is not None:
                scores[:, ~allowed[part]] = -np.inf
            threshold = best.min(axis=1, keepdims=True)
            better = scores > threshold
            for query in np.flatnonzero(better.any(axis=1)):
                found = np.flatnonzero(better[query])
                merged = np.concatenate([best[query], scores[query, found]])
                names = np.concatenate([rows[query], found + start])
                keep = np.argpartition(merged, len(merged) - k)[len(merged) - k :]
                best[query], rows[query] = merged[keep], names[keep]
        return best, rows


@dataclass(frozen=True)
class Tail:
    """The newest rows, in arrays with room to grow: a later tail appends behind an earlier one."""

    embed_dim: int
    length: int = 0
    ids: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """(capacity,)"""
    vectors: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))
    """(capacity, D)"""
    checksums: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """(capacity,)"""
    dead: NDArray[np.bool_] | None = None
    """(length,)"""
    cameras: NDArray[np.object_] = field(default_factory=lambda: np.empty(0, np.object_))
    """(capacity,) where blocks have them."""
    times: NDArray[np.float64] = field(default_factory=lambda: np.empty(0, np.float64))
    """(capacity,) where blocks have them, NaN for none."""

    @property
    def alive(self) -> int:
        """Rows that count."""
        return self.length - (0 if self.dead is None else int(np.count_nonzero(self.dead)))

    @cached_property
    def total(self) -> int:
        """Sum of the checksums of the rows that count."""
        return total_of(self.checksums[: self.length], self.dead)

    def checksums_of(self, ids: NDArray[np.int64]) -> dict[int, int]:
        """See `Segment.checksums_of`."""
        if not self.length:
            return {}
        found = np.isin(self.ids[: self.length], ids)
        rows = np.flatnonzero(found if self.dead is None else found & ~self.dead)
        return dict(zip(self.ids[rows].tolist(), self.checksums[rows].tolist(), strict=True))

    def without(self, ids: NDArray[np.int64]) -> "Tail":
        """Return the tail with these items marked as gone."""
        gone = np.isin(self.ids[: self.length], ids)
        if not gone.any():
            return self
        return replace(self, dead=gone if self.dead is None else self.dead | gone)

    def plus(self, block: Block) -> "Tail":
        """Return the tail with the items of a block behind it."""
        length = self.length + len(block.ids)
        grown = self._with_room(length)
        part = slice(self.length, length)
        grown.ids[part], grown.vectors[part] = block.ids, block.vectors
        grown.checksums[part] = block.checksums
        if block.cameras is not None:
            grown.cameras[part], grown.times[part] = block.cameras, block.times
        dead = self.dead
        if dead is not None:
            dead = np.concatenate([dead, np.zeros(len(block.ids), np.bool_)])
        return replace(grown, length=length, dead=dead)

    def _with_room(self, length: int) -> "Tail":
        if length <= len(self.ids):
            return self
        capacity, kept = max(1024, 2 * length), slice(0, self.length)
        names = ("ids", "checksums", "cameras", "times")
        grown: dict[str, Any] = {
            name: np.empty(capacity, getattr(self, name).dtype) for name in names
        }
        grown["vectors"] = np.empty((capacity, self.embed_dim), np.float32)
        for name in grown if self.length else ():
            grown[name][kept] = getattr(self, name)[kept]
        return replace(self, **grown)

    @property
    def alive_ids(self) -> NDArray[np.int64]:
        """Items that count, ascending."""
        ids = self.ids[: self.length]
        return np.sort(ids if self.dead is None else ids[~self.dead])

    def kept(self, id_: int, also: NDArray[np.int64]) -> "Tail":
        """Return the tail of items after an id, and of some others."""
        ids = self.ids[: self.length]
        rows = np.flatnonzero((ids > id_) | np.isin(ids, also))
        if not len(rows):
            return Tail(self.embed_dim)
        names = ("ids", "vectors", "checksums", "cameras", "times")
        columns: dict[str, Any] = {name: getattr(self, name)[rows] for name in names}
        dead = None if self.dead is None else self.dead[rows]
        return Tail(self.embed_dim, len(rows), dead=dead, **columns)

    def passing(self, where: Filter) -> NDArray[np.int64]:
        """Return the items that pass camera and time of a filter, ascending."""
        rows = slice(0, self.length)
        passed = np.ones(self.length, np.bool_)
        if where.cameras is not None:
            wanted = {*where.cameras}
            named = (camera in wanted for camera in self.cameras[rows])
            passed &= np.fromiter(named, np.bool_, self.length)
        if where.since is not None:
            passed &= self.times[rows] >= where.since
        if where.until is not None:
            passed &= self.times[rows] < where.until
        if self.dead is not None:
            passed &= ~self.dead
        return np.sort(self.ids[rows][passed])

    def search(
        self, queries: NDArray[np.float32], k: int, only: NDArray[np.int64] | None
    ) -> Candidates:
        """See `Segment.search`."""
        if not self.length:
            return nothing(len(queries))
        ids = self.ids[: self.length]
        scores = queries @ self.vectors[: self.length].T
        bad = self.dead
        if only is not None:
            outside = ~np.isin(ids, only)
            bad = outside if bad is None else bad | outside
        if bad is not None:
            scores[:, bad] = -np.inf
        if k < self.length:
            rows = np.argpartition(scores, self.length - k, axis=1)[:, self.length - k :]
            scores = np.take_along_axis(scores, rows, axis=1)
        else:
            rows = np.broadcast_to(np.arange(self.length), scores.shape)
        return scores, np.where(np.isneginf(scores), -1, ids[rows])

    def sealed(self) -> Segment:
        """Return its rows as a segment."""
        rows = np.arange(self.length) if self.dead is None else np.flatnonzero(~self.dead)
        rows = rows[np.argsort(self.ids[rows])]
        index = flat_index(self.embed_dim, len(rows))
        stored_rows(index)[:] = self.vectors[rows].astype(STORED).view(np.uint8)
        return Segment(ids=self.ids[rows], checksums=self.checksums[rows], index=index)


def total_of(checksums: NDArray[np.int64], dead: NDArray[np.bool_] | None) -> int:
    """Return the sum of (N,) checksums, modulo 2^64, without the rows that are gone."""
    alive = checksums if dead is None else checksums[~dead]
    return int(alive.view(np.uint64).sum(dtype=np.uint64))


def flat_index(embed_dim: int, count: int) -> Any:
    """Return an exact index of float16 with room for ``count`` rows, see `stored_rows`."""
    faiss = load_faiss()
    index = faiss.IndexScalarQuantizer(
        embed_dim, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    )
    index.codes.resize(count * embed_dim * STORED.itemsize)
    index.ntotal = count
    return index


def is_flat(segment: Segment, embed_dim: int) -> bool:
    """Whether a segment that was read fits together, and its index is one of `flat_index`."""
    index, ids, count = segment.index, segment.ids, len(segment.ids)
    return bool(
        type(index).__name__ == "IndexScalarQuantizer"
        and (index.ntotal, index.d) == (count, embed_dim)
        and index.metric_type == load_faiss().METRIC_INNER_PRODUCT
        and index.sq.qtype == load_faiss().ScalarQuantizer.QT_fp16
        and index.sa_code_size() == embed_dim * STORED.itemsize
        and index.codes.size() == count * embed_dim * STORED.itemsize
        and ids.dtype == segment.checksums.dtype == np.int64
        and len(segment.checksums) == count
        and (np.diff(ids) > 0).all()
    )


def stored_rows(index: Any) -> NDArray[np.uint8]:
    """Return the rows of an exact index, to read or to fill: (N, 2 * D) bytes of float16."""
    faiss = load_faiss()
    width = index.d * STORED.itemsize
    if index.ntotal == 0:
        return np.empty((0, width), np.uint8)
    flat: NDArray[np.uint8] = faiss.rev_swig_ptr(index.codes.data(), index.ntotal * width)
    return flat.reshape(index.ntotal, width)


def merge_flat(segments: Sequence[Segment], embed_dim: int) -> Segment:
    """Return exact segments as one, without the rows that are gone."""
    kept = [
        np.arange(len(part.ids)) if part.dead is None else np.flatnonzero(~part.dead)
        for part in segments
    ]
    ids = np.concatenate([part.ids[rows] for part, rows in zip(segments, kept, strict=True)])
    order = np.argsort(ids, kind="stable")
    places = np.empty(len(ids), np.int64)
    places[order] = np.arange(len(ids))
    index = flat_index(embed_dim, len(ids))
    target, done = stored_rows(index), 0
    checksums = np.empty(len(ids), np.int64)
    for part, rows in zip(segments, kept, strict=True):
        places_of_part = places[done : done + len(rows)]
        target[places_of_part] = stored_rows(part.index)[rows]
        checksums[places_of_part] = part.checksums[rows]
        done += len(rows)
    return Segment(ids=ids[order], checksums=checksums, index=index)


def rows_of(ids: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.intp]:
    """Return the rows of those wanted ids that are in ``ids`` (ascending)."""
    if not len(ids):
        return np.empty(0, np.intp)
    if ids[-1] - ids[0] + 1 == len(ids):  # Nothing is missing in between: the usual case.
        near: NDArray[np.intp] = wanted[(wanted >= ids[0]) & (wanted <= ids[-1])] - ids[0]
        return near
    rows: NDArray[np.intp] = np.searchsorted(ids, wanted)
    rows[rows == len(ids)] = 0
    found: NDArray[np.intp] = rows[ids[rows] == wanted]
    return found


def nothing(count: int) -> Candidates:
    """Return no candidates for so many queries."""
    return np.empty((count, 0), np.float32), np.empty((count, 0), np.int64)
