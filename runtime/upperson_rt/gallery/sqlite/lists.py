"""Parts of the index of a large gallery: inverted lists of vectors of 2 bits (IVF-RaBitQ).

The 2 bits only choose candidates, which are scored again from the stored float16. Rows are in the
order of camera and time, so that a filter by those is a range of rows for each camera.

Shapes: Q queries, N rows, K candidates, D dimensions.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import BackendError
from upperson_rt.gallery.records import Filter
from upperson_rt.gallery.sqlite.index_file import UnusableIndexError, read_file, write_file
from upperson_rt.gallery.sqlite.rows import Block
from upperson_rt.gallery.sqlite.segments import (
    Candidates,
    Part,
    load_faiss,
    nothing,
    rows_of,
)

KIND = "ivf-rabitq"
_BITS = 2
_QUERY_BITS = 4
_ROWS_PER_LIST = 50  # That are trained with.
_ITERATIONS = 10
_ADD_ROWS = 8192
_LISTS_PROBED = 32
"""One list in so many is searched, or more: see `_measured`."""
_RECALL = 0.99
_RECALL_AT = 10
_QUERIES = 100
_SPREAD = 0.75
"""More lists than without a filter, of the root of the inverse share that passes."""
_QUERY_COSINE = 0.54  # Of a sentence and the best picture, typically.
_ROUNDING = 1e-6
"""Of centroids: one item more of a thousand moves their numbers by far more."""
ReadVectors: TypeAlias = Callable[[NDArray[np.int64]], Iterable[Block]]
"""Reads the vectors of items (ascending), as far as they are stored."""
Ranges: TypeAlias = list[tuple[int, int]]
"""First row, and the row after the last, ascending."""


def candidates_for(k: int) -> int:
    """Return how many candidates to score at most for the best k: 2 bits place them roughly."""
    return 300 * k + 1000


@dataclass(frozen=True)
class ListPart(Part):
    """A faiss index over rows 0 to N - 1."""

    places: NDArray[np.int32]
    """(N,) where the item of each row is in ``ids``."""
    times: NDArray[np.float64]
    """(N,) of each row, ascending for each camera, NaN last."""
    cameras: list[tuple[str | None, int, int]]
    """Names, first row, and the row after the last, in order."""
    recall_at_10: float
    """Measured, with candidates scored again."""

    @cached_property
    def alive_rows(self) -> NDArray[np.bool_] | None:
        """(N,) rows whose items count; None if all do."""
        return None if self.dead is None else ~self.dead[self.places]

    def ranges(self, where: Filter) -> Ranges:
        """Return the rows that pass camera and time of a filter."""
        wanted = None if where.cameras is None else {*where.cameras}
        found: Ranges = []
        for camera, start, stop in self.cameras:
            if wanted is not None and camera not in wanted:
                continue
            if where.since is not None or where.until is not None:
                times = self.times[start:stop]
                known = int(np.searchsorted(times, np.nan))
                until = known
                if where.until is not None:
                    until = int(np.searchsorted(times[:known], where.until))
                since = 0
                if where.since is not None:
                    since = int(np.searchsorted(times[:known], where.since))
                start, stop = start + since, start + until
            if found and found[-1][1] == start:
                found[-1] = (found[-1][0], stop)
            elif start < stop:
                found.append((start, stop))
        return found

    def items_in(self, ranges: Ranges) -> NDArray[np.int64]:
        """Return the items of rows that count, in no order."""
        rows = np.concatenate([np.arange(*ends) for ends in ranges])
        if self.alive_rows is not None:
            rows = rows[self.alive_rows[rows]]
        found: NDArray[np.int64] = self.ids[self.places[rows]]
        return found

    def search(
        self, queries: NDArray[np.float32], k: int, ranges: Ranges, wider: float = 1.0
    ) -> Candidates:
        """Find about the best k rows for (Q, D) queries among ranges of rows.

        ``wider`` is how many times as many lists are searched as for the ten best of all.
        """
        faiss = load_faiss()
        passing = sum(stop - start for start, stop in ranges)
        if not passing:
            return nothing(len(queries))
        parameters = faiss.IVFRaBitQSearchParameters()
        parameters.qb = int(self.index.qb)
        # Filtered, the best are spread over more lists, and there is less to look at in each.
        if passing < len(self.ids):
            wider *= max(1.0, _SPREAD * math.sqrt(len(self.ids) / passing))
        parameters.nprobe = min(int(self.index.nlist), math.ceil(self.index.nprobe * wider))
        alive = self.alive_rows
        if alive is None and len(ranges) == 1 and passing < len(self.ids):
            parameters.sel = faiss.IDSelectorRange(*ranges[0], True)
        elif alive is not None or passing < len(self.ids):
            allowed = np.zeros(len(self.ids), np.bool_)
            for start, stop in ranges:
                allowed[start:stop] = True if alive is None else alive[start:stop]
            bits = np.packbits(allowed, bitorder="little")
            parameters.sel = faiss.IDSelectorBitmap(bits)
        scores, rows = self.index.search(queries, min(k, passing), params=parameters)
        return scores, np.where(rows >= 0, self.ids[self.places[rows]], -1)


def write_part(path: Path, part: ListPart, identity: str) -> None:
    """Write a part of a gallery completely or not at all."""
    arrays = {name: getattr(part, name) for name in ("ids", "checksums", "places", "times")}
    facts = {name: getattr(part, name) for name in ("cameras", "recall_at_10")}
    write_file(path, part.index, arrays, {"identity": identity, **facts})


def read_part(path: Path, identity: str, embed_dim: int) -> ListPart:
    """Read the part of a file, where its rows stay; UnusableIndexError if that cannot be right."""
    index, arrays, facts = read_file(path)
    try:
        if facts["identity"] != identity:
            raise UnusableIndexError("it belongs to another gallery")
        cameras = [(name, start, stop) for name, start, stop in facts["cameras"]]
        part = ListPart(
            ids=arrays["ids"],
            checksums=arrays["checksums"],
            index=index,
            places=arrays["places"],
            times=arrays["times"],
            cameras=cameras,
            recall_at_10=float(facts["recall_at_10"]),
        )
        if not _is_sound(part, embed_dim):
            raise UnusableIndexError("its rows are not what its stamp says")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UnusableIndexError(f"it is no part of an index: {error}") from error
    return part


def _is_sound(part: ListPart, embed_dim: int) -> bool:
    """Whether index and arrays of a file fit one another."""
    index, count = part.index, len(part.ids)
    ends = [0, *(stop for _, _, stop in part.cameras)]
    kinds = (np.dtype("<i8"), np.dtype("<i8"), np.dtype("<i4"), np.dtype("<f8"))
    columns: tuple[NDArray[np.generic], ...] = (part.ids, part.checksums, part.places, part.times)
    return bool(
        type(index).__name__ == "IndexIVFRaBitQ"
        and index.ntotal == count > 0
        and index.d == index.quantizer.d == embed_dim
        and index.nlist == index.quantizer.ntotal == index.invlists.nlist
        and index.rabitq.nb_bits == _BITS
        and 1 <= index.qb <= 8
        and index.nprobe >= 1
        and all(one.dtype == kind for one, kind in zip(columns, kinds, strict=True))
        and all(len(one) == count for one in columns)
        and (np.diff(part.ids) > 0).all()
        and part.places.min() >= 0
        and (np.bincount(part.places, minlength=count) == 1).all()
        and all(name is None or isinstance(name, str) for name, _, _ in part.cameras)
        and [start for _, start, _ in part.cameras] == ends[:-1]
        and ends[-1] == count
        and set(_descents(part.times).tolist()) <= set(ends)
        and len(_lists_of_rows(index)) == count
    )


def _descents(times_N: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return the rows that are earlier than the one before; NaN is last."""
    later = (times_N[1:] >= times_N[:-1]) | np.isnan(times_N[1:])
    return np.flatnonzero(~later) + 1


