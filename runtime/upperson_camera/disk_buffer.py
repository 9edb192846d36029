"""A buffer on disk: rows wait there for a gallery on a server, which may be away.

One file of SQLite for each gallery and model, in a folder that this machine keeps. A row is durable
when `DiskBuffer.put` returns, and stays until the gallery has it: it outlives the process.
"""

import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from upperson_rt.arguments import check_name
from upperson_rt.errors import InputError, IntegrityError, UppersonError
from upperson_rt.files import make_folder
from upperson_rt.gallery import Gallery, Item
from upperson_rt.gallery.protocol import read_item
from upperson_rt.gallery.records import check_new, length_problem, unit_vectors
from upperson_rt.gallery.sqlite.stored import COLUMNS, item_from_row, row_from_item
from upperson_rt.locks import try_lock
from upperson_rt.printable import one_line

_LAYOUT = 1
_TABLE = f"""
    CREATE TABLE IF NOT EXISTS rows (
        seq INTEGER PRIMARY KEY AUTOINCREMENT, {COLUMNS}, variant, vector, arrived, chosen
    )
"""
_ABOUT = "CREATE TABLE IF NOT EXISTS about (gallery PRIMARY KEY, fingerprint) WITHOUT ROWID"
# Of pages of SQLite's 4096 bytes a row with 512 numbers would fill one each.
_PRAGMAS = (
    "page_size = 8192",
    "journal_mode = TRUNCATE",
    "synchronous = FULL",
    "secure_delete = ON",
)
_SMALL_BYTES = 1 << 20
"""A file larger than that is made smaller when it is empty."""


class BufferedRow(NamedTuple):
    """A row that waits for its gallery."""

    seq: int
    """Rises in the order of writing."""
    item: Item
    vector_D: NDArray[np.float32]
    variant: str | None
    stamps: tuple[float, float]
    """What `DiskBuffer.put` was given."""
    is_own: bool
    """Whether this run wrote it."""


class OtherBuffer(NamedTuple):
    """A file in the folder of a buffer in which rows wait that this buffer does not send."""

    path: Path
    rows: int | None
    """None if the file cannot be read."""
    gallery: str | None
    """For which gallery, if the file says so; None for files of older versions."""
    fingerprint: str | None
    """Of its model, as `gallery`."""


