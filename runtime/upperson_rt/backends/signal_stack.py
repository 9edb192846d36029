"""Keep a thread's alternate signal stack what it was.

OpenVINO gives a thread that loads its CPU plugin a stack of its own for signals, and takes it away
with the plugin. When two of them go in another order, the memory of the first stays registered
after it was freed, and the next Ctrl-C or SIGTERM ends the process with a segmentation fault (seen
with OpenVINO 2026.4). Putting back what was there before leaves nothing to dangle.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["same_signal_stack"]


class _Stack(ctypes.Structure):
    """``stack_t`` of Linux."""

    _fields_ = [("sp", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


_ON_STACK = 1


@contextmanager
def same_signal_stack() -> Iterator[None]:
    """Restore this thread's alternate signal stack at the end; does nothing but on Linux."""
    if sys.platform != "linux":
        yield
        return
    libc = ctypes.CDLL(None)
    before = _Stack()
    libc.sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        if not before.flags & _ON_STACK:
            libc.sigaltstack(ctypes.byref(before), None)
