"""Parts of the index of a large gallery: inverted lists of vectors of 2 bits (IVF-RaBitQ).

The 2 bits only choose candidates, which are scored again from the stored float16. Rows are in the
order of camera and time, so that a filter by those is a range of rows for each camera.

Shapes: Q queries, N rows, K candidates, D dimensions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import BackendError
from upperson_rt.gallery.records import Filter
from upperson_rt.gallery.sqlite.index_file import UnusableIndexError, read_file, write_file
from upperson_rt.gallery.sqlite.rows import Block
from upperson_rt.gallery.sqlite.segments import Candidates, Part, load_faiss, nothing

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
        and [start for _, start, _ in part.cameras] == ends[:-1]
        and ends[-1] == count
    )


def without_dead(part: ListPart, path: Path) -> ListPart:
    """Return the part of a file without the items that are gone, of which nothing is left."""
    faiss = load_faiss()
    alive_rows = part.alive_rows
    if alive_rows is None or part.dead is None:
        return part
    index = faiss.read_index(str(path))
    new_rows, lists = np.cumsum(alive_rows) - 1, index.invlists
    for number in range(index.nlist):
        size = lists.list_size(number)
        if not size:
            continue
        rows = faiss.rev_swig_ptr(lists.get_ids(number), size)
        codes = faiss.rev_swig_ptr(lists.get_codes(number), size * index.code_size)
        kept = alive_rows[rows]
        count = int(np.count_nonzero(kept))
        rows[:count] = new_rows[rows[kept]]
        codes = codes.reshape(size, index.code_size)
        codes[:count] = codes[kept]
        lists.resize(number, count)
    index.ntotal = part.alive
    kept_items = ~part.dead
    new_places = np.cumsum(kept_items) - 1
    starts = np.concatenate([[0], np.cumsum(alive_rows)]).tolist()
    return ListPart(
        ids=part.ids[kept_items],
        checksums=part.checksums[kept_items],
        index=index,
        places=new_places[part.places[alive_rows]].astype(np.int32),
        times=part.times[alive_rows],
        cameras=[
            (name, starts[start], starts[stop])
            for name, start, stop in part.cameras
            if starts[start] < starts[stop]
        ],
        recall_at_10=part.recall_at_10,
    )


def make_part(block: Block, check: Callable[[], None] = lambda: None) -> ListPart:
    """Train lists on rows, whose ids ascend and which have columns, and fill them.

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
    count, embed_dim = block.vectors.shape
    names = {name: number for number, name in enumerate(sorted({*block.cameras} - {None}), 1)}
    codes = np.fromiter((names.get(name, 0) for name in block.cameras), np.int64, count)
    places = np.lexsort((block.ids, block.times, codes)).astype(np.int32)
    bounds = np.searchsorted(codes[places], np.arange(len(names) + 2)).tolist()

    lists = max(1, min(count, round(2 * math.sqrt(count))))
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(count, min(count, lists * _ROWS_PER_LIST), replace=False))
    index = faiss.IndexIVFRaBitQ(
        faiss.IndexFlatIP(embed_dim), embed_dim, lists, faiss.METRIC_INNER_PRODUCT, True, _BITS
    )
    index.qb, index.nprobe = _QUERY_BITS, max(1, lists // _LISTS_PROBED)
    index.cp.niter = _ITERATIONS
    index.cp.min_points_per_centroid = 1
    index.train(block.vectors[chosen].astype(np.float32))
    for start in range(0, count, _ADD_ROWS):
        check()
        index.add(block.vectors[places[start : start + _ADD_ROWS]].astype(np.float32))
    part = ListPart(
        ids=block.ids,
        checksums=block.checksums,
        index=index,
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
