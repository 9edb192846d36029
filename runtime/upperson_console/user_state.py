"""User state store, one SQLite file: pictures, searches, marks, settings, approvals, key of ids.

A write that has returned survives a killed process and a power failure. Rows have checksums, which
are compared when the file is opened: SQLite has none.
"""

import re
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import numpy as np
from numpy.typing import NDArray

from upperson_console.opaque_ids import KEY_BYTES, IdPermutation
from upperson_rt.arguments import check_name
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.files import make_folder, require_no_links
from upperson_rt.gallery.sqlite.schema import checksum_of_values
from upperson_rt.printable import one_line

_MOST_PICTURES = 1000
_MOST_APPROVALS = 1000
_LONGEST_NAME = 100
_TABLES = """
CREATE TABLE IF NOT EXISTS pictures (
    id TEXT PRIMARY KEY, sha256 TEXT NOT NULL, fingerprint TEXT NOT NULL, vector BLOB NOT NULL,
    jpeg BLOB NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, added REAL NOT NULL,
    checksum INTEGER
);
CREATE TABLE IF NOT EXISTS saved (
    id INTEGER PRIMARY KEY AUTOINCREMENT, user TEXT NOT NULL, name TEXT NOT NULL,
    address TEXT NOT NULL, added REAL NOT NULL, checksum INTEGER, UNIQUE (user, name)
);
CREATE TABLE IF NOT EXISTS marks (
    user TEXT NOT NULL, question TEXT NOT NULL, item INTEGER NOT NULL, yes INTEGER NOT NULL,
    added REAL NOT NULL, checksum INTEGER, PRIMARY KEY (user, question, item)
);
CREATE TABLE IF NOT EXISTS approvals (
    id TEXT PRIMARY KEY, request TEXT NOT NULL, added REAL NOT NULL, checksum INTEGER
);
CREATE TABLE IF NOT EXISTS id_key (key BLOB NOT NULL, checksum INTEGER);
CREATE TABLE IF NOT EXISTS shared (
    saved INTEGER PRIMARY KEY, added REAL NOT NULL, checksum INTEGER
);
CREATE TABLE IF NOT EXISTS settings (
    user TEXT PRIMARY KEY, language TEXT NOT NULL, zone TEXT NOT NULL, checksum INTEGER
);
"""
_GUARD = """
CREATE TRIGGER IF NOT EXISTS saved_adding BEFORE INSERT ON saved BEGIN SELECT sum_of(); END
"""
"""Keeps older releases, which write no checksums, from adding rows: they lack this function. Their
inserts into the other tables fail for the additional column."""

_SUMS = {
    "pictures": "sum_of(id, sha256, fingerprint, vector, jpeg, width, height, added)",
    "saved": "sum_of(id, user, name, address, added)",
    "marks": "sum_of(user, question, item, yes, added)",
    "approvals": "sum_of(id, request, added)",
    "id_key": "sum_of(key)",
    "shared": "sum_of(saved, added)",
    "settings": "sum_of(user, language, zone)",
}
"""The checksum of a row, by table."""

_UNSAVED = "NOT EXISTS (SELECT 1 FROM saved WHERE instr(saved.address, 'picture=' || pictures.id))"
"""Of pictures that no saved search needs."""

_DAMAGED = re.compile("decode|malformed|no such (column|table|index|function)|syntax|user-defined")
"""SQLite's messages that mean damage, as our statements are correct."""


class _DamageError(Exception):
    """The file is damaged."""


@dataclass(frozen=True, kw_only=True)
class QueryPicture:
    """A picture to search with."""

    id: str
    sha256: str
    """Of the file that was sent."""
    vector_D: NDArray[np.float32]
    jpeg: bytes
    size: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SavedSearch:
    """A search with a name."""

    id: int
    user: str
    name: str
    address: str
    """The query string of the search page."""
    added: float
    shared: bool
    """Whether all users see it."""


