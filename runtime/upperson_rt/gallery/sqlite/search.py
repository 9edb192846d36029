"""A search in a SQLite gallery: candidates from the index or from SQL, scored from the database.

Every score is computed from the stored vector, in float64 and then rounded, so that it does not
depend on which index, filter or batch found the picture.

Shapes: Q queries, K candidates, D dimensions.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.gallery.records import (
    Filter,
    Hit,
    Item,
    Track,
    TrackSpan,
    iter_first_of_tracks,
    with_spans,
)
from upperson_rt.gallery.sqlite.database import Database, Transaction
from upperson_rt.gallery.sqlite.index import SearchIndex, Snapshot
from upperson_rt.gallery.sqlite.lists import candidates_for
from upperson_rt.gallery.sqlite.rows import (
    Block,
    block_of,
    condition_of,
    ids_where,
    rows_with_ids,
    vectors_with_ids,
)
from upperson_rt.gallery.sqlite.schema import COLUMNS, DamageError
from upperson_rt.gallery.sqlite.segments import Candidates
from upperson_rt.towers import batch_slices

_FROM_SQL = 10_000
"""Items that pass a filter up to which their vectors are read instead of the index."""
_WIDER = 8
_EXTRA = 2
_ROUNDING = 1e-5  # Far above that of 512 products in float32.
_MOST_TIES = 4096
_QUERIES_AT_A_TIME = 256
_READ = 256
"""Candidates with rough scores that are read at first, then twice as many each time."""
_DEVIATIONS = 3.25
"""At ten million pictures a sentence misses 0.9 % of its ten best with 3, 0.5 % with 3.5, which
reads half as many rows more."""
_FEWEST_ERRORS = 32
"""Of which a deviation is taken."""
_AT_ONCE = 65_536
_FETCHED = 64
_MOST_ASKED = 10_000
"""Candidates from which on all items that pass a filter by attributes are listed instead."""
_Row: TypeAlias = tuple[Any, ...]
"""The values of `ROW`, the vector, the checksum."""
_CAMERA, _TRACK, _VECTOR = 3, 5, -2
_COLUMNS = slice(1, 1 + len(COLUMNS.split()))


_Find: TypeAlias = Callable[[NDArray[np.float32], int], tuple[Candidates, bool]]
"""From (Q, D) queries and a number: candidates, and whether these are all that pass."""


@dataclass(frozen=True)
class _Source:
    """Where the candidates of a search come from."""

    transaction: Transaction
    find: _Find
    is_exact: bool
    snapshot: Snapshot | None = None
    """What the candidates come from; None where they were read from the database."""


def search_items(
    database: Database,
    index: SearchIndex,
    queries_QD: NDArray[np.float32],
    k: int,
    where: Filter,
    by_track: bool,
    certain: int,
    make_item: Callable[[Sequence[Any]], Item],
) -> list[tuple[list[Hit], list[bytes]]]:
    """Find the best items for each query, see `Gallery.search`, with their vectors as stored.

    For ``certain`` see `Gallery.search_with_vectors`. ``make_item`` reads the values of `COLUMNS`.
    """
    found, stored = list[list[Hit]](), list[list[bytes]]()
    # More than the ten best are spread over more lists.
    wider = min(4.0, max(1.0, (certain / 10) ** 0.5))
    with _source(database, index, where, wider) as source:
        for start in range(0, len(queries_QD), _QUERIES_AT_A_TIME):
            part = queries_QD[start : start + _QUERIES_AT_A_TIME]
            for ranked in _rank(source, part, k, by_track, certain):
                found.append(
                    [
                        Hit(id=row[0], score=score, item=make_item(row[_COLUMNS]))
                        for score, row in ranked
                    ]
                )
                stored.append([row[_VECTOR] for _, row in ranked])
        if by_track:
            found = with_spans(found, lambda tracks: _spans(source.transaction, tracks, where))
    return list(zip(found, stored, strict=True))


@contextmanager
def _source(
    database: Database, index: SearchIndex, where: Filter, wider: float
) -> Iterator[_Source]:
    """Give the source of one search; it sees one state of the database to the end."""
    load, source = where.is_empty, None
    with ExitStack() as stack:
        while source is None:
            stack.close()
            # Within the lock no other thread can bring the index beyond what this one sees.
            with index.lock:
                transaction = stack.enter_context(database.reading())
                # The index is not worth loading if the filter leaves few items.
                load = load or index.snapshot is not None
                snapshot = index.refresh(transaction) if load else None
            source = _choose(transaction, index.embed_dim, snapshot, where, wider)
            load = True
        yield source


def _choose(
    transaction: Transaction,
    embed_dim: int,
    snapshot: Snapshot | None,
    where: Filter,
    wider: float,
) -> _Source | None:
    """Return the best source, or None if the index has to be loaded first."""
    if snapshot is not None and snapshot.is_exact:
        ids = None if where.is_empty else ids_where(transaction, where)
        return _Source(transaction, _all_of(snapshot, ids), True, snapshot)
    if snapshot is not None and where.track is None and not where.attributes:
        return _Source(
            transaction,
            lambda queries, k: snapshot.search_lists(queries, k, where, wider),
            False,
            snapshot,
        )
    ids = ids_where(transaction, where, most=_FROM_SQL + 1)
    if len(ids) <= _FROM_SQL:
        return _Source(transaction, _few(transaction, embed_dim, ids), True)
    if snapshot is None:
        return None
    return _Source(transaction, _many(transaction, snapshot, where, wider), False, snapshot)


def _all_of(snapshot: Snapshot, only: NDArray[np.int64] | None) -> _Find:
    """Return a search in an exact index."""

    def find(queries_QD: NDArray[np.float32], k: int) -> tuple[Candidates, bool]:
        scores, ids = snapshot.search(queries_QD, k, only)
        return (scores, ids), ids.shape[1] < k or bool((ids < 0).any())

    return find


def _few(transaction: Transaction, embed_dim: int, ids: NDArray[np.int64]) -> _Find:
    """Return a search among few items, whose vectors are read now."""
    transaction.check_table()
    block = vectors_with_ids(transaction, ids, embed_dim)
    vectors_ND = block.vectors.astype(np.float32)
    if len(vectors_ND) != len(ids):
        raise DamageError(f"{len(ids)} pictures pass the filter, {len(vectors_ND)} are found")

    def find(queries_QD: NDArray[np.float32], k: int) -> tuple[Candidates, bool]:
        scores = queries_QD @ vectors_ND.T
        count = min(k, len(ids))
        best = np.argpartition(scores, len(ids) - count, axis=1)[:, len(ids) - count :]
        return (np.take_along_axis(scores, best, axis=1), ids[best]), count < k

    return find


def _many(transaction: Transaction, snapshot: Snapshot, where: Filter, wider: float) -> _Find:
    """Return a search in lists for a filter by track or attributes that many items pass.

    Candidates pass camera and time; which of them pass the rest is asked of the database. If few
    do, all items that pass are listed.
    """
    condition, values = condition_of(where)
    among = f"items NOT INDEXED WHERE id IN (SELECT value FROM json_each(?)) AND {condition}"

    def find(queries_QD: NDArray[np.float32], k: int) -> tuple[Candidates, bool]:
        if k > _MOST_ASKED:
            ids = np.broadcast_to(
                every := ids_where(transaction, where), (len(queries_QD), len(every))
            )
            return (np.zeros(ids.shape, np.float32), ids), True
        (scores, ids), is_all = snapshot.search_lists(queries_QD, _WIDER * k, where, wider)
        some = np.unique(ids[ids >= 0])
        # Checks what the condition looks at.
        _fetch(transaction, some, queries_QD.shape[1])
        rows = transaction.execute(f"SELECT id FROM {among}", (json.dumps(some.tolist()), *values))
        passed = np.isin(ids, np.fromiter((id_ for (id_,) in rows), np.int64))
        return (scores, np.where(passed, ids, -1)), is_all

    return find


def _rank(
    source: _Source, queries_QD: NDArray[np.float32], k: int, by_track: bool, certain: int
) -> list[list[tuple[float, _Row]]]:
    """Return scores and rows of the best k for each query, best first, ties by id."""
    found: dict[int, list[tuple[float, _Row]]] = {}
    pending = np.arange(len(queries_QD))
    count = k + _EXTRA if source.is_exact else max(k, candidates_for(certain))
    if by_track and source.is_exact:
        count *= 4
    while len(pending):
        (scores_QK, ids_QK), is_all = source.find(queries_QD[pending], count)
        rows = _Rows(source, queries_QD.shape[1], by_track, rough=not (source.is_exact or is_all))
        rows.read_first(scores_QK, ids_QK)
        for query, scores, ids in zip(pending.tolist(), scores_QK, ids_QK, strict=True):
            there = ids >= 0
            ranked = rows.best(queries_QD[query], scores[there], ids[there], k, certain)
            found[query] = ranked
            lowest = float(scores[there].min(initial=np.inf))
            # What was not looked at may equal the last one that is returned, and have a lower id.
            ties = source.is_exact and len(ranked) >= k and lowest > ranked[k - 1][0] - _ROUNDING
            if is_all or (len(ranked) >= k and (not ties or count > k + _MOST_TIES)):
                pending = pending[pending != query]
        count *= 4
    return [found[query] for query in range(len(queries_QD))]


class _Rows:
    """Candidates: their vectors are read first, the rest of a row where it is returned.

    Candidates with rough scores are read in their order, until the rest cannot be among the best:
    by `_DEVIATIONS` standard deviations of the difference between rough and exact scores.
    """

    def __init__(self, source: _Source, embed_dim: int, by_track: bool, rough: bool) -> None:
        self._source = source
        self._by_track = by_track
        self._rough = rough
        self._first = Block.joined([], embed_dim)
        self._rows: dict[int, _Row] = {}

    def read_first(self, scores_QK: NDArray[np.float32], ids_QK: NDArray[np.int64]) -> None:
        """Read what all queries begin with, together."""
        if self._rough and ids_QK.shape[1] > _READ:
            best = np.argpartition(-scores_QK, _READ, axis=1)[:, :_READ]
            ids_QK = np.take_along_axis(ids_QK, best, axis=1)
        if ids_QK.size > _AT_ONCE:
            return
        ids = np.unique(ids_QK[ids_QK >= 0])
        if self._rough or not 0 < len(ids) <= _FETCHED:
            self._first = self._vectors(ids)
            return
        # Most of these few are returned: they are read once, as a whole.
        dim = self._first.vectors.shape[1]
        rows = rows_with_ids(self._source.transaction, ids.tolist(), dim)
        self._first = self._current(block_of(rows, dim), ids)
        self._rows = {row[0]: row for row in rows}

    def best(
        self,
        query_D: NDArray[np.float32],
        rough: NDArray[np.float32],
        ids: NDArray[np.int64],
        k: int,
        certain: int,
    ) -> list[tuple[float, _Row]]:
        """Return scores and rows of the best k of some items, best first, ties by id."""
        order = np.argsort(-rough, kind="stable")
        rough, ids = rough[order], ids[order]
        scores = np.empty(len(ids), np.float32)
        done, size = 0, _READ if self._rough else _AT_ONCE
        while done < len(ids):
            part = slice(done, min(done + size, len(ids)))
            scores[part] = self._exact(query_D, ids[part])
            done, size = part.stop, 2 * size if self._rough else size
            if self._rough and k <= done < len(ids):
                errors = scores[:done] - rough[:done]
                errors = errors[np.abs(errors) > _ROUNDING]  # What is in no part has none.
                if len(errors) < _FEWEST_ERRORS:
                    continue
                lowest = self._certain_score(ids[:done], scores[:done], certain)
                lowest -= _DEVIATIONS * float(np.std(errors))
                needed = int(np.count_nonzero(rough >= lowest))
                if needed > done:
                    size = min(size, max(needed - done, _FETCHED))
                elif len(ranked := self._ranked(ids[:done], scores[:done], k)) == k:
                    return ranked  # Else their tracks are too few.
        return self._ranked(ids, scores, k)

    def _ranked(
        self, ids: NDArray[np.int64], scores: NDArray[np.float32], k: int
    ) -> list[tuple[float, _Row]]:
        order = np.lexsort((ids, -scores))
        if not self._by_track:
            return self._with_rows(scores[order[:k]], ids[order[:k]])
        parts = (order[part] for part in batch_slices(len(order), _FETCHED))
        rows = chain.from_iterable(self._with_rows(scores[part], ids[part]) for part in parts)
        return list(islice(iter_first_of_tracks(rows, _track_of), k))

    def _certain_score(
        self, ids: NDArray[np.int64], scores: NDArray[np.float32], certain: int
    ) -> float:
        """Return what so many of the best pictures, or tracks, score at least; -inf if fewer."""
        if len(ids) < certain:
            return -np.inf
        if not self._by_track:
            return float(np.partition(scores, len(scores) - certain)[len(scores) - certain])
        ranked = self._ranked(ids, scores, certain)
        return ranked[-1][0] if len(ranked) == certain else -np.inf

    def _with_rows(
        self, scores: NDArray[np.float32], ids: NDArray[np.int64]
    ) -> list[tuple[float, _Row]]:
        if missing := [id_ for id_ in ids.tolist() if id_ not in self._rows]:
            self._read(missing)
        return [
            (score, self._rows[id_])
            for score, id_ in zip(scores.tolist(), ids.tolist(), strict=True)
        ]

    def _exact(self, query_D: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.float32]:
        block, wanted = self._first, np.sort(ids)
        places = np.searchsorted(block.ids, wanted)
        found = block.ids[np.minimum(places, len(block.ids) - 1)] if len(block.ids) else wanted[:0]
        if not np.array_equal(found, wanted):
            block, places = self._vectors(wanted), np.arange(len(wanted))
        exact = block.vectors[places].astype(np.float64) @ query_D.astype(np.float64)
        scores = np.empty(len(ids), np.float32)
        scores[np.argsort(ids)] = exact
        return scores

    def _vectors(self, ids: NDArray[np.int64]) -> Block:
        """Read the vectors of items (ascending)."""
        dim = self._first.vectors.shape[1]
        return self._current(vectors_with_ids(self._source.transaction, ids, dim), ids)

    def _current(self, block: Block, ids: NDArray[np.int64]) -> Block:
        """Return what was read of these items, which have to be those of the index."""
        transaction, snapshot = self._source.transaction, self._source.snapshot
        if len(block.ids) != len(ids):
            raise DamageError(
                "the search index has pictures that the database lacks; if it was changed by "
                "something else, run  upperson-rt gallery rebuild",
                "index_contradicts_database",
            )
        if transaction.sums is not None and snapshot is not None:
            expected = snapshot.checksums_of(ids)
            for id_, checksum in zip(block.ids.tolist(), block.checksums.tolist(), strict=True):
                if checksum != expected.get(id_):
                    message = f"the picture with id {id_} is one of an earlier state"
                    raise DamageError(message, "row_outdated", id=id_)
        return block

    def _read(self, ids: list[int]) -> None:
        dim = self._first.vectors.shape[1]
        wanted = np.sort(np.array(ids, np.int64))
        self._rows |= _fetch(self._source.transaction, wanted, dim)


def _track_of(scored: tuple[float, _Row]) -> Track | None:
    row = scored[1]
    return None if row[_TRACK] is None else (row[_CAMERA], row[_TRACK])


def _spans(transaction: Transaction, tracks: set[Track], where: Filter) -> dict[Track, TrackSpan]:
    if not tracks:
        return {}
    transaction.check_table()
    condition, values = condition_of(where)
    sql = (
        "SELECT min(time), max(time), count(*) FROM items INDEXED BY items_by_track "
        f"WHERE {condition} AND track = ? AND camera IS ?"
    )
    spans = {}
    for camera, track in tracks:
        first, last, pictures = transaction.execute(sql, (*values, track, camera)).fetchone()
        spans[camera, track] = TrackSpan(first_time=first, last_time=last, pictures=pictures)
    return spans


def _fetch(transaction: Transaction, ids: NDArray[np.int64], embed_dim: int) -> dict[int, _Row]:
    rows = {row[0]: row for row in rows_with_ids(transaction, ids.tolist(), embed_dim)}
    if len(rows) != len(ids):
        raise DamageError("pictures that the search index has are missing")
    return rows
