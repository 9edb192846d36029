"""Files as a whole: their hashes, and writes that happen completely or not at all.

What is written gets a temporary name first. When it is complete, its content is put on disk, then
it is renamed, then the folder with its name is put on disk, and only then an older one goes. So at
any moment a kill or a power failure leaves the old or the new one, and what a caller was told is
written stays written.
"""

import ctypes
import errno
import glob
import hashlib
import os
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

from upperson_rt.errors import InputError
from upperson_rt.locks import lock_until_closed, try_lock

__all__ = [
    "all_names",
    "cache_folder",
    "folder_near",
    "make_folder",
    "new_folder",
    "put_in_place",
    "read_bounded",
    "remove_leftovers",
    "remove_unfinished",
    "require_place",
    "require_writable",
    "scratch_folder",
    "sha256_of_file",
    "sync_folder",
    "unfinished",
    "write_all_atomically",
    "write_atomically",
]

Foreign: TypeAlias = Callable[[Path], Collection[str]]
"""Tells what a folder holds beside an older result; nothing, if it may be replaced."""

_RENAME_EXCHANGE = 2  # renameat2(2)
_AT_FDCWD = -100
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ASKING = threading.Lock()
_STALE_S = 3600.0
_SYNCS = 8  # At once: a thousand pictures take 0.07 s instead of 2 s.


def cache_folder() -> Path:
    """Return `$UPPERSON_CACHE`, else ``upperson`` in the user's cache folder (XDG).

    Raises:
        InputError: The user has no home folder.
    """
    if named := os.environ.get("UPPERSON_CACHE"):
        return Path(named)
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))  # The standard ignores relative paths.
    try:
        return (caches if caches.is_absolute() else Path.home() / ".cache") / "upperson"
    except RuntimeError as error:
        raise InputError("there is no home folder for a cache: set $UPPERSON_CACHE") from error


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder with its missing parents, each of them there after a power failure, too.

    Raises:
        OSError: The place cannot be written to.
    """
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(mode, parents=True, exist_ok=True)
    for place in reversed(missing):
        sync_folder(place.parent)


def write_atomically(path: Path, content: bytes | str, private: bool = False) -> None:
    """Write a file under a temporary name beside it, put it on disk, then rename it.

    Text is written as UTF-8. Missing parent folders are made. A power failure afterwards changes
    nothing; one meanwhile leaves what was there before, or all of the new. A private file is for
    its owner alone. What killed processes left of the same file goes.

    Raises:
        InputError: The place cannot be written to; what was there before is untouched, or replaced
            by all of the new if only that could not be put on disk.
    """
    with _told(path):
        remove_leftovers(path)
        _replace(path, content, 0o600 if private else 0o666 & ~_umask())
        sync_folder(path.parent)


def write_all_atomically(contents: Mapping[Path, bytes], pool: Executor) -> None:
    """Write files as `write_atomically` does, several at a time: each waits for the disk.

    Raises:
        InputError: A place cannot be written to; other files may have been written.
    """

    def write(path: Path) -> None:
        with _told(path):
            _replace(path, contents[path], 0o666 & ~_umask())

    writes = [pool.submit(write, path) for path in contents]
    wait(writes)
    for done in writes:
        done.result()
    for folder in {path.parent for path in contents}:
        with _told(folder):
            sync_folder(folder)


def unfinished(folder: Path, name: str) -> set[Path]:
    """Return what killed processes left, or others are writing, of files that match a pattern."""
    return set(folder.glob(f".{name}.????????"))


def remove_unfinished(folder: Path, name: str) -> None:
    """Remove what `unfinished` finds; nobody may be writing such files meanwhile."""
    for path in unfinished(folder, name):
        path.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left beside a file that they were writing.

    The file of a live process is locked. A folder is not: it goes an hour after its last change.
    """
    for left in unfinished(path.parent, glob.escape(path.name)):
        if left.is_symlink() or (lock := _locked(left)) is None:
            continue
        try:
            if left.is_dir():
                if time.time() - left.stat().st_mtime > _STALE_S:
                    shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()
        except OSError:  # It went meanwhile, or is another user's.
            pass
        finally:
            _unlock(lock)


