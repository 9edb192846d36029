"""Files as a whole: their hashes, and writes that happen completely or not at all.

What is written gets a temporary name first. When it is complete, its content is put on disk, then
it is renamed, then the folder with its name is put on disk, and only then an older one goes. So at
any moment a kill or a power failure leaves the old or the new one, and what was reported as written
stays written.
"""

import ctypes
import errno
import glob
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeAlias

from upperson_rt.errors import InputError
from upperson_rt.locks import lock_until_closed, try_lock

_BLOCK = 512

Unowned: TypeAlias = Callable[[Path], Collection[str]]
"""Returns what a folder holds beside an older result; nothing if it may be replaced."""

_RENAME_EXCHANGE = 2  # renameat2(2)
_AT_FDCWD = -100
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_ASKING = threading.Lock()
IRREGULAR = (errno.EINVAL, errno.ELOOP, errno.ENXIO)
"""Numbers of the errors of `open_regular` for what is no regular file; ENXIO is for sockets."""
_STALE_S = 3600.0
_SYNCS = 8  # At once: a thousand pictures take 0.07 s instead of 2 s.


def cache_folder() -> Path:
    """Return `$UPPERSON_CACHE`, else ``upperson`` in the user's cache folder (XDG)."""
    if named := os.environ.get("UPPERSON_CACHE"):
        return Path(named)
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))  # The standard ignores relative paths.
    try:
        return (caches if caches.is_absolute() else Path.home() / ".cache") / "upperson"
    except RuntimeError as error:
        message = "there is no home folder for a cache: set $UPPERSON_CACHE"
        raise InputError(message, code="no_home") from error


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder with its missing parents, durably; raises OSError."""
    missing = [place for place in (path, *path.parents) if not place.exists()]
    path.mkdir(mode, parents=True, exist_ok=True)
    for place in reversed(missing):
        sync_folder(place.parent)


def write_atomically(path: Path, content: bytes | str, private: bool = False) -> None:
    """Write a file (text as UTF-8) under a temporary name, put it on disk, rename it.

    Missing parent folders are made, and what killed processes left of the same file is removed.
    ``private`` gives permissions to the owner alone.
    """
    with _naming(path):
        remove_leftovers(path)
        _replace(path, content, 0o600 if private else 0o666 & ~_umask())
        sync_folder(path.parent)


def write_all_atomically(contents: Mapping[Path, bytes], pool: Executor) -> None:
    """Write files as `write_atomically` does, several at a time: each waits for the disk."""

    def write(path: Path) -> None:
        with _naming(path):
            _replace(path, contents[path], 0o666 & ~_umask())

    wait(writes := [pool.submit(write, path) for path in contents])
    for done in writes:
        done.result()
    for folder in {path.parent for path in contents}:
        with _naming(folder):
            sync_folder(folder)


def unfinished(folder: Path, name: str) -> set[Path]:
    """Return what killed processes left, or others are writing, of files that match a pattern."""
    return set(folder.glob(f".{name}.????????"))


def remove_unfinished(folder: Path, name: str) -> None:
    """Remove what `unfinished` finds; no process may be writing such files meanwhile."""
    for path in unfinished(folder, name):
        path.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left beside a file; an unlocked folder goes after an hour."""
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
    """Put the names in a folder on disk: a rename outlives a power failure. Raises OSError."""
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
    """Make and lock a file beside ``path``; return its handle, its name and one for the lock."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        if sys.platform == "win32":  # No locks, and an open file cannot be renamed.
            return handle, name, None
        lock_until_closed(handle, wait=True)
        if os.path.exists(name):
            return handle, name, os.dup(handle)
        os.close(handle)  # Another process swept it before it was locked.


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        message = f"cannot write {path}: {error.strerror or error}"
        raise InputError(message, code="cannot_write", path=str(path)) from error


def sha256_of_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def bytes_on_disk(look: os.stat_result) -> int:
    """Return what a file takes on its disk, without holes; where that is unknown, its size."""
    blocks: int = getattr(look, "st_blocks", -(-look.st_size // _BLOCK))
    return blocks * _BLOCK


def open_regular(path: str | os.PathLike[str], *, follow_links: bool = True) -> BinaryIO:
    """Open a regular file to read; raises OSError for anything else, and waits for no pipe.

    Without ``follow_links`` the file itself must be no symbolic link; its folders may be.
    """
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    if not follow_links:
        flags |= getattr(os, "O_NOFOLLOW", 0)
        if os.path.islink(path):  # Not all systems have the flag.
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
    handle = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
    return open(handle, "rb")


def read_bounded(
    path: str | os.PathLike[str], most_bytes: int, *, follow_links: bool = True
) -> bytes:
    """Read a whole file, see `open_regular`: a sparse one may name more than the memory has.

    Raises:
        InputError: It cannot be read (``file_unreadable``), or is longer (``file_too_large``).
    """
    place = os.fspath(path)
    try:
        with open_regular(path, follow_links=follow_links) as file:
            too_long = os.fstat(file.fileno()).st_size > most_bytes
            content = b"" if too_long else file.read(most_bytes + 1)
    except OSError as error:
        message = f"cannot read {place}: {error.strerror}"
        raise InputError(message, code="file_unreadable", path=place) from error
    if too_long or len(content) > most_bytes:  # It may have grown meanwhile.
        raise InputError(
            f"{place} has more than {most_bytes >> 20} MiB, the most that is read from a file of "
            "its kind: choose another file",
            code="file_too_large",
            path=place,
        )
    return content


def link_below(folder: Path, place: Path) -> Path | None:
    """Return the first symbolic link on the way from a folder to a place in it, None without one.

    The folder itself may be a link, or lie behind one. A place that does not begin with the folder
    counts as a link; one that is missing is none.
    """
    if not place.is_relative_to(folder):
        return place
    names = place.relative_to(folder).parts
    places = (folder.joinpath(*names[:count]) for count in range(1, len(names) + 1))
    return next((one for one in places if one.is_symlink()), None)


def require_no_links(folder: Path, *names: str) -> None:
    """Refuse to change a folder in which a symbolic link lies.

    Without names all that lies directly in it is looked at, else the way to each of these places.
    A missing folder has none. It is a check before work: who may write to the folder at the same
    time can still make a link after it.

    Raises:
        InputError: There is one (``link_in_folder``), or the folder cannot be listed.
    """
    links: Iterable[Path | None] = (link_below(folder, folder / name) for name in names)
    if not names and folder.is_dir():
        with _naming(folder), os.scandir(folder) as entries:
            links = [Path(entry.path) for entry in entries if entry.is_symlink()]
    for link in filter(None, links):
        raise InputError(
            f"{link} is a symbolic link; nothing below {folder} is written or removed through one: "
            "put a folder or file in its place, or mount the other disk there",
            code="link_in_folder",
            path=str(link),
            folder=str(folder),
        )


def all_names(folder: Path) -> list[str]:
    """Return the names in a folder: all are unowned where no older result is known."""
    return [path.name for path in folder.iterdir()]


def folder_near(place: Path, name: str) -> str | None:
    """Find a folder that holds a file of this name, in a place or around it; None if none does."""
    try:
        inside = [place / found for found in sorted(os.listdir(place))]
    except OSError:
        inside = []
    places = (*inside, place.absolute().parent)
    return next((str(folder) for folder in places if os.path.isfile(folder / name)), None)


_ARCHIVES = {b"PK\3\4": "zip", b"\x1f\x8b": "gzip", b"7z\xbc\xaf": "7z", b"Rar!": "RAR"}
"""By how a file begins."""


def refuse_archive(path: Path, expected: str) -> None:
    """Raise InputError if there is an archive where a folder is expected."""
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError:  # Whatever needs the folder says why it cannot be read.
        return
    for beginning, kind in _ARCHIVES.items():
        if start.startswith(beginning):
            raise InputError(
                f"{path} is a {kind} archive, expected {expected}: unpack it, and name the folder",
                code="archive",
                path=str(path),
                kind=kind,
            )


def require_place(path: Path, unowned: Unowned = all_names) -> None:
    """Refuse what `new_folder` would refuse. It makes nothing, so it may come before long work."""
    path = path.resolve()
    if path == Path.cwd():
        message = f"{path} is the working folder: choose a folder inside it as output"
        raise InputError(message, code="working_folder", path=str(path))
    if path.is_mount():
        message = f"{path} is a mount point: choose a folder inside it as output"
        raise InputError(message, code="mount_point", path=str(path))
    if path.exists() and not path.is_dir():
        message = f"{path} is a file, expected a folder: choose another output"
        raise InputError(message, code="no_folder", path=str(path))
    if path.exists() and (others := sorted(unowned(path))):
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        found = "exists and is not an earlier result, or was changed or holds other files as well"
        raise InputError(
            f"{path} {'is not empty' if unowned is all_names else found} ({shown}): choose another "
            "output, or move it away",
            code="unowned_files",
            path=str(path),
            names=shown,
        )
    require_writable(path.parent)


def require_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written to, or could not be made; nothing is made."""
    folder = folder.resolve()
    there = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not there.is_dir():
        message = f"cannot write to {folder}: {there} is not a folder"
        raise InputError(message, code="no_folder", path=str(there))
    if not os.access(there, os.W_OK | os.X_OK):
        message = f"cannot write to {folder}: folder {there} is not writable"
        raise InputError(message, code="not_writable", path=str(there))