def _lists_of_rows(index: Any) -> NDArray[np.int64]:
    """Return the list of each row, (N,); UnusableIndexError unless each row is in one list."""
    lists, rows_in_lists = np.full(index.ntotal, -1), 0
    for number in range(index.nlist):
        if not (size := index.invlists.list_size(number)):
            continue
        rows = load_faiss().rev_swig_ptr(index.invlists.get_ids(number), size)
        if rows[0] < 0 or rows[-1] >= len(lists) or (np.diff(rows) <= 0).any():
            raise UnusableIndexError("a list has rows that are not there")
        lists[rows] = number
        rows_in_lists += size
    if rows_in_lists != len(lists) or (lists < 0).any():
        raise UnusableIndexError("its lists do not have each row once")
    return lists


def _centroids_of(index: Any) -> NDArray[np.float32]:
    """Return the (L, D) centroids."""
    found: NDArray[np.float32] = index.quantizer.reconstruct_n(0, index.nlist)
    return found


def _means_of(
    blocks: Iterable[tuple[NDArray[np.int64], NDArray[np.float16]]], count: int, embed_dim: int
) -> NDArray[np.float32]:
    """Return the means of lists, (L, D) of unit length, from blocks: the lists of rows, and these.

    Sums of float16 are exact in float64, so that the order of rows makes no difference.
    """
    sums = np.zeros((count, embed_dim))
    for lists_N, vectors_ND in blocks:
        order = np.argsort(lists_N, kind="stable")
        there, starts = np.unique(lists_N[order], return_index=True)
        if len(there):
            sums[there] += np.add.reduceat(vectors_ND[order].astype(np.float64), starts, axis=0)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    means: NDArray[np.float32] = (sums / np.where(lengths, lengths, 1)).astype(np.float32)
    return means


