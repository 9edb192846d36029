"""A file beside SQLite's log that says how many transactions the log has to hold."""

import errno
import os
import zlib
from pathlib import Path

from upperson_rt.errors import InputError

__all__ = ["read_mark", "write_mark"]


def write_mark(path: Path, identity: str, commits: int) -> None:
    """Note beside the log how many transactions it has to hold, see `Database._check_mark`.

    Written after the log was synced, so it never says too much. It may say too little: nothing is
    lost then but the notice of a loss.

    Raises:
        InputError: The disk turned read-only, and may have kept nothing of what it said was synced.
    """
    text = f"{identity} {commits:020d}"
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.write(handle, f"{text} {zlib.crc32(text.encode()):08x}\n".encode())
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno == errno.EROFS:
            raise InputError(
                f"the disk of gallery {path.parent} turned read-only while it was written to, and "
                "the last change may be lost: check the disk, then repeat it"
            ) from error


def read_mark(path: Path) -> tuple[str, int] | None:
    """Return the gallery's identity and its transactions; None where nothing was noted."""
    try:
        text, _, checksum = path.read_bytes().decode("ascii", "replace").rpartition(" ")
    except OSError:
        return None
    if checksum != f"{zlib.crc32(text.encode()):08x}\n":
        return None
    identity, _, commits = text.partition(" ")
    return identity, int(commits)
