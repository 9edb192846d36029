"""The search index in a file: derived from the database, checked when read, replaceable any time.

    faiss index | item ids, int64 | checksums of their rows, int64 | JSON
    | crc32 of the JSON, 4 bytes | length of the JSON, 4 bytes | crc32 of all that, 8 bytes
    | magic, 8 bytes

faiss reads its own part from the beginning and ignores what follows.
"""

import json
import os
import tempfile
import time
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.files import put_in_place
from upperson_rt.gallery.sqlite.segments import load_faiss

__all__ = ["INDEX_FILE", "Stamp", "UnusableIndexError", "read_index", "read_stamp", "write_index"]

INDEX_FILE = "gallery.index"
FORMAT = 2

_MAGIC = b"uprtidx2"
_END_BYTES = 24
_CHUNK_BYTES = 1 << 24
_ABANDONED_S = 3600.0
Contents: TypeAlias = tuple[Any, NDArray[np.int64], NDArray[np.int64]]
"""The index of faiss, and for each of its rows the item's id and its checksum."""


class UnusableIndexError(Exception):
    """An index file that cannot be used, and why; it is made anew."""


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """What an index was made from, and how."""

    identity: str
    """The gallery's, see `schema.SqliteMeta`."""
    seq: int
    """Last entry of the log of changes."""
    last_id: int
    """Highest id ever given."""
    embed_dim: int
    rows: int
    kind: str
    """``exact`` or ``ivf-sq8``."""
    witnesses: list[list[int]]
    """[id, crc32 of the stored vector] of the newest rows: a database that was replaced by an
    earlier copy and went on from there has others."""
    nlist: int = 0
    nprobe: int = 0
    recall_at_10: float = 1.0
    format: int = field(default=FORMAT)


def write_index(path: Path, contents: Contents, stamp: Stamp) -> None:
    """Write the file completely or not at all.

    Raises:
        OSError, InputError: The place cannot be written to; what was there before is untouched.
    """
    faiss = load_faiss()
    index, ids, checksums = contents

    prefix = f".{path.name}."
    for abandoned in path.parent.glob(f"{prefix}*"):  # By processes that were killed.
        if time.time() - abandoned.stat().st_mtime > _ABANDONED_S:
            abandoned.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix)
    os.close(handle)
    try:
        try:
            faiss.write_index(index, name)
        except RuntimeError as error:
            raise OSError(f"cannot write {path}: {error}") from error
        details = json.dumps(asdict(stamp)).encode()
        with open(name, "r+b") as file:
            checksum = _checksum(file, os.path.getsize(name))
            file.seek(0, os.SEEK_END)
            for part in (
                ids.astype("<i8").tobytes(),
                checksums.astype("<i8").tobytes(),
                details,
                zlib.crc32(details).to_bytes(4, "little"),
                len(details).to_bytes(4, "little"),
            ):
                checksum = zlib.crc32(part, checksum)
                file.write(part)
            file.write(checksum.to_bytes(8, "little") + _MAGIC)
        os.chmod(name, path.stat().st_mode if path.exists() else 0o644)
        put_in_place(Path(name), path)
    finally:
        with suppress(OSError):
            os.unlink(name)


def read_stamp(path: Path) -> Stamp:
    """Read only the stamp.

    Raises:
        FileNotFoundError: There is no such file.
        UnusableIndexError: It is damaged or of another version.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        return _read_stamp(file)[0]


def read_index(path: Path) -> tuple[Contents, Stamp]:
    """Read the file after checking all of it; the vectors stay there (mmap).

    So processes share them, and the system may drop them where memory is short.

    Raises:
        FileNotFoundError: There is no such file.
        UnusableIndexError: It is damaged or of another version.
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        stamp, ids_at, checksum_at = _read_stamp(file)
        file.seek(checksum_at)
        expected = int.from_bytes(file.read(8), "little")
        file.seek(0)
        if _checksum(file, checksum_at) != expected:
            raise UnusableIndexError("its checksum does not match")
        file.seek(ids_at)
        numbers = np.frombuffer(file.read(16 * stamp.rows), "<i8").astype(np.int64)
        faiss = load_faiss()
        # By descriptor: the path may lead to another process's newer file by now.
        name = f"/proc/self/fd/{file.fileno()}"
        # Older releases of faiss read exact indexes into memory.
        exact = getattr(faiss, "IO_FLAG_MMAP_IFC", 0)
        flags = exact if stamp.kind == "exact" else faiss.IO_FLAG_MMAP
        try:
            index = faiss.read_index(name if os.path.exists(name) else str(path), flags)
        except RuntimeError as error:
            raise UnusableIndexError(f"faiss cannot read it: {error}") from error
    if index.ntotal != stamp.rows or index.d != stamp.embed_dim:
        raise UnusableIndexError(
            f"it holds {index.ntotal} rows of {index.d}, not what its stamp says"
        )
    return (index, numbers[: stamp.rows], numbers[stamp.rows :]), stamp


def _read_stamp(file: BinaryIO) -> tuple[Stamp, int, int]:
    """Return the stamp, and where the ids and the checksum are."""
    size = file.seek(0, os.SEEK_END)
    if size < _END_BYTES:
        raise UnusableIndexError("it is too short")
    file.seek(size - _END_BYTES)
    end = file.read(_END_BYTES)
    checksum, length = (int.from_bytes(end[at : at + 4], "little") for at in (0, 4))
    if end[16:] != _MAGIC or length > size - _END_BYTES:
        raise UnusableIndexError("it is cut off, or no index of this version")
    file.seek(size - _END_BYTES - length)
    details = file.read(length)
    if zlib.crc32(details) != checksum:
        raise UnusableIndexError("its stamp is damaged")
    try:
        stamp = Stamp(**json.loads(details))
    except (ValueError, TypeError) as error:
        raise UnusableIndexError(f"it is of another version: {error}") from error
    ids_at = size - _END_BYTES - length - 16 * stamp.rows
    if stamp.format != FORMAT or ids_at < 0:
        raise UnusableIndexError("it is of another version")
    return stamp, ids_at, size - 16


def _checksum(file: BinaryIO, length: int) -> int:
    """Return the crc32 of the next bytes."""
    checksum, buffer = 0, memoryview(bytearray(_CHUNK_BYTES))
    while length > 0:
        count = file.readinto(buffer[: min(length, _CHUNK_BYTES)])  # type: ignore[attr-defined]
        if not count:
            raise UnusableIndexError("it is cut off")
        checksum = zlib.crc32(buffer[:count], checksum)
        length -= count
    return checksum
