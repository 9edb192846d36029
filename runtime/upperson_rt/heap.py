"""Memory that was freed goes back to the system, as far as the C library lets it.

glibc keeps a heap for each thread. What is freed in the middle of one stays there, and so does what
is freed at its end, up to twice the largest block that was ever freed. Blocks up to that one, 32
MiB at most, are then taken from heaps, too: where work moves from thread to thread, each heap comes
to hold as much as the work ever needed.
"""

import ctypes
import functools
import sys
import threading

__all__ = ["keep_little", "return_freed"]

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # Of mallopt in malloc.h.
_LEFT_BYTES = 4 << 20
_ASKING = threading.Lock()


def return_freed() -> None:
    """Give all back that lies free in any heap; takes some milliseconds."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


class _Thresholds:
    """What was asked for in this process: the smallest counts."""

    largest_in_heap: int | None = None


def keep_little(largest_in_heap: int) -> None:
    """Have heaps keep little of what is freed at their ends, and no block above so many bytes.

    Such a block is taken from the system and goes back when it is freed, for the price of its pages
    being cleared each time. Who asks for less than somebody before is heard.
    """
    with _ASKING:
        before = _Thresholds.largest_in_heap
        if before is not None and before <= largest_in_heap:
            return
        _Thresholds.largest_in_heap = largest_in_heap
        if (libc := _glibc()) is not None:
            # Either stops the growth of both.
            libc.mallopt(_MMAP_THRESHOLD, largest_in_heap)
            libc.mallopt(_TRIM_THRESHOLD, _LEFT_BYTES)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """Return the C library where it is glibc."""
    found = ctypes.CDLL(None) if sys.platform == "linux" else None
    return found if hasattr(found, "malloc_trim") else None