def sync_folder(folder: Path) -> None:
    """Put the names in a folder on disk: without that a rename may not outlive a power failure.

    Raises:
        OSError: The disk fails.
    """
    if sys.platform == "win32":  # Folders cannot be opened there.
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # Some network file systems know it for files only.
            raise
    finally:
        os.close(handle)


def _replace(path: Path, content: bytes | str, mode: int) -> None:
    data = content.encode("utf-8") if isinstance(content, str) else content
    make_folder(path.parent)
    handle, name, lock = _own_file(path)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.chmod(name, mode)
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    finally:
        _unlock(lock)


def _own_file(path: Path) -> tuple[int, str, int | None]:
    """Make a file beside ``path`` and lock it.

    Returns:
        The handle to write with, the name, and another handle, which holds the lock until it, too,
        is closed.
    """
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        if sys.platform == "win32":  # No locks, and an open file cannot be renamed.
            return handle, name, None
        lock_until_closed(handle, wait=True)
        if os.path.exists(name):
            return handle, name, os.dup(handle)
        os.close(handle)  # Another process swept it before it was locked.


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Turn errors of the system into ours, naming what was to be written."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_bounded(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """Read a whole file that must not be longer: a sparse one may name more than the memory has.

    Raises:
        InputError: It cannot be read, or is longer.
    """
    try:
        with open(path, "rb") as file:
            too_long = os.fstat(file.fileno()).st_size > most_bytes
            # A device or pipe tells no size.
            content = b"" if too_long else file.read(most_bytes + 1)
    except OSError as error:
        raise InputError(f"cannot read {os.fspath(path)}: {error.strerror}") from error
    if too_long or len(content) > most_bytes:
        raise InputError(
            f"{os.fspath(path)} has more than {most_bytes >> 20} MiB, the most that is read from a "
            "file of its kind: choose another file"
        )
    return content


def all_names(folder: Path) -> list[str]:
    """Return the names in a folder: what is foreign where no older result is known."""
    return [path.name for path in folder.iterdir()]


def folder_near(place: Path, name: str) -> str | None:
    """Return the folder with a file of a name that lies in a place, or around it; None if none is.

    Args:
        place: A folder, or a file, or missing.
        name: Of the file that makes a folder what was looked for.
    """
    try:
        inside = [place / found for found in sorted(os.listdir(place))]
    except OSError:
        inside = []
    places = (*inside, place.absolute().parent)
    return next((str(folder) for folder in places if os.path.isfile(folder / name)), None)


def require_place(path: Path, foreign: Foreign = all_names) -> None:
    """Refuse what `new_folder` would refuse. It makes nothing, so it may come before long work.

    Raises:
        InputError: ``path`` holds something else, or cannot be written to.
    """
    path = path.resolve()
    if path == Path.cwd():
        raise InputError(f"{path} is the working folder: choose a folder inside it as output")
    if path.is_mount():
        raise InputError(f"{path} is a mount point: choose a folder inside it as output")
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file, expected a folder: choose another output")
    if path.exists() and (others := sorted(foreign(path))):
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        raise InputError(
            f"{path} exists and is not an earlier result, or was changed or holds other files as "
            f"well ({shown}): choose another output, or move it away"
        )
    require_writable(path.parent)


def require_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written to, or could not be made; nothing is made.

    Raises:
        InputError: Neither it nor what is there of its parents is a folder that can be written to.
    """
    folder = folder.resolve()
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise InputError(f"cannot write to {folder}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {folder}: folder {there} is not writable")


