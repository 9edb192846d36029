"""A log with a checksum chain: each line ends with a hash of itself and of all before it.

A line is an object of JSON that ends in ``, "chain": "<SHA-256>"}``. The hash is taken of the chain
of the line before, of whatever lies between the two (lines of older releases, or what a full disk
or a crash cut off), and of the line itself up to there. So a line that was changed, removed or
added shows. Lines of older releases stand before the first chained one only; a line that follows
one that was cut off says so, in ``"cut_off"``.
How long the log was and its last chain also stand in a file beside it, its head: lines that were
cut off at its end show, too. A crash may leave the head one line behind, never more.

A log that does not match its head, or was changed, is not continued. The next line goes into a new
file, whose first line has the last known chain in ``"previous"`` and is chained to it. This line
and those that follow have ``"unacknowledged"``, the time of the break, until one of the action
``acknowledge``.

A log of queries that is long enough is renamed to ``NAME.part-TIME``, a part, with a copy of its
head, and a new file goes on. Its first line has the last chain of the part in ``"previous"`` and is
chained to it, so that all files verify as one log, the oldest first. A kill in between leaves a
head that is the one of the newest part. If a file is missing, the one after it continues a chain
that no file before it ends with. A line ``acknowledge`` lists such chains.

A process that may write both files can replace them as a whole. Against that, note a chain where it
cannot write, and expect it later: everything up to its line is as it was then. No key is used: a
process that writes the log would have it, and so would an attacker who controls that process.
"""

import datetime
import errno
import glob
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

from upperson_rt.errors import InputError
from upperson_rt.printable import count_of

Head: TypeAlias = tuple[int, str]
"""Where the last chained line ends, and its chain."""

SOON_BYTES = 8 << 20
"""A log up to so long is read through when it is opened or shown."""

_SEALED = re.compile(rb'(.*), "chain": "([0-9a-f]{64})"\}')
_HEAD = re.compile(rb"([0-9]{20}) ([0-9a-f]{64})\n")
_HEAD_BYTES = 20 + 1 + 64 + 1
_SEAL = re.compile(
    rb'(?:, "unacknowledged": "([0-9T:.+-]{1,40})")?(?:, "cut_off": [0-9]+)?'
    rb', "chain": "([0-9a-f]{64})"}\n\Z'
)
_SEAL_BYTES = 200
"""Longer than what `_SEAL` matches."""
_PART = re.compile(r"(.+)\.part-([0-9]{14,})")
_LAST_TIME = 253_402_300_799
"""Unix time of the year 9999, the last one that has a date."""
_ACKNOWLEDGE = b'"action": "acknowledge"'
_BEGIN = b'{"time": "'
_ENTRY = b'{"'
_LONGEST_LINE = 64 << 20
"""Nothing that is written is longer; a damaged log may have no line ends at all."""
_MOST_PROBLEMS = 100


@dataclass(frozen=True, kw_only=True)
class LogReport:
    """What `verify_log` found."""

    lines: int
    """Lines that are chained."""
    unchained: int
    """Lines before the first of those, of older releases; its hash covers them."""
    cut_off: int
    """Beginnings of lines that a full disk or a crash cut off: what they say was never shown."""
    chain: str
    """The last hash, which stands for the whole log; empty without a chained line."""
    previous: str
    """The chain of the broken log that this one continues; empty if it continues none."""
    unacknowledged: str
    """Since when a break of the log has not been acknowledged, ISO 8601; empty without one."""
    expected: dict[str, int]
    """The line of each chain that was expected and is there: up to it nothing has changed. Lines
    of all files are counted, the oldest first."""
    files: int
    """Files of the log that are here: its parts, and the one that is written to."""
    absent: dict[str, bool]
    """Last chains of files that are not here, and whether that was acknowledged or is expected."""
    code: str
    """What is wrong, for programs: ``no_query_log``, ``log_unchained`` (none of its lines has a
    chain) or ``log_altered``; empty if nothing is."""
    problems: list[str]
    """One line each; nothing if the log is as it was written. Of its lines a hundred are named, and
    how many more there are; what is wrong with the whole is always listed."""


