"""Opens the file of a gallery: with SQLite's locks, or read-only without a trace.

SQLite makes files beside a database to read it, and the last connection that closes checkpoints
and removes the log, whatever log it is. So a gallery that no process has open is read without
SQLite's locks: no file is made, changed or removed. Readers share a lock on the folder (`flock`)
instead; a checkpoint, which changes the file, needs that lock alone. A gallery that a process has
open is read with SQLite's locks.
"""

import json
import os
import sqlite3
import struct
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import quote
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError
from upperson_rt.files import read_bounded
from upperson_rt.gallery.sqlite.schema import GUARD
from upperson_rt.locks import lock_until_closed, unlock_and_close

LOCK_TIMEOUT_S = 30.0
"""How long a write waits for that of another process."""
MAIN_FILE_ONLY = "ro&immutable=1"
"""Reads the database file without its log and without locks."""
_WITH_LOG = f"ro&vfs={'win32' if sys.platform == 'win32' else 'unix'}-none"
"""Reads file and log without locks; the log must hold a transaction, see `Log`, else SQLite removes
it when the connection is closed."""
_WAL_LIMIT_BYTES = 64 << 20
_MOST_SHARED_BYTES = 256 << 20
_READERS_KB = 512
"""Pages that each reader keeps. SQLite's 2 MB make searches no quicker: what others write empties
them, and the system keeps the file."""
_WRITERS_KB = 16_384
"""Pages that a writer keeps: one that runs out of room in a transaction writes them twice."""
_SMALL = f"PRAGMA cache_size = -{_READERS_KB}"
_SETTINGS = {
    "rw": (
        "PRAGMA synchronous = FULL",
        "PRAGMA secure_delete = ON",  # What was deleted is overwritten.
        f"PRAGMA journal_size_limit = {_WAL_LIMIT_BYTES}",
        f"PRAGMA cache_size = -{_WRITERS_KB}",
        "PRAGMA temp_store = MEMORY",  # Else large deletions write their way back into a file.
    ),
    "ro": (_SMALL,),
    MAIN_FILE_ONLY: (_SMALL,),
    # First of all: it then keeps its index of the log in memory.
    _WITH_LOG: ("PRAGMA locking_mode = EXCLUSIVE", _SMALL),
}
_SETTLED_S = 0.1
"""A file that changed later may change again within the same time stamp."""
_LOCK_BYTES = (120, 9)
"""Place and number of the locks in ``-shm``, the last of which each process holds that has it."""
_FileState: TypeAlias = tuple[int, int, int]

_guard = threading.RLock()
"""Held while connections with locks are counted, and while a file with locks is opened and closed
otherwise: closing it ends all locks that this process has on it."""
_with_locks: Counter[str] = Counter()
"""Connections of this process that have locks, by file."""
_without_locks: dict[str, set["_Connection"]] = defaultdict(set)
"""Connections of this process that read a file and its log without locks, by file. Where one is
closed, the system ends all locks of the process on the file: another process would then take the
log for unused. So they stay open as long as there are locks."""

_descriptors: dict[str, list[int]] = defaultdict(list)
"""Other descriptors of files, kept for the same reason."""
_with_descriptors: Counter[str] = Counter()
"""How many use them now."""


