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

A process that may write both files can replace them as a whole. Against that, note a chain where it
cannot write, and expect it later: everything up to its line is as it was then. No key is used: a
process that writes the log would have it, and so would an attacker who controls that process.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
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
    """The line of each chain that was expected and is there: up to it nothing has changed."""
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


def verify_log(path: Path, expected: Collection[str] = ()) -> LogReport:
    """Read a log through."""
    try:
        if path.exists() and not path.is_file():  # Opening a pipe would wait for its other end.
            raise OSError(errno.EINVAL, "not a regular file")
        with open(path, "rb") as file:
            head, size = _read_both(path, file)
            scan = Scan(path, head, expected)
            scan.read(file, size)
    except FileNotFoundError as error:
        head = read_head(path)
        if head is None or not head[0]:
            raise _unreadable(path, error) from error
        scan = Scan(path, head, expected)
    except OSError as error:
        raise _unreadable(path, error) from error
    problems, code = scan.problems(), scan.refusal_code()
    if code:
        line_ends = code == "log_unchained" and scan.has_other_line_ends
        problems.insert(0, _OTHER_LINE_ENDS if line_ends else _EXPECTED[code])
    if scan.unacknowledged:
        problems.append(unacknowledged(path, scan.unacknowledged))
    absent = [one for one in expected if one not in scan.found]
    advice = "the log was written anew, or its end is missing"
    problems += [f"no line has the expected chain {one}: {advice}" for one in absent]
    return LogReport(
        lines=scan.lines,
        unchained=scan.unchained,
        cut_off=scan.torn,
        chain=scan.chain,
        previous=scan.previous,
        unacknowledged=scan.unacknowledged,
        expected=scan.found,
        code=code or ("log_altered" if problems else ""),
        problems=problems,
    )


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
    message = f"cannot read the query log {path}: {error.strerror}"
    return InputError(message, code="log_unreadable", path=str(path))


def _read_both(path: Path, file: BinaryIO) -> tuple[Head | None, int]:
    """Return head and size of one moment: a line at most is between them."""
    while True:
        head, size = read_head(path), os.fstat(file.fileno()).st_size
        if read_head(path) == head:
            return head, size


class Scan:
    """Reads a log, or its end, and compares it with its head."""

    def __init__(self, path: Path, head: Head | None, expected: Collection[str] = ()) -> None:
        self.lines = self.unchained = self.torn = 0
        self.end = 0
        """Where the last chained line ends."""
        self.chain = self.previous = self.unacknowledged = ""
        self.found: dict[str, int] = {}
        self._path, self._head, self._expected = path, head, expected
        self._size = 0
        self._behind: int | None = None
        """Lines after the one that the head knows; None before that one."""
        self._wrong: list[str] = []
        """What is wrong with lines: the first ones."""
        self._wrong_count = 0
        self.has_other_line_ends = False
        """Whether a line would be chained if it did not end with CR LF."""
        self._before, self._are_entries = _Loose(), True
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
                    self._before.add(number, line)
                    self._are_entries = self._are_entries and line.startswith(_ENTRY)
                continue
            if offset == len(line):
                hashed = self._follow(match[1])
            self._end_loose(loose, match[1])
            loose = _Loose()
            hashed.update(match[1])
            self._add(number, match[2].decode(), hashed.hexdigest(), offset)
            hashed = _begun(self.chain)
            last = line.removesuffix(b"\n")
        if last and (seal := _SEAL.search(last[-_SEAL_BYTES:] + b"\n")):
            self.unacknowledged = (seal[1] or b"").decode()
        self._end_loose(loose, None)

    def refusal_code(self) -> str:
        """Return the code of a file that is no log, or one without chains; empty for a log."""
        if self._head == (0, "") and self._before.are_cut_off(None):
            return ""  # Nothing was written yet, or the first line was cut off.
        if not self._are_entries or (self._head is None and not self._size):
            return "no_query_log"
        return "log_unchained" if self.unchained and not self.lines else ""

    def problems(self) -> list[str]:
        """Return one line for each thing that is wrong."""
        head, name = self._head, head_of(self._path).name
        of_whole: list[str] = []
        if head is None:
            if self.chain or head_of(self._path).exists():
                of_whole.append(f"{name} is missing or damaged: lines at the end may be")
        elif head[0] > self._size:
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
        if loose.are_cut_off(body):
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
        try:
            entry = json.loads(body + b"}")
        except (ValueError, RecursionError):
            entry = None
        previous = entry.get("previous") if isinstance(entry, dict) else None
        if isinstance(previous, str) and re.fullmatch("[0-9a-f]{64}", previous):
            self.previous = previous
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
