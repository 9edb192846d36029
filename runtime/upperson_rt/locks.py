"""Locks between processes, on open files and folders; the system ends them with their process."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["lock_until_closed", "locked", "locked_folder"]


def lock_until_closed(handle: int, *, wait: bool = False) -> bool:
    """Lock an open file or folder until it is closed; return whether that worked.

    It does not where another process has it and ``wait`` is false, on some network file systems,
    and on Windows.
    """
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


@contextmanager
def locked(file: int) -> Iterator[None]:
    """Keep other processes that lock the same file waiting meanwhile, where the system can."""
    try:
        import fcntl
    except ImportError:  # Windows: short writes are whole, and a rename replaces nothing.
        yield
        return
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Do the same with a folder; what was renamed in it meanwhile is on disk at the end."""
    if os.name == "nt":  # Folders cannot be opened.
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with locked(descriptor):
            yield
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
