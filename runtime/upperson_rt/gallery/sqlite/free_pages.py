"""Free pages of a database file, overwritten without SQLite's log.

SQLite would write each of them twice: to its log, and to the file. A hole in the file reads as
zeros, costs no writing, and gives its space back to the file system. The list of free pages is that
of SQLite's file format (sqlite.org/fileformat2.html, 1.5).
"""

import ctypes
import errno
import os
import sys
import time
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.gallery.sqlite.access import Log
from upperson_rt.gallery.sqlite.schema import DamageError

_KEEP_SIZE, _PUNCH_HOLE = 1, 2  # Of Linux' fallocate.
_BLOCK_BYTES = 4096
_RUN_PAGES = 4096
_NOT_POSSIBLE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EPERM}


@dataclass(frozen=True)
class FreePages:
    """Pages that hold no rows, by number from 1 on."""

    page_bytes: int
    leaves: NDArray[np.int64]
    """Ascending; SQLite never reads what is in them."""
    trunks: dict[int, int]
    """Pages of the list itself; where the numbers in them end, in bytes."""

    @classmethod
    def read(cls, descriptor: int, log: Log | None = None) -> "FreePages":
        """Read the list of a database file as its log leaves it.

        Raises:
            DamageError: It was altered (``free_pages_altered``).
        """
        size = int.from_bytes(_read(descriptor, 16, 18), "big")
        size = 65536 if size == 1 else size  # As SQLite writes it.

        def numbers(page: int) -> NDArray[np.int64]:
            if log is not None and page in log.last:
                content = log.page(log.last[page])
            else:
                content = _read(descriptor, (page - 1) * size, page * size)
            return np.frombuffer(content, ">u4").astype(np.int64)

        pages, trunk, total = numbers(1)[7:10].tolist()
        leaves, trunks = [np.empty(0, np.int64)], dict[int, int]()
        while trunk and len(trunks) < total:
            listed = numbers(trunk)
            following, count = listed[:2].tolist() if len(listed) else (0, size)
            if trunk in trunks or count > size // 4 - 2:
                raise DamageError("its list of free pages was altered", "free_pages_altered")
            leaves.append(listed[2 : 2 + count])
            trunks[trunk], trunk = 8 + 4 * count, following
        found = cls(size, np.sort(np.concatenate(leaves)), trunks)
        ends = [*trunks, *found.leaves[:1].tolist(), *found.leaves[-1:].tolist()]
        if (
            len(found.leaves) + len(trunks) != total
            or not (np.diff(found.leaves) > 0).all()
            or any(not 1 < end <= pages for end in ends)
        ):
            raise DamageError("its list of free pages was altered", "free_pages_altered")
        return found

    def count_used(self, descriptor: int, log: Log | None = None) -> int:
        """Count those that have content: rows that were deleted, for example."""
        used, last = 0, max(int(self.leaves.max(initial=0)), *self.trunks, 0)
        for page, end in self.trunks.items() if log is None else ():
            place = (page - 1) * self.page_bytes
            rest = np.frombuffer(_read(descriptor, place + end, place + self.page_bytes), ">u4")
            used += bool((rest > last).any())  # SQLite leaves numbers of pages there.
        logged = np.array(sorted(log.last if log is not None else ()), np.int64)
        for page in np.intersect1d(self.leaves, logged).tolist():
            assert log is not None
            used += bool(log.page(log.last[page]).strip(b"\0"))
        for start, stop in self._runs(np.setdiff1d(self.leaves, logged)):
            found = _read(descriptor, start, stop).ljust(stop - start, b"\0")  # The file may end.
            content = np.frombuffer(found, np.uint8)
            used += int(content.reshape(-1, self.page_bytes).any(axis=1).sum())
        return used

    def overwrite(self, descriptor: int, after: int, seconds: float) -> int | None:
        """Make zeros of those after a page; return the last one if time ended, else None."""
        began = time.monotonic()
        if not after:
            for page, end in self.trunks.items():
                place = (page - 1) * self.page_bytes
                _write_zeros(descriptor, place + end, place + self.page_bytes)
        later = self.leaves[np.searchsorted(self.leaves, after, "right") :]
        for start, stop in self._runs(later):
            first, last = -(-start // _BLOCK_BYTES) * _BLOCK_BYTES, stop // _BLOCK_BYTES
            last *= _BLOCK_BYTES
            if first < last and _punch(descriptor, first, last):
                _write_zeros(descriptor, start, first)
                _write_zeros(descriptor, last, stop)
            else:
                _write_zeros(descriptor, start, stop)
            if time.monotonic() - began > seconds:
                os.fsync(descriptor)
                return stop // self.page_bytes
        os.fsync(descriptor)
        return None

    def _runs(self, leaves: NDArray[np.int64]) -> list[tuple[int, int]]:
        """Return where pages that follow each other, some MB at most, begin and end, in bytes."""
        is_end = (np.diff(leaves) != 1) | (np.arange(1, max(1, len(leaves))) % _RUN_PAGES == 0)
        parts = np.split(leaves, np.flatnonzero(is_end) + 1) if len(leaves) else []
        size = self.page_bytes
        return [((int(part[0]) - 1) * size, int(part[-1]) * size) for part in parts]


@cache
def _fallocate() -> Any:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)


def _punch(descriptor: int, start: int, stop: int) -> bool:
    """Make a hole; False where the file system cannot."""
    fallocate = _fallocate()
    if fallocate is None:
        return False
    offset, length = ctypes.c_int64(start), ctypes.c_int64(stop - start)
    if fallocate(descriptor, _KEEP_SIZE | _PUNCH_HOLE, offset, length) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_POSSIBLE:
        return False
    raise OSError(number, os.strerror(number))


def can_punch(descriptor: int) -> bool:
    """Whether the file system makes holes; tries it behind the end of the file."""
    end = -(-os.fstat(descriptor).st_size // _BLOCK_BYTES) * _BLOCK_BYTES
    return _punch(descriptor, end, end + _BLOCK_BYTES)


def _read(descriptor: int, start: int, stop: int) -> bytes:
    os.lseek(descriptor, start, os.SEEK_SET)
    return os.read(descriptor, stop - start)


def _write_zeros(descriptor: int, start: int, stop: int) -> None:
    """Write where there is anything else."""
    if _read(descriptor, start, stop).strip(b"\0"):
        os.lseek(descriptor, start, os.SEEK_SET)
        os.write(descriptor, bytes(stop - start))
