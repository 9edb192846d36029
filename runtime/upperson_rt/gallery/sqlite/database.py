"""The SQLite file of a gallery: made, opened, and used in transactions.

One connection writes; as many as needed read beside it. Errors of SQLite come out as ours.
"""

import json
import os
import sqlite3
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote

from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.files import make_folder
from upperson_rt.gallery.protocol import Meta, check_schema_version, made_now, no_gallery
from upperson_rt.locks import locked_folder

__all__ = ["DATABASE_FILE", "Database", "SqliteMeta", "make"]

DATABASE_FILE = "gallery.sqlite"
SCHEMA_VERSION = 2
LOCK_TIMEOUT_S = 30.0
"""How long a write waits for that of another process."""
_WAL_LIMIT_BYTES = 64 << 20
_CHECKPOINT_PAGES = 4096  # SQLite's 1000 costs a disk with slow syncs a quarter of its rate.
_ADVICE = {
    "locked": f"another process has been writing to it for over {LOCK_TIMEOUT_S:g} s. Nothing was "
    "changed: wait for that process or end it, then try again",
    "readonly": "the file or its folder cannot be written to. Nothing was changed: check the "
    "permissions and the mount",
    "full": "nothing was changed: free some space first; after that old pictures can be deleted "
    "with  upperson-rt gallery prune  (which needs some room itself)",
    "disk I/O error": "nothing was changed: check the disk's space, quota and health",
    "unable to open": "check the permissions of the folder",
}
_TABLES = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    # AUTOINCREMENT: an id is never used again, so what is newer than an index has a higher one.
    """
    CREATE TABLE items (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        key TEXT NOT NULL UNIQUE,
        source TEXT,
        camera TEXT,
        time REAL,
        track TEXT,
        box TEXT,
        crop TEXT,
        attributes TEXT NOT NULL,
        variant TEXT,
        vector BLOB NOT NULL
    )
    """,
    # The log of what is no longer as it was: indexes beside the table read on from where they were.
    "CREATE TABLE changes (seq INTEGER PRIMARY KEY AUTOINCREMENT, id INTEGER NOT NULL)",
    """
    CREATE TRIGGER items_replaced AFTER UPDATE OF id, vector ON items
    BEGIN INSERT INTO changes (id) VALUES (old.id); END
    """,
    """
    CREATE TRIGGER items_deleted AFTER DELETE ON items
    BEGIN INSERT INTO changes (id) VALUES (old.id); END
    """,
    "CREATE INDEX items_by_camera_time ON items (camera, time) WHERE camera IS NOT NULL",
    "CREATE INDEX items_by_time ON items (time)",
    "CREATE INDEX items_by_track ON items (track, camera, time) WHERE track IS NOT NULL",
    "CREATE INDEX items_by_variant ON items (variant)",
    "CREATE INDEX items_by_crop ON items (crop) WHERE crop IS NOT NULL",
)
_State: TypeAlias = tuple[int, int, int] | None


@dataclass(frozen=True, kw_only=True)
class SqliteMeta(Meta):
    """The table `meta`."""

    identity: str
    """Unique to this gallery, so that an index is not used with another one."""


