"""Connections to a gallery's SQLite file: one that writes, and as many as needed that read."""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote

from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.gallery.rows import attribute_equals

__all__ = ["DATABASE_FILE", "LOCK_TIMEOUT_S", "Connections", "connect", "is_writable", "translated"]

DATABASE_FILE = "gallery.sqlite"
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


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn errors of SQLite into ours, naming the file and what to do."""
    try:
        yield
    except sqlite3.ProgrammingError as error:
        raise UsageError(f"gallery {path.parent} has been closed") from error
    except sqlite3.OperationalError as error:
        if "decode" in str(error):  # A text is not UTF-8.
            raise _damaged(path, error) from error
        advice = next((text for name, text in _ADVICE.items() if name in str(error)), "")
        raise InputError(
            f"cannot use gallery {path}: {error}{'; ' if advice else ''}{advice}"
        ) from error
    except sqlite3.DatabaseError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: sqlite3.Error) -> IntegrityError:
    return IntegrityError(
        f"gallery {path} is damaged or not a gallery ({error}); it was left as it is: restore it "
        "from a copy, or index again into another folder"
    )


def connect(path: Path, read_only: bool = False) -> sqlite3.Connection:
    """Open an existing database file; errors are SQLite's own."""
    mode = "mode=rw"
    if read_only:
        mode = "mode=ro" if _unlocked_state(path) is None else "mode=ro&immutable=1"
    connection = sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?{mode}",
        uri=True,
        timeout=LOCK_TIMEOUT_S,
        isolation_level=None,  # Transactions are written out.
        check_same_thread=False,  # One thread at a time: `Connections` sees to it.
    )
    connection.execute("PRAGMA synchronous = FULL")
    connection.execute("PRAGMA secure_delete = ON")  # What was deleted is overwritten.
    connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
    connection.execute(f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}")
    connection.create_function("attribute_equals", 3, attribute_equals, deterministic=True)
    return connection


_State: TypeAlias = tuple[int, int, int] | None


def _unlocked_state(path: Path) -> _State:
    """Return what tells whether a file that is read without locks has changed; None with locks.

    Locks are kept beside the log. Without one nobody writes, and where the folder cannot be written
    to none can be made.
    """
    if path.with_name(path.name + "-wal").exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


class Connections:
    """Transactions on one file; those that read run beside the one that writes."""

    def __init__(self, path: Path, first: sqlite3.Connection, read_only: bool) -> None:
        """Take over a connection that is open already."""
        self.path = path
        self.read_only = read_only
        self._writer = first
        self._write_lock = threading.Lock()
        self._pool_lock = threading.Lock()
        self._idle: list[tuple[sqlite3.Connection, _State]] = []
        self._closed = False

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Give a connection whose first statement takes a snapshot that lasts to the end."""
        with translated(self.path):
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
        with self._write_lock, translated(self.path):
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
        return connect(self.path, self.read_only), state

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


def is_writable(path: Path) -> bool:
    """Tell whether a database file and the folder of its log can be written to."""
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
