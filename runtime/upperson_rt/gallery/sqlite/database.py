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
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from upperson_rt.errors import InputError, IntegrityError, UppersonError, UsageError
from upperson_rt.files import folder_near, make_folder, read_bounded
from upperson_rt.gallery.protocol import no_gallery
from upperson_rt.gallery.sqlite import access, schema
from upperson_rt.gallery.sqlite.access import LOCK_TIMEOUT_S, MAIN_FILE_ONLY, Beside, Lease, Log
from upperson_rt.gallery.sqlite.free_pages import FreePages
from upperson_rt.gallery.sqlite.schema import ROW, DamageError, Description, SqliteMeta, Sums
from upperson_rt.locks import locked_folder
from upperson_rt.machine import lower_priority
from upperson_rt.printable import get_logger, one_line

_LOG = get_logger(__name__)

DATABASE_FILE = "gallery.sqlite"
CHANGES_PROBLEM = "the log of changes is not what it should be"
_MOST_IDLE = 16
"""Connections that are kept to be used again."""
_CHECKPOINT_BYTES = 16 << 20  # SQLite's 4 MB cost a disk with slow syncs a quarter of its rate.
_ADVICE = {
    "locked": (
        "gallery_locked",
        f"another process has been writing to it for over {LOCK_TIMEOUT_S:g} s. Nothing was "
        "changed: wait for that process or end it, then try again",
    ),
    "readonly": (
        "gallery_read_only",
        "the file or its folder cannot be written to. Nothing was changed: check the permissions "
        "and the mount",
    ),
    "full": (
        "disk_full",
        "nothing was changed: free some space first; after that old pictures can be deleted with  "
        "upperson-rt gallery prune  (which needs some room itself)",
    ),
    "disk I/O error": (
        "disk_error",
        "nothing was changed: check the disk's space, quota and health",
    ),
    "unable to open": ("gallery_not_opened", "check the permissions of the folder"),
}
"""By the words of SQLite: code and advice."""
_DAMAGED = re.compile(
    "decode|malformed|no such (column|table|index|function)|syntax error|unsupported file format|"
    "no query solution"
)
"""Errors of statements that are right: a text is not UTF-8, or a definition was altered."""


def make(file: Path, fingerprint: str, embed_dim: int) -> None:
    """Make a gallery's database, completely or not at all; one that is there is left alone."""
    missing = [place for place in (file.parent, *file.parent.parents) if not place.exists()]
    try:
        make_folder(file.parent)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as name:
            temporary = Path(name, file.name)
            temporary.touch()
            with _translated(file):
                _fill(temporary, fingerprint, embed_dim)
            with locked_folder(file.parent):
                if not file.exists():  # Else another process was faster.
                    temporary.rename(file)
    except BaseException as error:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        if not isinstance(error, OSError):
            raise
        raise InputError(
            f"cannot make gallery {file.parent}: {error.strerror}",
            code="gallery_not_made",
            path=file.parent,
        ) from error


def _fill(file: Path, fingerprint: str, embed_dim: int) -> None:
    """Make the tables in an empty file, and read them back.

    Without a log until everything is in the file: a full disk fails a checkpoint without a word.
    """
    with closing(access.connect(file)) as connection:
        schema.create(connection, fingerprint, embed_dim)
        if connection.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
            raise sqlite3.OperationalError("disk I/O error: no log can be kept")
    with closing(access.connect(file, MAIN_FILE_ONLY)) as connection:
        schema.read_sums(connection, file, schema.read_meta(connection, file))
        for problem in schema.structural_problems(connection):
            raise sqlite3.OperationalError(f"disk I/O error: {problem}")


def _is_writable(path: Path) -> bool:
    """Whether a database file and the folder of its log can be written to."""
    return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)


