"""Writes that either happen completely or not at all: a temporary name, then a rename; locks."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from upperson_rt.errors import InputError

__all__ = ["locked", "locked_folder", "new_folder", "write_atomically"]


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file under a temporary name beside it, flush it to disk, then rename it.

    Text is written as UTF-8. Missing parent folders are made.

    Raises:
        InputError: The place cannot be written to; what was there before is untouched.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    finally:
        Path(name).unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, *, is_earlier: Callable[[Path], bool]) -> Iterator[Path]:
    """Give a temporary folder to fill; on success it takes the place of ``path``.

    A folder that is there is replaced only if it is empty or ``is_earlier`` says that all of it is
    an older result of the same kind; anything else is refused, so nothing of the user's is lost. On
    an error the temporary folder goes and ``path`` stays as it was.

    Args:
        path: Final place.
        is_earlier: Tells whether a folder is an older result, and nothing else.

    Raises:
        InputError: ``path`` holds something else, or cannot be written to.
    """
    path = path.resolve()
    if path == Path.cwd():
        raise InputError(f"{path} is the working folder: choose a folder inside it as output")
    if path.exists() and (not path.is_dir() or (any(path.iterdir()) and not is_earlier(path))):
        raise InputError(
            f"{path} exists and is not an earlier result, or holds other files as well: "
            "choose another output, or move it away"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error
    try:
        temporary.chmod(0o777 & ~_umask())
        yield temporary
        if path.exists():
            retired = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
            os.replace(path, retired / path.name)
            try:
                os.replace(temporary, path)
            except BaseException:  # Ctrl-C, too: the older result comes back.
                os.replace(retired / path.name, path)
                raise
            finally:
                shutil.rmtree(retired)
        else:
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