@contextmanager
def new_folder(path: Path, unowned: Unowned = all_names) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it takes the place of ``path``.

    A folder that is there is replaced only if it has no unowned files. It goes after the new one is
    on disk; on an error it stays as it was. What a killed process left goes, or comes back, the
    next time.
    """
    path = path.resolve()
    require_place(path, unowned)
    with scratch_folder(path) as temporary:
        yield temporary
        require_place(path, unowned)  # Again: the work may have taken hours.
        put_in_place(temporary, path)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside ``path``, which goes at the end or the next time."""
    with _naming(path):
        make_folder(path.parent)
        _sweep(path)
        temporary, lock = _own_folder(path)
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
    except OSError as error:
        if error.errno in _FULL:  # Which says of itself neither where nor what to do.
            raise InputError(
                f"cannot write {path}: {error.strerror}; free some space, then try again",
                code="disk_full",
                path=str(path),
            ) from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        _unlock(lock)


def put_in_place(temporary: Path, path: Path) -> None:
    """Put a finished file or folder on disk, rename it, and put its new name on disk.

    An older folder at the new place ends up in the temporary place, on the same file system.
    """
    with _naming(path):
        if not temporary.is_dir():
            _sync_file(temporary)
            os.replace(temporary, path)
            sync_folder(path.parent)
            return
        _sync_tree(temporary)
        was_there = path.exists()
        move = _change_places if was_there else os.rename
        move(temporary, path)
        try:
            sync_folder(path.parent)
        except BaseException:  # Ctrl-C, too: the older one comes back.
            move(*(temporary, path) if was_there else (path, temporary))
            raise


def _sync_tree(folder: Path) -> None:
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


def _change_places(temporary: Path, path: Path) -> None:
    if not _exchange(temporary, path):
        _swap(temporary, path)


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
    """Make a folder beside ``path`` and lock it; return it and the handle that holds the lock."""
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
        is_left = pattern.fullmatch(folder.name) and folder.is_dir() and not folder.is_symlink()
        if not is_left or (lock := _locked(folder)) is None:
            continue
        try:
            if folder.suffix == ".old" and not path.exists():
                os.rename(folder, path)
                sync_folder(path.parent)
            else:
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            _unlock(lock)


def sweep(folder: Path, name: str) -> None:
    """Remove what dead processes left of files and folders whose names match a pattern."""
    found = {*unfinished(folder, name), *folder.glob(f".{name}.????????.tmp")}
    for path in {one.with_name(one.name[1:].removesuffix(".tmp")[:-9]) for one in found}:
        remove_leftovers(path)
        _sweep(path)


def _locked(path: Path) -> int | None:
    """Lock a file or folder; None if a live process has it, or it cannot be locked."""
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
    """Return which permissions new files do not get; one thread at a time, as it has to be set."""
    with _ASKING:
        mask = os.umask(0o077)
        os.umask(mask)
    return mask