@contextmanager
def new_folder(path: Path, foreign: Foreign = all_names) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it takes the place of ``path``.

    A folder that is there is replaced only if nothing in it is foreign, so nothing of the user's
    is lost; it goes after the new one is in place and on disk. On an error the temporary folder
    goes and ``path`` stays as it was. What a killed process left behind goes, or comes back, the
    next time.

    Args:
        path: Final place.
        foreign: Tells what a folder holds that no older result of the same kind does.

    Raises:
        InputError: ``path`` holds something else, or cannot be written to.
    """
    path = path.resolve()
    require_place(path, foreign)
    with scratch_folder(path) as temporary:
        yield temporary
        require_place(path, foreign)  # Again: the work may have taken hours.
        put_in_place(temporary, path)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside ``path`` and named after it, which goes at the end.

    What a killed process left behind goes, or comes back, the next time.

    Raises:
        InputError: The place cannot be written to, or is full.
    """
    with _told(path):
        make_folder(path.parent)
        _sweep(path)
        temporary, lock = _own_folder(path)
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
    except OSError as error:
        if error.errno in _FULL:  # Which says of itself neither where nor what to do.
            raise InputError(
                f"cannot write {path}: {error.strerror}; free some space, then try again"
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _unlock(lock)


def put_in_place(temporary: Path, path: Path) -> None:
    """Put a finished file or folder on disk, rename it, and put its new name on disk.

    An older folder at the new place ends up in the temporary place, an older file goes. Both places
    are on one file system.

    Raises:
        InputError: The place cannot be written to; an older folder is where it was.
    """
    with _told(path):
        if not temporary.is_dir():
            _sync_file(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
            return
        _sync_tree(temporary)
        was_there = path.exists()
        if was_there:
            _change_places(temporary, path)
        else:
            os.rename(temporary, path)
        try:
            sync_folder(path.parent)
        except BaseException:  # Ctrl-C, too: the older one comes back.
            if was_there:
                _change_places(temporary, path)
            else:
                os.rename(path, temporary)
            raise


def _sync_tree(folder: Path) -> None:
    """Put all files and names in a folder on disk."""
    with ThreadPoolExecutor(_SYNCS) as pool:
        places = [Path(place) for place, _, _ in os.walk(folder)]
        paths = (path for place in places for path in place.iterdir())
        # The results raise what went wrong.
        list(pool.map(_sync_file, (p for p in paths if p.is_file() and not p.is_symlink())))
        list(pool.map(sync_folder, places))


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _change_places(one: Path, other: Path) -> None:
    if not _exchange(one, other):
        _swap(one, other)


def _exchange(one: Path, other: Path) -> bool:
    """Let two folders change places in one step; False where the system cannot."""
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):  # It is younger than some C libraries.
        return False
    paths = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    if libc.renameat2(*paths, _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # Not with this file system.
        return False
    raise OSError(number, os.strerror(number), str(other))


def _swap(temporary: Path, path: Path) -> None:
    """Let two folders change places in three steps; `_sweep` repairs what ends in between."""
    retired = temporary.with_suffix(".old")
    lock = _locked(path)
    try:
        os.rename(path, retired)
        try:
            os.rename(temporary, path)
        except BaseException:  # Ctrl-C, too: the older one comes back.
            os.rename(retired, path)
            raise
        os.rename(retired, temporary)
    finally:
        _unlock(lock)


def _own_folder(path: Path) -> tuple[Path, int | None]:
    """Make a folder beside ``path`` and lock it: the lock ends with the process, however it ends.

    Returns:
        The folder and the open handle that holds the lock.
    """
    while True:
        folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
        if sys.platform == "win32":  # Folders cannot be opened there; nothing is swept either.
            return folder, None
        with suppress(FileNotFoundError):  # Another process swept it before it was locked.
            handle = os.open(folder, os.O_RDONLY)
            lock_until_closed(handle, wait=True)
            if folder.exists():
                return folder, handle
            os.close(handle)


def _sweep(path: Path) -> None:
    """Remove temporary folders of dead processes; an older result that one had moved comes back."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.(tmp|old)")
    for folder in list(path.parent.iterdir()):
        if not (pattern.fullmatch(folder.name) and folder.is_dir()):
            continue
        lock = _locked(folder)
        if lock is None:
            continue
        try:
            if folder.suffix == ".old" and not path.exists():
                os.rename(folder, path)
                sync_folder(path.parent)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            _unlock(lock)


def _locked(path: Path) -> int | None:
    """Lock a file or folder; None if a live process has it, or nobody can."""
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:  # It is gone, or another user's.
        return None
    if try_lock(handle):
        return handle
    os.close(handle)
    return None


def _unlock(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)


def _umask() -> int:
    """Return which permissions new files do not get.

    The system tells that only to whoever sets another mask: one thread at a time, lest another one
    keeps that, and a strict one, for files that others make meanwhile.
    """
    with _ASKING:
        mask = os.umask(0o077)
        os.umask(mask)
    return mask
