"""How close two embeddings of the same items are.

Shapes: N items, E embedding width.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, kw_only=True, slots=True)
class Closeness:
    """Cosines and errors of N embeddings against expected ones.

    An embedding that is not finite counts with cosine 0 and an infinite error.
    """

    min_cosine: float
    p1_cosine: float
    """The 1 % quantile."""
    median_cosine: float
    max_error: float
    """Largest absolute difference of a component."""
    worst_cosine: int
    """Index of the item with the lowest cosine."""
    worst_error: int
    """Index of the item with the largest error."""

    def as_dict(self) -> dict[str, float | None]:
        """Return the numbers for JSON, which knows no infinity: None stands for it."""
        return {
            "min_cosine": self.min_cosine,
            "p1_cosine": self.p1_cosine,
            "median_cosine": self.median_cosine,
            "max_error": self.max_error if np.isfinite(self.max_error) else None,
        }


def closeness(expected_NE: npt.NDArray[Any], found_NE: npt.NDArray[Any]) -> Closeness:
    """Compare embeddings [N, E] item by item; N is at least 1, the expected ones are finite."""
    expected_NE = expected_NE.astype(np.float64)
    found_NE = found_NE.astype(np.float64)
    finite_N = np.isfinite(found_NE).all(axis=1)
    found_NE = np.where(finite_N[:, None], found_NE, 0.0)
    cosine_N = cosines(expected_NE, found_NE)
    error_N = np.where(finite_N, np.abs(expected_NE - found_NE).max(axis=1), np.inf)
    return Closeness(
        min_cosine=float(cosine_N.min()),
        p1_cosine=float(np.quantile(cosine_N, 0.01)),
        median_cosine=float(np.median(cosine_N)),
        max_error=float(error_N.max()),
        worst_cosine=int(cosine_N.argmin()),
        worst_error=int(error_N.argmax()),
    )


def cosines(a_NE: npt.NDArray[Any], b_NE: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Return the cosine of each pair [N]; 0 for a vector of zeros."""
    lengths_N = np.linalg.norm(a_NE, axis=1) * np.linalg.norm(b_NE, axis=1)
    products_N = (a_NE * b_NE).sum(axis=1)
    cosine_N: npt.NDArray[np.float64] = products_N / np.maximum(lengths_N, np.finfo(float).tiny)
    return cosine_N


def is_constant(found_NE: npt.NDArray[Any]) -> bool:
    """Whether N > 1 embeddings are all the same, to float32 rounding."""
    return len(found_NE) > 1 and bool(np.ptp(found_NE, axis=0).max() < 1e-6)


def first_not_finite(found_NE: npt.NDArray[Any]) -> int | None:
    """Return the index of the first embedding with a NaN or infinity, if there is one."""
    bad = np.flatnonzero(~np.isfinite(found_NE).all(axis=1))
    return int(bad[0]) if bad.size else None


def exchanged_item(
    alone_NE: npt.NDArray[Any], found_ME: npt.NDArray[Any], items_M: npt.NDArray[np.int64]
) -> tuple[int, int] | None:
    """Find an item that got the embedding of another one: ten times nearer to that than to its own.

    Args:
        alone_NE: What each item gives alone.
        found_ME: What some items give in batches; rows that are not finite count for nothing.
        items_M: Their indices.

    Returns:
        (the item, the one whose embedding it has), the clearest case; None if there is none. Items
        that are alike to rounding cannot be told apart and do not count.
    """
    apart_MN = 1 - _unit(found_ME) @ _unit(alone_NE).T
    gain_MN = apart_MN[np.arange(len(items_M)), items_M][:, None] - 10 * apart_MN
    place, other = np.unravel_index(gain_MN.argmax(), gain_MN.shape)
    # Below this, cosines of float32 embeddings are rounding.
    return (int(items_M[place]), int(other)) if gain_MN[place, other] > 1e-6 else None


def _unit(x_NE: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Scale to unit length; what is not finite becomes 0."""
    x_NE = np.where(np.isfinite(x_NE).all(axis=1, keepdims=True), x_NE, 0.0).astype(np.float64)
    norm_N1 = np.linalg.norm(x_NE, axis=1, keepdims=True)
    unit_NE: npt.NDArray[np.float64] = x_NE / np.maximum(norm_N1, np.finfo(float).tiny)
    return unit_NE
