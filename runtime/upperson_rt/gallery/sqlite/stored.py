"""What other packages may use of a gallery's SQLite file: its transactions, and rows as stored.

A stored row has the values of `ROW`, the bytes of the vector and the checksum. Who changes rows
keeps the sums of the transaction right; `add_rows`, `append_rows` and `remove_rows` do.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, TypeAlias

from upperson_rt.gallery.sqlite.access import log_of
from upperson_rt.gallery.sqlite.bin import among, leave_out
from upperson_rt.gallery.sqlite.database import DATABASE_FILE, Database, Transaction, make
from upperson_rt.gallery.sqlite.deletion import forget_messages
from upperson_rt.gallery.sqlite.list_files import INDEX_FILE
from upperson_rt.gallery.sqlite.rows import (
    ADD,
    changed_since,
    checked,
    condition_of,
    has_key,
    item_from_row,
    row_from_item,
    rows_with_ids,
    unnamed_crops,
)
from upperson_rt.gallery.sqlite.schema import COLUMNS, ROW, Sums, checksum_of
from upperson_rt.gallery.sqlite.store import SqliteGallery

__all__ = [
    "COLUMNS",
    "DATABASE_FILE",
    "INDEX_FILE",
    "Database",
    "SqliteGallery",
    "StoredRow",
    "Transaction",
    "add_rows",
    "among",
    "append_rows",
    "changed_since",
    "condition_of",
    "forget_messages",
    "item_from_row",
    "keys_there",
    "leave_out",
    "log_of",
    "make",
    "remove_rows",
    "row_from_item",
    "rows_after",
    "rows_with_ids",
    "unnamed_crops",
]

_ROWS_AT_A_TIME = 4096

StoredRow: TypeAlias = tuple[Any, ...]


def rows_after(transaction: Transaction, id_: int, embed_dim: int) -> Iterator[list[StoredRow]]:
    """Yield the rows above an id, by id, some thousand at a time, see `rows_with_ids`."""
    sql = f"SELECT {ROW}, vector, {transaction.checksum} FROM items NOT INDEXED WHERE id > ? "
    cursor = transaction.execute(f"{sql} ORDER BY id", (id_,))
    while rows := cursor.fetchmany(_ROWS_AT_A_TIME):
        yield checked(transaction, rows, embed_dim)


def keys_there(transaction: Transaction, keys: Sequence[str]) -> list[str]:
    """Return those of the keys that the gallery has."""
    source, values = has_key(transaction, keys)
    return [key for (key,) in transaction.execute(f"SELECT key FROM {source}", values)]


def add_rows(transaction: Transaction, rows: Sequence[StoredRow]) -> None:
    """Add rows as they are, with their ids."""
    _sums_of(transaction).add(rows)
    transaction.connection.executemany(ADD, rows)


def append_rows(transaction: Transaction, rows: Sequence[StoredRow]) -> None:
    """Add rows, which need no checksum, with the next ids."""
    sums = _sums_of(transaction)
    numbered = [(sums.last_id + n, *row[1:11]) for n, row in enumerate(rows, 1)]
    sums.last_id += len(rows)
    add_rows(transaction, [(*row, checksum_of(row, row[-1])) for row in numbered])


def remove_rows(transaction: Transaction, ids: Sequence[int], embed_dim: int) -> int:
    """Remove the rows of these ids; return how many there were."""
    there = rows_with_ids(transaction, ids, embed_dim)
    _sums_of(transaction).remove(there)
    sql = "DELETE FROM items WHERE id IN (SELECT value FROM json_each(?))"
    transaction.execute(sql, (json.dumps([*ids]),))
    return len(there)


def _sums_of(transaction: Transaction) -> Sums:
    assert transaction.sums is not None  # Of a gallery that this release has made or written to.
    return transaction.sums