@dataclass
class Transaction:
    """A connection in a transaction, and what the rows that it sees must come to."""

    connection: sqlite3.Connection
    sums: Sums | None
    """None for a gallery that was made before there were checksums."""
    checked: set[str] = field(default_factory=set)
    """What this process has read through: ``structure``, ``table``, ``items``."""
    beside: Callable[[], None] = lambda: None
    """Starts the check of the table beside other work."""

    @property
    def checksum(self) -> str:
        """SQL for the checksum of a row of ``items``."""
        return "NULL" if self.sums is None else "checksum"

    def execute(self, sql: str, values: Sequence[object] = ()) -> sqlite3.Cursor:
        """Run a statement."""
        return self.connection.execute(sql, values)

    def check_changes(self) -> None:
        """Check that the triggers kept the log of changes, by the number that SQLite keeps."""
        sql = "SELECT seq FROM sqlite_sequence WHERE name = 'changes'"
        (found,) = self.execute(sql).fetchone() or (0,)
        if self.sums is not None and found != self.sums.seq:
            raise DamageError(CHANGES_PROBLEM, "changes_altered")

    def count(self) -> int:
        """Return the number of items."""
        if self.sums is not None:
            return self.sums.rows
        return int(self.execute("SELECT count(*) FROM items").fetchone()[0])

    def check_table(self, now: bool = False) -> None:
        """Check once that all rows are there, and that SQLite's indexes name the right ones.

        Whether a row fits its checksum is checked when the row is read. In a large gallery that
        takes minutes, so it is done beside other work; ``now`` waits for it.
        """
        if self.sums is None or "table" in self.checked:
            return
        if self.sums.rows >= LARGE_ROWS and not now:
            self.beside()
            return
        if "structure" not in self.checked:
            for problem in schema.structural_problems(self.connection, of_items=True):
                raise DamageError(problem)
        schema.check_totals(self.connection, self.sums)
        self.checked |= {"structure", "table"}

    def check_items(self) -> None:
        """Check once that the metadata of all rows is there and as it was written."""
        if self.sums is not None and "items" not in self.checked:
            rows = self.execute(f"SELECT {ROW}, checksum FROM items NOT INDEXED ORDER BY id")
            for _ in schema.with_checked_metadata(rows, self.sums):
                pass
            self.checked.add("items")


LARGE_ROWS = 1_000_000
"""Rows from which on reading through the file takes too long to wait for it."""
_CHECKED_S = 7 * 86_400.0
"""How long a large file that was closed in order need not be read through before a change."""
_SMALLEST_BYTES, _MOST_NOTE_BYTES = 512, 4096
"""SQLite takes a smaller file for a new one, and removes its log."""


