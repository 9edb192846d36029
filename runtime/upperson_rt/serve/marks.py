"""Yes and no: a search moved towards what somebody said is right, and no further than a bound."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["refined", "share_of_yes"]

_TOWARDS = 0.8
"""Of the way from the question to what is right, at most: the question always has its say."""
_SOON = 0.3
"""The first yes goes most of that way: a picture says more than a sentence."""
_AWAY = 0.4
"""Of the length of the question, at most, away from what is not right."""
_LATER = 3.0
"""One no says little, several of a kind say more."""


def refined(
    query_D: NDArray[np.float32], yes_ND: NDArray[np.float32], no_ND: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the (D,) query of unit length moved by marks; without any the same bits.

    As in Rocchio's rule the query goes towards the mean of what is right and away from the mean of
    what is not. But both moves have a bound that depends on the number of marks alone, so that
    some wrong clicks among others cannot carry a search away.

    Args:
        query_D: (D,) of unit length.
        yes_ND: (N, D) of unit length, what is right; the same marks in the same order give the
            same bits.
        no_ND: (N, D) of unit length, what is not.
    """
    if not len(yes_ND) and not len(no_ND):
        return query_D
    moved = query_D.astype(np.float64)
    if len(yes_ND):
        share = share_of_yes(len(yes_ND))
        moved = (1 - share) * moved + share * _unit(yes_ND.mean(axis=0, dtype=np.float64))
    if len(no_ND):
        share = _AWAY * len(no_ND) / (len(no_ND) + _LATER)
        moved = _unit(moved) - share * no_ND.mean(axis=0, dtype=np.float64)
    length = float(np.linalg.norm(moved))
    if length < 1e-6:  # The marks cancel the question out.
        return query_D
    return (moved / length).astype(np.float32)


def share_of_yes(count: int) -> float:
    """Return how much of a refined query is what so many marks say is right."""
    return _TOWARDS * count / (count + _SOON)


def _unit(vector_D: NDArray[np.float64]) -> NDArray[np.float64]:
    length = float(np.linalg.norm(vector_D))
    return vector_D / length if length > 1e-12 else vector_D