class _Connection(sqlite3.Connection):
    """A connection that is closed when it says so, and counted while it has SQLite's locks."""

    place: str | None = None
    """Of the file, if it has SQLite's locks."""
    unlocked: str | None = None
    """Of the file, if it reads it and its log without locks."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._cursors = WeakSet[sqlite3.Cursor]()
        super().__init__(*arguments, **options)

    def execute(self, sql: str, values: Any = (), /) -> sqlite3.Cursor:
        return self._followed().execute(sql, values)

    def executemany(self, sql: str, rows: Any, /) -> sqlite3.Cursor:
        return self._followed().executemany(sql, rows)

    def _followed(self) -> sqlite3.Cursor:
        cursor = self.cursor()
        self._cursors.add(cursor)
        return cursor

    def close(self) -> None:
        for cursor in self._cursors:  # One that an error keeps would put the end off.
            cursor.close()
        with _guard:
            if self.unlocked is not None and _with_locks[self.unlocked]:
                return  # Its end would end the locks of this process: see `_without_locks`.
            super().close()
            _without_locks[self.unlocked or ""].discard(self)
            self.unlocked = None
            if self.place is not None:
                place, self.place = self.place, None
                _with_locks[place] -= 1
                if not _with_locks[place]:
                    for waiting in [*_without_locks[place]]:
                        waiting.close()
                    _close_descriptors(place)


def connect(path: Path, mode: str = "rw") -> sqlite3.Connection:
    """Open a database file; ``mode`` is that of SQLite's URIs."""
    with _guard:
        connection = sqlite3.connect(
            f"file:{quote(os.fsencode(path.absolute()))}?mode={mode}",
            uri=True,
            timeout=LOCK_TIMEOUT_S,
            isolation_level=None,  # Transactions are written out.
            check_same_thread=False,  # One thread at a time: `Database` sees to it.
            factory=_Connection,
        )
        if mode in ("rw", "ro"):
            connection.place = os.path.realpath(path)
            _with_locks[connection.place] += 1
        elif mode == _WITH_LOG:
            connection.unlocked = os.path.realpath(path)
            _without_locks[connection.unlocked].add(connection)
    try:
        for statement in _SETTINGS[mode]:
            connection.execute(statement)
        connection.create_function("attribute_equals", 3, _attribute_equals, deterministic=True)
        connection.create_function(GUARD, 0, lambda: None)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def opened_bytes(path: Path) -> Iterator[int]:
    """Give a descriptor of a database file, to read and write bytes.

    It stays open while this process has SQLite's locks on the file: its end would end them.
    """
    place = os.path.realpath(path)
    with _guard:
        kept, look = _descriptors[place], os.stat(place)
        same = [one for one in kept if os.path.samestat(os.fstat(one), look)]
        if not same:
            binary = getattr(os, "O_BINARY", 0)
            try:
                same = [os.open(place, os.O_RDWR | binary)]
            except OSError:  # A file of others, or a disk that cannot be written to.
                same = [os.open(place, os.O_RDONLY | binary)]
            kept += same
        (descriptor,) = same
        _with_descriptors[place] += 1
    try:
        yield descriptor
    finally:
        with _guard:
            _with_descriptors[place] -= 1
            _close_descriptors(place)


def _close_descriptors(place: str) -> None:
    if not (_with_locks[place] or _with_descriptors[place]):
        for descriptor in _descriptors.pop(place, ()):
            os.close(descriptor)


def connect_locked(path: Path, mode: str) -> sqlite3.Connection:
    """Open a database file with SQLite's locks, while `Beside.put_back` removes nothing of it."""
    with folder_lock(path, wait=True, share=True):
        connection = connect(path, mode)
        try:
            connection.execute("PRAGMA schema_version")  # Opens the log.
        except BaseException:
            connection.close()
            raise
    return connection


@contextmanager
def folder_lock(path: Path, *, wait: bool = False, share: bool = False) -> Iterator[bool]:
    """Lock the folder of a database file until the end, and say whether that was possible.

    While readers without SQLite's locks share this lock, no process may change the file: that needs
    the lock alone.
    """
    folder = None
    with suppress(OSError):  # Not on Windows, nor without the right to list it.
        folder = os.open(path.parent, os.O_RDONLY)
    try:
        is_locked = True
        if folder is not None:
            try:
                lock_until_closed(folder, wait=wait, share=share)
            except BlockingIOError:
                is_locked = False
        yield is_locked
    finally:
        if folder is not None:
            unlock_and_close(folder)


def log_of(path: Path) -> Path:
    """Return where SQLite's log is."""
    return path.with_name(f"{path.name}-wal")


# --- SQLite's log as bytes: SQLite would recover, checkpoint or remove a log that it opens

_LOG_HEADER = struct.Struct(">8I")
_MAGIC, _VERSION = 0x377F0682, 3_007_000
_FRAME_HEADER = struct.Struct(">6I")
_FRAMES_AT_A_TIME = 512
_WORD = 0xFFFFFFFF
_Matrix: TypeAlias = tuple[int, int, int, int]


@dataclass
class Log:
    """What SQLite would read of a log: all frames up to the last complete transaction."""

    path: Path
    page_size: int
    first: dict[int, int] = field(default_factory=dict)
    """By page: the place in the log of its content as the log has it first."""
    last: dict[int, int] = field(default_factory=dict)
    """By page: the place in the log of its content as the log has it last."""

    def page(self, place: int) -> bytes:
        """Return the content of a page."""
        with open(self.path, "rb") as file:
            file.seek(place)
            return file.read(self.page_size)


