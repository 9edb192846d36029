"""A search in a SQLite gallery: candidates from the index or from SQL, scored from the database.

Every score is computed from the stored vector, in float64 and then rounded, so that it does not
depend on which index, filter or batch found the picture.
"""

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import IntegrityError
from upperson_rt.gallery.connections import Connections
from upperson_rt.gallery.index import SearchIndex, Snapshot, version_of
from upperson_rt.gallery.ivf import candidates_for
from upperson_rt.gallery.records import Filter, Hit, Item, TrackSpan
from upperson_rt.gallery.rows import COLUMNS, sql_from_filter
from upperson_rt.gallery.segments import ALL_LISTS_FROM, Candidates
from upperson_rt.gallery.vectors import STORED

__all__ = ["search_items"]

_FROM_SQL = 10_000
"""Items that pass a filter up to which reading their vectors is faster than loading the index, or
than looking for them in all lists of an approximate one."""
_WIDER = 8
_EXTRA = 2
_ROUNDING = 1e-5  # Far above that of 512 products in float32.
_MOST_TIES = 4096
_QUERIES_AT_A_TIME = 256
_Row: TypeAlias = tuple[Any, ...]
"""id, vector, then the values of `COLUMNS`."""
_CAMERA, _TRACK = 2 + 2, 2 + 4


@dataclass(frozen=True)
class _Source:
    """Where the candidates of a search come from."""

    connection: sqlite3.Connection
    find: Callable[[NDArray[np.float32], int], Candidates]
    is_exact: bool


def search_items(
    connections: Connections,
    index: SearchIndex,
    queries: NDArray[np.float32],
    k: int,
    where: Filter | None,
    by_track: bool,
    make_item: Callable[[Sequence[object]], Item],
) -> list[list[Hit]]:
    """Find the best items for (Q, D) queries, see `Gallery.search`.

    ``make_item`` reads the values of `COLUMNS`.
    """
    found: list[list[Hit]] = []
    if not len(queries):
        return found
    with _source(connections, index, where) as source:
        for start in range(0, len(queries), _QUERIES_AT_A_TIME):
            part = queries[start : start + _QUERIES_AT_A_TIME]
            for ranked in _rank(source, part, k, by_track):
                hits = []
                for score, row in ranked:
                    item = make_item(row[2:])
                    span = None
                    if by_track and item.track is not None:
                        span = _span(source.connection, item, where)
                    hits.append(Hit(id=row[0], score=score, item=item, span=span))
                found.append(hits)
    return found


@contextmanager
def _source(
    connections: Connections, index: SearchIndex, where: Filter | None
) -> Iterator[_Source]:
    """Give the source of one search; it sees one state of the database to the end."""
    with ExitStack() as stack:
        source = None
        for load in (False, True):
            # Within the lock no other thread can bring the index beyond what this one sees.
            with index.lock:
                connection = stack.enter_context(connections.reading())
                version_of(connection)  # Takes the snapshot.
                # The index is not worth loading if the filter leaves few items.
                snapshot = (
                    index.refresh(connection)
                    if load or where is None or where.is_empty or index.snapshot is not None
                    else None
                )
            source = _choose(connection, snapshot, where)
            if source is not None:
                break
            stack.close()
        assert source is not None
        yield source


def _choose(
    connection: sqlite3.Connection, snapshot: Snapshot | None, where: Filter | None
) -> _Source | None:
    """Return the best source, or None if the index has to be loaded first."""
    if where is None or where.is_empty:
        assert snapshot is not None
        return _Source(connection, snapshot.search, snapshot.is_exact)
    if snapshot is not None and snapshot.is_exact:
        ids = _passing(connection, where, -1)
        return _Source(connection, lambda queries, k: snapshot.search(queries, k, ids), True)
    ids = _passing(connection, where, _FROM_SQL + 1)
    if len(ids) <= _FROM_SQL:
        return _Source(connection, _few(connection, ids), True)
    if snapshot is None:
        return None
    return _Source(connection, _many(connection, snapshot, where), False)


def _rank(
    source: _Source, queries: NDArray[np.float32], k: int, by_track: bool
) -> list[list[tuple[float, _Row]]]:
    """Return scores and rows of the best k for each query, best first, ties by id."""
    found: dict[int, list[tuple[float, _Row]]] = {}
    pending = np.arange(len(queries))
    count = k + _EXTRA if source.is_exact else candidates_for(k)
    if by_track:
        count *= 4
    while len(pending):
        scores, ids = source.find(queries[pending], count)
        rows = _fetch(source.connection, np.unique(ids[ids >= 0]))
        for query, query_scores, query_ids in zip(pending.tolist(), scores, ids, strict=True):
            there = query_ids >= 0
            own = [rows[id_] for id_ in query_ids[there].tolist()]
            ranked = _scored(queries[query], own)
            if by_track:
                ranked = _first_of_tracks(ranked)
            found[query] = ranked[:k]
            # A few lists of an approximate index may hold few items that pass.
            everything = len(own) < count and (source.is_exact or count >= ALL_LISTS_FROM)
            lowest = float(query_scores[there].min(initial=np.inf))
            # What was not looked at may equal the last one that is returned, and have a lower id.
            ties = source.is_exact and len(ranked) >= k and lowest > ranked[k - 1][0] - _ROUNDING
            if everything or (len(ranked) >= k and (not ties or count > k + _MOST_TIES)):
                pending = pending[pending != query]
        count *= 4
    return [found[query] for query in range(len(queries))]


