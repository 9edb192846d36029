"""Damage to a file at random, and what is said of it in a process that may crash.

`damage` changes one place. Outcomes: an answer is right if it equals that of the sound file; a
refusal is an `IntegrityError`; anything else is bad.
"""

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from upperson_rt.gallery.sqlite.schema import PAGE_BYTES

TIME_LIMIT_S = 60
KINDS = (
    "bit", "byte", "16 bytes", "sector of zeros", "page of zeros", "cut", "swap", "misplaced",
    "newest rows", "older page",
)  # fmt: skip
BAD = ("crash", "wrong", "raw", "input", "missed")
OUTCOMES = (*BAD, "refused", "right")
"""The worst first."""
_LEAF_OF_TABLE = b"\x0d"  # The first byte of a page of rows.
_NEWEST = 100


class Window:
    """A part of a file, changed as a bytearray is, and put back at the end.

    Without ``stop`` it ends where the file ends. To cut it cuts the file.
    """

    def __init__(self, path: Path, start: int = 0, stop: int | None = None) -> None:
        self._path, self._start, self._look = path, start, path.stat()
        self._length = min(stop or self._look.st_size, self._look.st_size) - start
        self._before = list[tuple[int, bytes]]()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, key: slice) -> bytes:
        start, stop, _ = key.indices(self._length)
        with open(self._path, "rb") as file:
            file.seek(self._start + start)
            return file.read(stop - start)

    def __setitem__(self, key: slice, content: bytes | bytearray) -> None:
        start, _, _ = key.indices(self._length)
        self._before.append((start, self[start : start + len(content)]))
        self._write(start, content)

    def __delitem__(self, key: slice) -> None:
        start, _, _ = key.indices(self._length)
        with open(self._path, "rb") as file:
            file.seek(self._start + start)
            self._before.append((start, file.read()))
        os.truncate(self._path, self._start + start)

    @property
    def is_changed(self) -> bool:
        """Whether something is not what it was."""
        return any(self[start : start + len(content)] != content for start, content in self._before)

    def keep_time(self) -> None:
        """Let the file look as if it had not been written to."""
        os.utime(self._path, ns=(self._look.st_atime_ns, self._look.st_mtime_ns))

    def put_back(self) -> None:
        """Undo all changes."""
        for start, content in reversed(self._before):
            self._write(start, content)
        self.keep_time()

    def _write(self, start: int, content: bytes | bytearray) -> None:
        with open(self._path, "r+b") as file:
            file.seek(self._start + start)
            file.write(content)


_Content = TypeVar("_Content", bytearray, Window)


def in_child(function: Callable[[], dict[str, str]]) -> dict[str, str]:
    """Call in a forked process, which may crash or hang."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        signal.setitimer(signal.ITIMER_PROF, TIME_LIMIT_S)  # Of its processor,
        signal.alarm(20 * TIME_LIMIT_S)  # and for what waits.
        os.close(read)
        with os.fdopen(write, "w") as file:
            json.dump(function(), file)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        text = file.read()
    status = os.waitpid(child, 0)[1]
    return json.loads(text) if status == 0 else {"process": f"crash: status {status}"}


def damage(
    content: _Content, kind: str, rng: np.random.Generator, earlier: bytes = b""
) -> _Content:
    """Return the content of a file with one damage."""
    at = int(rng.integers(len(content)))

    def zeros(start: int, length: int) -> None:
        content[start : start + length] = bytes(min(length, len(content) - start))

    def flip(bits: int) -> None:
        content[at : at + 1] = bytes([content[at : at + 1][0] ^ bits])

    page = at // PAGE_BYTES * PAGE_BYTES
    changed = [
        start
        for start in range(0, min(len(content), len(earlier)), PAGE_BYTES)
        if content[start : start + PAGE_BYTES] != earlier[start : start + PAGE_BYTES]
    ]
    if kind == "newest rows":
        at, kind = _place_of_a_newest_row(content, rng) or at, "sector of zeros"
    if kind == "older page" and changed:
        page = int(rng.choice(changed))
        content[page : page + PAGE_BYTES] = earlier[page : page + PAGE_BYTES]
    elif kind == "bit":
        flip(1 << int(rng.integers(8)))
    elif kind == "byte":
        flip(int(rng.integers(1, 256)))
    elif kind == "16 bytes":
        content[at : at + 16] = rng.bytes(min(16, len(content) - at))
    elif kind == "sector of zeros":
        zeros(at // 512 * 512, 512)
    elif kind == "page of zeros":
        zeros(page, PAGE_BYTES)
    elif kind == "cut":
        del content[at:]
    else:
        other = int(rng.integers(max(1, len(content) // PAGE_BYTES))) * PAGE_BYTES
        ours, theirs = content[page : page + PAGE_BYTES], content[other : other + PAGE_BYTES]
        content[page : page + len(theirs)] = theirs
        if kind == "swap":
            content[other : other + len(ours)] = ours
    return content


def _place_of_a_newest_row(content: bytearray | Window, rng: np.random.Generator) -> int | None:
    """Return a place in a page of rows that holds one of the newest."""
    found = [(match[0], match.start()) for match in re.finditer(rb"picture-\d{6}", content[:])]
    pages = {at: at // PAGE_BYTES * PAGE_BYTES for _, at in sorted(found)}
    places = [at for at, page in pages.items() if content[page : page + 1] == _LEAF_OF_TABLE]
    if not places:
        return None
    page = int(rng.choice(places[-_NEWEST:])) // PAGE_BYTES * PAGE_BYTES
    return page + int(rng.integers(PAGE_BYTES))


def verdict_on(name: str, answer: str, expected: str | None) -> str:
    """Return one of `OUTCOMES` for what an operation says of a damaged gallery."""
    if answer == expected:
        return "right"
    if name == "verify" and answer.startswith("["):
        return "refused"  # It lists what is wrong.
    kind = answer.partition(":")[0]
    return kind if kind in ("refused", "input", "raw", "crash") else "wrong"