def read_log(path: Path) -> Log | None:
    """Read which pages a log holds; None if SQLite would take it for empty."""
    with open(path, "rb") as file:
        header = file.read(_LOG_HEADER.size)
        if len(header) < _LOG_HEADER.size:
            return None
        magic, version, page_size, _, *salts, first, second = _LOG_HEADER.unpack(header)
        order = ">u4" if magic & 1 else "<u4"
        if magic & ~1 != _MAGIC or version != _VERSION:
            return None
        if not 512 <= page_size <= 65536 or page_size & page_size - 1:
            return None
        sums = _advance((0, 0), np.frombuffer(header[:24], order)[None])[0]
        if sums != (first, second):
            return None
        log, pending, place = Log(path, page_size), list[tuple[int, int]](), len(header)
        size = _FRAME_HEADER.size + page_size
        while chunk := file.read(size * _FRAMES_AT_A_TIME):
            frames = np.frombuffer(chunk[: len(chunk) // size * size], np.uint8).reshape(-1, size)
            summed = np.concatenate((frames[:, :8], frames[:, _FRAME_HEADER.size :]), axis=1)
            for frame, found in zip(frames, _advance(sums, summed.view(order)), strict=True):
                number, is_commit, *rest = _FRAME_HEADER.unpack(
                    frame[: _FRAME_HEADER.size].tobytes()
                )
                if not number or rest != [*salts, *found]:
                    return log if log.last else None
                sums = found
                pending.append((number, place + _FRAME_HEADER.size))
                place += size
                if is_commit:
                    log.last.update(pending)
                    for page, at in pending:
                        log.first.setdefault(page, at)
                    pending.clear()
        return log if log.last else None


def _advance(sums: tuple[int, int], blocks: NDArray[np.uint32]) -> list[tuple[int, int]]:
    """Return SQLite's checksum after each of (N, W) words, one block after the other.

    A pair of words makes ``a += word + b; b += next + a``, which is linear modulo 2^32.
    """
    weights, (aa, ab, ba, bb) = _weights(blocks.shape[1])
    a, b = sums
    found = []
    for more_a, more_b in (blocks.astype(np.uint32) @ weights).tolist():
        a, b = (aa * a + ab * b + more_a) & _WORD, (ba * a + bb * b + more_b) & _WORD
        found.append((a, b))
    return found


@lru_cache(maxsize=8)
def _weights(words: int) -> tuple[NDArray[np.uint32], _Matrix]:
    """Return what each word adds to the two sums, (W, 2), and what the sums before become."""
    weights = np.empty((words, 2), np.uint32)
    aa, ab, ba, bb = 1, 0, 0, 1
    for word in range(words - 2, -1, -2):
        weights[word] = (aa + ab) & _WORD, (ba + bb) & _WORD
        weights[word + 1] = ab, bb
        aa, ab, ba, bb = ((aa + ab) & _WORD, (aa + 2 * ab) & _WORD,
                          (ba + bb) & _WORD, (ba + 2 * bb) & _WORD)  # fmt: skip
    return weights, (aa, ab, ba, bb)


# --- Reading without locks


@dataclass(frozen=True)
class State:
    """Sizes and times by which a change of files read without locks is found."""

    file: _FileState
    log: _FileState | None
    """None without a log, and for an empty one."""
    log_header: bytes
    """Changes when the log begins anew."""

    @classmethod
    def of(cls, path: Path) -> "State":
        """Return the state of now."""
        try:
            with open(log_of(path), "rb") as file:
                log, header = _state_of(os.fstat(file.fileno())), file.read(32)
        except FileNotFoundError:
            log, header = None, b""
        return cls(_state_of(path.stat()), log if header else None, header)

    def holds_for(self, later: "State") -> bool:
        """Whether what was read since is right; a log that another process began is ignored."""
        if self.log is None:
            return self.file == later.file
        return (
            (self.file, self.log_header) == (later.file, later.log_header)
            and later.log is not None
            and self.log[0] == later.log[0]
            and self.log[1] <= later.log[1]
        )

    @property
    def is_settled(self) -> bool:
        """Whether another change would show."""
        newest = max(self.file[2], self.log[2] if self.log else 0)
        return time.time_ns() - newest > _SETTLED_S * 1e9


def _state_of(found: os.stat_result) -> _FileState:
    return found.st_ino, found.st_size, found.st_mtime_ns


class Beside:
    """What lies beside a file that no process has open, to be put back as it was."""

    def __init__(self, path: Path, read: Log | None) -> None:
        """Note what there is beside a database file, and what its log holds."""
        self._path = path
        self._read = read
        self._folder = path.parent.stat()
        log, shared = self._places
        with _guard:
            self._log = log.stat() if log.exists() else None
            self._shared = shared.stat() if shared.exists() else None
            self._content = b""
            if self._shared is not None:
                self._content = read_bounded(shared, _MOST_SHARED_BYTES)

    @property
    def _places(self) -> tuple[Path, Path]:
        return log_of(self._path), Path(f"{self._path}-shm")

    def put_back(self) -> None:
        """Undo what a connection did that has changed nothing; needs `folder_lock` alone."""
        log, shared = self._places
        with _guard, suppress(OSError):
            if _is_open_elsewhere(self._path):
                return
            found = read_log(log) if log.exists() else None
            if (found and found.last) != (self._read and self._read.last):
                return  # Another process has written, and is gone again.
            if self._log is None and log.exists():
                log.unlink()
            elif self._log is not None and self._log.st_size < log.stat().st_size:
                os.truncate(log, self._log.st_size)  # Pages of no complete transaction.
            if self._shared is None:
                shared.unlink(missing_ok=True)
            else:
                shared.write_bytes(self._content)
            looks = (self._log, self._shared, self._folder)
            for place, look in zip((log, shared, self._path.parent), looks, strict=True):
                if look is not None:
                    os.utime(place, ns=(look.st_atime_ns, look.st_mtime_ns))


@dataclass
class Lease:
    """How a file may be read for a while."""

    path: Path
    state: State | None
    """Of files that are read without locks; None with SQLite's locks."""
    log: Log | None = None
    """What is read of the log without locks; None where there is nothing."""
    _lock: ExitStack = field(default_factory=ExitStack)

    @property
    def mode(self) -> str:
        """For `connect`."""
        if self.state is None:
            return "ro"
        return MAIN_FILE_ONLY if self.log is None else _WITH_LOG

    def check(self) -> None:
        """Check that nothing was changed."""
        if self.state is not None and not self.state.holds_for(State.of(self.path)):
            raise InputError(
                f"gallery {self.path} was written to by a program without locks while it was read: "
                "try again"
            )

    def end(self) -> None:
        """Let others change the file."""
        self._lock.close()


def lease(path: Path, known: Lease | None = None) -> Lease:
    """Find out how a database file is to be read, and keep it as it is until the end of that.

    The log of an earlier lease is not read again if it is the same.
    """
    with ExitStack() as stack:
        is_locked = stack.enter_context(folder_lock(path, share=True))
        if is_locked and not _is_open_elsewhere(path):  # Else a process is writing.
            state = State.of(path)
            if known is not None and known.state == state and state.is_settled:
                log = known.log
            else:
                log = None if state.log is None else read_log(log_of(path))
            return Lease(path, state, log, stack.pop_all())
    return Lease(path, None)


def _is_open_elsewhere(path: Path) -> bool:
    """Whether any process, this one included, has the file open with locks."""
    with _guard:
        if _with_locks[os.path.realpath(path)]:
            return True
        try:
            handle = os.open(f"{path}-shm", os.O_RDONLY)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        try:
            return _is_locked(handle)
        finally:
            os.close(handle)


def _is_locked(handle: int) -> bool:
    """Whether another process has one of SQLite's locks; takes no lock itself."""
    if sys.platform != "linux":  # Elsewhere the structure is another.
        return True
    import fcntl

    question = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, *_LOCK_BYTES, 0)
    try:
        answer = fcntl.fcntl(handle, fcntl.F_GETLK, question)
    except OSError:
        return True
    return bool(struct.unpack("hhqqi", answer)[0] != fcntl.F_UNLCK)


def _attribute_equals(attributes: str, key: str, value: str) -> bool:
    """Whether a row's attributes have this value under this key; both values are JSON.

    The key never becomes part of a statement or of a JSON path, so it may be anything.
    """
    wanted = json.loads(value)
    try:
        found = json.loads(attributes).get(key)
    except (ValueError, AttributeError):  # Damaged: `Gallery.verify` finds it.
        return False
    return isinstance(found, bool) == isinstance(wanted, bool) and bool(found == wanted)
