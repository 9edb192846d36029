"""The SQLite file of a gallery: made, opened, and used in transactions.

One connection writes; as many as needed read beside it. Errors of SQLite come out as ours. Each
transaction leaves sums over all rows, see `checksums`; how many transactions there were also stands
in a file beside the log, so that a log that lost some is not believed.
"""

import json
import os
import re
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias
from urllib.parse import quote

from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.files import folder_near, make_folder
from upperson_rt.gallery.protocol import no_gallery
from upperson_rt.gallery.sqlite.checksums import (
    ROW,
    DamageError,
    Facet,
    Sums,
    prove_facet,
    prove_metadata,
    prove_rows,
    read_mark,
    write_mark,
)
from upperson_rt.gallery.sqlite.schema import GUARD, SqliteMeta, create, read_meta, read_sums
from upperson_rt.locks import locked_folder
from upperson_rt.printable import one_line

__all__ = ["DATABASE_FILE", "Database", "Transaction", "make"]

DATABASE_FILE = "gallery.sqlite"
LOCK_TIMEOUT_S = 30.0
"""How long a write waits for that of another process."""
_WAL_LIMIT_BYTES = 64 << 20
_MOST_IDLE = 16
"""Connections that are kept to be used again."""
_READERS_KB = 512
"""Pages that each of them keeps. SQLite's 2 MB make searches no quicker: what others write empties
them, and the system keeps the file."""
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
_UNLOCKED = "ro&immutable=1"
_DAMAGED = re.compile(
    "decode|malformed|no such (column|table|index|function)|syntax error|unsupported file format|"
    "no query solution"
)
"""Errors of statements that are right: a text is not UTF-8, or a definition was altered."""
_State: TypeAlias = tuple[int, int, int] | None


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
                create(connection, fingerprint, embed_dim)
            with locked_folder(file.parent):
                if not file.exists():  # Else another process was faster.
                    os.rename(temporary, file)
    except OSError as error:
        raise InputError(f"cannot make gallery {file.parent}: {error.strerror}") from error


def _is_writable(path: Path) -> bool:
    """Tell whether a database file and the folder of its log can be written to."""
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


