"""Exact top-k by score, with ties in a fixed order."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["top_k"]


def top_k(scores: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Return the indices of the k largest of (N,) finite scores, best first, ties by index.

    Same as a stable descending sort cut to k, without sorting everything.
    """
    if k < len(scores):
        # argpartition alone picks arbitrary ones among equals, so it only finds the threshold.
        threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
        candidates = np.flatnonzero(scores >= threshold)
    else:
        candidates = np.arange(len(scores))
    order = np.argsort(-scores[candidates], kind="stable")
    return candidates[order[:k]]
