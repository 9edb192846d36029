"""This machine: processor, installed versions, priorities, and memory that is freed."""

import ctypes
import functools
import os
import platform
import sys
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")

_BF16_SETS = {"avx512_bf16", "amx_bf16", "bf16"}


def lower_priority() -> None:
    """Let other threads and processes go before this thread, where the system can."""
    with suppress(AttributeError, OSError):  # Priorities of threads are Linux's.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def version_of(package: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    from importlib import metadata  # Here: it brings a third of what opening a picture imports.

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Processor:
    """A processor as the system describes it."""

    name: str
    flags: frozenset[str] | None
    """What it can do, such as ``avx2``; None where /proc does not list it."""

    @property
    def is_x86(self) -> bool:
        """Whether it is one of Intel's or AMD's."""
        return platform.machine().lower() in ("x86_64", "amd64")

    @property
    def has_bf16(self) -> bool:
        """Whether it multiplies bf16; True where the system does not report it."""
        return self.flags is None or bool(self.flags & _BF16_SETS)


def processor() -> Processor:
    """Return the processor of this machine."""
    name, flags = platform.processor() or platform.machine(), None
    if _CPUINFO.is_file():
        with _CPUINFO.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                key, _, value = (part.strip() for part in line.partition(":"))
                if key == "model name":
                    name = value
                elif key in ("flags", "Features"):
                    flags = frozenset(value.split())
                elif not key and flags:  # The next core, of many.
                    break
    return Processor(name, flags)


# --- Memory that was freed goes back to the system, as far as the C library lets it
#
# glibc keeps a heap for each thread. What is freed in the middle of one stays there, and so does
# what is freed at its end, up to twice the largest block that was ever freed. Blocks up to that
# one, 32 MiB at most, are then taken from heaps, too: where work moves from thread to thread, each
# heap comes to hold as much as the work ever needed.

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # Of mallopt in malloc.h.
_LEFT_BYTES = 4 << 20
_ASKING = threading.Lock()
_largest_in_heap = sys.maxsize
"""The smallest limit that was asked for in this process."""


def trim_heap() -> None:
    """Give all back that lies free in any heap; takes some milliseconds."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def limit_heap(largest_in_heap: int) -> None:
    """Trim heaps early and take larger blocks from the system; a later, smaller limit wins."""
    global _largest_in_heap
    with _ASKING:
        if _largest_in_heap <= largest_in_heap:
            return
        _largest_in_heap = largest_in_heap
        if (libc := _glibc()) is not None:
            # Either stops the growth of both.
            libc.mallopt(_MMAP_THRESHOLD, largest_in_heap)
            libc.mallopt(_TRIM_THRESHOLD, _LEFT_BYTES)


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    found = ctypes.CDLL(None) if sys.platform == "linux" else None
    return found if hasattr(found, "malloc_trim") else None
