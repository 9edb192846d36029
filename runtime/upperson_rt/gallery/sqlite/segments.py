"""Parts of the search index: faiss indexes, exact or approximate, and a growing tail beside them.

Shapes: Q queries, N rows, K candidates, D dimensions.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import BackendError
from upperson_rt.gallery.sqlite.rows import STORED, Block

Candidates: TypeAlias = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Scores and item ids, (Q, K) each, in no order; where there is none the id is -1."""

_GEMM_FROM_QUERIES = 20  # Measured: decoding pays off from about there on.
_GEMM_ROWS = 4096
ALL_LISTS_FROM = 1000
"""Candidates from which on an approximate index looks into all of its lists."""


def load_faiss() -> Any:
    """Import faiss when it is first needed; its type hints are incomplete."""
    try:
        return import_module("faiss")
    except ImportError as error:
        raise BackendError(
            "searching a gallery needs the package 'faiss', which is not installed: run "
            " pip install faiss-cpu"
        ) from error


def candidates_for(k: int) -> int:
    """Return how many rows of the 8-bit lists to look at for the best k."""
    return 4 * k + 32


@dataclass(frozen=True)
class Segment:
    """A faiss index over rows 0 to N - 1, and which items they are."""

    ids: NDArray[np.int64]
    """(N,) ascending."""
    checksums: NDArray[np.int64]
    """(N,) of the rows of the database that they were made from."""
    index: Any
    """IndexScalarQuantizer of float16 (exact), or IndexIVFScalarQuantizer."""
    nprobe: int | None = None
    """Lists to look into; None for an exact index."""
    dead: NDArray[np.bool_] | None = None
    """(N,) rows that are gone or have been replaced."""
    dead_count: int = 0

    @property
    def alive(self) -> int:
        """Rows that count."""
        return len(self.ids) - self.dead_count

    @cached_property
    def total(self) -> int:
        """Sum of the checksums of the rows that count."""
        return total_of(self.checksums, self.dead)

    def checksums_of(self, ids: NDArray[np.int64]) -> dict[int, int]:
        """Return the checksums of those of the items (ascending) that count here, by id."""
        rows = _rows_of(self.ids, ids)
        if self.dead is not None:
            rows = rows[~self.dead[rows]]
        return dict(zip(self.ids[rows].tolist(), self.checksums[rows].tolist(), strict=True))

    def without(self, ids: NDArray[np.int64]) -> "Segment":
        """Return the segment with these items marked as gone."""
        rows = _rows_of(self.ids, ids)
        if not len(rows):
            return self
        dead = np.zeros(len(self.ids), np.bool_) if self.dead is None else self.dead.copy()
        dead[rows] = True
        return replace(self, dead=dead, dead_count=int(np.count_nonzero(dead)))

    def search(
        self, queries: NDArray[np.float32], k: int, only: NDArray[np.int64] | None
    ) -> Candidates:
        """Find the best rows for (Q, D) queries; with ``only`` (ascending) among those items."""
        faiss = load_faiss()
        allowed: NDArray[np.bool_] | None = None
        if only is not None:
            allowed = np.zeros(len(self.ids), np.bool_)
            allowed[_rows_of(self.ids, only)] = True
            if self.dead is not None:
                allowed &= ~self.dead
        elif self.dead_count and self.dead is not None:
            allowed = ~self.dead
        nprobe = self._lists_for(k, only)
        k = min(k, len(self.ids) if allowed is None else int(np.count_nonzero(allowed)))
        if k == 0:
            return _nothing(len(queries))
        if self.nprobe is None and len(queries) >= _GEMM_FROM_QUERIES:
            scores, rows = self._search_many(queries, k, allowed)
        else:
            bits, selector = None, None
            if allowed is not None:
                bits = np.packbits(allowed, bitorder="little")
                selector = faiss.IDSelectorBitmap(bits)
            if nprobe is not None:
                parameters = faiss.SearchParametersIVF(sel=selector, nprobe=nprobe)
            else:
                parameters = None if selector is None else faiss.SearchParameters(sel=selector)
            scores, rows = self.index.search(queries, k, params=parameters)
        return scores, np.where(rows >= 0, self.ids[rows], -1)

    def _lists_for(self, k: int, only: NDArray[np.int64] | None) -> int | None:
        """Return the lists to look into.

        ``nprobe`` finds the ten best. The more rows are wanted, and the fewer may be found, the
        more lists the best of them are spread over, and the less there is to look at in each.
        """
        if self.nprobe is None:
            return None
        every = int(self.index.nlist)
        if k >= ALL_LISTS_FROM or (only is not None and 10 * len(only) <= len(self.ids)):
            return every
        wider = max(1, k // candidates_for(10)) if only is None else 16
        return min(self.nprobe * wider, every)

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
        ids, vectors, checksums = block
        length = self.length + len(ids)
        grown = self._with_room(length)
        part = slice(self.length, length)
        grown.ids[part], grown.vectors[part], grown.checksums[part] = ids, vectors, checksums
        dead = self.dead
        if dead is not None:
            dead = np.concatenate([dead, np.zeros(len(ids), np.bool_)])
        return replace(grown, length=length, dead=dead)

    def _with_room(self, length: int) -> "Tail":
        if length <= len(self.ids):
            return self
        capacity, kept = max(1024, 2 * length), slice(0, self.length)
        ids, checksums = np.empty(capacity, np.int64), np.empty(capacity, np.int64)
        vectors = np.empty((capacity, self.embed_dim), np.float32)
        ids[kept], checksums[kept] = self.ids[kept], self.checksums[kept]
        if self.length:
            vectors[kept] = self.vectors[kept]
        return replace(self, ids=ids, vectors=vectors, checksums=checksums)

    def search(
        self, queries: NDArray[np.float32], k: int, only: NDArray[np.int64] | None
    ) -> Candidates:
        """See `Segment.search`."""
        if not self.length:
            return _nothing(len(queries))
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


def _rows_of(ids: NDArray[np.int64], wanted: NDArray[np.int64]) -> NDArray[np.intp]:
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


def _nothing(count: int) -> Candidates:
    return np.empty((count, 0), np.float32), np.empty((count, 0), np.int64)


# --- The approximate index of large galleries: inverted lists of 8-bit vectors (IVF-SQ8)
#
# Its candidates are scored again from the stored float16, so 8 bits only decide what is a
# candidate.

_ROWS_PER_LIST = 50
_NPROBES = (8, 16, 32, 64, 128, 256)
_RECALL = 0.985
_RECALL_AT = 10
_QUERIES = 200
_QUERY_COSINE = 0.54  # Of a sentence and the best picture, typically.


@dataclass(frozen=True)
class TrainedLists:
    """An index, and what was found out about it."""

    index: Any
    ids: NDArray[np.int64]
    """(N,) the item of each row."""
    nlist: int
    nprobe: int
    recall_at_10: float


def train_lists(
    count: int,
    embed_dim: int,
    sample: Callable[[int], NDArray[np.float32]],
    blocks: Callable[[], Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]]],
) -> TrainedLists:
    """Make an index of about ``count`` rows and measure it.

    nprobe is the smallest that finds 98.5 % of the ten best pictures of 200 queries which are as
    far from the pictures as sentences are: stored vectors turned away to a cosine of 0.54. The
    lists were not trained on those: theirs are found too easily.

    Args:
        count: Rows, about.
        embed_dim: D.
        sample: Gives up to that many random (N, D) rows.
        blocks: Goes through all rows in ascending order of ids: (N,) ids and (N, D) vectors.
    """
    faiss = load_faiss()
    nlist = max(1, round(2 * math.sqrt(count)))
    queries, rows = _held_out(sample(nlist * _ROWS_PER_LIST + _QUERIES))
    nlist = min(nlist, len(rows))
    quantizer = faiss.IndexFlatIP(embed_dim)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer,
        embed_dim,
        nlist,
        faiss.ScalarQuantizer.QT_8bit,
        faiss.METRIC_INNER_PRODUCT,
        False,  # Residuals would need another table for every list.
    )
    index.cp.niter = 10
    index.cp.min_points_per_centroid = 1
    index.train(rows)
    del rows

    ids: list[NDArray[np.int64]] = []
    best = np.full((len(queries), _RECALL_AT), -np.inf, np.float32)
    found = np.full((len(queries), _RECALL_AT), -1, np.int64)
    done = 0
    for block_ids, vectors in blocks():
        index.add(vectors)
        scores = np.concatenate([best, queries @ vectors.T], axis=1)
        rows_here = np.arange(done, done + len(vectors))
        names = np.hstack([found, np.broadcast_to(rows_here, (len(queries), len(vectors)))])
        keep = np.argpartition(scores, scores.shape[1] - _RECALL_AT, axis=1)[:, -_RECALL_AT:]
        best = np.take_along_axis(scores, keep, axis=1)
        found = np.take_along_axis(names, keep, axis=1)
        ids.append(block_ids)
        done += len(vectors)

    nprobe, recall = nlist, 1.0
    for nprobe in sorted({min(value, nlist) for value in _NPROBES}):
        recall = _recall(index, queries, found, nprobe)
        if recall >= _RECALL:
            break
    return TrainedLists(
        index=index,
        ids=np.concatenate(ids) if ids else np.empty(0, np.int64),
        nlist=nlist,
        nprobe=nprobe,
        recall_at_10=recall,
    )


def _held_out(rows: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return far queries made of some (N, D) rows, a tenth at most, and the other rows."""
    rng = np.random.default_rng(0)
    held = rng.choice(len(rows), min(_QUERIES, -(-len(rows) // 10)), replace=False)
    away = rng.standard_normal((len(held), rows.shape[1]), np.float32)
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    queries = rows[held] + math.sqrt(1 / _QUERY_COSINE**2 - 1) * away
    turned: NDArray[np.float32] = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    return turned, np.delete(rows, held, axis=0)


def _recall(
    index: Any, queries: NDArray[np.float32], expected: NDArray[np.int64], nprobe: int
) -> float:
    faiss = load_faiss()
    _, rows = index.search(
        queries, candidates_for(_RECALL_AT), params=faiss.SearchParametersIVF(nprobe=nprobe)
    )
    hits = sum(
        len(np.intersect1d(found, best[best >= 0]))
        for found, best in zip(rows, expected, strict=True)
    )
    return hits / max(1, int(np.count_nonzero(expected >= 0)))
