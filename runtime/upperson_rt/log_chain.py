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
_BEGIN = b'{"time": "'
_BLOCK_BYTES = 1 << 20


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
    """One line each; nothing if the log is as it was written."""


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
    own = _hash(chain, between, body)
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
    end, place = b"", size
    while place > start:
        step = min(_BLOCK_BYTES, place - start)
        place -= step
        end = _read(file, place, step) + end
        lines = end.split(b"\n")
        for number in range(len(lines) - 2, -1 if place == start else 0, -1):
            if match := _SEALED.fullmatch(lines[number]):
                return match[2].decode(), b"\n".join(lines[number + 1 :])
    return chain, end


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
    lines = unchained = offset = torn = 0
    chain, between = "", b""
    problems: list[str] = []
    found: dict[str, int] = {}
    loose: list[tuple[int, bytes]] = []  # Not chained, after one that is.

    def told(are_torn: bool) -> int:
        if are_torn:
            return len(loose)
        problems.extend(
            f"line {number} is not what was written: it was changed or added there"
            for number, _ in loose
        )
        return 0

    head = _read_head(path)
    head_found = False
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                offset += len(line)
                match = _SEALED.fullmatch(line.removesuffix(b"\n"))
                if match is None:
                    between += line
                    if lines:
                        loose.append((number, line))
                    else:
                        unchained += 1
                    continue
                if loose:
                    torn += told(_are_torn(loose, match[1]))
                    loose.clear()
                lines += 1
                stated = match[2].decode()
                if _hash(chain, between, match[1]) != stated:
                    problems.append(
                        f"line {number} is not what was written, or what stands before it is not: "
                        "something was changed, removed or added there"
                    )
                chain, between = stated, b""
                if chain in expected:
                    found[chain] = number
                head_found = head_found or head == (offset, chain)
    except OSError as error:
        raise InputError(f"cannot read the query log {path}: {error.strerror}") from error
    torn += told(_are_torn(loose, None))
    if head is None:
        if lines:
            problems.append(f"{head_of(path).name} is missing or damaged: lines at the end may be")
    elif head[0] > offset:
        problems.append(
            f"{count_of(head[0] - offset, 'byte')} at the end are missing: lines were removed there"
        )
    elif not head_found and not problems:
        problems.append(f"the log was written anew: {head_of(path).name} knows another one")
    problems.extend(
        f"no line has the expected chain {one}: the log was written anew, or its end is missing"
        for one in expected
        if one not in found
    )
    return LogReport(
        lines=lines,
        unchained=unchained,
        cut_off=torn,
        chain=chain,
        expected=found,
        problems=problems,
    )


def _are_torn(loose: list[tuple[int, bytes]], body: bytes | None) -> bool:
    """Return whether lines were cut off, by the chained one that follows, or None at the end."""
    if not loose or not all(_is_beginning(line.removesuffix(b"\n")) for _, line in loose):
        return False
    last = loose[-1][1]
    if body is None:
        return not last.endswith(b"\n")
    said = cut_off(last.removesuffix(b"\n"))["cut_off"]
    return body.endswith(f', "cut_off": {said}'.encode())


def _is_beginning(line: bytes) -> bool:
    """Return whether this can be the beginning of a line, and is no whole one."""
    if not line or line[: len(_BEGIN)] != _BEGIN[: len(line)]:
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def _hash(chain: str, between: bytes, body: bytes) -> str:
    return hashlib.sha256(chain.encode() + b"\n" + between + body).hexdigest()


def _read(file: int, place: int, size: int) -> bytes:
    os.lseek(file, place, os.SEEK_SET)
    found = b""
    while len(found) < size and (more := os.read(file, size - len(found))):
        found += more
    return found


def _read_head(path: Path) -> tuple[int, str] | None:
    try:
        match = _HEAD.fullmatch(head_of(path).read_bytes())
    except OSError:
        return None
    return None if match is None else (int(match[1]), match[2].decode())
