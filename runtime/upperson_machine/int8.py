"""Int8 on x86 processors without VNNI: what saturates there, and what cannot.

They add the products of two neighbouring inputs in saturating 16 bits (``vpmaddubsw``), with
activations moved from -128..127 to 0..255. Two int8 weights that add up to 128 at the most stay
below 2**15 with any activations (255 * 128 = 32,640), so such a graph is the same on every CPU.
The exporter makes int8 for CPUs that way and says so in the file; what does not say so is
computed in float where it would saturate, or not at all.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.machine import processor

PAIR_LIMIT = 128
"""The most that the absolute values of two neighbouring weights may add up to."""

INT8_SUMS, EXACT = "int8_sums", "exact"
"""Key and value in the metadata of an ONNX file whose weights keep `PAIR_LIMIT`."""

_EXACT_SETS = {"avx_vnni", "avx512_vnni", "amx_int8"}


def int8_sums_saturate() -> bool:
    """Whether this processor adds int8 products in 16 bits; ARM processors add in 32."""
    found = processor()
    return found.is_x86 and found.flags is not None and not found.flags & _EXACT_SETS


def largest_pair(w_IO: NDArray[Any]) -> NDArray[np.float32]:
    """Return the largest sum [out] of two neighbouring inputs' absolute weights [in, out]."""
    even_IO = np.abs(w_IO.astype(np.float32))
    if len(even_IO) % 2:
        even_IO = np.pad(even_IO, ((0, 1), (0, 0)))
    pairs_O: NDArray[np.float32] = (even_IO[::2] + even_IO[1::2]).max(axis=0)
    return pairs_O
