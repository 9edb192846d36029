"""Items, vectors and filters as rows and conditions of the table `items`, and the log of changes.

Shapes: N rows, D dimensions.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.gallery.records import (
    MAX_NORM_ERROR,
    Filter,
    Item,
    attributes_as_json,
    length_problem,
)
from upperson_rt.gallery.sqlite.checksums import (
    COLUMNS,
    ROW,
    DamageError,
    check_rows,
    check_vector,
    facet_of,
)
from upperson_rt.gallery.sqlite.database import Transaction

__all__ = [
    "ADD",
    "REPLACE",
    "STORED",
    "Block",
    "changed_since",
    "checked",
    "has_key",
    "ids_where",
    "indexed",
    "item_from_row",
    "json_list",
    "passing",
    "row_from_item",
    "stored_vectors",
    "trim_log",
    "unnamed_crops",
    "vector_problem",
    "version_of",
]

STORED = np.dtype("<f2")
"""How vectors are stored; every score is computed from these."""
ADD = f"INSERT INTO items ({ROW}, vector, checksum) VALUES ({', '.join('?' * 12)})"
REPLACE = f"""
    UPDATE items SET ({COLUMNS}, variant, vector, checksum) = ({", ".join("?" * 11)}) WHERE id = ?
"""
_Row: TypeAlias = tuple[Any, ...]
Block: TypeAlias = tuple[NDArray[np.int64], NDArray[np.float16], NDArray[np.int64]]
"""(N,) ids, (N, D) vectors and (N,) checksums, 0 where a gallery keeps none."""

_PLAIN_KEY = re.compile(r"[A-Za-z0-9_ .:-]+", re.ASCII)
"""Keys that need no escapes in a JSON path; all others are compared in Python, never as SQL."""
_BLOCK_ROWS = 8192
_LOG_ENTRIES = 1_000_000


def passing(
    transaction: Transaction, where: Filter, by: str | None = None
) -> tuple[str, list[object]]:
    """Return table and condition, as SQL with placeholders, and their values.

    Everything that decides which rows pass has been checked then: it stands in one index, which is
    read through once in a process, and attributes in the rows.

    Args:
        transaction: Where it is going to be used.
        where: Which rows.
        by: The column that the index must begin with, where the statement has more conditions.

    Raises:
        DamageError: It is damaged.
    """
    condition, values = _condition(where)
    if by is None and where.track is not None:
        by = "track"
    elif by is None and where.camera is not None:
        by = "camera"
    elif by is None and (where.since is not None or where.until is not None):
        by = "time"
    if where.attributes:
        transaction.prove_items()
    source = "items NOT INDEXED" if by is None else indexed(transaction, by)
    return f"{source} WHERE {condition}", values


def has_key(transaction: Transaction, keys: Iterable[str]) -> tuple[str, list[object]]:
    """Return table and condition for the rows with these keys, see `passing`."""
    source = indexed(transaction, "key")
    return f"{source} WHERE key IN (SELECT value FROM json_each(?))", [json.dumps(list(keys))]


def indexed(transaction: Transaction, column: str) -> str:
    """Return the table with the index that begins with a column, which is read through once."""
    facet = facet_of(column)
    transaction.prove(facet)
    return f"items INDEXED BY {facet.index}"


def _condition(where: Filter) -> tuple[str, list[object]]:
    """Return a condition with placeholders, and their values; "1" where everything passes."""
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
    time = None if item.time is None else float(item.time) + 0.0  # SQLite knows no -0.0.
    attributes = attributes_as_json(item)
    return (item.key, item.source, item.camera, time, item.track, box, item.crop, attributes)


def item_from_row(columns: Sequence[Any]) -> Item:
    """Read the values of `COLUMNS`.

    Raises:
        ValueError, TypeError, InputError: The row is damaged.
    """
    key, source, camera, time, track, box, crop, attributes = columns
    for text in (box, attributes):  # Items check the others.
        if text is not None and not isinstance(text, str):
            raise TypeError(f"{type(text).__name__} where a text is expected")
    edges = None if box is None else tuple(map(int, box.split(",")))
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


def checked(transaction: Transaction, rows: list[_Row], embed_dim: int) -> list[_Row]:
    """Return rows that are as they were written: the values of `ROW`, the vector, the checksum.

    Raises:
        DamageError: One is damaged.
    """
    if transaction.sums is not None:
        check_rows(rows)
    else:
        for row in rows:
            if problem := vector_problem(row[-2], embed_dim):
                raise DamageError(f"the picture with id {row[0]} has a {problem}")
    return rows


def vector_problem(vector: object, embed_dim: int) -> str | None:
    """Say what is wrong with a stored vector by its looks, or return None."""
    size = embed_dim * STORED.itemsize
    if not isinstance(vector, bytes):
        return f"{type(vector).__name__} where a vector is expected"
    if len(vector) != size:
        return f"vector of {len(vector)} bytes, expected {size}"
    return length_problem(np.frombuffer(vector, STORED).astype(np.float32))


def ids_where(
    transaction: Transaction, where: Filter | None = None, most: int = -1
) -> NDArray[np.int64]:
    """Return the ids of items that pass, ascending; not all of them if there are more than most."""
    source, values = passing(transaction, where or Filter())
    # One text instead of a Python object for each row.
    (text,) = transaction.execute(
        f"SELECT group_concat(id) FROM (SELECT id FROM {source} LIMIT ?)", (*values, most)
    ).fetchone()
    return np.sort(np.fromstring(text or "", np.int64, sep=","))


def stored_vectors(
    transaction: Transaction,
    embed_dim: int,
    since: int | None,
    also: NDArray[np.int64] | None = None,
) -> Iterator[Block]:
    """Yield blocks: of those of the items named that are there, then of those newer than an id.

    Raises:
        DamageError: A vector is damaged.
    """
    sql = f"SELECT id, vector, {transaction.checksum} FROM items NOT INDEXED WHERE"
    queries: list[tuple[str, tuple[object, ...]]] = []
    if also is not None:
        for start in range(0, len(also), _BLOCK_ROWS):
            ids = json_list(also[start : start + _BLOCK_ROWS])
            queries.append((f"{sql} id IN (SELECT value FROM json_each(?)) ORDER BY id", (ids,)))
    if since is not None:
        queries.append((f"{sql} id > ? ORDER BY id", (since,)))
    for query, values in queries:
        cursor, last = transaction.execute(query, values), -1
        while rows := cursor.fetchmany(_BLOCK_ROWS):
            block = _block(rows, embed_dim, transaction.sums is not None)
            if block[0][0] <= last or (np.diff(block[0]) <= 0).any():
                raise DamageError("the pictures are not in the order of their ids")
            last = int(block[0][-1])
            yield block


def _block(rows: list[tuple[Any, ...]], embed_dim: int, has_checksums: bool) -> Block:
    size = embed_dim * STORED.itemsize
    for id_, vector, checksum in rows:
        if has_checksums:
            check_vector(id_, vector, checksum)
        if not isinstance(vector, bytes) or len(vector) != size:
            problem = vector_problem(vector, embed_dim)
            raise DamageError(f"the picture with id {id_} has a {problem}")
    ids = np.fromiter((row[0] for row in rows), np.int64, len(rows))
    vectors = np.frombuffer(b"".join(row[1] for row in rows), STORED).reshape(-1, embed_dim)
    if has_checksums:
        return ids, vectors, np.fromiter((row[2] for row in rows), np.int64, len(rows))
    lengths = np.linalg.norm(vectors.astype(np.float32), axis=1)
    for row in np.flatnonzero(~(np.abs(lengths - 1) <= MAX_NORM_ERROR)):  # NaN, too.
        problem = vector_problem(rows[row][1], embed_dim)
        raise DamageError(f"the picture with id {ids[row]} has a {problem}")
    return ids, vectors, np.zeros(len(rows), np.int64)


def unnamed_crops(transaction: Transaction, crops: Sequence[str]) -> list[str]:
    """Return those that no item names."""
    sql = f"{indexed(transaction, 'crop')} WHERE crop IN (SELECT value FROM json_each(?))"
    rows = transaction.execute(f"SELECT crop FROM {sql}", (json.dumps(crops),))
    named = {crop for (crop,) in rows}
    return [crop for crop in crops if crop not in named]


# The log of changes: what indexes beside the table follow.


def version_of(transaction: Transaction) -> tuple[int, int]:
    """Return the last entry of the log of changes, and the highest id ever given."""
    if transaction.sums is not None:
        return transaction.sums.seq, transaction.sums.last_id
    rows = dict(transaction.execute("SELECT name, seq FROM sqlite_sequence"))
    return rows.get("changes", 0), rows.get("items", 0)


def changed_since(transaction: Transaction, seq: int) -> NDArray[np.int64] | None:
    """Return the ids in the log after an entry, ascending; None if the log begins later."""
    last = version_of(transaction)[0]
    rows = transaction.execute("SELECT id FROM changes WHERE seq > ?", (seq,))
    try:
        ids = np.fromiter((id_ for (id_,) in rows), np.int64)
    except (TypeError, ValueError):  # Damaged, which is as good as missing.
        return None
    return np.unique(ids) if len(ids) == last - seq else None


def trim_log(transaction: Transaction) -> None:
    """Keep the log bounded; an index that is older than it is made again."""
    first, last = transaction.execute(
        "SELECT (SELECT min(seq) FROM changes), (SELECT max(seq) FROM changes)"
    ).fetchone()
    if first is not None and last - first >= _LOG_ENTRIES:
        transaction.execute("DELETE FROM changes WHERE seq <= ?", (last - _LOG_ENTRIES // 2,))
