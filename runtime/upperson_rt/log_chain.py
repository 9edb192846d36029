"""A log whose lines vouch for each other: each ends with a hash of itself and of all before it.

A line is an object of JSON that ends in ``, "chain": "<SHA-256>"}``. The hash is taken of the chain
of the line before, of whatever lies between the two (lines of older releases, or what a full disk
or a crash cut off), and of the line itself up to there. So a line that was changed, removed or
added shows. Lines of older releases stand before the first chained one only; a line that follows
one that was cut off says so, in ``"cut_off"``.
How long the log was and its last chain also stand in a file beside it: lines that were cut off at
its end show, too. Whoever may write both files can make them anew as a whole. Against that a chain
is noted where he cannot write, and expected later: everything up to its line is as it was then. No
key is used: a process that writes the log would have it, and so would whoever took that over.
"""

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upperson_rt.errors import InputError
from upperson_rt.printable import count_of

__all__ = ["LogReport", "cut_off", "head_of", "read_end", "sealed", "verify_log", "write_head"]

_SEALED = re.compile(rb'(.*), "chain": "([0-9a-f]{64})"\}')
_HEAD = re.compile(rb"([0-9]{20}) ([0-9a-f]{64})\n")
_HEAD_BYTES = 20 + 1 + 64 + 1
_BEGIN = b'{"time": "'
_BLOCK_BYTES = 1 << 20
_LONGEST_LINE = 64 << 20
"""Nothing that is written is longer; a damaged log may have no line ends at all."""
_MOST_PROBLEMS = 100


@dataclass(frozen=True, kw_only=True)
class LogReport:
    """What `verify_log` found."""

    lines: int
    """Lines that are chained."""
    unchained: int
    """Lines before the first of those, of older releases; that one vouches for them."""
    cut_off: int
    """Beginnings of lines that a full disk or a crash cut off: what they say was never shown."""
    chain: str
    """The last hash, which stands for the whole log; empty without a chained line."""
    expected: dict[str, int]
    """The line of each chain that was expected and is there: up to it nothing has changed."""
    problems: list[str]
    """One line each; nothing if the log is as it was written. Of its lines a hundred are named, and
    how many more there are; what is wrong with the whole is told in any case."""


def sealed(entry: Mapping[str, Any], chain: str, between: bytes) -> tuple[bytes, str]:
    """Return the line of an entry with its line end, and its chain.

    Args:
        entry: What is logged.
        chain: That of the line before, empty for the first.
        between: What lies after that one.

    Raises:
        TypeError, ValueError, RecursionError: The entry is no JSON.
    """
    body = json.dumps(entry, ensure_ascii=True, default=str).encode("ascii")[:-1]
    hashed = _begun(chain)
    hashed.update(between + body)
    own = hashed.hexdigest()
    return body + f', "chain": "{own}"}}\n'.encode(), own


def cut_off(between: bytes) -> dict[str, int]:
    """Return what a line says of the one before that was cut off: how many bytes of it are there.

    Args:
        between: What lies behind the last chained line; its end is no line end.
    """
    return {"cut_off": len(between) - between.rfind(b"\n") - 1}


def read_end(file: int, size: int, start: int = 0, chain: str = "") -> tuple[str, bytes]:
    """Return the last chain of an open log, and what lies behind it.

    Args:
        file: The open file.
        size: Where the log ends.
        start: Where to stop looking, the beginning of a line.
        chain: That of what lies before ``start``.
    """
    step = _BLOCK_BYTES
    while True:
        place = max(start, size - step)
        end = _read(file, place, size - place)
        newline = end.rfind(b"\n")
        while newline >= 0:
            before = end.rfind(b"\n", 0, newline)
            if before < 0 and place > start:
                break  # The line begins further ahead.
            if match := _SEALED.fullmatch(end, before + 1, newline):
                return match[2].decode(), end[newline + 1 :]
            newline = before
        if place == start:
            return chain, end
        step *= 4  # What was read is read again, a third of it all at most.


def head_of(path: Path) -> Path:
    """Return the file that says how long a log is."""
    return path.with_name(f"{path.name}.head")