def sealed(entry: Mapping[str, Any], chain: str, between: bytes) -> tuple[bytes, str]:
    """Return the line of an entry with its line end, and its chain.

    ``between`` is what lies after the line of ``chain``. Raises TypeError, ValueError or
    RecursionError for an entry that is no JSON.
    """
    body = json.dumps(entry, ensure_ascii=True, default=str).encode("ascii")[:-1]
    hashed = _begun(chain)
    hashed.update(between + body)
    own = hashed.hexdigest()
    return body + f', "chain": "{own}"}}\n'.encode(), own


def cut_off(between: bytes) -> dict[str, int]:
    """Return the field that says how many bytes are left of a line that was cut off."""
    return {"cut_off": len(between) - between.rfind(b"\n") - 1}


def unacknowledged(path: Path, since: str) -> str:
    """Return what to say of a break that has not been acknowledged."""
    return (
        f"the query log {path} was cut, changed or removed: since {since} it goes on in a new "
        f"file. Compare it with {path.name}.broken-*, then run  upperson-rt log acknowledge {path}"
    )


def head_of(path: Path) -> Path:
    """Return the file that says how long a log is."""
    return path.with_name(f"{path.name}.head")


def write_head(path: Path, size: int, chain: str) -> None:
    """Write the head of a log that is on disk, and put it on disk; raises OSError."""
    place = head_of(path)
    if place.exists() and not place.is_file():
        raise OSError(errno.EINVAL, f"{place} is not a regular file")
    file = os.open(place, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        left = f"{size:020d} {chain}\n".encode()  # As many bytes as before.
        while left:
            left = left[os.write(file, left) :]
        if os.fstat(file).st_size != _HEAD_BYTES:
            os.ftruncate(file, _HEAD_BYTES)
        getattr(os, "fdatasync", os.fsync)(file)
    finally:
        os.close(file)


def read_head(path: Path) -> Head | None:
    """Return the head of a log, (0, "") before its first line; None if it is missing or damaged."""
    place = head_of(path)
    try:
        if not place.is_file():
            return None
        content = place.read_bytes()[: _HEAD_BYTES + 1]
    except OSError:
        return None
    match = _HEAD.fullmatch(content)
    if match is None:
        return None if content else (0, "")
    return int(match[1]), match[2].decode()


def parts_of(path: Path) -> list[Path]:
    """Return the parts of a log, the oldest first; of a part, those before it."""
    place = Path(os.path.realpath(path))
    own = _PART.fullmatch(place.name)
    stem = own[1] if own else place.name
    found = {}
    for part in place.parent.glob(f"{glob.escape(stem)}.part-*"):
        match = _PART.fullmatch(part.name)
        if match and match[1] == stem and is_plain(part):
            found[int(match[2])] = part
    return [found[time] for time in sorted(found) if own is None or time < int(own[2])]


def next_part(path: Path) -> Path:
    """Return the name that a log gets as a part: the time of its last line, after other parts.

    So a rotation that was killed chooses the same name again.
    """
    place = Path(os.path.realpath(path))
    seconds = min(max(0, place.stat().st_mtime), _LAST_TIME)
    changed = datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc)
    parts = parts_of(path)
    last = _PART.fullmatch(parts[-1].name) if parts else None
    number = max(int(f"{changed:%Y%m%d%H%M%S}"), int(last[2]) + 1 if last else 0)
    return place.with_name(f"{place.name}.part-{number:014d}")


def is_plain(path: Path) -> bool:
    """Return whether this is a regular file, and no link to one."""
    return path.is_file() and not path.is_symlink()


@dataclass(frozen=True, kw_only=True)
class LogFiles:
    """The files of a log at one moment."""

    parts: list[Path]
    file: BinaryIO | None
    """The file that is written to, open; None between two of them."""
    head: Head | None
    size: int
    """Of `file`."""

    @property
    def total_bytes(self) -> int:
        """Of all files."""
        return sum(part.stat().st_size for part in self.parts) + self.size

    def opened(self, *, newest_first: bool = False) -> Iterator[tuple[BinaryIO, int]]:
        """Open the files one by one, and yield them with their sizes; raises OSError."""
        places = [*self.parts, None]
        for place in reversed(places) if newest_first else places:
            if place is not None:
                with open(place, "rb") as file:
                    yield file, os.fstat(file.fileno()).st_size
            elif self.file is not None:
                yield self.file, self.size


