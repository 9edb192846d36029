"""A search in a SQLite gallery: candidates from the index or from SQL, scored from the database.

Every score is computed from the stored vector, in float64 and then rounded, so that it does not
depend on which index, filter or batch found the picture.

Shapes: Q queries, K candidates, D dimensions.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.gallery.records import (
    Filter,
    Hit,
    Item,
    Track,
    TrackSpan,
    first_of_tracks,
    with_spans,
)
from upperson_rt.gallery.sqlite.database import Database, Transaction
from upperson_rt.gallery.sqlite.index import SearchIndex, Snapshot
from upperson_rt.gallery.sqlite.rows import (
    STORED,
    condition_of,
    ids_where,
    rows_with_ids,
    stored_vectors,
)
from upperson_rt.gallery.sqlite.schema import COLUMNS, DamageError
from upperson_rt.gallery.sqlite.segments import ALL_LISTS_FROM, Candidates, candidates_for

_FROM_SQL = 10_000
"""Items that pass a filter up to which reading their vectors is faster than loading the index, or
than looking for them in all lists of an approximate one."""
_WIDER = 8
_EXTRA = 2
_ROUNDING = 1e-5  # Far above that of 512 products in float32.
_MOST_TIES = 4096
_QUERIES_AT_A_TIME = 256
_Row: TypeAlias = tuple[Any, ...]
"""The values of `ROW`, the vector, the checksum."""
_CAMERA, _TRACK, _VECTOR = 3, 5, -2
_COLUMNS = slice(1, 1 + len(COLUMNS.split()))


@dataclass(frozen=True)
class _Source:
    """Where the candidates of a search come from."""

    transaction: Transaction
    find: Callable[[NDArray[np.float32], int], Candidates]
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
    make_item: Callable[[Sequence[Any]], Item],
) -> list[tuple[list[Hit], list[bytes]]]:
    """Find the best items for each query, see `Gallery.search`, with their vectors as stored.

    ``make_item`` reads the values of `COLUMNS`.
    """
    found, stored = list[list[Hit]](), list[list[bytes]]()
    with _source(database, index, where) as source:
        for start in range(0, len(queries_QD), _QUERIES_AT_A_TIME):
            part = queries_QD[start : start + _QUERIES_AT_A_TIME]
            for ranked in _rank(source, part, k, by_track):
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
def _source(database: Database, index: SearchIndex, where: Filter) -> Iterator[_Source]:
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
            source = _choose(transaction, index.embed_dim, snapshot, where)
            load = True
        yield source


def _choose(
    transaction: Transaction, embed_dim: int, snapshot: Snapshot | None, where: Filter
) -> _Source | None:
    """Return the best source, or None if the index has to be loaded first."""
    if where.is_empty:
        assert snapshot is not None
        return _Source(transaction, snapshot.search, snapshot.is_exact, snapshot)
    if snapshot is not None and snapshot.is_exact:
        ids = ids_where(transaction, where)
        return _Source(
            transaction, lambda queries, k: snapshot.search(queries, k, ids), True, snapshot
        )
    ids = ids_where(transaction, where, most=_FROM_SQL + 1)
    if len(ids) <= _FROM_SQL:
        return _Source(transaction, _few(transaction, embed_dim, ids), True)
    if snapshot is None:
        return None
    return _Source(transaction, _many(transaction, snapshot, where), False, snapshot)


def _few(
    transaction: Transaction, embed_dim: int, ids: NDArray[np.int64]
) -> Callable[[NDArray[np.float32], int], Candidates]:
    """Return a search among few items, whose vectors are read now."""
    transaction.check_table()
    parts = [rows for _, rows, _ in stored_vectors(transaction, embed_dim, since=None, also=ids)]
    vectors_ND = np.concatenate([*parts, np.empty((0, embed_dim), STORED)]).astype(np.float32)
    if len(vectors_ND) != len(ids):
        raise DamageError(f"{len(ids)} pictures pass the filter, {len(vectors_ND)} are found")

    def find(queries_QD: NDArray[np.float32], k: int) -> Candidates:
        scores = queries_QD @ vectors_ND.T
        k = min(k, len(ids))
        best = np.argpartition(scores, len(ids) - k, axis=1)[:, len(ids) - k :]
        return np.take_along_axis(scores, best, axis=1), ids[best]

    return find


def _many(
    transaction: Transaction, snapshot: Snapshot, where: Filter
) -> Callable[[NDArray[np.float32], int], Candidates]:
    """Return a search in an approximate index for a filter that many items pass.

    First among the best of all items; only if too few of them pass, all that pass are listed.
    """
    condition, values = condition_of(where)
    among = f"items NOT INDEXED WHERE id IN (SELECT value FROM json_each(?)) AND {condition}"
    listed: list[NDArray[np.int64]] = []

    def find(queries_QD: NDArray[np.float32], k: int) -> Candidates:
        if not listed:
            scores, ids = snapshot.search(queries_QD, _WIDER * k)
            some = np.unique(ids[ids >= 0])
            # Checks what the condition looks at.
            _fetch(transaction, some, queries_QD.shape[1], snapshot)
            values_of_some = (json.dumps(some.tolist()), *values)
            rows = transaction.execute(f"SELECT id FROM {among}", values_of_some)
            passed = np.isin(ids, np.fromiter((id_ for (id_,) in rows), np.int64))
            if (np.count_nonzero(passed, axis=1) >= k).all():
                order = np.lexsort((-scores, ~passed))[:, :k]
                return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
            listed.append(ids_where(transaction, where))
        return snapshot.search(queries_QD, k, listed[0])

    return find


def _rank(
    source: _Source, queries_QD: NDArray[np.float32], k: int, by_track: bool
) -> list[list[tuple[float, _Row]]]:
    """Return scores and rows of the best k for each query, best first, ties by id."""
    found: dict[int, list[tuple[float, _Row]]] = {}
    pending = np.arange(len(queries_QD))
    count = k + _EXTRA if source.is_exact else candidates_for(k)
    if by_track:
        count *= 4
    while len(pending):
        scores_QK, ids_QK = source.find(queries_QD[pending], count)
        wanted = np.unique(ids_QK[ids_QK >= 0])
        rows = _fetch(source.transaction, wanted, queries_QD.shape[1], source.snapshot)
        for query, scores, ids in zip(pending.tolist(), scores_QK, ids_QK, strict=True):
            there = ids >= 0
            own = [rows[id_] for id_ in ids[there].tolist()]
            ranked = _scored(queries_QD[query], own)
            if by_track:
                ranked = first_of_tracks(ranked, _track_of)
            found[query] = ranked[:k]
            # A few lists of an approximate index may hold few items that pass.
            everything = len(own) < count and (source.is_exact or count >= ALL_LISTS_FROM)
            lowest = float(scores[there].min(initial=np.inf))
            # What was not looked at may equal the last one that is returned, and have a lower id.
            ties = source.is_exact and len(ranked) >= k and lowest > ranked[k - 1][0] - _ROUNDING
            if everything or (len(ranked) >= k and (not ties or count > k + _MOST_TIES)):
                pending = pending[pending != query]
        count *= 4
    return [found[query] for query in range(len(queries_QD))]


def _scored(query_D: NDArray[np.float32], rows: Sequence[_Row]) -> list[tuple[float, _Row]]:
    """Return scores and rows of `_fetch`, whose vectors have been checked, best first."""
    vectors = np.frombuffer(b"".join(row[_VECTOR] for row in rows), STORED)
    exact = vectors.reshape(len(rows), len(query_D)).astype(np.float64) @ query_D.astype(np.float64)
    scored = list(zip(exact.astype(np.float32).tolist(), rows, strict=True))
    scored.sort(key=lambda pair: (-pair[0], pair[1][0]))
    return scored


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


def _fetch(
    transaction: Transaction, ids: NDArray[np.int64], embed_dim: int, snapshot: Snapshot | None
) -> dict[int, _Row]:
    rows = {row[0]: row for row in rows_with_ids(transaction, ids.tolist(), embed_dim)}
    if len(rows) != len(ids):
        raise DamageError(
            "the search index has pictures that the database lacks; if it was changed by something "
            "else, run  upperson-rt gallery rebuild",
            "index_contradicts_database",
        )
    if transaction.sums is not None and snapshot is not None:
        expected = snapshot.checksums_of(ids)
        for id_, row in rows.items():
            if row[-1] != expected.get(id_):
                raise DamageError(
                    f"the picture with id {id_} is one of an earlier state", "row_outdated", id=id_
                )
    return rows