def write_head(file: int, size: int, chain: str) -> None:
    """Say how long a log is, always in as many bytes; the log itself is on disk by then."""
    os.lseek(file, 0, os.SEEK_SET)
    os.write(file, f"{size:020d} {chain}\n".encode())


def verify_log(path: Path, expected: Collection[str] = ()) -> LogReport:
    """Read a log through.

    Args:
        path: The log.
        expected: Chains that it had at some time, noted elsewhere.

    Raises:
        InputError: It cannot be read.
    """
    lines = unchained = offset = torn = number = 0
    chain, hashed = "", _begun("")
    problems = _Problems()
    found: dict[str, int] = {}
    loose = _Loose()
    head = _read_head(path)
    head_found = False
    try:
        with open(path, "rb") as file:
            while line := file.readline(_LONGEST_LINE):
                number += 1
                offset += len(line)
                match = _SEALED.fullmatch(line.removesuffix(b"\n"))
                if match is None:
                    hashed.update(line)
                    if lines:
                        loose.add(number, line)
                    else:
                        unchained += 1
                    continue
                torn += loose.ended(match[1], problems)
                loose = _Loose()
                lines += 1
                chain = match[2].decode()
                hashed.update(match[1])
                if hashed.hexdigest() != chain:
                    problems.add(
                        f"line {number} is not what was written, or what stands before it is not: "
                        "something was changed, removed or added there"
                    )
                hashed = _begun(chain)
                if chain in expected:
                    found[chain] = number
                head_found = head_found or head == (offset, chain)
    except OSError as error:
        raise InputError(f"cannot read the query log {path}: {error.strerror}") from error
    torn += loose.ended(None, problems)
    of_whole: list[str] = []
    if head is None:
        if lines:
            of_whole.append(f"{head_of(path).name} is missing or damaged: lines at the end may be")
    elif head[0] > offset:
        of_whole.append(
            f"{count_of(head[0] - offset, 'byte')} at the end are missing: lines were removed there"
        )
    elif not head_found and not problems.count:
        of_whole.append(f"the log was written anew: {head_of(path).name} knows another one")
    of_whole += [
        f"no line has the expected chain {one}: the log was written anew, or its end is missing"
        for one in expected
        if one not in found
    ]
    return LogReport(
        lines=lines,
        unchained=unchained,
        cut_off=torn,
        chain=chain,
        expected=found,
        problems=problems.told() + of_whole,
    )


class _Problems:
    """What is wrong with lines: the first ones, and how many more there are."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[str] = []

    def add(self, problem: str) -> None:
        self.count += 1
        if self.count <= _MOST_PROBLEMS:
            self._first.append(problem)

    def told(self) -> list[str]:
        """Return one line each."""
        more = self.count - len(self._first)
        return self._first + ([f"and {more} more of them"] if more else [])


class _Loose:
    """Lines that are not chained, after one that is."""

    def __init__(self) -> None:
        self._first = self._count = self._last_size = 0
        self._are_beginnings = True
        self._has_end = False

    def add(self, number: int, line: bytes) -> None:
        self._first = self._first or number
        self._count += 1
        text = line.removesuffix(b"\n")
        self._last_size, self._has_end = len(text), line.endswith(b"\n")
        self._are_beginnings = self._are_beginnings and _is_beginning(text)

    def ended(self, body: bytes | None, problems: _Problems) -> int:
        """Return how many were cut off; any others are problems.

        Args:
            body: The chained line that follows; None at the end of the log.
            problems: Where these go.
        """
        if self._count and self._are_beginnings:
            if body is None:
                are_torn = not self._has_end
            else:
                are_torn = body.endswith(f', "cut_off": {self._last_size}'.encode())
            if are_torn:
                return self._count
        for number in range(self._first, self._first + self._count):
            problems.add(f"line {number} is not what was written: it was changed or added there")
        return 0


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


def _read(file: int, place: int, size: int) -> bytes:
    os.lseek(file, place, os.SEEK_SET)
    found = b""
    while len(found) < size and (more := os.read(file, size - len(found))):
        found += more
    return found


def _read_head(path: Path) -> tuple[int, str] | None:
    try:
        with open(head_of(path), "rb") as file:
            match = _HEAD.fullmatch(file.read(_HEAD_BYTES + 1))
    except OSError:
        return None
    return None if match is None else (int(match[1]), match[2].decode())
