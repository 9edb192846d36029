"""Files of the search index: derived from the database, checked when read, replaceable any time.

    faiss index, if there is one | arrays | JSON: stamp, and name, type and length of each array
    | crc32 of the JSON, 4 bytes | length of the JSON, 4 bytes | crc32 of all that, 8 bytes
    | magic, 8 bytes

faiss reads its own part from the beginning and ignores what follows. Index and arrays stay in the
file (mmap), so processes share them, and the system may drop them where memory is short.
"""

import json
import mmap
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.files import open_regular, put_in_place, scratch_folder
from upperson_rt.gallery.sqlite.segments import load_faiss

FORMAT = 4
_MAGIC = b"uprtidx4"
_END_BYTES = 24
_CHUNK_BYTES = 1 << 24
_MOST_BYTES = 1 << 34
"""Of a file: an exact index of a million rows of 4,096 dimensions takes half of it."""
_MOST_DETAILS = 1 << 26
"""Bytes of the JSON, which names the cameras of a part."""
_TYPES = {"<i8", "<i4", "<f8", "|u1"}
Arrays: TypeAlias = Mapping[str, NDArray[Any]]


class UnusableIndexError(Exception):
    """An index file that cannot be used, and why; it is made anew."""


class OutdatedIndexError(UnusableIndexError):
    """An index file of another release."""


def write_file(path: Path, index: Any, arrays: Arrays, stamp: Mapping[str, Any]) -> None:
    """Write a file completely or not at all; ``index`` is faiss's, or None."""
    faiss = load_faiss()
    parts = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    lengths = [[name, array.dtype.str, len(array)] for name, array in parts.items()]
    details = json.dumps({"format": FORMAT, "stamp": stamp, "arrays": lengths}).encode()
    # Parts share the name of the scratch: the next one that is written removes what is left.
    with scratch_folder(path.with_name(path.name.partition("-")[0])) as folder:
        temporary = folder / path.name
        try:
            if index is None:
                temporary.touch()
            else:
                faiss.write_index(index, str(temporary))
        except RuntimeError as error:
            raise OSError(f"cannot write {path}: {error}") from error
        with open(temporary, "r+b") as file:
            # Arrays begin where a type of eight bytes may.
            file.write(bytes(-file.seek(0, os.SEEK_END) % 8))
            checksum = _checksum(file, file.tell())
            for part in (
                *(array.tobytes() + bytes(-array.nbytes % 8) for array in parts.values()),
                details,
                zlib.crc32(details).to_bytes(4, "little"),
                len(details).to_bytes(4, "little"),
            ):
                checksum = zlib.crc32(part, checksum)
                file.write(part)
            file.write(checksum.to_bytes(8, "little") + _MAGIC)
        if path.exists():
            temporary.chmod(path.stat().st_mode)
        put_in_place(temporary, path)


def read_stamp(path: Path) -> dict[str, Any]:
    """Read only what an index was made from."""
    with _opened(path) as file:
        stamp: dict[str, Any] = _read_end(file)[0]["stamp"]
        return stamp


def read_file(path: Path) -> tuple[Any, dict[str, NDArray[Any]], dict[str, Any]]:
    """Read index, arrays and stamp, after checking all of the file."""
    with _opened(path) as file:
        details, arrays_at, checksum_at = _read_end(file)
        file.seek(checksum_at)
        expected = int.from_bytes(file.read(8), "little")
        file.seek(0)
        if _checksum(file, checksum_at) != expected:
            raise UnusableIndexError("its checksum does not match")
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        arrays, at = {}, arrays_at
        for name, kind, count in details["arrays"]:
            arrays[name] = np.frombuffer(content, np.dtype(kind), count, at)
            at += arrays[name].nbytes + -arrays[name].nbytes % 8
        index = None
        if arrays_at:
            # By descriptor: the path may lead to another process's newer file by now.
            name = f"/proc/self/fd/{file.fileno()}"
            faiss = load_faiss()
            try:
                index = faiss.read_index(
                    name if os.path.exists(name) else str(path), faiss.IO_FLAG_MMAP_IFC
                )
            except (RuntimeError, MemoryError) as error:
                raise UnusableIndexError(f"faiss cannot read it: {error}") from error
    return index, arrays, details["stamp"]


def _opened(path: Path) -> BinaryIO:
    """Open a regular file: a pipe would be waited for, and a sparse one may have no end."""
    file = open_regular(path)
    if os.fstat(file.fileno()).st_size > _MOST_BYTES:
        file.close()
        raise UnusableIndexError("it is far too large")
    return file


def _read_end(file: BinaryIO) -> tuple[dict[str, Any], int, int]:
    """Return the JSON, and where the arrays and the checksum are."""
    size = file.seek(0, os.SEEK_END)
    if size < _END_BYTES:
        raise UnusableIndexError("it is too short")
    file.seek(size - _END_BYTES)
    end = file.read(_END_BYTES)
    checksum, length = (int.from_bytes(end[at : at + 4], "little") for at in (0, 4))
    if end[16:23] == _MAGIC[:7] and end[23:] != _MAGIC[7:]:
        raise OutdatedIndexError("it is of another version")
    if end[16:] != _MAGIC or length > min(size - _END_BYTES, _MOST_DETAILS):
        raise UnusableIndexError("it is cut off, or no index of this version")
    file.seek(size - _END_BYTES - length)
    details = file.read(length)
    if zlib.crc32(details) != checksum:
        raise UnusableIndexError("its stamp is damaged")
    try:
        found = json.loads(details)
        for name, kind, count in found["arrays"]:
            if (
                not isinstance(name, str)
                or kind not in _TYPES
                or type(count) is not int
                or count < 0
            ):
                raise TypeError("an array is of no known type")
        lengths = [np.dtype(kind).itemsize * count for _, kind, count in found["arrays"]]
        format_ = found["format"]
        found["stamp"].keys()
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UnusableIndexError(f"it is of another version: {error}") from error
    arrays_at = size - _END_BYTES - len(details) - sum(n + -n % 8 for n in lengths)
    if format_ != FORMAT or arrays_at < 0:
        raise UnusableIndexError("it is of another version")
    return found, arrays_at, size - 16


def _checksum(file: BinaryIO, length: int) -> int:
    checksum, buffer = 0, memoryview(bytearray(_CHUNK_BYTES))
    file.seek(0)
    while length > 0:
        count = file.readinto(buffer[: min(length, _CHUNK_BYTES)])  # type: ignore[attr-defined]
        if not count:
            raise UnusableIndexError("it is cut off")
        checksum = zlib.crc32(buffer[:count], checksum)
        length -= count
    return checksum
