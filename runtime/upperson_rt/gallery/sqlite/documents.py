"""JSON documents in the database of a gallery, which are committed with its rows."""

import json
import sqlite3
from typing import Any

from upperson_rt.errors import IntegrityError

__all__ = ["make_documents", "parse_document", "read_document", "read_documents", "write_document"]

_TABLE = "outbox_documents"
"""Documents came with the outbox, whose tables begin so."""


def read_documents(connection: sqlite3.Connection, prefix: str) -> dict[str, Any]:
    """Return the documents whose name begins so, by the rest of their names."""
    rows = _rows(connection, "substr(name, 1, ?) = ? ORDER BY name", len(prefix), prefix)
    return {name[len(prefix) :]: parse_document(name, value) for name, value in rows}


def read_document(connection: sqlite3.Connection, name: str) -> Any:
    """Return the document of a name, or None."""
    found = _rows(connection, "name = ?", name)
    return parse_document(*found[0]) if found else None


def _rows(connection: sqlite3.Connection, condition: str, *values: object) -> list[Any]:
    there = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = ?"
    if connection.execute(there, (_TABLE,)).fetchone() is None:
        return []
    sql = f"SELECT name, value FROM {_TABLE} WHERE {condition}"
    return connection.execute(sql, values).fetchall()


def make_documents(connection: sqlite3.Connection) -> None:
    """Make the table, if it is not there."""
    sql = f"CREATE TABLE IF NOT EXISTS {_TABLE} (name TEXT PRIMARY KEY, value TEXT NOT NULL)"
    connection.execute(sql)


def write_document(connection: sqlite3.Connection, name: str, value: Any) -> None:
    """Write a document; None removes it."""
    make_documents(connection)
    if value is None:
        connection.execute(f"DELETE FROM {_TABLE} WHERE name = ?", (name,))
    else:
        sql = f"INSERT OR REPLACE INTO {_TABLE} VALUES (?, ?)"
        connection.execute(sql, (name, json.dumps(value)))


def parse_document(name: str, text: object) -> Any:
    """Parse what is stored under a name.

    Raises:
        IntegrityError: It is no JSON (``outbox_damaged``).
    """
    try:
        return json.loads(str(text))
    except ValueError as error:
        raise IntegrityError(
            f"{name} in the outbox of the gallery is damaged: restore the gallery from a copy",
            code="outbox_damaged",
            name=name,
        ) from error
