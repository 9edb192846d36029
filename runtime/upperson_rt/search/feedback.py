"""Relevance feedback: a query embedding moved by what a user marked as right and wrong.

As in Rocchio's rule the query moves towards the mean of the relevant pictures and away from the
mean of the others. Both moves have a bound that depends on the number of marks alone, so that some
wrong clicks among others cannot carry a search away.
"""

import numpy as np
from numpy.typing import NDArray

__all__ = ["refine", "share_of_relevant"]

_TOWARDS = 0.8
"""Share of the way to the relevant pictures, at most: the query keeps the rest."""
_SOON = 0.3
"""The first relevant picture goes most of that way: a picture says more than a sentence."""
_AWAY = 0.4
"""Share of the query's length, at most, away from pictures that are not relevant."""
_LATER = 3.0
"""One such picture says little, several of a kind say more."""


def refine(
    query_D: NDArray[np.float32],
    relevant_ND: NDArray[np.float32] | None,
    not_relevant_ND: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    """Return the (D,) query of unit length moved by feedback; without any the same bits.

    Args:
        query_D: (D,) of unit length.
        relevant_ND: (N, D) of unit length; the same pictures in the same order give the same bits.
        not_relevant_ND: (N, D) of unit length.
    """
    relevant = 0 if relevant_ND is None else len(relevant_ND)
    not_relevant = 0 if not_relevant_ND is None else len(not_relevant_ND)
    if not relevant and not not_relevant:
        return query_D
    moved = query_D.astype(np.float64)
    if relevant_ND is not None and relevant:
        share = share_of_relevant(relevant)
        moved = (1 - share) * moved + share * _unit(relevant_ND.mean(axis=0, dtype=np.float64))
    if not_relevant_ND is not None and not_relevant:
        share = _AWAY * not_relevant / (not_relevant + _LATER)
        moved = _unit(moved) - share * not_relevant_ND.mean(axis=0, dtype=np.float64)
    length = float(np.linalg.norm(moved))
    if length < 1e-6:  # The marks cancel the query out.
        return query_D
    return (moved / length).astype(np.float32)


def share_of_relevant(count: int) -> float:
    """Return the share of a refined query that comes from this many relevant pictures."""
    return _TOWARDS * count / (count + _SOON)


def _unit(vector_D: NDArray[np.float64]) -> NDArray[np.float64]:
    length = float(np.linalg.norm(vector_D))
    return vector_D / length if length > 1e-12 else vector_D