def foreign_centroids(part: ListPart, read: ReadVectors) -> int:
    """Count the lists whose centroid is not the mean of the stored items that are in them.

    Such a centroid may be made of items that are gone.
    """
    lists = np.empty(len(part.ids), np.int64)
    lists[part.places] = _lists_of_rows(part.index)
    blocks = ((lists[rows_of(part.ids, block.ids)], block.vectors) for block in read(part.ids))
    means = _means_of(blocks, part.index.nlist, part.index.d)
    same = np.isclose(_centroids_of(part.index), means, rtol=_ROUNDING, atol=_ROUNDING**2)
    return int(np.count_nonzero(~same.all(axis=1)))


def without_dead(part: ListPart, read: ReadVectors) -> ListPart:
    """Return the part without the items that are gone, of which no number is left.

    A list that lost items gets a centroid of those that stay, which are encoded again: what is
    encoded is the difference. A list that lost them all goes.

    Raises:
        UnusableIndexError: The database has other items than the part.
    """
    alive_rows = part.alive_rows
    if alive_rows is None or part.dead is None:
        return part
    old_lists, new_rows = _lists_of_rows(part.index), np.cumsum(alive_rows) - 1
    stay, lists = np.unique(old_lists[alive_rows], return_inverse=True)
    kept_items = ~part.dead
    new_places = np.cumsum(kept_items) - 1
    starts = np.concatenate([[0], np.cumsum(alive_rows)]).tolist()
    kept = ListPart(
        ids=part.ids[kept_items],
        checksums=part.checksums[kept_items],
        index=None,
        places=new_places[part.places[alive_rows]].astype(np.int32),
        times=part.times[alive_rows],
        cameras=[
            (name, starts[start], starts[stop])
            for name, start, stop in part.cameras
            if starts[start] < starts[stop]
        ],
        recall_at_10=part.recall_at_10,
    )
    is_changed = np.isin(stay, old_lists[~alive_rows])
    rows = np.flatnonzero(is_changed[lists])
    vectors_ND = _stored(kept, rows, read)
    centroids_LD = _centroids_of(part.index)[stay]
    means_LD = _means_of([(lists[rows], vectors_ND)], len(stay), part.index.d)
    centroids_LD[is_changed] = means_LD[is_changed]
    index = _empty_index(centroids_LD, part.index.nprobe)
    for number in np.flatnonzero(~is_changed).tolist():
        _copy_list(part.index, int(stay[number]), index, number, new_rows)
    _encode(index, rows, lists[rows], vectors_ND)
    index.ntotal = len(kept.ids)
    return replace(kept, index=index)


def _stored(part: ListPart, rows: NDArray[np.int64], read: ReadVectors) -> NDArray[np.float16]:
    """Read the vectors of some rows."""
    places = np.sort(part.places[rows])
    block = Block.joined([*read(part.ids[places])], 0)
    if not (
        np.array_equal(block.ids, part.ids[places])
        and np.array_equal(block.checksums, part.checksums[places])
    ):
        raise UnusableIndexError("the database has other rows than it was made from")
    return block.vectors[np.searchsorted(places, part.places[rows])]


def _empty_index(centroids_LD: NDArray[np.float32], probed: int) -> Any:
    faiss = load_faiss()
    count, embed_dim = centroids_LD.shape
    index = faiss.IndexIVFRaBitQ(
        faiss.IndexFlatIP(embed_dim), embed_dim, count, faiss.METRIC_INNER_PRODUCT, True, _BITS
    )
    index.quantizer.add(centroids_LD)
    index.qb, index.nprobe, index.is_trained = _QUERY_BITS, min(probed, count), True
    return index


def _encode(
    index: Any,
    rows_N: NDArray[np.int64],
    lists_N: NDArray[np.int64],
    vectors_ND: NDArray[np.float16],
    check: Callable[[], None] = lambda: None,
) -> None:
    """Add rows (ascending) to their lists."""
    pointer = load_faiss().swig_ptr
    for start in range(0, len(rows_N), _ADD_ROWS):
        check()
        part = slice(start, start + _ADD_ROWS)
        rows, lists = (np.ascontiguousarray(one[part], np.int64) for one in (rows_N, lists_N))
        vectors = np.ascontiguousarray(vectors_ND[part], np.float32)
        index.add_core(len(rows), pointer(vectors), pointer(rows), pointer(lists))


def _copy_list(
    source: Any, number: int, target: Any, new_number: int, new_rows: NDArray[np.int64]
) -> None:
    """Copy a list with its codes; its rows have new numbers."""
    faiss = load_faiss()
    size = source.invlists.list_size(number)
    rows = new_rows[faiss.rev_swig_ptr(source.invlists.get_ids(number), size)]
    codes = source.invlists.get_codes(number)
    target.invlists.add_entries(new_number, size, faiss.swig_ptr(rows), codes)