@dataclass
class Transaction:
    """A connection in a transaction, and what the rows that it sees must come to."""

    connection: sqlite3.Connection
    sums: Sums | None
    """None for a gallery that was made before there were checksums."""
    proven: set[str] = field(default_factory=set)
    """What has been read through by this process: indexes of SQLite, ``rows``, ``items``."""

    @property
    def checksum(self) -> str:
        """SQL for the checksum of a row of ``items``."""
        return "NULL" if self.sums is None else "checksum"

    def execute(self, sql: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        """Run a statement."""
        return self.connection.execute(sql, values)

    def count(self) -> int:
        """Return the number of items."""
        if self.sums is not None:
            return self.sums.rows
        return int(self.execute("SELECT count(*) FROM items").fetchone()[0])

    def prove(self, facet: Facet) -> None:
        """Make sure once that an index of SQLite names all rows that it should.

        Raises:
            DamageError: It does not.
        """
        if self.sums is not None and facet.index not in self.proven:
            prove_facet(self.connection, facet, self.sums)
            self.proven.add(facet.index)

    def prove_rows(self) -> None:
        """Make sure once that all rows are there, and none of an earlier state.

        Raises:
            DamageError: It is not so.
        """
        if self.sums is not None and self.proven.isdisjoint(("rows", "items")):
            prove_rows(self.connection, self.sums)
            self.proven.add("rows")

    def prove_items(self) -> None:
        """Make sure once that the metadata of all rows is there and as it was written.

        Raises:
            DamageError: It is not.
        """
        if self.sums is not None and "items" not in self.proven:
            rows = self.execute(f"SELECT {ROW}, checksum FROM items NOT INDEXED ORDER BY id")
            for _ in prove_metadata(rows, self.sums):
                pass
            self.proven.add("items")


class Database:
    """Transactions on one file; those that read run beside the one that writes."""

    def __init__(self, path: Path) -> None:
        """Open the file of a gallery.

        Raises:
            InputError: There is none, it cannot be opened, or its schema is another.
            IntegrityError: It is damaged, or some other database.
        """
        if not path.is_file():
            raise no_gallery(str(path.parent), folder_near(path.parent, DATABASE_FILE))
        if not path.stat().st_size:  # SQLite would take it for new, and remove its log.
            raise IntegrityError(
                f"{path} is empty: it is damaged, and was left as it is. Restore it from a copy, "
                "or remove it to begin anew"
            )
        self.path = path
        self.read_only = not _is_writable(path)
        self._mark = path.with_name(f"{path.name}-mark")
        with _translated(path):
            acknowledged = read_mark(self._mark)
            if acknowledged is not None:
                self._check_mark(*acknowledged)
            self._writer = _connect(path, self._mode(_unlocked_state(path)))
            try:
                # Sums vouch for what it says.
                self._about, _ = read_sums(self._writer, path, read_meta(self._writer, path))
            except BaseException:
                self._writer.close()
                raise
        self._write_lock = threading.Lock()
        self._pool_lock = threading.Lock()
        self._idle: list[tuple[sqlite3.Connection, _State]] = []
        self._closed = False
        self._proven: set[str] = set()

    @property
    def meta(self) -> SqliteMeta:
        """What the gallery says about itself."""
        return self._about.meta

    @property
    def keeps_sums(self) -> bool:
        """See `Vouched.keeps_sums`."""
        return self._about.keeps_sums

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        """Give a transaction that sees the state of now to its end."""
        with _translated(self.path):
            connection, state = self._take()
            try:
                connection.execute("BEGIN DEFERRED")
                yield self._begun(connection)
                self._check_unchanged(state)
                connection.execute("ROLLBACK")
            except BaseException as error:
                # A statement that is kept alive by the error would keep its snapshot, too.
                connection.close()
                if isinstance(error, sqlite3.Error | IntegrityError):
                    self._check_unchanged(state)
                raise
            self._give_back(connection, state)

    @contextmanager
    def writing(self) -> Iterator[Transaction]:
        """Give a transaction that is committed at the end, and rolled back on any error.

        What it adds and removes must be in its sums by then.
        """
        with self._write_lock, _translated(self.path):
            self._writer.execute("BEGIN IMMEDIATE")
            before = self._about
            try:
                transaction = self._begun(self._writer)
                yield transaction
                sums = transaction.sums
                if sums is not None:
                    self._check_log(sums)
                    sums.commits += 1
                    self._about.write_sums(self._writer, sums)
                self._writer.execute("COMMIT")
                if sums is not None:
                    write_mark(self._mark, self.meta.identity, sums.commits)
            except BaseException:
                self._about = before
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
        if not self.read_only and not _log_of(self.path).exists():
            with suppress(OSError):  # Without a log it says nothing that the database does not.
                self._mark.unlink(missing_ok=True)

    def _begun(self, connection: sqlite3.Connection) -> Transaction:
        """Take the snapshot of a transaction."""
        known = self._about
        about, sums = read_sums(connection, self.path, known)
        if about is not known:  # Else a thread that writes may have just changed it.
            self._about = about
        return Transaction(connection, sums, self._proven)

    def reload(self, connection: sqlite3.Connection) -> None:
        """Read again what the gallery says about itself."""
        self._about = read_meta(connection, self.path)

    def _check_log(self, sums: Sums) -> None:
        """Check that the triggers kept the log of changes, which has a count of its own."""
        sql = "SELECT seq FROM sqlite_sequence WHERE name = 'changes'"
        found = self._writer.execute(sql).fetchone() or (0,)
        if found[0] != sums.seq:
            raise DamageError("the log of changes is not what it should be")

    def _check_mark(self, identity: str, commits: int) -> None:
        """Check that the log is this gallery's, and has all transactions that were acknowledged.

        Not with a connection that writes: it would cut the log when it is closed.
        """
        log = _log_of(self.path)
        while True:
            state = _unlocked_state(self.path)
            has_log = log.exists() and log.stat().st_size > 0
            with closing(_connect(self.path, "ro" if state is None else _UNLOCKED)) as connection:
                try:
                    connection.execute("BEGIN DEFERRED")  # Both of one state.
                    said = read_meta(connection, self.path)
                    about, sums = read_sums(connection, self.path, said)
                except sqlite3.Error:
                    if state == _unlocked_state(self.path):
                        raise
                    continue  # Another process began or ended meanwhile.
            if state == _unlocked_state(self.path):
                break
        if about.meta.identity != identity:
            if has_log:
                raise DamageError(
                    "its log is of another gallery, or it was replaced beside a log: put back what "
                    f"belongs together ({self._mark.name} is of gallery {identity})"
                )
            if not self.read_only:
                with suppress(OSError):  # Left behind by what was replaced.
                    self._mark.unlink()
            return
        found = 0 if sums is None else sums.commits
        if found < commits:
            raise DamageError(
                f"it has {found} of {commits} acknowledged transactions, its log is damaged or lost"
                f" or it was replaced by an earlier copy: to go on with what is left remove "
                f"{self._mark.name}"
            )

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
        connection = _connect(self.path, self._mode(state))
        connection.execute(f"PRAGMA cache_size = -{_READERS_KB}")
        return connection, state

    def _mode(self, state: _State) -> str:
        """Return how to open the file, which has a state where it must be read without locks."""
        if not self.read_only:
            return "rw"
        return "ro" if state is None else _UNLOCKED

    def _check_unchanged(self, state: _State) -> None:
        if state is not None and _unlocked_state(self.path) != state:
            raise InputError(
                f"gallery {self.path} was written to while it was read; this user cannot write to "
                "the folder, so it was read without locks: try again"
            )

    def _give_back(self, connection: sqlite3.Connection, state: _State) -> None:
        with self._pool_lock:
            if self._closed or len(self._idle) >= _MOST_IDLE:
                connection.close()
            else:
                self._idle.append((connection, state))


def _connect(path: Path, mode: str = "rw") -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"file:{quote(os.fsencode(path.absolute()))}?mode={mode}",
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
    connection.create_function(GUARD, 0, lambda: None)
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
    if _log_of(path).exists():
        return None
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _log_of(path: Path) -> Path:
    return path.with_name(f"{path.name}-wal")


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn errors of SQLite into ours, naming the file and what to do."""
    try:
        yield
    except sqlite3.ProgrammingError as error:
        raise UsageError(f"gallery {path.parent} has been closed") from error
    except DamageError as error:
        raise IntegrityError(
            f"gallery {path} is damaged: {one_line(error)}; it was left as it is: see  "
            "upperson-rt gallery verify, restore it from a copy, or index again into another folder"
        ) from error
    except (sqlite3.Error, UnicodeDecodeError) as error:  # SQLite's own words quote what it read.
        if not isinstance(error, sqlite3.OperationalError) or _DAMAGED.search(str(error)):
            raise IntegrityError(
                f"gallery {path} is damaged or not a gallery ({one_line(error)}); it was left as "
                "it is: restore it from a copy, or index again into another folder"
            ) from error
        advice = next((text for name, text in _ADVICE.items() if name in str(error)), "")
        raise InputError(
            f"cannot use gallery {path}: {one_line(error)}{'; ' if advice else ''}{advice}"
        ) from error
