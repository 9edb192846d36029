"""The SQLite file of a gallery: made, opened, and used in transactions.

One connection writes; as many as needed read beside it. Errors of SQLite come out as ours. Each
transaction leaves sums over all rows, see `checksums`; how many transactions there were also stands
in a file beside the log, so that a log that lost some is not believed.
"""

import os
import re
import sqlite3
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.files import folder_near, make_folder
from upperson_rt.gallery.protocol import no_gallery
from upperson_rt.gallery.sqlite.access import (
    LOCK_TIMEOUT_S,
    MAIN_FILE_ONLY,
    Beside,
    Lease,
    alone,
    connect,
    connect_locked,
    lease,
    log_of,
    raw_file,
)
from upperson_rt.gallery.sqlite.checksums import (
    FACETS,
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
from upperson_rt.gallery.sqlite.pages import Log, is_free_list_sound
from upperson_rt.gallery.sqlite.schema import (
    SqliteMeta,
    Vouched,
    create,
    first_commit_of,
    read_meta,
    read_sums,
)
from upperson_rt.locks import locked_folder
from upperson_rt.printable import one_line

__all__ = ["DATABASE_FILE", "Database", "Transaction", "make", "structural_problems"]

DATABASE_FILE = "gallery.sqlite"
_MOST_IDLE = 16
"""Connections that are kept to be used again."""
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
_DAMAGED = re.compile(
    "decode|malformed|no such (column|table|index|function)|syntax error|unsupported file format|"
    "no query solution"
)
"""Errors of statements that are right: a text is not UTF-8, or a definition was altered."""


def make(file: Path, fingerprint: str, embed_dim: int) -> None:
    """Make a gallery's database, completely or not at all; one that is there is left alone.

    Raises:
        InputError: It cannot be made; folders that were made for it are gone again.
    """
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
    except OSError as error:
        _remove_empty(missing)
        raise InputError(f"cannot make gallery {file.parent}: {error.strerror}") from error
    except BaseException:
        _remove_empty(missing)
        raise


def _fill(file: Path, fingerprint: str, embed_dim: int) -> None:
    """Make the tables in an empty file, and read them back.

    Without a log until everything is in the file: a full disk fails a checkpoint without a word.
    """
    with closing(connect(file)) as connection:
        create(connection, fingerprint, embed_dim)
        if connection.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
            raise sqlite3.OperationalError("disk I/O error: no log can be kept")
    with closing(connect(file, MAIN_FILE_ONLY)) as connection:
        read_sums(connection, file, read_meta(connection, file))
        for problem in structural_problems(connection, "quick_check"):
            raise sqlite3.OperationalError(f"disk I/O error: {problem}")


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def structural_problems(connection: sqlite3.Connection, pragma: str) -> Iterator[str]:
    """Yield what SQLite itself finds wrong: ``quick_check`` looks at everything but its indexes."""
    for (line,) in connection.execute(f"PRAGMA {pragma}"):
        if line != "ok":
            yield f"SQLite: {line}"


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

    def changes_problem(self) -> str | None:
        """Say what is wrong with the number that SQLite keeps for the log of changes, or None."""
        sql = "SELECT seq FROM sqlite_sequence WHERE name = 'changes'"
        (found,) = self.execute(sql).fetchone() or (0,)
        if self.sums is not None and found != self.sums.seq:
            return "the log of changes is not what it should be"
        return None

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

    def prove_all(self) -> None:
        """Make sure once of everything that searches rely on beside the vectors.

        Raises:
            DamageError: Something was altered.
        """
        self.prove_items()
        for facet in FACETS:
            self.prove(facet)


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
        self._write_lock = threading.Lock()
        self._pool_lock = threading.Lock()
        self._idle: list[tuple[sqlite3.Connection, Lease]] = []
        self._closed = False
        self._damaged = False
        """Whether damage was found: a log is not checkpointed into it."""
        self._writer: sqlite3.Connection | None = None
        """Made for the first write: until then nothing is changed."""
        self._proven: set[str] = set()
        with _translated(path):
            self._about = self._admit()

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
                yield transaction
                sums = transaction.sums
                if sums is not None:
                    _check_changes(transaction)
                    sums.commits += 1
                    self._about.write_sums(writer, sums)
                if beside is not None:
                    self._remove_mark_of_another()
                with alone(self.path) as is_alone:
                    pages = _CHECKPOINT_PAGES if is_alone else 0
                    writer.execute(f"PRAGMA wal_autocheckpoint = {pages}")
                    writer.execute("COMMIT")
                if sums is not None:
                    write_mark(self._mark, self.meta.identity, sums.commits)
            except BaseException as error:
                self._about = before
                if writer.in_transaction:
                    writer.execute("ROLLBACK")
                if _is_damage(error):
                    self._damaged = True
                    self._close_writer(writer, beside)
                raise

    def _open_writer(self) -> Beside | None:
        """Open the connection that writes; return what it may change beside the file.

        Raises:
            DamageError: What every change relies on is damaged; nothing was changed.
        """
        if self._closed:
            raise UsageError(f"gallery {self.path.parent} has been closed")
        self._about = self._admit()
        with self._leased() as (connection, held):
            transaction = self._begun(connection)
            if not self._is_free_list_sound(connection, held):
                for problem in structural_problems(connection, "quick_check"):
                    raise DamageError(problem)
            if transaction.sums is not None:
                _check_changes(transaction)
        if self.read_only:
            self._writer = connect(self.path, MAIN_FILE_ONLY)
            return None
        beside = None if held.state is None else Beside(self.path)
        self._writer = connect_locked(self.path, "rw")
        return beside

    def _remove_mark_of_another(self) -> None:
        acknowledged = read_mark(self._mark)
        if acknowledged is not None and acknowledged[0] != self.meta.identity:
            with suppress(OSError):  # Left behind by what was replaced.
                self._mark.unlink()

    def _is_free_list_sound(self, connection: sqlite3.Connection, held: Lease) -> bool:
        """Tell whether new pages may be taken; where it is false that is not certain."""
        if held.state is None:
            return bool(connection.execute("PRAGMA freelist_count").fetchone() == (0,))
        with raw_file(self.path) as handle:
            return handle is not None and is_free_list_sound(handle, held.log)

    def close(self) -> None:
        """Close all connections."""
        with self._write_lock, self._pool_lock:
            self._closed = True
            for connection, _ in self._idle:
                connection.close()
            self._idle.clear()
            if self._writer is not None:
                self._close_writer(self._writer)

    def _close_writer(self, writer: sqlite3.Connection, beside: Beside | None = None) -> None:
        with alone(self.path) as is_alone:
            with ExitStack() as stack:
                if self._damaged or not is_alone:
                    # Its lock keeps SQLite from a checkpoint, for which it is read-only itself.
                    with suppress(sqlite3.Error):
                        guard = stack.enter_context(closing(connect(self.path, "ro")))
                        guard.execute("PRAGMA schema_version").fetchone()
                writer.close()
                self._writer = None
            if beside is not None and is_alone:
                beside.put_back()
        if not (self.read_only or self._damaged or log_of(self.path).exists()):
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

    def _admit(self) -> Vouched:
        """Read what the gallery says about itself, if its files belong together.

        Raises:
            DamageError: They do not, or one was altered.
        """
        acknowledged = read_mark(self._mark)
        with self._leased() as (connection, held):
            about, sums = read_sums(connection, self.path, read_meta(connection, self.path))
            if held.state is not None:
                self._check_journal()
            if held.log is not None:
                self._check_log(held.log, about, sums, connection)
            if acknowledged is not None and (held.state is None or held.log is not None):
                self._check_identity(about, acknowledged[0])
            if acknowledged is not None and acknowledged[0] == about.meta.identity:
                self._check_commits(0 if sums is None else sums.commits, acknowledged[1])
        return about

    def _check_journal(self) -> None:
        """Check that there is no journal of another kind: SQLite would undo with it, and write."""
        journal = self.path.with_name(f"{self.path.name}-journal")
        with suppress(FileNotFoundError):
            if journal.stat().st_size:
                raise DamageError(
                    f"{journal.name} lies beside it, which is of another database: remove that"
                )

    def _check_identity(self, about: Vouched, identity: str) -> None:
        """Check that a log is of the gallery that another file is of."""
        if about.meta.identity != identity:
            raise DamageError(
                "its log is of another gallery, or it was replaced beside a log: put back what "
                f"belongs together ({about.meta.identity} and {identity})"
            )

    def _check_log(
        self, log: Log, about: Vouched, sums: Sums | None, connection: sqlite3.Connection
    ) -> None:
        """Check that a log goes on from the file, of which some may have been checkpointed."""
        with closing(connect(self.path, MAIN_FILE_ONLY)) as alone_in_file:
            try:
                file_about = read_meta(alone_in_file, self.path)
                _, file_sums = read_sums(alone_in_file, self.path, file_about)
            except (sqlite3.Error, InputError, IntegrityError):
                return  # A checkpoint under way was killed: the log has the rest.
        self._check_identity(about, file_about.meta.identity)
        if sums is None or file_sums is None:
            return
        first = first_commit_of(log, connection, about)
        if file_sums.commits > sums.commits or (first or 0) > file_sums.commits + 1:
            raise DamageError(
                f"its log has the transactions {first} to {sums.commits}, the file ends at "
                f"{file_sums.commits}: they are of different times, put back what belongs together"
            )

    def _check_commits(self, found: int, acknowledged: int) -> None:
        if found < acknowledged:
            raise DamageError(
                f"it has {found} of {acknowledged} acknowledged transactions, its log is damaged or"
                " lost or it was replaced by an earlier copy: to go on with what is left remove "
                f"{self._mark.name}"
            )

    def _take(self) -> tuple[sqlite3.Connection, Lease]:
        with self._pool_lock:
            if self._closed:
                raise UsageError(f"gallery {self.path.parent} has been closed")
            held = lease(self.path, self._idle[-1][1] if self._idle else None)
            while self._idle:
                connection, before = self._idle.pop()
                if before.state == held.state:
                    return connection, held
                connection.close()  # It would not see, or mix, what has been written since.
        try:
            return (connect_locked if held.state is None else connect)(self.path, held.mode), held
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


def _check_changes(transaction: Transaction) -> None:
    """Check that the triggers kept the log of changes, which has a count of its own."""
    if (problem := transaction.changes_problem()) is not None:
        raise DamageError(problem)


def _is_damage(error: BaseException) -> bool:
    """Tell whether an error says that what was read is damaged."""
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
        raise UsageError(f"gallery {path.parent} has been closed") from error
    except DamageError as error:
        raise IntegrityError(
            f"gallery {path} is damaged: {one_line(error)}; it was left as it is: see  "
            "upperson-rt gallery verify, restore it from a copy, or index again into another folder"
        ) from error
    except (sqlite3.Error, UnicodeDecodeError) as error:  # SQLite's own words quote what it read.
        if _is_damage(error):
            raise IntegrityError(
                f"gallery {path} is damaged or not a gallery ({one_line(error)}); it was left as "
                "it is: restore it from a copy, or index again into another folder"
            ) from error
        advice = next((text for name, text in _ADVICE.items() if name in str(error)), "")
        raise InputError(
            f"cannot use gallery {path}: {one_line(error)}{'; ' if advice else ''}{advice}"
        ) from error
