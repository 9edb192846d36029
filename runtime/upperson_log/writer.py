"""Appends to a log with a checksum chain, see `chain`: for one process or several at once."""

import datetime
import errno
import glob
import itertools
import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from upperson_log.chain import (
    SOON_BYTES,
    Head,
    Scan,
    cut_off,
    head_of,
    is_plain,
    next_part,
    parts_of,
    read_head,
    sealed,
    unacknowledged,
    write_head,
)
from upperson_rt.arguments import check_path, check_text
from upperson_rt.errors import InputError
from upperson_rt.files import sync_folder
from upperson_rt.locks import locked
from upperson_rt.printable import get_logger

_LOG = get_logger(__name__)
_Self = TypeVar("_Self", bound="ChainedLog")
_SPARE_BYTES = 64 << 10
"""Space on the disk below which a log counts as not writable; a line has some hundred bytes."""


class ChainedLog:
    """Appends to a file that only its owner may read. Safe to use from several threads.

    Every line is flushed to disk before the call returns. Several processes may write to one file,
    and a line that a full disk cut off does not spoil the next one. Each line is chained to
    the one before, so that one that was changed or removed shows (`chain.verify_log`).

    A log that was cut, changed, replaced or removed is not continued, also while it is open. It is
    kept as ``NAME.broken-1`` (or a later number), a new file begins, and `problem` says so until
    `acknowledge`. A file of up to 8 MB is read through when it is opened, of a longer one the end.
    Nothing here keeps the owner of the files from writing all of them anew: send the lines, or the
    last chain, elsewhere for that.
    """

    what: ClassVar[str] = "log"
    refuses: ClassVar[str] = ""
    """What is refused while no line can be written."""
    most_bytes: ClassVar[int] = sys.maxsize
    """A file of this size becomes a part before the next line, see `chain`."""

    def __init__(self, path: str | os.PathLike[str], user: str | None = None) -> None:
        """Open a log, or make it with the permissions 0600; its folder must exist.

        ``user`` is by default that of the process. A service that answers several people opens the
        log once for each.

        Raises:
            InputError: The file cannot be opened for writing, or is no regular file.
        """
        self.path = Path(check_path(path, f"the {self.what}"))
        self.user = (
            process_user() if user is None else check_text(user, f"the user of a {self.what}")
        )
        self._lock = threading.Lock()
        self._file = -1
        self._size, self._end, self._chain = -1, 0, ""
        """Of the file, where its last chained line ends, and the chain of that; -1: not read."""
        self._changed = 0
        self._has_failed = False
        """Whether the last line could not be written."""
        self._last_known, self._since = "", ""
        """The chain that a new file continues, and the time of a break that is open."""
        self._owner: tuple[int, int] | None = None
        with self._current():
            pass

    @property
    def problem(self) -> str:
        """What to say of a break of the log that has not been acknowledged; empty without one."""
        return unacknowledged(self.path, self._since) if self._since else ""

    def append(self, action: str, entry: Mapping[str, Any]) -> None:
        """Append a line of these members, after its time, user and action, and flush it to disk.

        Raises:
            InputError: The line cannot be written, or made of these values.
        """
        with self._current():
            self._append({**begin_entry(self.user, action), **entry, **self._open_break()})

    def acknowledge(self, reason: str = "", absent: Sequence[str] = ()) -> None:
        """Write a line, with a reason, that ends what `problem` says.

        ``absent`` has chains of files that are not here any more, see `LogReport.absent`.

        Raises:
            InputError: The line cannot be written.
        """
        with self._current():
            entry = begin_entry(self.user, "acknowledge")
            gone = {"absent": [*absent]} if absent else {}
            self._append({**entry, "details": {"since": self._since, "reason": reason, **gone}})
            self._since = ""

    def last_chain(self) -> str:
        """Return what stands for the whole log now, see `chain`; empty for a new one.

        Raises:
            InputError: The log cannot be read.
        """
        with self._current():
            return self._chain

    def check(self) -> None:
        """Check that a line can be written; after a failed one, write a line (``resume``).

        Raises:
            InputError: It cannot be written, or the disk has less than 64 KiB left.
        """
        with self._current():
            if self._has_failed:
                self._append({**begin_entry(self.user, "resume"), **self._open_break()})
        if not os.access(self.path, os.W_OK):
            raise self._unwritable("it is read-only")
        if shutil.disk_usage(self.path.parent).free < _SPARE_BYTES:
            raise self._unwritable("the disk is full")

    def close(self) -> None:
        """Close the file; the object cannot be used afterwards. May be called again."""
        with self._lock:
            if self._file >= 0:
                os.close(self._file)
            self._file = -2

    def __enter__(self: _Self) -> _Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Lock the log as its head and this object know it, or a new one in its place."""
        reason = aside = ""
        try:
            with self._lock:
                while True:
                    self._open()
                    with locked(self._file):
                        if self._is_in_place():
                            broken = self._read()
                            if not broken and self._is_full():
                                self._rotate()
                            elif not broken or not os.fstat(self._file).st_size:
                                if broken or reason:
                                    self._begin_anew(reason or broken, aside)
                                yield
                                return
                            else:
                                reason, aside = broken, self._set_aside()
                                self._chain = ""  # What others begin meanwhile is continued.
                    os.close(self._file)
                    self._file = -1
        except OSError as error:
            self._size, self._has_failed = -1, True
            raise self._unwritable(error.strerror or str(error)) from error

    def _unwritable(self, why: str) -> InputError:
        return InputError(
            f"cannot write the {self.what} {self.path}: {why}; {self.refuses}",
            code="log_unwritable",
            path=str(self.path),
        )

    def _open(self) -> None:
        if self._file == -2:
            raise OSError(errno.EBADF, "it has been closed")
        if self._file >= 0:
            return
        is_new = not self.path.exists()
        if not is_new and not self.path.is_file():
            raise OSError(errno.EINVAL, "not a regular file")
        self._owner = _owner_of(self.path) or _owner_of(head_of(self.path)) or self._owner
        self._file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
        self._size = -1
        if is_new:
            _give(self._file, self._owner)
            self._make_head(self.path)
            sync_folder(self.path.parent)

    def _make_head(self, path: Path) -> None:
        file = os.open(head_of(path), os.O_RDWR | os.O_CREAT, 0o600)
        _give(file, self._owner)
        os.close(file)

    def _is_in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), self.path.stat())
        except FileNotFoundError:
            return False

    def _read(self) -> str:
        """Read what is new in the file; return why it cannot be continued, empty if it can."""
        found, head = os.fstat(self._file), read_head(self.path)
        size, known = found.st_size, (self._end, self._chain)
        if (size, found.st_ctime_ns, head) == (self._size, self._changed, known):
            return ""
        start: Head = (0, "")
        expected = {self._chain} - {""}
        if 0 <= self._size < size:  # Others have written.
            start, expected = known, set()
        elif size > SOON_BYTES and head and head[0] <= size and expected <= {head[1]}:
            start, expected = head, set()
        parts = [] if start[0] else parts_of(self.path)
        before = read_head(parts[-1]) if parts else None
        scan = Scan(self.path, head, expected, before)
        with open(os.dup(self._file), "rb") as file:
            scan.read(file, size, start)
        problems = scan.problems()
        previous = head[1] if head and scan.is_next else ""
        if expected - scan.found.keys() and not self._is_set_aside(previous):
            problems.append("the log is not the one that this process wrote to")
        known_chains = (head and head[1], self._chain, scan.chain, self._last_known)
        self._last_known = next(filter(None, known_chains), before[1] if before else "")
        if problems:
            return problems[0]
        if scan.is_next:
            self._begin_next(parts[-1])
            return ""
        self._since = scan.unacknowledged
        self._settle(scan, size, head)
        return ""

    def _is_set_aside(self, previous: str) -> bool:
        """Return whether other processes have set aside or rotated the log that this one wrote to.

        The new log then begins with a line that goes on from that one, which may have done so as
        well; if it has no line yet, ``previous`` is the chain that it goes on from.
        """
        pattern = f"{glob.escape(self.path.name)}.broken-*[0-9]"
        aside = [path for path in self.path.parent.glob(pattern) if is_plain(path)]
        aside = [*reversed(parts_of(self.path)), *aside]
        previous = previous or _continued(_read_from(self._file, 0, SOON_BYTES))
        while previous and previous != self._chain:
            found = next((path for path in aside if _mentions(path, previous)), None)
            if found is None:
                return False
            if _mentions(found, self._chain):
                return True
            aside.remove(found)
            with open(found, "rb") as file:
                previous = _continued(file.read(SOON_BYTES))
        return bool(previous)

    def _settle(self, scan: Scan, size: int, head: Head | None) -> None:
        """Go on where a sound log ends; finish what a crash left undone."""
        end = scan.end
        if 0 < size == end and _read_from(self._file, size - 1, size) != b"\n":
            end = size = size + self._put(b"\n")
        if scan.chain and head != (end, scan.chain):
            write_head(self.path, end, scan.chain)
        self._size, self._end, self._chain = size, end, scan.chain
        self._changed = os.fstat(self._file).st_ctime_ns

    def _is_full(self) -> bool:
        """Return whether the next line goes into a new file.

        Nothing may follow the last line of a part. Windows renames no file that is open.
        """
        return self._end == self._size >= self.most_bytes and sys.platform != "win32"

    def _rotate(self) -> None:
        """Make the file a part; the next one begins as after a kill right here."""
        part = next_part(self.path)
        self._make_head(part)
        write_head(part, self._end, self._chain)
        os.rename(os.path.realpath(self.path), part)
        sync_folder(part.parent)

    def _begin_next(self, part: Path) -> None:
        """Write the first line of the file after a part."""
        end = read_head(part) or (0, "")
        scan = Scan(part, end)
        with open(part, "rb") as file:
            scan.read(file, os.fstat(file.fileno()).st_size, end)
        os.ftruncate(self._file, 0)  # A kill may have left the beginning of this line.
        self._size, self._end, self._chain, self._since = 0, 0, end[1], scan.unacknowledged
        entry = {**begin_entry(process_user(), "rotate"), "details": {"part": part.name}}
        self._append({**entry, "previous": end[1], **self._open_break()})

    def _set_aside(self) -> str:
        """Rename a broken log, and copy its head beside it; return the new name."""
        names = (self.path.with_name(f"{self.path.name}.broken-{n}") for n in itertools.count(1))
        place = next(name for name in names if not any(map(os.path.lexists, (name, head_of(name)))))
        head = head_of(self.path)
        if head.is_file():
            copy = os.open(head_of(place), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(copy, "wb") as file:
                file.write(head.read_bytes())
        os.rename(self.path, place)
        sync_folder(self.path.parent)
        return place.name

    def _begin_anew(self, reason: str, aside: str) -> None:
        """Write the line of a break, the first one of an empty file."""
        entry = begin_entry(process_user(), "break")
        self._since = entry["time"]
        details = {"reason": reason, "set_aside": aside}
        previous = {} if os.fstat(self._file).st_size else {"previous": self._last_known}
        if previous:
            part = read_head(parts[-1]) if (parts := parts_of(self.path)) else None
            previous |= {"part": part[1]} if part else {}
            self._size = self._end = 0
            self._chain = self._last_known
        self._append({**entry, "details": details, **previous, **self._open_break()})
        _LOG.warning("the %s %s is not continued: %s", self.what, self.path, reason)

    def _open_break(self) -> dict[str, str]:
        return {"unacknowledged": self._since} if self._since else {}

    def _append(self, entry: Mapping[str, Any]) -> None:
        between = _read_from(self._file, self._end, self._size)
        torn = between and not between.endswith(b"\n")
        if torn:
            entry = {**entry, **cut_off(between)}
            between += b"\n"
        try:
            line, chain = sealed(entry, self._chain, between)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"cannot write such a line into a {self.what}: {error}") from error
        end = self._size + self._put(b"\n" + line if torn else line)
        write_head(self.path, end, chain)
        self._size = self._end = end
        self._chain, self._changed = chain, os.fstat(self._file).st_ctime_ns
        self._has_failed = False

    def _put(self, line: bytes) -> int:
        left = line
        while left:
            left = left[os.write(self._file, left) :]
        os.fsync(self._file)
        return len(line)


class ErasureLog(ChainedLog):
    """The log of erasures beside a gallery in a folder."""

    what = "erasure log"
    refuses = "the rows are deleted, and the next deletion writes the line"


def begin_entry(user: str, action: str) -> dict[str, str]:
    """Return what each line begins with."""
    now = datetime.datetime.now(datetime.timezone.utc)
    return {"time": now.isoformat(timespec="milliseconds"), "user": user, "action": action}


def _continued(content: bytes) -> str:
    """Return the chain from which a log goes on, after a break or a part; else an empty text."""
    try:
        first = json.loads(content.partition(b"\n")[0])
        return str(first["previous"]) if first["action"] in ("break", "rotate") else ""
    except (ValueError, LookupError, TypeError):
        return ""


def _mentions(path: Path, chain: str) -> bool:
    """Return whether a log, or the head beside it, has a chain."""
    for part in filter(is_plain, (head_of(path), path)):
        with open(part, "rb") as file:
            if any(chain.encode() in line for line in file):
                return True
    return False


def _read_from(file: int, start: int, end: int) -> bytes:
    os.lseek(file, start, os.SEEK_SET)
    found = b""
    while more := os.read(file, end - start - len(found)):
        found += more
    return found


def _owner_of(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_uid, found.st_gid


def _give(file: int, owner: tuple[int, int] | None) -> None:
    """Let a new file belong to the owner of the one before, where that is allowed."""
    if owner is not None and sys.platform != "win32":
        with suppress(OSError):
            os.fchown(file, *owner)


def process_user() -> str:
    """Return the user by the system's word: a variable such as $USER can be set to anything."""
    try:
        import pwd
    except ImportError:  # Windows.
        import getpass

        return getpass.getuser()
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # A container may run under a number without a name.
        return f"uid {os.getuid()}"
