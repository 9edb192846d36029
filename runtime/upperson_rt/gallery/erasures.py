"""The log of erasures beside a gallery in a folder: digests of what was deleted, never a key.

Each line has the erasure's id and step, how many rows went, the filter, the period and the row
numbers, which are never used again, and a SHA-256 of the keys. Lines are chained, see `log_chain`.
"""

import base64
import binascii
import hashlib
import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError
from upperson_rt.log_writer import ChainedLog

ERASURE_LOG = "erasures.log"
_MOST_BYTES = 1 << 28


class ErasureLog(ChainedLog):
    """The log in ``FOLDER/erasures.log``."""

    what = "erasure log"
    refuses = "the rows are deleted, and the next deletion writes the line"


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