class Database:
    """Transactions on one file; those that read run beside the one that writes."""

    def __init__(self, path: Path) -> None:
        """Open the file of a gallery; change nothing before the first write."""
        try:
            if path.is_symlink():  # SQLite keeps log and locks beside the file that it leads to.
                path = path.resolve()
            size_bytes = path.stat().st_size if path.is_file() else None
        except OSError as error:
            raise InputError(
                f"cannot use gallery {path}: {error.strerror}; check the permissions of the folder",
                code="gallery_unusable",
                path=path,
            ) from error
        if size_bytes is None:
            raise no_gallery(str(path.parent), folder_near(path.parent, DATABASE_FILE))
        if size_bytes < _SMALLEST_BYTES:
            raise IntegrityError(
                f"{path} is empty or nearly so: it is damaged, and was left as it is. Restore it "
                "from a copy, or remove it to begin anew",
                code="gallery_file_empty",
                path=path,
            )
        for name in ("-wal", "-shm", "-journal", "-mark", "-checked"):
            beside = path.with_name(path.name + name)
            if beside.exists() and not beside.is_file():
                raise IntegrityError(
                    f"{beside} is no regular file: nothing was read or changed; remove it, or put "
                    "back what belongs to the gallery",
                    code="not_a_file",
                    path=beside,
                )
        self.path = path
        self.read_only = not _is_writable(path)
        self._mark = path.with_name(f"{path.name}-mark")
        self._write_lock = threading.Lock()
        self._pool_lock = threading.Lock()
        self._idle: list[tuple[sqlite3.Connection, Lease]] = []
        self._closed = False
        self._damaged = False
        """Whether damage was found: a log is not checkpointed into it."""
        self._writer: sqlite3.Connection | None = None
        self._checked: set[str] = set()
        self._note = path.with_name(f"{path.name}-checked")
        self._is_large = False
        self._read_at: float | None = None
        """When a process read through the file; None if it is not known."""
        self._checker: threading.Thread | None = None
        self._checking: sqlite3.Connection | None = None
        self._found: DamageError | None = None
        """What the check beside other work found."""
        with _translated(path):
            self._about = self._admit()

    @property
    def meta(self) -> SqliteMeta:
        """What the gallery says about itself."""
        return self._about.meta

    @property
    def has_sums(self) -> bool:
        """Whether rows have checksums; see `Description.keeps_sums`."""
        return self._about.keeps_sums

    @contextmanager
    def reading(self) -> Iterator[Transaction]:
        """Give a transaction that sees the state of now to its end."""
        with _translated(self.path), self._leased() as (connection, _):
            yield self._begun(connection)

    @contextmanager
    def _leased(self) -> Iterator[tuple[sqlite3.Connection, Lease]]:
        """Give a connection in a transaction that reads, and how it reads."""
        connection, held = self._take()
        try:
            try:
                connection.execute("BEGIN DEFERRED")
                yield connection, held
                held.check()
                connection.execute("ROLLBACK")
            except BaseException as error:
                # A statement that is kept alive by the error would keep its snapshot, too.
                connection.close()
                if _is_damage(error):
                    held.check()
                    self._damaged = True
                raise
            self._give_back(connection, held)
        finally:
            held.end()

    @contextmanager
    def writing(self) -> Iterator[Transaction]:
        """Give a transaction that is committed at the end, and rolled back on any error.

        What it adds and removes must be in its sums by then. If the first one of a process meets
        damage, all files are left as they were.
        """
        with self._write_lock, _translated(self.path):
            beside = None
            if self._writer is None:
                beside = self._open_writer()
            writer = self._writer
            assert writer is not None
            before = self._about
            try:
                writer.execute("BEGIN IMMEDIATE")
                transaction = self._begun(writer)
                if transaction.sums is not None and not self._about.is_current:
                    schema.upgrade(writer, transaction.sums)
                    self.reload(writer)
                yield transaction
                sums = transaction.sums
                if sums is not None:
                    transaction.check_changes()
                    sums.commits += 1
                    self._about.write_sums(writer, sums)
                    self._is_large = sums.rows >= LARGE_ROWS
                acknowledged = schema.read_mark(self._mark) if beside is not None else None
                if acknowledged is not None and acknowledged[0] != self.meta.identity:
                    with suppress(OSError):  # Left behind by what was replaced.
                        self._mark.unlink()
                with access.folder_lock(self.path) as is_alone:
                    (page_bytes,) = writer.execute("PRAGMA page_size").fetchone()
                    pages = _CHECKPOINT_BYTES // page_bytes if is_alone else 0
                    writer.execute(f"PRAGMA wal_autocheckpoint = {pages}")
                    writer.execute("COMMIT")
                if sums is not None:
                    schema.write_mark(self._mark, self.meta.identity, sums.commits)
            except BaseException as error:
                self._about = before
                if writer.in_transaction:
                    writer.execute("ROLLBACK")
                if _is_damage(error):
                    self._damaged = True
                    self._close_writer(writer, beside)
                raise

    def _open_writer(self) -> Beside | None:
        """Open the connection that writes; return what it may change beside the file."""
        if self._closed:
            raise _closed(self.path)
        self._about = self._admit()
        with self._leased() as (connection, held):
            transaction = self._begun(connection)
            if self._reads_through_later(transaction):
                pass
            elif transaction.count() >= LARGE_ROWS and self._has_no_rows_in_free_pages(held):
                self._check_beside()
            else:
                # Of the list of free pages, too: a change would overwrite what it names.
                for problem in schema.structural_problems(connection):
                    raise DamageError(problem)
                transaction.checked.add("structure")
                self._read_at = time.time()
            transaction.check_changes()
        if self.read_only:
            self._writer = access.connect(self.path, MAIN_FILE_ONLY)
            return None
        beside = None if held.state is None else Beside(self.path, held.log)
        self._writer = access.connect_locked(self.path, "rw")
        return beside

    def _has_no_rows_in_free_pages(self, held: Lease) -> bool:
        """Whether pages that a change may overwrite are empty; no if another process may write."""
        if held.state is None:
            return False
        with access.opened_bytes(self.path) as file:
            return not FreePages.read(file, held.log).count_used(file, held.log)

    @contextmanager
    def with_empty_log(self, wait_ms: int = 200) -> Iterator[int | None]:
        """Empty SQLite's log, and give the file until others may write; None if it is read."""
        with self._write_lock, _translated(self.path):
            if self._writer is None:
                self._open_writer()
            writer = self._writer
            assert writer is not None
            lock, opened = access.folder_lock(self.path), access.opened_bytes(self.path)
            with lock as is_alone, opened as file:
                if is_alone:
                    # Most of it without a lock. Then others wait, so this does not.
                    writer.execute("PRAGMA wal_checkpoint(PASSIVE)")
                    writer.execute(f"PRAGMA busy_timeout = {wait_ms}")
                    try:
                        row = writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                    finally:
                        writer.execute(f"PRAGMA busy_timeout = {LOCK_TIMEOUT_S * 1000:.0f}")
                    is_alone = row[0] == 0
                writer.execute("BEGIN IMMEDIATE")
                try:  # Another process may have written in between.
                    is_empty = is_alone and not _has_content(access.log_of(self.path))
                    yield file if is_empty else None
                finally:
                    writer.execute("ROLLBACK")

    def _check_beside(self) -> None:
        """Check the table in a thread, once; later transactions refuse what it finds."""
        with self._pool_lock:
            if self._checker is not None or self._closed:
                return
            self._checker = threading.Thread(target=self._check, name="gallery-check", daemon=True)
        self._checker.start()

    def _check(self) -> None:
        lower_priority()
        # Errors are of the disk, or of the end of this gallery.
        with suppress(UppersonError), self.reading() as transaction:
            if not self._reads_through_later(transaction):
                self._checking = transaction.connection
                try:
                    transaction.check_table(now=True)
                    self._read_at = time.time()
                except DamageError as error:
                    self._found, self._damaged = error, True
                    _LOG.error("gallery %s is damaged: %s", self.path, one_line(error))
                finally:
                    self._checking = None

    def _reads_through_later(self, transaction: Transaction) -> bool:
        """Whether a large file is as a process left it that had read through it lately."""
        if transaction.count() < LARGE_ROWS:
            return False
        with suppress(InputError, ValueError, TypeError, KeyError, OSError):
            found = json.loads(read_bounded(self._note, _MOST_NOTE_BYTES))
            if found["state"] == self._state() and time.time() - found["time"] < _CHECKED_S:
                self._read_at = float(found["time"])
                transaction.checked |= {"structure", "table"}
                return True
        return False

    def _state(self) -> list[int]:
        found = self.path.stat()
        return [found.st_ino, found.st_size, found.st_mtime_ns]

    def close(self) -> None:
        """Close all connections."""
        while self._checker is not None and self._checker.is_alive():
            if (checking := self._checking) is not None:
                with suppress(sqlite3.Error):
                    checking.interrupt()  # Of a statement that runs: there may be another one.
            self._checker.join(0.05)
        with self._write_lock, self._pool_lock:
            self._closed = True
            for connection, _ in self._idle:
                connection.close()
            self._idle.clear()
            if self._writer is not None:
                self._close_writer(self._writer)

    def _close_writer(self, writer: sqlite3.Connection, beside: Beside | None = None) -> None:
        with access.folder_lock(self.path) as is_alone:
            with ExitStack() as stack:
                if self._damaged or not is_alone:
                    # Its lock keeps SQLite from a checkpoint, for which it is read-only itself.
                    with suppress(sqlite3.Error):
                        guard = stack.enter_context(closing(access.connect(self.path, "ro")))
                        guard.execute("PRAGMA schema_version").fetchone()
                writer.close()
                self._writer = None
            if beside is not None and is_alone:
                beside.put_back()
        if not (self.read_only or self._damaged or access.log_of(self.path).exists()):
            with suppress(OSError):  # Without a log it says nothing that the database does not.
                self._mark.unlink(missing_ok=True)
                if self._is_large and self._read_at is not None:
                    note = json.dumps({"state": self._state(), "time": self._read_at})
                    self._note.write_text(note)

    def _begun(self, connection: sqlite3.Connection) -> Transaction:
        """Take the snapshot of a transaction."""
        if self._found is not None:
            raise DamageError(str(self._found), self._found.code, **self._found.fields)
        known = self._about
        about, sums = schema.read_sums(connection, self.path, known)
        if about is not known:  # Else a thread that writes may have just changed it.
            self._about = about
        return Transaction(connection, sums, self._checked, self._check_beside)

    def reload(self, connection: sqlite3.Connection) -> None:
        """Read again what the gallery says about itself."""
        self._about = schema.read_meta(connection, self.path)

    def _admit(self) -> Description:
        """Read what the gallery says about itself, if its files belong together."""
        acknowledged = schema.read_mark(self._mark)
        with self._leased() as (connection, held):
            about, sums = schema.read_sums(
                connection, self.path, schema.read_meta(connection, self.path)
            )
            journal = self.path.with_name(f"{self.path.name}-journal")
            with suppress(FileNotFoundError):
                # SQLite would undo with it, and write.
                if held.state is not None and journal.stat().st_size:
                    raise DamageError(
                        f"{journal.name} lies beside it, which is of another database: remove that"
                    )
            if held.log is not None:
                self._check_log(held.log, about, sums, connection)
            if acknowledged is not None and (held.state is None or held.log is not None):
                self._check_identity(about, acknowledged[0])
            found = 0 if sums is None else sums.commits
            identity, commits = acknowledged or ("", 0)
            if identity == about.meta.identity and found < commits:
                raise DamageError(
                    f"it has {found} of {commits} acknowledged transactions, its log is damaged or "
                    "lost or it was replaced by an earlier copy: to go on with what is left remove "
                    f"{self._mark.name}",
                    "transactions_lost",
                    found=found,
                    acknowledged=commits,
                )
        return about

    def _check_identity(self, about: Description, identity: str) -> None:
        """Check that a log is of the gallery that another file is of."""
        if about.meta.identity != identity:
            raise DamageError(
                "its log is of another gallery, or it was replaced beside a log: put back what "
                f"belongs together ({about.meta.identity} and {identity})",
                "log_of_other_gallery",
            )

    def _check_log(
        self, log: Log, about: Description, sums: Sums | None, connection: sqlite3.Connection
    ) -> None:
        """Check that a log goes on from the file, of which some may have been checkpointed."""
        try:
            with closing(access.connect(self.path, MAIN_FILE_ONLY)) as alone_in_file:
                file_about = schema.read_meta(alone_in_file, self.path)
                _, file_sums = schema.read_sums(alone_in_file, self.path, file_about)
        except (sqlite3.Error, InputError, IntegrityError):
            return  # A checkpoint did not come to its end: the log has the rest.
        self._check_identity(about, file_about.meta.identity)
        if sums is None or file_sums is None:
            return
        ((root,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'meta'")
        first = schema.commit_in(log.page(log.first[root]), about) if root in log.first else None
        if file_sums.commits > sums.commits or (first or 0) > file_sums.commits + 1:
            raise DamageError(
                f"its log has the transactions {first} to {sums.commits}, the file ends at "
                f"{file_sums.commits}: they are of different times, put back what belongs together"
            )

    def _take(self) -> tuple[sqlite3.Connection, Lease]:
        with self._pool_lock:
            if self._closed:
                raise _closed(self.path)
            held = access.lease(self.path, self._idle[-1][1] if self._idle else None)
            while self._idle:
                connection, before = self._idle.pop()
                if before.state == held.state:
                    return connection, held
                connection.close()  # It would not see, or mix, what has been written since.
        connect = access.connect_locked if held.state is None else access.connect
        try:
            return connect(self.path, held.mode), held
        except BaseException:
            held.end()
            raise

    def _give_back(self, connection: sqlite3.Connection, held: Lease) -> None:
        is_reusable = held.state is None or held.state.is_settled
        with self._pool_lock:
            if self._closed or len(self._idle) >= _MOST_IDLE or not is_reusable:
                connection.close()
            else:
                self._idle.append((connection, held))


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _closed(path: Path) -> UsageError:
    return UsageError(
        f"gallery {path.parent} has been closed", code="gallery_closed", path=path.parent
    )


def _is_damage(error: BaseException) -> bool:
    """Whether an error means that what was read is damaged."""
    return isinstance(error, sqlite3.Error | IntegrityError | UnicodeDecodeError) and not (
        isinstance(error, sqlite3.OperationalError | sqlite3.ProgrammingError)
        and not _DAMAGED.search(str(error))
    )


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """Turn errors of SQLite into ours, naming the file and what to do."""
    try:
        yield
    except sqlite3.ProgrammingError as error:
        raise _closed(path) from error
    except DamageError as error:
        raise IntegrityError(
            f"gallery {path} is damaged: {one_line(error)}; it was left as it is: see  upperson-rt "
            "gallery verify, restore it from a copy, or index again into another folder",
            code=error.code,
            path=path,
            **error.fields,
        ) from error
    except (sqlite3.Error, UnicodeDecodeError) as error:  # SQLite's own words quote what it read.
        if _is_damage(error):
            raise IntegrityError(
                f"gallery {path} is damaged or not a gallery ({one_line(error)}); it was left as "
                "it is: restore it from a copy, or index again into another folder",
                code="gallery_damaged",
                path=path,
            ) from error
        known = (entry for name, entry in _ADVICE.items() if name in str(error))
        code, advice = next(known, ("gallery_unusable", ""))
        raise InputError(
            f"cannot use gallery {path}: {one_line(error)}{'; ' if advice else ''}{advice}",
            code=code,
            path=path,
        ) from error
