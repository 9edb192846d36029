"""Pages of a gallery's file and of its log as bytes, read without SQLite.

SQLite recovers, checkpoints or removes a log that it opens; what is read here stays as it is.
"""

import mmap
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Log", "is_free_list_sound", "read_log"]

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
    """Read which pages a log holds; None if SQLite would take it for empty.

    Raises:
        OSError: It cannot be read.
    """
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


def is_free_list_sound(handle: int, log: Log | None) -> bool:
    """Tell whether each page of the list of free pages is free: named once, and zeros.

    Galleries overwrite what they delete (`secure_delete`). A list that other programs wrote may be
    sound where this is false.

    Args:
        handle: Of the database file.
        log: What its log holds.
    """
    with closing(mmap.mmap(handle, 0, access=mmap.ACCESS_READ)) as file:
        (size,) = struct.unpack_from(">H", file, 16)
        size = 65536 if size == 1 else size
        in_log = {} if log is None or log.page_size != size else log.last

        def page(number: int) -> bytes:
            if log is not None and number in in_log:
                return log.page(in_log[number])
            return file[(number - 1) * size : number * size]

        pages, trunk, count = struct.unpack_from(">III", page(1), 28)
        if size < 512 or (log is None and pages * size != len(file)):
            return False
        seen, zeros = {1}, bytes(size)
        for number, is_trunk in _named_free(page, trunk):
            if number in seen or not 1 < number <= pages:
                return False
            seen.add(number)
            if not is_trunk and page(number) != zeros:
                return False
        return bool(len(seen) - 1 == count)


def _named_free(page: Callable[[int], bytes], trunk: int) -> Iterator[tuple[int, bool]]:
    """Yield the pages that the list names, and whether each is part of the list itself."""
    while trunk:
        yield trunk, True
        content = page(trunk)
        trunk, count = struct.unpack_from(">II", content)
        if count > len(content) // 4 - 2:
            yield 0, False  # No page.
            return
        yield from ((leaf, False) for leaf in struct.unpack_from(f">{count}I", content, 8))