def make_part(block: Block, check: Callable[[], None] = lambda: None) -> ListPart:
    """Train lists on rows, whose ids ascend and which have columns, and fill them.

    The centroid of a list is the mean of the rows in it, see `foreign_centroids`.

    The share of lists that is searched starts at a 32nd, and is doubled until it finds 99 % of the
    ten best pictures of 100 queries as far from the pictures as sentences are: stored vectors
    turned away to a cosine of 0.54. ``check`` is called now and then, to end it with an error.
    """
    faiss = load_faiss()
    if not hasattr(faiss, "IVFRaBitQSearchParameters"):
        raise BackendError(
            f"a gallery of this size needs faiss 1.13 or later, found {faiss.__version__}: run "
            " pip install -U faiss-cpu"
        )
    assert block.cameras is not None
    assert block.times is not None
    count = len(block.ids)
    names = {name: number for number, name in enumerate(sorted({*block.cameras} - {None}), 1)}
    codes = np.fromiter((names.get(name, 0) for name in block.cameras), np.int64, count)
    places = np.lexsort((block.ids, block.times, codes)).astype(np.int32)
    bounds = np.searchsorted(codes[places], np.arange(len(names) + 2)).tolist()
    rng = np.random.default_rng(0)
    part = ListPart(
        ids=block.ids,
        checksums=block.checksums,
        index=_trained(block.vectors, places, rng, check),
        places=places,
        times=block.times[places],
        cameras=[
            (name, *bounds[number : number + 2])
            for number, name in enumerate([None, *names])
            if bounds[number] < bounds[number + 1]
        ],
        recall_at_10=0.0,
    )
    return _measured(part, block.vectors, rng)


def _trained(
    vectors_ND: NDArray[np.float16],
    places_N: NDArray[np.int32],
    rng: np.random.Generator,
    check: Callable[[], None],
) -> Any:
    """Return an index of vectors in the order of their places, see `make_part`."""
    faiss = load_faiss()
    count, embed_dim = vectors_ND.shape
    wanted = max(1, min(count, round(2 * math.sqrt(count))))
    chosen = np.sort(rng.choice(count, min(count, wanted * _ROWS_PER_LIST), replace=False))
    trained = faiss.IndexIVFFlat(
        faiss.IndexFlatIP(embed_dim), embed_dim, wanted, faiss.METRIC_INNER_PRODUCT
    )
    trained.cp.niter = _ITERATIONS
    trained.cp.min_points_per_centroid = 1
    trained.train(vectors_ND[chosen].astype(np.float32))
    slices = [slice(start, start + _ADD_ROWS) for start in range(0, count, _ADD_ROWS)]
    lists_N = np.empty(count, np.int64)
    for part in slices:
        check()
        vectors = vectors_ND[places_N[part]].astype(np.float32)
        lists_N[part] = trained.quantizer.assign(vectors, 1)[:, 0]
    there, lists_N = np.unique(lists_N, return_inverse=True)  # Lists that are empty go.
    blocks = ((lists_N[part], vectors_ND[places_N[part]]) for part in slices)
    index = _empty_index(_means_of(blocks, len(there), embed_dim), max(1, wanted // _LISTS_PROBED))
    _encode(index, np.arange(count), lists_N, vectors_ND[places_N], check)
    return index


def _measured(
    part: ListPart, vectors_ND: NDArray[np.float16], rng: np.random.Generator
) -> ListPart:
    """Set how many lists are searched; return the part with what these find."""
    count = len(vectors_ND)
    near = vectors_ND[rng.choice(count, min(_QUERIES, count), replace=False)].astype(np.float32)
    away = rng.standard_normal(near.shape, np.float32)
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    queries = near + math.sqrt(1 / _QUERY_COSINE**2 - 1) * away
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    scores = np.empty((len(queries), count), np.float32)
    for start in range(0, count, _ADD_ROWS):
        rows = slice(start, start + _ADD_ROWS)
        scores[:, rows] = queries @ vectors_ND[rows].astype(np.float32).T
    best = np.argpartition(scores, max(0, count - _RECALL_AT), axis=1)[:, -_RECALL_AT:]
    del scores
    while True:
        _, found = part.search(queries, candidates_for(_RECALL_AT), [(0, count)])
        pairs = zip(found, part.ids[best], strict=True)
        recall = sum(len(np.intersect1d(ids, right)) for ids, right in pairs) / best.size
        part = replace(part, recall_at_10=recall)
        if recall >= _RECALL or part.index.nprobe >= part.index.nlist:
            return part
        part.index.nprobe = min(2 * part.index.nprobe, part.index.nlist)
