"""Items, vectors and filters as rows and conditions of the table `items`, and the log of changes.

Shapes: N rows, D dimensions.
"""

import json
import re
import sqlite3
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import IntegrityError
from upperson_rt.gallery.records import Filter, Item, attributes_as_json

__all__ = [
    "COLUMNS",
    "STORED",
    "UPSERT",
    "changed_since",
    "ids_where",
    "item_from_row",
    "json_list",
    "row_from_item",
    "sql_from_filter",
    "stored_vectors",
    "trim_log",
    "unnamed_crops",
    "version_of",
]

STORED = np.dtype("<f2")
"""How vectors are stored; every score is computed from these."""
COLUMNS = "key, source, camera, time, track, box, crop, attributes"
"""The metadata of an item, in the order of `row_from_item` and `item_from_row`."""
UPSERT = f"""
    INSERT INTO items ({COLUMNS}, variant, vector) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
    ON CONFLICT (key) DO UPDATE SET
        source = excluded.source, camera = coalesce(excluded.camera, camera), time = excluded.time,
        track = excluded.track, box = excluded.box, crop = excluded.crop,
        attributes = excluded.attributes, variant = excluded.variant, vector = excluded.vector
"""
"""Adds a row, or replaces the one with the same key and keeps its id."""

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_ .:-]+", re.ASCII)
"""Keys that need no escapes in a JSON path; all others are compared in Python, never as SQL."""
_BLOCK_ROWS = 8192
_LOG_ENTRIES = 1_000_000


def sql_from_filter(where: Filter | None) -> tuple[str, list[object]]:
    """Return a condition with placeholders, and their values; "1" where everything passes."""
    if where is None:
        return "1", []
    conditions: list[str] = []
    values: list[object] = []
    if where.cameras is not None:
        conditions.append(f"camera IN ({', '.join('?' * len(where.cameras))})")
        values += where.cameras
    for sql, value in {
        "time >= ?": where.since,
        "time < ?": where.until,
        "track = ?": where.track,
    }.items():
        if value is not None:
            conditions.append(sql)
            values.append(value)
    for key, value in where.attributes.items():
        if _PLAIN_KEY.fullmatch(key):
            path = f'$."{key}"'
            kinds = "('integer', 'real')"
            if isinstance(value, bool):
                kinds = f"('{json.dumps(value)}')"
            elif isinstance(value, str):
                kinds = "('text')"
            conditions.append(
                "CASE WHEN json_valid(attributes) THEN json_type(attributes, ?) IN "
                f"{kinds} AND json_extract(attributes, ?) = ? ELSE 0 END"
            )
            values += (path, path, value)
        else:
            conditions.append("attribute_equals(attributes, ?, ?)")
            values += (key, json.dumps(value))
    return " AND ".join(conditions) or "1", values


def row_from_item(item: Item) -> tuple[object, ...]:
    """Return the values of `COLUMNS`.

    Raises:
        InputError: The attributes are not JSON.
    """
    box = None if item.box is None else ",".join(str(int(edge)) for edge in item.box)
    time = None if item.time is None else float(item.time)
    attributes = attributes_as_json(item)
    return (item.key, item.source, item.camera, time, item.track, box, item.crop, attributes)


def item_from_row(columns: Sequence[Any]) -> Item:
    """Read the values of `COLUMNS`.

    Raises:
        ValueError, TypeError, InputError: The row is damaged.
    """
    key, source, camera, time, track, box, crop, attributes = columns
    edges = None if box is None else tuple(int(edge) for edge in box.split(","))
    if edges is not None and len(edges) != 4:
        raise ValueError(f"box '{box}' has {len(edges)} edges")
    return Item(
        key=key,
        source=source,
        camera=camera,
        time=time,
        track=track,
        box=edges,
        crop=crop,
        attributes={} if attributes == "{}" else json.loads(attributes),
    )


def json_list(ids: NDArray[np.int64]) -> str:
    """Return (N,) ids for ``IN (SELECT value FROM json_each(?))``."""
    return f"[{','.join(map(str, ids.tolist()))}]"