def _scored(query: NDArray[np.float32], rows: Sequence[_Row]) -> list[tuple[float, _Row]]:
    vectors = np.frombuffer(b"".join(row[1] for row in rows), STORED)
    exact = vectors.reshape(len(rows), len(query)).astype(np.float64) @ query.astype(np.float64)
    scored = list(zip(exact.astype(np.float32).tolist(), rows, strict=True))
    scored.sort(key=lambda pair: (-pair[0], pair[1][0]))
    return scored


def _first_of_tracks(
    ranked: Sequence[tuple[float, _Row]],
) -> list[tuple[float, _Row]]:
    kept, seen = [], set()
    for score, row in ranked:
        track = (row[_CAMERA], row[_TRACK])
        if row[_TRACK] is None or track not in seen:
            kept.append((score, row))
            seen.add(track)
    return kept


def _span(connection: sqlite3.Connection, item: Item, where: Filter | None) -> TrackSpan:
    condition, values = sql_from_filter(where)
    first, last, pictures = connection.execute(
        "SELECT min(time), max(time), count(*) FROM items WHERE track = ? AND camera IS ?"
        f" AND {condition}",
        (item.track, item.camera, *values),
    ).fetchone()
    return TrackSpan(first_time=first, last_time=last, pictures=pictures)


def _passing(connection: sqlite3.Connection, where: Filter, most: int) -> NDArray[np.int64]:
    """Return the ids of items that pass, ascending; -1 for all of them."""
    condition, values = sql_from_filter(where)
    # One text instead of a Python object for each row.
    (text,) = connection.execute(
        f"SELECT group_concat(id) FROM (SELECT id FROM items WHERE {condition} LIMIT ?)",
        (*values, most),
    ).fetchone()
    return np.sort(np.fromstring(text or "", np.int64, sep=","))


def _few(
    connection: sqlite3.Connection, ids: NDArray[np.int64]
) -> Callable[[NDArray[np.float32], int], Candidates]:
    """Return a search among few items, whose vectors are read now."""
    rows = connection.execute(
        "SELECT id, vector FROM items WHERE id IN (SELECT value FROM json_each(?)) ORDER BY id",
        (_json(ids),),
    ).fetchall()
    try:
        flat = np.frombuffer(b"".join(blob for _, blob in rows), STORED)
        vectors = flat.reshape(len(rows), -1 if rows else 0).astype(np.float32)
    except ValueError as error:
        raise _malformed() from error

    def find(queries: NDArray[np.float32], k: int) -> Candidates:
        if not len(ids):
            return np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
        if vectors.shape[1] != queries.shape[1] or not np.isfinite(vectors).all():
            raise _malformed()
        scores = queries @ vectors.T
        k = min(k, len(ids))
        best = np.argpartition(scores, len(ids) - k, axis=1)[:, len(ids) - k :]
        return np.take_along_axis(scores, best, axis=1), ids[best]

    return find


def _many(
    connection: sqlite3.Connection, snapshot: Snapshot, where: Filter
) -> Callable[[NDArray[np.float32], int], Candidates]:
    """Return a search in an approximate index for a filter that many items pass.

    First among the best of all items; only if too few of them pass, all that pass are listed.
    """
    condition, values = sql_from_filter(where)
    listed: list[NDArray[np.int64]] = []

    def find(queries: NDArray[np.float32], k: int) -> Candidates:
        if not listed:
            scores, ids = snapshot.search(queries, _WIDER * k)
            sql = "SELECT id FROM items WHERE id IN (SELECT value FROM json_each(?))"
            rows = connection.execute(
                f"{sql} AND {condition}", (_json(np.unique(ids[ids >= 0])), *values)
            )
            passing = np.isin(ids, np.fromiter((id_ for (id_,) in rows), np.int64))
            if (np.count_nonzero(passing, axis=1) >= k).all():
                order = np.argsort(~passing, axis=1, kind="stable")[:, :k]  # They are sorted.
                return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
            listed.append(_passing(connection, where, -1))
        return snapshot.search(queries, k, listed[0])

    return find


def _fetch(connection: sqlite3.Connection, ids: NDArray[np.int64]) -> dict[int, _Row]:
    """Return rows (id, vector, *COLUMNS) by id."""
    rows = {
        row[0]: row
        for row in connection.execute(
            f"SELECT id, vector, {COLUMNS} FROM items WHERE id IN (SELECT value FROM json_each(?))",
            (_json(ids),),
        )
    }
    if len(rows) != len(ids):
        raise IntegrityError(
            "the search index does not match the database: run  upperson-rt gallery rebuild"
        )
    return rows


def _json(ids: NDArray[np.int64]) -> str:
    return f"[{','.join(map(str, ids.tolist()))}]"


def _malformed() -> IntegrityError:
    return IntegrityError(
        "the gallery has vectors of a wrong length or that are not finite: see "
        " upperson-rt gallery verify"
    )