class UserState:
    """The store. Safe for several threads."""

    def __init__(self, path: Path) -> None:
        """Open the file, or create it and its folder; raises IntegrityError if it is damaged."""
        self._path = path
        self._lock = threading.Lock()
        try:
            make_folder(path.parent, 0o700)
            require_no_links(path.parent)
            if not path.exists():
                path.touch(0o600)
            self._connection = sqlite3.connect(
                path, isolation_level=None, check_same_thread=False, timeout=10
            )
            with self._sqlite_errors():
                for pragma in ("journal_mode = WAL", "synchronous = FULL", "secure_delete = ON"):
                    self._connection.execute(f"PRAGMA {pragma}")
                self._connection.create_function("sum_of", -1, _sum_of, deterministic=True)
                with self._transaction():
                    self._make_tables()
                    for table in _SUMS:
                        self._check(table)
        except OSError as error:
            raise InputError(
                f"cannot write {path}: {error.strerror}; name another folder with  --state"
            ) from error

    def _make_tables(self) -> None:
        """Create missing tables; those of older releases get the column of checksums."""
        execute = self._connection.execute
        for statement in filter(str.strip, _TABLES.split(";")):
            execute(statement)
        for table in _SUMS:
            if "checksum" not in {name for _, name, *_ in execute(f"PRAGMA table_info({table})")}:
                execute(f"ALTER TABLE {table} ADD COLUMN checksum INTEGER")
        execute(_GUARD)

    def _check(self, table: str) -> None:
        """Compare the checksums of a table; rows of older releases get theirs."""
        execute = self._connection.execute
        (problem,) = execute(f"PRAGMA integrity_check({table})").fetchone()
        if problem != "ok":
            raise _DamageError(problem)
        self._sum_up(table)
        sql = f"SELECT count(*) FROM {table} WHERE checksum IS NOT {_SUMS[table]}"
        if count := execute(sql).fetchone()[0]:
            raise _DamageError(f"{count} rows of {table} are not what was written")

    def _sum_up(self, table: str) -> None:
        """Set the checksums of rows that have none."""
        self._connection.execute(
            f"UPDATE {table} SET checksum = {_SUMS[table]} WHERE checksum IS NULL"
        )

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def keep_picture(self, picture: QueryPicture, fingerprint: str) -> None:
        """Keep a picture with its embedding of one model.

        Only the newest thousand, and those of saved searches, are kept.
        """
        vector = picture.vector_D.astype("<f4").tobytes()
        row = (picture.id, picture.sha256, fingerprint, vector, picture.jpeg, *picture.size)
        with self._writing("pictures") as execute:
            execute(
                "INSERT OR REPLACE INTO pictures VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL)",
                (*row, time.time()),
            )
            execute(
                f"DELETE FROM pictures WHERE {_UNSAVED} AND id NOT IN "
                "(SELECT id FROM pictures ORDER BY added DESC LIMIT ?)",
                (_MOST_PICTURES,),
            )

    def forget_pictures(self, before: float) -> None:
        """Delete pictures that were last sent before a Unix time.

        Not those of saved searches, and of exports that were requested later.
        """
        requested = "SELECT 1 FROM approvals WHERE added >= ? AND instr(request, pictures.id)"
        sql = f"DELETE FROM pictures WHERE {_UNSAVED} AND added < ? AND NOT EXISTS ({requested})"
        with self._writing() as execute:
            deleted = execute(sql, (before, before)).rowcount
        if deleted:
            with self._lock, self._sqlite_errors():
                # The log still has them.
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def picture(self, id_: str, fingerprint: str) -> QueryPicture | None:
        """Return a picture with its embedding of a model, or None."""
        found = self._rows(
            "SELECT sha256, vector, jpeg, width, height FROM pictures "
            "WHERE id = ? AND fingerprint = ?",
            id_,
            fingerprint,
        )
        if not found:
            return None
        sha256, vector, jpeg, *size = found[0]
        vector_D = np.frombuffer(vector, "<f4").astype(np.float32)
        return QueryPicture(
            id=id_, sha256=sha256, vector_D=vector_D, jpeg=jpeg, size=(size[0], size[1])
        )

    def save(self, user: str, name: str, address: str, shared: bool = False) -> None:
        """Save a search, for all users if it is shared; one of the same name is replaced."""
        name = check_name(name.strip(), "the name of a search")
        if len(name) > _LONGEST_NAME:
            raise InputError(
                f"the name of a search may have {_LONGEST_NAME} letters at most",
                code="name_too_long",
            )
        with self._writing("saved", "shared") as execute:
            execute(
                "INSERT INTO saved (user, name, address, added) VALUES (?, ?, ?, ?) ON CONFLICT "
                "(user, name) DO UPDATE SET address = excluded.address, checksum = NULL",
                (user, name, address, time.time()),
            )
            sql = "SELECT id FROM saved WHERE (user, name) = (?, ?)"
            (saved,) = execute(sql, (user, name)).fetchone()
            execute("DELETE FROM shared WHERE saved = ?", (saved,))
            if shared:
                execute("INSERT INTO shared VALUES (?, ?, NULL)", (saved, time.time()))

    def saved(self, user: str) -> list[SavedSearch]:
        """Return a user's searches by name, and then those that others share."""
        rows = self._rows(
            "SELECT id, user, name, address, saved.added, shared.saved IS NOT NULL FROM saved "
            "LEFT JOIN shared ON shared.saved = id WHERE user = ? OR shared.saved IS NOT NULL "
            "ORDER BY user != ?, name",
            user,
            user,
        )
        names = ("id", "user", "name", "address", "added", "shared")
        return [SavedSearch(**dict(zip(names, row, strict=True))) for row in rows]

    def forget_saved(self, user: str, id_: int) -> bool:
        """Delete a saved search; return whether it existed."""
        with self._writing("saved") as execute:
            gone = execute("DELETE FROM saved WHERE user = ? AND id = ?", (user, id_))
            execute("DELETE FROM shared WHERE saved NOT IN (SELECT id FROM saved)")
            return bool(gone.rowcount)

    def change_marks(self, user: str, marks_key: str, changes: Mapping[int, bool | None]) -> None:
        """Mark items of a query as right or wrong, or remove their marks for None; others stay."""
        with self._writing("marks") as execute:
            now = time.time()
            for place, (id_, right) in enumerate(changes.items()):
                row = (user, marks_key, id_)
                execute("DELETE FROM marks WHERE (user, question, item) = (?, ?, ?)", row)
                if right is not None:
                    values = (*row, right, now + place / 1e6)
                    execute("INSERT INTO marks VALUES (?, ?, ?, ?, ?, NULL)", values)

    def marks(self, user: str, marks_key: str) -> dict[int, bool]:
        """Return the items that a user marked, and whether as right, in the order of marking."""
        sql = "SELECT item, yes FROM marks WHERE user = ? AND question = ? ORDER BY added"
        return {item: bool(yes) for item, yes in self._rows(sql, user, marks_key)}

    def set_settings(self, user: str, language: str, zone: str) -> None:
        """Keep the language and the time zone of an account; empty ones are not chosen."""
        with self._writing("settings") as execute:
            values = (user, language, zone)
            execute("INSERT OR REPLACE INTO settings VALUES (?, ?, ?, NULL)", values)

    def settings(self, user: str) -> tuple[str, str]:
        """Return the language and the time zone that an account chose, or empty texts."""
        found = self._rows("SELECT language, zone FROM settings WHERE user = ?", user)
        return found[0] if found else ("", "")

    def set_approval(self, id_: str, request: str) -> None:
        """Keep a request for approval, JSON, or replace it; only the newest thousand are kept."""
        with self._writing("approvals") as execute:
            execute(
                "INSERT INTO approvals VALUES (?, ?, ?, NULL) ON CONFLICT (id) DO UPDATE SET "
                "request = excluded.request, checksum = NULL",
                (id_, request, time.time()),
            )
            execute(
                "DELETE FROM approvals WHERE id NOT IN "
                "(SELECT id FROM approvals ORDER BY added DESC LIMIT ?)",
                (_MOST_APPROVALS,),
            )

    def approvals(self, undecided: bool = False) -> list[str]:
        """Return the requests for approval, newest first; all, or only undecided ones."""
        which = "WHERE json_extract(request, '$.decision') IS NULL " if undecided else ""
        sql = f"SELECT request FROM approvals {which}ORDER BY added DESC"
        return [row[0] for row in self._rows(sql)]

    def id_permutation(self) -> IdPermutation:
        """Return the permutation of ids; the first call makes its key.

        It also converts the row ids in the marks and saved searches of older releases, all or none.
        """
        with self._writing("id_key", "marks", "saved") as execute:
            if found := execute("SELECT key FROM id_key").fetchone():
                return IdPermutation(found[0])
            key = secrets.token_bytes(KEY_BYTES)
            ids = IdPermutation(key)
            execute("INSERT INTO id_key VALUES (?, NULL)", (key,))
            for row, item in execute("SELECT rowid, item FROM marks").fetchall():
                sql = "UPDATE marks SET item = ?, checksum = NULL WHERE rowid = ?"
                execute(sql, (ids.opaque(item), row))
            for id_, address in execute("SELECT id, address FROM saved").fetchall():
                if (new := _with_opaque_ids(address, ids)) != address:
                    sql = "UPDATE saved SET address = ?, checksum = NULL WHERE id = ?"
                    execute(sql, (new, id_))
            return ids

    def _rows(self, sql: str, *values: str) -> list[Any]:
        with self._lock, self._sqlite_errors():
            return self._connection.execute(sql, values).fetchall()

    @contextmanager
    def _writing(self, *tables: str) -> Iterator[Callable[..., sqlite3.Cursor]]:
        with self._lock, self._sqlite_errors(), self._transaction():
            yield self._connection.execute
            for table in tables:
                self._sum_up(table)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Run a transaction that excludes other processes."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _sqlite_errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, _DamageError, UnicodeDecodeError) as error:
            is_use = isinstance(error, sqlite3.OperationalError | sqlite3.ProgrammingError)
            if is_use and not _DAMAGED.search(str(error)):
                raise InputError(f"cannot use {self._path}: {one_line(error)}") from error
            raise IntegrityError(
                f"{self._path} is damaged or something else ({one_line(error)}): put back a copy, "
                "or remove it, and with it saved searches, marks and query pictures",
                code="user_state_damaged",
                path=self._path,
            ) from error


def _with_opaque_ids(address: str, ids: IdPermutation) -> str:
    """Return the query string of a search with opaque ids in place of row ids."""
    pairs = parse_qsl(address.lstrip("?"))
    if not {"like", "marks"} & {name for name, _ in pairs}:
        return address

    def opaque(row: re.Match[str]) -> str:
        return str(ids.opaque(int(row[0])) if int(row[0]) < 1 << 63 else row[0])

    return urlencode(
        [(n, re.sub("[0-9]+", opaque, v) if n in ("like", "marks") else v) for n, v in pairs]
    )


def _sum_of(*values: object) -> int:
    return checksum_of_values(values)
