"""Locks between processes, on open files and folders; the system ends them with their process.

Where the system has none (Windows, some network file systems), work goes on without.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def lock_until_closed(handle: int, *, wait: bool = False, share: bool = False) -> bool:
    """Lock an open file or folder until it is closed; return False where the system has no locks.

    Raises BlockingIOError if another process has the lock and ``wait`` is false.
    """
    if sys.platform == "win32":
        return False
    import fcntl

    kind = fcntl.LOCK_SH if share else fcntl.LOCK_EX
    try:
        fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
    except OSError as error:
        if isinstance(error, BlockingIOError):
            raise
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
def locked(file: int, wait: bool = True) -> Iterator[bool]:
    """Keep other processes that lock the same file waiting meanwhile; False where none can be.

    Without ``wait`` also False while another one has the lock.
    """
    held = lock_until_closed(file, wait=True) if wait else try_lock(file)
    try:
        yield held
    finally:
        if held:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_UN)


@contextmanager
def locked_folder(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Do the same with a folder; what was renamed in it meanwhile is on disk at the end."""
    if sys.platform == "win32":  # Folders cannot be opened there.
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with locked(descriptor, wait) as held:
            yield held
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
