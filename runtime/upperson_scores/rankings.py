"""Do two models rank pictures alike, and did an item get the embedding of another one?

Shapes: N embeddings of E numbers; Q queries that score a gallery of G pictures.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.agreement import ROUNDING, finite_rows

TOP_K = 10
"""Pictures that people look at first: what overlaps of rankings are taken over."""


def exchanged_item(
    own_NE: NDArray[Any], found_ME: NDArray[Any], items_M: NDArray[np.int64]
) -> tuple[int, int] | None:
    """Find an item that got another's embedding: ten times nearer to that than to its own.

    Takes what belongs to each item [N, E], what some items got [M, E] and their indices [M].
    Returns the item and the other one, the clearest case. Items that are alike to rounding do not
    count.
    """
    apart_MN = 1 - _unit_rows(found_ME) @ _unit_rows(own_NE).T
    gain_MN = apart_MN[np.arange(len(items_M)), items_M][:, None] - 10 * apart_MN
    place, other = np.unravel_index(gain_MN.argmax(), gain_MN.shape)
    return (int(items_M[place]), int(other)) if gain_MN[place, other] > ROUNDING else None


def top_k_overlap(
    expected_QG: NDArray[Any], found_QG: NDArray[Any], top_k: int = TOP_K
) -> NDArray[np.float64]:
    """Return the share [Q] of the `top_k` highest scores that two rankings have in common, 0 to 1.

    Equal scores rank in the order of the gallery; what is not finite ranks last. A query that
    scores all pictures alike shares nothing: its ranking would be the order of the files.
    """
    top_k = min(top_k, expected_QG.shape[1])
    lowest = np.finfo(found_QG.dtype).min
    found_QG = np.where(np.isfinite(found_QG), found_QG, lowest)
    shared_QG = _first(expected_QG, top_k) & _first(found_QG, top_k)
    shared_Q: NDArray[np.float64] = shared_QG.sum(axis=1) / top_k
    if found_QG.shape[1] > 1:
        shared_Q[found_QG.min(axis=1) == found_QG.max(axis=1)] = 0.0
    return shared_Q


def _first(scores_QG: NDArray[Any], top_k: int) -> NDArray[np.bool_]:
    """Mark the highest scores of each row, exactly `top_k` of them."""
    # Sorting all of a large gallery would take ten times as long.
    last = scores_QG.shape[1] - top_k
    least_Q1 = np.partition(scores_QG, last, axis=1)[:, last, None]
    above_QG = scores_QG > least_Q1
    level_QG = scores_QG == least_Q1
    places_Q1 = top_k - above_QG.sum(axis=1, keepdims=True)
    first_QG: NDArray[np.bool_] = above_QG | (level_QG & (level_QG.cumsum(axis=1) <= places_Q1))
    return first_QG


def _unit_rows(x_NE: NDArray[Any]) -> NDArray[np.float64]:
    x_NE = finite_rows(x_NE)
    length_N1 = np.linalg.norm(x_NE, axis=1, keepdims=True)
    unit_NE: NDArray[np.float64] = x_NE / np.maximum(length_N1, np.finfo(np.float64).tiny)
    return unit_NE
