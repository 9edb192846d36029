"""Do embeddings agree? One rule for golden samples, engines, exports, the gate and benchmarks.

What is not finite agrees with nothing, whatever the tolerance.

Shapes: N embeddings of E numbers; Q queries that score a gallery of G pictures.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import IntegrityError

TOP_K = 10
"""Pictures that people look at first: what overlaps of rankings are taken over."""

_ROUNDING = 1e-6
"""Differences of unit-length float32 embeddings below this say nothing."""


@dataclass(frozen=True, eq=False, kw_only=True, slots=True)
class Agreement:
    """How far N embeddings are from the ones that were expected."""

    finite_N: NDArray[np.bool_]
    """Whether an embedding and what is expected of it are finite."""
    cosine_N: NDArray[np.float64]
    """-1 to 1; 0 where it is not finite, or nothing but zeros."""
    error_N: NDArray[np.float64]
    """Largest absolute difference of a component; infinite where it is not finite."""

    def agrees(
        self, *, min_cosine: float = -np.inf, max_error: float = np.inf
    ) -> NDArray[np.bool_]:
        """Return which rows [N] are finite and within the limits: the one rule for "agrees"."""
        within_N: NDArray[np.bool_] = (
            self.finite_N & (self.cosine_N >= min_cosine) & (self.error_N <= max_error)
        )
        return within_N

    @property
    def not_finite(self) -> int:
        """Number of rows that are not finite."""
        return int(np.count_nonzero(~self.finite_N))

    @property
    def min_cosine(self) -> float:
        """Cosine of the pair that agrees least."""
        return float(self.cosine_N.min())

    @property
    def p1_cosine(self) -> float:
        """The cosine that one row in a hundred does not reach."""
        return float(np.quantile(self.cosine_N, 0.01))

    @property
    def median_cosine(self) -> float:
        """The cosine that half of the rows do not reach."""
        return float(np.median(self.cosine_N))

    @property
    def worst_cosine(self) -> int:
        """Index of the row with the lowest cosine."""
        return int(self.cosine_N.argmin())

    @property
    def max_error(self) -> float:
        """Largest difference of any component."""
        return float(self.error_N.max())

    @property
    def worst_error(self) -> int:
        """Index of the row with the largest error."""
        return int(self.error_N.argmax())


def compare_embeds(expected_NE: NDArray[Any], found_NE: NDArray[Any]) -> Agreement:
    """Compare embeddings [N, E] of any length row by row, in float64; N is at least 1."""
    finite_N = np.isfinite(expected_NE).all(axis=1) & np.isfinite(found_NE).all(axis=1)
    error_N = np.abs(_finite_rows(expected_NE) - _finite_rows(found_NE)).max(axis=1)
    return Agreement(
        finite_N=finite_N,
        cosine_N=row_cosines(expected_NE, found_NE),
        error_N=np.where(finite_N, error_N, np.inf),
    )


def require_agreement(
    expected_NE: NDArray[Any],
    found_NE: NDArray[Any],
    min_cosine: float,
    *,
    where: str,
    row: str,
    reference: str,
    advice: str,
    **fields: object,
) -> Agreement:
    """Compare embeddings [N, E] of the same shape, all of which must agree.

    Messages say ``where`` it was, what a ``row`` and its ``reference`` are called, and the
    ``advice``; errors get the ``fields`` as well.
    """
    agreement = compare_embeds(expected_NE, found_NE)
    if count := agreement.not_finite:
        message = f"{where}: {count} of {len(found_NE)} embeddings are not finite; {advice}"
        raise IntegrityError(message, code="embeds_not_finite", count=count, **fields)
    if count := int(np.count_nonzero(~agreement.agrees(min_cosine=min_cosine))):
        worst = agreement.worst_cosine
        message = (
            f"{where}: {row} {worst} has cosine {agreement.min_cosine:.5f} to {reference}, expected"
            f" at least {min_cosine:.5f} ({count} of {len(found_NE)} differ); {advice}"
        )
        raise IntegrityError(message, code="embeds_differ", row=worst, count=count, **fields)
    return agreement


def row_cosines(a_NE: NDArray[Any], b_NE: NDArray[Any]) -> NDArray[np.float64]:
    """Return the cosine [N] of each pair of rows; 0 where one is not finite, or only zeros."""
    a_NE, b_NE = _finite_rows(a_NE), _finite_rows(b_NE)
    length_N = np.linalg.norm(a_NE, axis=1) * np.linalg.norm(b_NE, axis=1)
    product_N = (a_NE * b_NE).sum(axis=1)
    cosine_N: NDArray[np.float64] = product_N / np.maximum(length_N, np.finfo(np.float64).tiny)
    return cosine_N


def is_constant(embeds_NE: NDArray[Any]) -> bool:
    """Whether N > 1 embeddings are one and the same, to float32 rounding."""
    if len(embeds_NE) < 2 or not np.isfinite(embeds_NE).all():
        return False
    return bool(np.ptp(embeds_NE, axis=0).max() < _ROUNDING)


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
    return (int(items_M[place]), int(other)) if gain_MN[place, other] > _ROUNDING else None


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
    x_NE = _finite_rows(x_NE)
    length_N1 = np.linalg.norm(x_NE, axis=1, keepdims=True)
    unit_NE: NDArray[np.float64] = x_NE / np.maximum(length_N1, np.finfo(np.float64).tiny)
    return unit_NE


def _finite_rows(x_NE: NDArray[Any]) -> NDArray[np.float64]:
    finite_N1 = np.isfinite(x_NE).all(axis=1, keepdims=True)
    return np.where(finite_N1, x_NE, 0.0).astype(np.float64)
