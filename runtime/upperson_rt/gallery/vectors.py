"""Vectors of a gallery: what may go in, and whether the embedding space is the right one."""

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError, IntegrityError

__all__ = ["STORED", "check_space", "unit_vectors", "vector_problem"]

STORED = np.dtype("<f2")
"""How vectors are stored; scores are computed from these, in float32."""
_MAX_NORM_ERROR = 0.01  # Far above the rounding of float16, far below a vector not normalised.


def unit_vectors(
    vectors: NDArray[np.float32], count: int, embed_dim: int, location: str
) -> NDArray[np.float32]:
    """Return (count, embed_dim) vectors as a contiguous float32 array.

    Raises:
        InputError: The shape is another, or a vector is not finite or not of unit length.
    """
    array = np.ascontiguousarray(vectors, dtype=np.float32)
    if array.shape != (count, embed_dim):
        raise InputError(
            f"expected vectors of shape {(count, embed_dim)} for gallery {location}, "
            f"found {array.shape}"
        )
    norms = np.linalg.norm(array, axis=1)
    bad = np.flatnonzero(~(np.abs(norms - 1) <= _MAX_NORM_ERROR))  # True for NaN, too.
    if len(bad):
        raise InputError(
            f"{len(bad)} of {count} vectors are not finite or not of unit length, the first at "
            f"index {bad[0]} with length {norms[bad[0]]}: pass what the encoder returned"
        )
    return array


def vector_problem(blob: bytes, embed_dim: int) -> str | None:
    """Say what is wrong with a stored vector, or return None."""
    size = embed_dim * STORED.itemsize
    if len(blob) != size:
        return f"vector of {len(blob)} bytes, expected {size}"
    norm = float(np.linalg.norm(np.frombuffer(blob, dtype=STORED).astype(np.float32)))
    if not abs(norm - 1) <= _MAX_NORM_ERROR:
        return f"vector of length {norm}, expected 1"
    return None


def check_space(
    location: str,
    found: tuple[str, int],
    fingerprint: str | None,
    embed_dim: int | None,
) -> None:
    """Check that a gallery holds the embedding space that was asked for.

    Args:
        location: Of the gallery.
        found: Its fingerprint and embed_dim.
        fingerprint: The one asked for; None accepts any.
        embed_dim: The one asked for; None accepts any.

    Raises:
        IntegrityError: It is another one.
    """
    if fingerprint not in (None, found[0]) or embed_dim not in (None, found[1]):
        raise IntegrityError(
            f"gallery {location} holds embeddings of another model: the bundle's is "
            f"{fingerprint or f'of {embed_dim} dimensions'}, the gallery's {found[0]} of "
            f"{found[1]} dimensions. Use the bundle it was made with, or index the "
            "pictures again into another folder with  --gallery"
        )
