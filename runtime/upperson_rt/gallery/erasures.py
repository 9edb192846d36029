"""The log of erasures beside a gallery in a folder: digests of what was deleted, never a key.

Each line has the erasure's id and step, how many rows went, the filter, the period and the row
numbers, which are never used again, and a SHA-256 of the keys. The package `upperson_log` writes
and chains them.
"""

import base64
import binascii
import hashlib
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError
from upperson_rt.extensions import load_service

ERASURE_LOG = "erasures.log"
_MOST_BYTES = 1 << 28


class ErasureLog(AbstractContextManager["ErasureLog"], Protocol):
    """The log in ``FOLDER/erasures.log``."""

    def append(self, action: str, entry: Mapping[str, Any], /) -> None:
        """Append a line and flush it to disk; raises InputError if it cannot be written."""


def open_erasure_log(folder: Path) -> ErasureLog:
    """Open the log of a gallery's folder; raises InputError if it cannot be written."""
    return require_erasure_log()(folder / ERASURE_LOG)


def require_erasure_log() -> Callable[[Path], ErasureLog]:
    """Return what opens a log; raises BackendError if there is none: then nothing is deleted."""
    found: Callable[[Path], ErasureLog] = load_service("erasure-log")
    return found


def digest_of_keys(identity: str, keys: Iterable[str]) -> str:
    """Return the SHA-256 of a gallery's identity and the sorted keys, with NUL between them."""
    text = "\0".join((identity, *sorted(keys)))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def pack_ids(ids: NDArray[np.int64]) -> str:
    """Return ascending row numbers as text: Base64 of zlib of their differences, int64."""
    return base64.b64encode(zlib.compress(np.diff(ids, prepend=0).astype("<i8").tobytes())).decode()


def unpack_ids(text: object) -> NDArray[np.int64]:
    """Return what `pack_ids` packed; raises InputError for anything else."""
    try:
        packed = base64.b64decode(str(text), validate=True)
        unpacking = zlib.decompressobj()
        content = unpacking.decompress(packed, _MOST_BYTES)
        if not unpacking.eof:
            raise ValueError("cut off, or too many")
        return np.cumsum(np.frombuffer(content, "<i8"))
    except (binascii.Error, zlib.error, ValueError) as error:
        raise InputError(f"malformed row numbers: {error}", code="erasure_malformed") from error