def make(file: Path, fingerprint: str, embed_dim: int) -> None:
    """Make a gallery's database, completely or not at all; one that is there is left alone.

    Raises:
        InputError: It cannot be made.
    """
    try:
        make_folder(file.parent)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as name:
            temporary = Path(name, file.name)
            temporary.touch()
            with _translated(temporary), closing(_connect(temporary)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                _fill(connection, fingerprint, embed_dim)
            with locked_folder(file.parent):
                if not file.exists():  # Else another process was faster.
                    os.rename(temporary, file)
    except OSError as error:
        raise InputError(f"cannot make gallery {file.parent}: {error.strerror}") from error


def _fill(connection: sqlite3.Connection, fingerprint: str, embed_dim: int) -> None:
    meta = SqliteMeta(
        schema_version=SCHEMA_VERSION,
        identity=uuid.uuid4().hex,
        fingerprint=fingerprint,
        embed_dim=embed_dim,
        **made_now(),
    )
    connection.execute("BEGIN IMMEDIATE")
    for statement in _TABLES:
        connection.execute(statement)
    rows = [(name, str(value)) for name, value in asdict(meta).items()]
    connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
    connection.execute("COMMIT")


def _is_writable(path: Path) -> bool:
    """Tell whether a database file and the folder of its log can be written to."""
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


class Database:
    """Transactions on one file; those that read run beside the one that writes."""

    def __init__(self, path: Path) -> None:
        """Open the file of a gallery.

        Raises:
            InputError: There is none, it cannot be opened, or its schema is another.
            IntegrityError: It is damaged, or some other database.
        """
        if not path.is_file():
            raise no_gallery(str(path.parent))
        if not path.stat().st_size:  # SQLite would take it for new, and remove its log.
            raise IntegrityError(
                f"{path} is empty: it is damaged, and was left as it is. Restore it from a copy, "
                "or remove it to begin anew"
            )
        self.path = path
        self.read_only = not _is_writable(path)
        with _translated(path):
            self._writer = _connect(path, self.read_only)
            try:
                self.meta = _read_meta(self._writer, path)
            except BaseException:
                self._writer.close()
                raise
        self._write_lock = threading.Lock()
        self._pool_lock = threading.Lock()
        self._idle: list[tuple[sqlite3.Connection, _State]] = []
        self._closed = False

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Give a connection whose first statement takes a snapshot that lasts to the end."""
        with _translated(self.path):
            connection, state = self._take()
            try:
                connection.execute("BEGIN DEFERRED")
                yield connection
                self._check_unchanged(state)
                connection.execute("ROLLBACK")
            except BaseException as error:
                # A statement that is kept alive by the error would keep its snapshot, too.
                connection.close()
                if isinstance(error, sqlite3.DatabaseError | IntegrityError):
                    self._check_unchanged(state)
                raise
            self._give_back(connection, state)

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Give a connection in a transaction: committed at the end, rolled back on any error."""
        with self._write_lock, _translated(self.path):
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield self._writer
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def close(self) -> None:
        """Close all connections."""
        with self._write_lock, self._pool_lock:
            self._closed = True
            for connection, _ in (*self._idle, (self._writer, None)):
                connection.close()
            self._idle.clear()

    def _take(self) -> tuple[sqlite3.Connection, _State]:
        with self._pool_lock:
            if self._closed:
                raise UsageError(f"gallery {self.path.parent} has been closed")
            state = _unlocked_state(self.path) if self.read_only else None
            while self._idle:
                connection, opened_at = self._idle.pop()
                if opened_at == state:
                    return connection, state
                connection.close()  # It would not see, or mix, what has been written since.
        return _connect(self.path, self.read_only), state

    def _check_unchanged(self, state: _State) -> None:
        if state is not None and _unlocked_state(self.path) != state:
            raise InputError(
                f"gallery {self.path} was written to while it was read; this user cannot write to "
                "the folder, so it was read without locks: try again"
            )

    def _give_back(self, connection: sqlite3.Connection, state: _State) -> None:
        with self._pool_lock:
            if self._closed:
                connection.close()
            else:
                self._idle.append((connection, state))


def _read_meta(connection: sqlite3.Connection, path: Path) -> SqliteMeta:
    foreign = IntegrityError(
        f"{path} is a database, but not a gallery; it was left as it is: name another folder "
        "with  --gallery"
    )
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    if not {"meta", "items"} <= {str(name) for (name,) in tables}:
        raise foreign
    try:
        rows = dict(connection.execute("SELECT name, value FROM meta"))
        version = int(rows["schema_version"])
        check_schema_version(str(path), version, SCHEMA_VERSION)
        return SqliteMeta(
            schema_version=version,
            identity=rows["identity"],
            fingerprint=rows["fingerprint"],
            embed_dim=int(rows["embed_dim"]),
            created=rows["created"],
            generator=rows["generator"],
        )
    except (KeyError, ValueError) as error:
        raise foreign from error
    except sqlite3.OperationalError as error:
        if "no such column" in str(error):
            raise foreign from error
        raise


def _connect(path: Path, read_only: bool = False) -> sqlite3.Connection:
    mode = "mode=rw"
    if read_only:
        mode = "mode=ro" if _unlocked_state(path) is None else "mode=ro&immutable=1"
    connection = sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?{mode}",
        uri=True,
        timeout=LOCK_TIMEOUT_S,
        isolation_level=None,  # Transactions are written out.
        check_same_thread=False,  # One thread at a time: `Database` sees to it.
    )
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")  # What was deleted is overwritten.
    connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
    connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")
    connection.create_function("attribute_equals", 3, _attribute_equals, deterministic=True)
    return connection


def _attribute_equals(attributes: str, key: str, value: str) -> bool:
    """Tell whether a row's attributes have this value under this key; both values are JSON.

    The key never becomes part of a statement or of a JSON path, so it may be anything.
    """
    wanted = json.loads(value)
    try:
        found = json.loads(attributes).get(key)
    except (ValueError, AttributeError):  # Damaged: `Gallery.verify` tells.
        return False
    return isinstance(found, bool) == isinstance(wanted, bool) and bool(found == wanted)


def _unlocked_state(path: Path) -> _State:
    """Return what tells whether a file that is read without locks has changed; None with locks.

    Locks are kept beside the log. Without one nobody writes, and where the folder cannot be written
    to none can be made.
    """
    if path.with_name(path.name + "-wal").exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn errors of SQLite into ours, naming the file and what to do."""
    try:
        yield
    except sqlite3.ProgrammingError as error:
        raise UsageError(f"gallery {path.parent} has been closed") from error
    except sqlite3.DatabaseError as error:
        is_damage = not isinstance(error, sqlite3.OperationalError)
        if is_damage or "decode" in str(error):  # A text is not UTF-8.
            raise IntegrityError(
                f"gallery {path} is damaged or not a gallery ({error}); it was left as it is: "
                "restore it from a copy, or index again into another folder"
            ) from error
        advice = next((text for name, text in _ADVICE.items() if name in str(error)), "")
        raise InputError(
            f"cannot use gallery {path}: {error}{'; ' if advice else ''}{advice}"
        ) from error