@contextmanager
def open_log(path: Path) -> Iterator[LogFiles]:
    """Open a log beside processes that write and rotate it; raises OSError."""
    while True:
        if path.exists() and not path.is_file():  # Opening a pipe would wait for its other end.
            raise OSError(errno.EINVAL, "not a regular file")
        head = read_head(path)
        with _open_if_there(path) as file:
            look = None if file is None else os.fstat(file.fileno())
            parts = parts_of(path)
            if not _is_same(path, look) or read_head(path) != head:
                continue
            if file is None and not parts:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
            size = 0 if look is None else look.st_size
            yield LogFiles(parts=parts, file=file, head=head, size=size)
            return


def _open_if_there(path: Path) -> AbstractContextManager[BinaryIO | None]:
    try:
        return open(path, "rb")
    except FileNotFoundError:
        return nullcontext()


def _is_same(path: Path, look: os.stat_result | None) -> bool:
    """Return whether a name is still that of an open file, or still missing (None)."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return look is None
    return look is not None and os.path.samestat(found, look)


def verify_log(path: Path, expected: Collection[str] = ()) -> LogReport:
    """Read a log through, with all its parts that are here."""
    try:
        with open_log(path) as log:
            scans = [_scan_part(part, expected) for part in log.parts]
            before = read_head(log.parts[-1]) if log.parts else None
            scans.append(Scan(path, log.head, expected, before))
            if log.file is not None:
                scans[-1].read(log.file, log.size)
    except FileNotFoundError as error:
        head = read_head(path)
        if head is None or not head[0] or parts_of(path):  # A part was moved away meanwhile.
            raise _unreadable(path, error) from error
        scans = [Scan(path, head, expected)]
    except OSError as error:
        raise _unreadable(path, error) from error
    return _report(path, scans, expected)


def _scan_part(part: Path, expected: Collection[str]) -> "Scan":
    scan = Scan(part, read_head(part), expected)
    with open(part, "rb") as file:
        scan.read(file, os.fstat(file.fileno()).st_size)
    return scan


def _report(path: Path, scans: list["Scan"], expected: Collection[str]) -> LogReport:
    last, problems, code = scans[-1], [], ""
    for scan in scans:
        name = "" if scan is last else f"{scan.name}: "
        if own := scan.refusal_code():
            line_ends = own == "log_unchained" and scan.has_other_line_ends
            problems.append(name + (_OTHER_LINE_ENDS if line_ends else _EXPECTED[own]))
        code = code or own
        problems += [name + problem for problem in scan.problems()]
    found, number = dict[str, int](), 0
    for scan in scans:
        found = {chain: number + line for chain, line in scan.found.items()} | found
        number += scan.lines_read
    known = {*expected}.union(*(scan.acknowledged for scan in scans))
    absent = {}
    for chain, name in _gaps(scans).items():
        absent[chain] = chain in known
        if chain not in known:
            problems.append(
                f"{name} does not continue the file before it: the file that ends with the chain "
                f"{chain} is missing or out of order. Put it back; if it was archived, run  "
                f"upperson-rt log acknowledge {path}"
            )
    chained = [scan for scan in scans if scan.lines]
    since = chained[-1].unacknowledged if chained else ""
    if since:
        problems.append(unacknowledged(path, since))
    missing = [one for one in expected if one not in found]
    advice = "the log was written anew, or its end is missing"
    problems += [f"no line has the expected chain {one}: {advice}" for one in missing]
    return LogReport(
        lines=sum(scan.lines for scan in scans),
        unchained=sum(scan.unchained for scan in scans),
        cut_off=sum(scan.torn for scan in scans),
        chain=chained[-1].chain if chained else "",
        previous=next((one.previous for one in reversed(scans) if one.is_break), ""),
        unacknowledged=since,
        expected=found,
        files=len(scans),
        absent=absent,
        code=code or ("log_altered" if problems else ""),
        problems=problems,
    )


def _gaps(scans: list["Scan"]) -> dict[str, str]:
    """Return chains that a file continues, or that none does, with the name of the later file."""
    found, before = {}, ""
    for scan in scans:
        if scan.lines:
            if scan.link != before:
                found[scan.link or before] = scan.name
            before = scan.chain
    return found


_EXPECTED = {
    "no_query_log": 'it is no such log: expected lines such as {"time": ..., "chain": ...}',
    "log_unchained": "none of its lines has a chain: expected each to end in its chain, as the "
    "releases since chains write it, or the chains were removed",
}
_OTHER_LINE_ENDS = (
    "its lines end with CR LF, expected LF alone: an editor or a transfer as text converted them; "
    "take the file as it was written"
)


def _unreadable(path: Path, error: OSError) -> InputError:
    message = f"cannot read the query log {error.filename or path}: {error.strerror}"
    return InputError(message, code="log_unreadable", path=str(path))


class Scan:
    """Reads a log, or its end, and compares it with its head."""

    def __init__(
        self,
        path: Path,
        head: Head | None,
        expected: Collection[str] = (),
        before: Head | None = None,
    ) -> None:
        """Prepare to read; ``before`` is the head of the newest part."""
        self.name = path.name
        self.lines = self.unchained = self.torn = self.lines_read = 0
        self.end = 0
        """Where the last chained line ends."""
        self.chain = self.previous = self.link = self.unacknowledged = ""
        """`link` is the last chain of the part before, `previous` the one that is continued: of the
        same, or of a broken log."""
        self.is_break = False
        self.found: dict[str, int] = {}
        self.acknowledged: set[str] = set()
        """Chains of files whose absence was acknowledged."""
        self._part = before
        self._is_part = _PART.fullmatch(path.name) is not None
        """Whether its last line is chained: nothing may follow."""
        self._path, self._head, self._expected = path, head, expected
        self._size = 0
        self._behind: int | None = None
        """Lines after the one that the head knows; None before that one."""
        self._wrong: list[str] = []
        """What is wrong with lines: the first ones."""
        self._wrong_count = 0
        self.has_other_line_ends = False
        """Whether a line would be chained if it did not end with CR LF."""
        self._first, self._are_entries = _Loose(), True
        """The lines before the first chained one, and whether they look like those of a log."""

    def read(self, file: BinaryIO, size: int, start: Head = (0, "")) -> None:
        """Read a log from a chained line on; raises OSError."""
        self.end, self.chain = start
        self._size = size
        self._behind = 0 if self._head == start else None
        if start[0]:
            self._read_seal(file)
        file.seek(self.end)
        hashed, loose, number, offset, last = _begun(self.chain), _Loose(), 0, self.end, b""
        while line := file.readline(min(_LONGEST_LINE, size - offset)):
            number += 1
            self.lines_read = number
            offset += len(line)
            match = _SEALED.fullmatch(line.removesuffix(b"\n"))
            if match is None:
                hashed.update(line)
                if line.endswith(b"\r\n") and _SEALED.fullmatch(line[:-2]):
                    self.has_other_line_ends = True
                if self.lines or start[0]:
                    loose.add(number, line)
                else:
                    self.unchained += 1
                    self._first.add(number, line)
                    self._are_entries = self._are_entries and line.startswith(_ENTRY)
                continue
            if offset == len(line):
                hashed = self._follow(match[1])
            self._end_loose(loose, match[1])
            loose = _Loose()
            hashed.update(match[1])
            if _ACKNOWLEDGE in match[1]:
                self.acknowledged |= _chains_in(match[1])
            self._add(number, match[2].decode(), hashed.hexdigest(), offset)
            hashed = _begun(self.chain)
            last = line.removesuffix(b"\n")
        if last and (seal := _SEAL.search(last[-_SEAL_BYTES:] + b"\n")):
            self.unacknowledged = (seal[1] or b"").decode()
        self._end_loose(loose, None)

    @property
    def is_next(self) -> bool:
        """Whether the file goes on from the newest part and has no line yet: a kill left it so."""
        is_empty = not self.end and self._first.are_cut_off(None)
        return is_empty and self._part is not None and self._head == self._part

    def refusal_code(self) -> str:
        """Return the code of a file that is no log, or one without chains; empty for a log."""
        if self.is_next or (self._head == (0, "") and self._first.are_cut_off(None)):
            return ""  # Nothing was written yet, or the first line was cut off.
        if not self._are_entries or (self._head is None and not self._size):
            return "no_query_log"
        return "log_unchained" if self.unchained and not self.lines else ""

    def problems(self) -> list[str]:
        """Return one line for each thing that is wrong."""
        head, name = self._head, head_of(self._path).name
        of_whole: list[str] = []
        if self.is_next:
            return []
        if self._part is not None and not self.end:
            of_whole.append("it has no line that goes on from its parts: the log was removed")
        if head is None:
            if self.chain or head_of(self._path).exists():
                of_whole.append(f"{name} is missing or damaged: lines at the end may be")
        elif head[0] > self._size and self._behind is None:
            missing = count_of(head[0] - self._size, "byte")
            of_whole.append(f"{missing} at the end are missing: lines were removed there")
        elif self._behind is None and not self._wrong_count:
            of_whole.append(f"the log was written anew: {name} knows another one")
        elif self._behind is not None and self._behind > 1:
            of_whole.append(f"{name} is of an older log, {self._behind} lines behind")
        more = self._wrong_count - len(self._wrong)
        return [*self._wrong, *([f"and {more} more of them"] if more else []), *of_whole]

    def _add_problem(self, problem: str) -> None:
        self._wrong_count += 1
        if self._wrong_count <= _MOST_PROBLEMS:
            self._wrong.append(problem)

    def _end_loose(self, loose: "_Loose", body: bytes | None) -> None:
        """Count lines that were cut off; any others are problems."""
        may_be = body is not None or not self._is_part or not loose.count
        if loose.are_cut_off(body) and may_be:
            self.torn += loose.count
            return
        for number in range(loose.first, loose.first + loose.count):
            self._add_problem(
                f"line {number} is not what was written: it was changed or added there"
            )

    def _read_seal(self, file: BinaryIO) -> None:
        """Compare what ends where reading starts with the chain that is expected there."""
        place = max(0, self.end - _SEAL_BYTES)
        file.seek(place)
        seal = _SEAL.search(file.read(self.end - place))
        if seal is None or seal[2].decode() != self.chain:
            self._add_problem(f"no line with the chain {self.chain} ends where it did")
        elif seal[1]:
            self.unacknowledged = seal[1].decode()

    def _follow(self, body: bytes) -> "hashlib._Hash":
        """Return the hash of what follows the log that a first line continues, if it does."""
        entry = _entry_of(body)
        previous = _chain_or_empty(entry.get("previous"))
        if previous:
            self.previous = previous
            self.is_break = entry.get("action") == "break"
            self.link = _chain_or_empty(entry.get("part")) if self.is_break else previous
            if previous in self._expected:
                self.found[previous] = 1
            if self._head is not None and self._head[1] == previous:
                self._behind = 0
        return _begun(self.previous)

    def _add(self, number: int, chain: str, hashed: str, end: int) -> None:
        self.lines += 1
        self.chain, self.end = chain, end
        if hashed != chain:
            self._add_problem(
                f"line {number} is not what was written, or what stands before it is not: "
                "something was changed, removed or added there"
            )
        if chain in self._expected:
            self.found[chain] = number
        if self._head == (end, chain):
            self._behind = 0
        elif self._behind is not None:
            self._behind += 1


def _entry_of(body: bytes) -> dict[str, Any]:
    """Return what is before the chain of a line; an empty entry if that is damaged."""
    try:
        entry = json.loads(body + b"}")
    except (ValueError, RecursionError):
        return {}
    return entry if isinstance(entry, dict) else {}


def _chain_or_empty(value: object) -> str:
    return value if isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) else ""


def _chains_in(body: bytes) -> set[str]:
    """Return the chains whose absence a line acknowledges."""
    entry = _entry_of(body)
    details = entry.get("details") if entry.get("action") == "acknowledge" else None
    chains = details.get("absent") if isinstance(details, dict) else None
    return {_chain_or_empty(one) for one in chains} - {""} if isinstance(chains, list) else set()


class _Loose:
    """Lines that are not chained, after one that is."""

    def __init__(self) -> None:
        self.first = self.count = self._last_size = 0
        self._are_beginnings = True
        self._has_end = False

    def add(self, number: int, line: bytes) -> None:
        self.first = self.first or number
        self.count += 1
        text = line.removesuffix(b"\n")
        self._last_size, self._has_end = len(text), line.endswith(b"\n")
        self._are_beginnings = self._are_beginnings and _is_beginning(text)

    def are_cut_off(self, body: bytes | None) -> bool:
        """Return whether all are beginnings, as the next chained line says, if there is one."""
        if body is None:
            return self._are_beginnings and not self._has_end
        return self._are_beginnings and body.endswith(f', "cut_off": {self._last_size}'.encode())


def _is_beginning(line: bytes) -> bool:
    """Return whether this can be the beginning of a line, and is no whole one."""
    if not line or line[: len(_BEGIN)] != _BEGIN[: len(line)]:
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def _begun(chain: str) -> "hashlib._Hash":
    """Return the hash of what follows a line with a chain."""
    return hashlib.sha256(chain.encode() + b"\n")
