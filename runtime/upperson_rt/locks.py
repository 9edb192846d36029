"""Locks between processes, on open files and folders; the system ends them with their process.

Where the system has none (Windows, some network file systems), work goes on without.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

__all__ = [
    "lock_or_wait",
    "lock_until_closed",
    "locked",
    "locked_folder",
    "try_lock",
    "unlock_and_close",
]


def lock_until_closed(handle: int, *, wait: bool = False, share: bool = False) -> bool:
    """Lock an open file or folder until it is closed; return False where the system has no locks.

    Args:
        handle: Of the file or folder.
        wait: Wait for another process that has the lock.
        share: Lock it beside others that share it.

    Raises:
        BlockingIOError: Another process has the lock, and ``wait`` is false.
    """
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        kind = fcntl.LOCK_SH if share else fcntl.LOCK_EX
        fcntl.flock(handle, kind | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def unlock_and_close(handle: int) -> None:
    """End a lock, in child processes that have the same file or folder open as well."""
    if sys.platform != "win32":
        import fcntl

        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_UN)
    os.close(handle)


def lock_or_wait(handle: int, on_wait: Callable[[], None]) -> None:
    """Lock an open file or folder until it is closed; say so before waiting for another process."""
    try:
        lock_until_closed(handle)
    except BlockingIOError:
        on_wait()
        lock_until_closed(handle, wait=True)


def try_lock(handle: int) -> bool:
    """Lock an open file or folder until it is closed, if that works at once; return whether."""
    try:
        return lock_until_closed(handle)
    except BlockingIOError:
        return False


@contextmanager
def locked(file: int) -> Iterator[bool]:
    """Keep other processes that lock the same file waiting meanwhile; False where none can be."""
    held = lock_until_closed(file, wait=True)
    try:
        yield held
    finally:
        if held:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def locked_folder(folder: Path) -> Iterator[bool]:
    """Do the same with a folder; what was renamed in it meanwhile is on disk at the end."""
    if sys.platform == "win32":  # Folders cannot be opened there.
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with locked(descriptor) as held:
            yield held
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
