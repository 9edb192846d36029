"""A histogram of absolute values whose bins never have to move.

Bins are the upper bits of a float32: all of its exponent and 9 bits of its mantissa. Each is at
most 0.2 % wide, from the smallest value to the largest, so that samples can stream through without
knowing the range before; a histogram with equal bins has to guess or to grow.
"""

import numpy as np
from numpy.typing import NDArray

_DROPPED_BITS = 14
BINS = 1 << (31 - _DROPPED_BITS)
_CHUNK = 1 << 18  # Values at a time: 2 MB of bin numbers, which stay in the cache.


class AbsHistogram:
    """Counts of |x|, 1 MiB whatever is added."""

    def __init__(self) -> None:
        self._counts: NDArray[np.int64] = np.zeros(BINS, np.int64)

    def add(self, values: NDArray[np.float32]) -> None:
        """Count finite values of any shape, C-contiguous."""
        bits = values.reshape(-1).view(np.uint32)
        for start in range(0, len(bits), _CHUNK):
            chunk = bits[start : start + _CHUNK] & np.uint32(0x7FFFFFFF)
            self._counts += np.bincount(chunk >> _DROPPED_BITS, minlength=BINS)

    def bins(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Return lower edges, upper edges and counts of the bins that are not empty, ascending."""
        used = np.flatnonzero(self._counts)
        lower, upper = (
            (edge.astype(np.uint32) << _DROPPED_BITS).view(np.float32).astype(np.float64)
            for edge in (used, used + 1)
        )
        return lower, upper, self._counts[used]

    def in_equal_bins(self, count: int, amax: float) -> NDArray[np.float64]:
        """Count again in ``count`` equal bins of [0, amax]; a bin's values lie evenly within it."""
        lower, upper, counts = self.bins()
        edges = np.concatenate([[0.0], np.stack([lower, upper], axis=1).reshape(-1)])
        below = np.cumsum(counts)
        at_edges = np.concatenate([[0], np.stack([below - counts, below], axis=1).reshape(-1)])
        cumulative = np.interp(np.linspace(0, amax, count + 1), edges, at_edges)
        cumulative[-1] = below[-1]  # The last bin's upper edge lies beyond the maximum.
        # Exact zeros sit on the first edge, and belong into the first bin.
        cumulative[0] = 0
        return np.diff(cumulative)