class DiskBuffer:
    """Rows in the order in which they were accepted; for any number of threads of one process."""

    def __init__(self, folder: Path, gallery: Gallery, most_bytes: int) -> None:
        """Take a folder; nothing is made before `open`.

        Args:
            folder: Made if it is missing.
            gallery: For which the rows wait; others may share the folder.
            most_bytes: `is_full` from this size on.
        """
        # Options of an address, such as its timeout, are no part of what it names.
        self._about = gallery.location.partition("?")[0], gallery.fingerprint
        name = "\n".join(self._about)
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:16]
        self.path = folder / f"{digest}.sqlite"
        self.size_bytes = 0
        """What the rows take on disk."""
        self._gallery = gallery
        self._most_bytes = most_bytes
        self._changed = threading.Condition()
        self._connection: sqlite3.Connection | None = None
        self._lock = -1
        self._count = 0
        self._last_of_others = 0
        self._finished = False

    def open(self) -> int:
        """Open the file; return how many rows earlier runs left in it.

        Raises:
            InputError: The folder cannot be written to, or another process uses the file.
            IntegrityError: The file is damaged.
        """
        try:
            make_folder(self.path.parent, 0o700)
            self._lock = os.open(self.path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o600)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            self.close()
            raise InputError(
                f"cannot write {self.path}: {error.strerror}: name a folder with  --buffer",
                code="buffer_not_writable",
                path=self.path,
            ) from error
        try:
            if not try_lock(self._lock):
                raise InputError(
                    f"another process buffers rows of gallery {self._gallery.location} in "
                    f"{self.path}: end it first, or name another folder with  --buffer",
                    code="buffer_in_use",
                    path=self.path,
                )
            with self._translated():
                # Threads take turns by the condition.
                self._connection = sqlite3.connect(self.path, check_same_thread=False)
                self._prepare(self._connection)
        except BaseException:
            self.close()
            raise
        return self._count

    def _prepare(self, connection: sqlite3.Connection) -> None:
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}")
        (found,) = connection.execute("PRAGMA user_version").fetchone()
        if found not in (0, _LAYOUT):
            raise IntegrityError(
                f"{self.path} has layout {found}, this program reads {_LAYOUT}: name another "
                "folder with  --buffer",
                code="buffer_unsupported",
                path=self.path,
                found=found,
            )
        with connection:
            connection.execute(_TABLE)
            connection.execute(_ABOUT)
            connection.execute("INSERT OR IGNORE INTO about VALUES (?, ?)", self._about)
            connection.execute(f"PRAGMA user_version = {_LAYOUT}")
        (self._count, self._last_of_others) = connection.execute(
            "SELECT count(*), ifnull(max(seq), 0) FROM rows"
        ).fetchone()
        self._measure(connection)

    def others(self) -> list[OtherBuffer]:
        """Find rows for other galleries or models in the folder that no process is sending."""
        found = []
        for path in sorted(self.path.parent.glob("*.sqlite")):
            if path != self.path and not _is_in_use(path):
                other = _read_other(path)
                if other.rows != 0:
                    found.append(other)
        return found

    def close(self) -> None:
        """Close the file, which keeps its rows."""
        with self._changed:
            if self._connection is not None:
                self._connection.close()
            self._connection = None
            if self._lock >= 0:
                os.close(self._lock)
            self._lock = -1

    def put(
        self,
        items: Sequence[Item],
        vectors_ND: NDArray[np.float32],
        variant: str | None,
        stamps: Sequence[tuple[float, float]],
    ) -> None:
        """Write rows, all or none, also into a full buffer; durable on return.

        Args:
            items: N items.
            vectors_ND: (N, D) of unit length.
            variant: Of the bundle that embedded them.
            stamps: Two numbers an item, for the caller.

        Raises:
            InputError: A gallery would refuse an item or a vector, or the disk is full.
            IntegrityError: The file is damaged.
        """
        gallery = self._gallery
        new = check_new(items)
        unit_ND = unit_vectors(vectors_ND, len(new), gallery.embed_dim, gallery.location)
        rows = [
            (*row_from_item(item), variant, vector_D.astype("<f4").tobytes(), *stamp)
            for item, vector_D, stamp in zip(new, unit_ND, stamps, strict=True)
        ]
        sql = f"INSERT INTO rows ({COLUMNS}, variant, vector, arrived, chosen) VALUES "
        with self._writing(1) as connection:
            connection.executemany(f"{sql} ({', '.join('?' * 12)})", rows)

    def wait(self, timeout_s: float) -> None:
        """Wait until there are rows, or it is finished; at most ``timeout_s``."""
        with self._changed:
            if not self._count and not self._finished:
                self._changed.wait(timeout_s)

    def first(self, most: int) -> list[BufferedRow]:
        """Return the first rows, at most so many."""
        with self._changed:
            if self._connection is None or not self._count:
                return []
            sql = (
                f"SELECT seq, variant, vector, arrived, chosen, {COLUMNS} FROM rows "
                "ORDER BY seq LIMIT ?"
            )
            with self._translated():
                found = self._connection.execute(sql, (most,)).fetchall()
        return [self._row(columns) for columns in found]

    def _row(self, columns: Sequence[Any]) -> BufferedRow:
        seq, variant, vector, arrived, chosen, *metadata = columns
        try:
            if not isinstance(vector, bytes) or len(vector) != 4 * self._gallery.embed_dim:
                raise InputError(f"no vector of {self._gallery.embed_dim} numbers")
            vector_D = np.frombuffer(vector, "<f4").astype(np.float32)
            if (problem := length_problem(vector_D)) is not None:
                raise InputError(problem)
            (item,) = check_new([read_item(item_from_row, metadata, str(self.path))])
            return BufferedRow(
                seq=seq,
                item=item,
                vector_D=vector_D,
                variant=None if variant is None else check_name(variant, "the variant"),
                stamps=(float(arrived), float(chosen)),
                is_own=seq > self._last_of_others,
            )
        except (UppersonError, TypeError, ValueError) as error:
            remedy = f"sqlite3 {quote(str(self.path))} 'DELETE FROM rows WHERE seq = {seq}'"
            cause = error.__cause__ or error  # `read_item` names a command for galleries.
            raise IntegrityError(
                f"row {seq} of {self.path} is damaged ({one_line(cause)}): to go on without it, "
                f"run  {remedy}  , or move the file away to go on without its rows",
                code="buffer_damaged",
                path=self.path,
                row=seq,
            ) from error

    def remove(self, rows: Sequence[BufferedRow]) -> None:
        """Remove rows: the gallery has them."""
        with self._writing(-1) as connection:
            connection.executemany("DELETE FROM rows WHERE seq = ?", [(row.seq,) for row in rows])

    @property
    def is_full(self) -> bool:
        """Whether it has reached its size: nothing new should be accepted."""
        return self.size_bytes >= self._most_bytes

    def finish(self) -> None:
        """Note that no more rows come in this run; returns at once, also if the disk is stuck."""
        self._finished = True

    @property
    def is_finished(self) -> bool:
        """Whether `finish` was called."""
        return self._finished

    def __len__(self) -> int:
        return self._count

    @contextmanager
    def _writing(self, sign: int) -> Iterator[sqlite3.Connection]:
        """Give the connection in a transaction that adds rows (1) or removes rows (-1)."""
        with self._changed:
            connection = self._connection
            if connection is None:
                raise InputError(f"{self.path} has been closed", code="buffer_closed")
            with self._translated(), connection:
                before = connection.total_changes
                yield connection
                changed = connection.total_changes - before
            self._count += sign * changed
            with self._translated():
                if not self._count and os.stat(self.path).st_size > _SMALL_BYTES:
                    with suppress(sqlite3.OperationalError):  # The disk may be full.
                        connection.execute("VACUUM")
                self._measure(connection)
            self._changed.notify_all()

    def _measure(self, connection: sqlite3.Connection) -> None:
        pages, free, size = (
            int(connection.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_count", "freelist_count", "page_size")
        )
        self.size_bytes = (pages - free) * size

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:  # A full disk, or one that turned read-only.
            raise InputError(
                f"cannot write {self.path} ({one_line(error)}): check the disk, or name "
                "another folder with  --buffer",
                code="buffer_not_writable",
                path=self.path,
            ) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(one_line(error)) from error

    def _damaged(self, problem: str) -> UppersonError:
        return IntegrityError(
            f"{self.path} is damaged ({problem}): move it away to go on without its rows",
            code="buffer_damaged",
            path=self.path,
        )


def _is_in_use(path: Path) -> bool:
    """Whether a process has a buffer open."""
    with suppress(OSError):
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR)
        try:
            return not try_lock(lock)
        finally:
            os.close(lock)
    return False


def _read_other(path: Path) -> OtherBuffer:
    rows = about = None
    with suppress(OSError, sqlite3.Error):
        if not path.stat().st_size:  # Nothing was written yet.
            return OtherBuffer(path, 0, None, None)
        # Not read-only: what a killed process began is undone first.
        uri = f"{path.resolve().as_uri()}?mode=rw"
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            (rows,) = connection.execute("SELECT count(*) FROM rows").fetchone()
            about = connection.execute("SELECT gallery, fingerprint FROM about").fetchone()
    return OtherBuffer(path, rows, *(about or (None, None)))