def ids_where(
    connection: sqlite3.Connection, where: Filter | None = None, most: int = -1
) -> NDArray[np.int64]:
    """Return the ids of items that pass, ascending; not all of them if there are more than most."""
    condition, values = sql_from_filter(where)
    # One text instead of a Python object for each row.
    (text,) = connection.execute(
        f"SELECT group_concat(id) FROM (SELECT id FROM items WHERE {condition} LIMIT ?)",
        (*values, most),
    ).fetchone()
    return np.sort(np.fromstring(text or "", np.int64, sep=","))


def stored_vectors(
    connection: sqlite3.Connection,
    embed_dim: int,
    since: int | None,
    also: NDArray[np.int64] | None = None,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float16]]]:
    """Yield (N,) ids and (N, D) vectors: of the items named, then of those newer than an id.

    Raises:
        IntegrityError: A vector is damaged.
    """
    queries: list[tuple[str, tuple[object, ...]]] = []
    if also is not None:
        for start in range(0, len(also), _BLOCK_ROWS):
            sql = "SELECT id, vector FROM items WHERE id IN (SELECT value FROM json_each(?))"
            queries.append((f"{sql} ORDER BY id", (json_list(also[start : start + _BLOCK_ROWS]),)))
    if since is not None:
        queries.append(("SELECT id, vector FROM items WHERE id > ? ORDER BY id", (since,)))
    size = embed_dim * STORED.itemsize
    for sql, values in queries:
        cursor = connection.execute(sql, values)
        while rows := cursor.fetchmany(_BLOCK_ROWS):
            broken = [id_ for id_, blob in rows if len(blob) != size]
            if broken:
                raise IntegrityError(
                    f"the gallery has vectors of a wrong length, the first at id {broken[0]}: see "
                    " upperson-rt gallery verify"
                )
            flat = np.frombuffer(b"".join(blob for _, blob in rows), STORED)
            if not np.isfinite(flat).all():
                raise IntegrityError(
                    "the gallery has vectors that are not finite: see  upperson-rt gallery verify"
                )
            ids = np.fromiter((id_ for id_, _ in rows), np.int64, len(rows))
            yield ids, flat.reshape(len(rows), embed_dim)


def unnamed_crops(connection: sqlite3.Connection, crops: Sequence[str]) -> list[str]:
    """Return those that no item names."""
    sql = "SELECT crop FROM items WHERE crop IN (SELECT value FROM json_each(?))"
    named = {crop for (crop,) in connection.execute(sql, (json.dumps(crops),))}
    return [crop for crop in crops if crop not in named]


# The log of changes: what indexes beside the table follow.


def version_of(connection: sqlite3.Connection) -> tuple[int, int]:
    """Return the last entry of the log of changes, and the highest id ever given."""
    rows = dict(connection.execute("SELECT name, seq FROM sqlite_sequence"))
    return rows.get("changes", 0), rows.get("items", 0)


def changed_since(connection: sqlite3.Connection, seq: int) -> NDArray[np.int64] | None:
    """Return the ids in the log after an entry, ascending; None if the log begins later."""
    last = version_of(connection)[0]
    if last == seq:
        return np.empty(0, np.int64)
    (first,) = connection.execute("SELECT min(seq) FROM changes").fetchone()
    if first is None or first > seq + 1 or last < seq:
        return None
    rows = connection.execute("SELECT DISTINCT id FROM changes WHERE seq > ?", (seq,))
    return np.sort(np.fromiter((id_ for (id_,) in rows), np.int64))


def trim_log(connection: sqlite3.Connection) -> None:
    """Keep the log bounded; an index that is older than it is made again."""
    first, last = connection.execute(
        "SELECT (SELECT min(seq) FROM changes), (SELECT max(seq) FROM changes)"
    ).fetchone()
    if first is not None and last - first >= _LOG_ENTRIES:
        connection.execute("DELETE FROM changes WHERE seq <= ?", (last - _LOG_ENTRIES // 2,))
