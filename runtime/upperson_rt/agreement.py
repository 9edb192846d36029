"""Do embeddings agree? One rule for golden samples, engines, exports, the gate and benchmarks.

What is not finite agrees with nothing, whatever the tolerance.

Shapes: N embeddings of E numbers.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import IntegrityError

ROUNDING = 1e-6
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
    error_N = np.abs(finite_rows(expected_NE) - finite_rows(found_NE)).max(axis=1)
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
    a_NE, b_NE = finite_rows(a_NE), finite_rows(b_NE)
    length_N = np.linalg.norm(a_NE, axis=1) * np.linalg.norm(b_NE, axis=1)
    product_N = (a_NE * b_NE).sum(axis=1)
    cosine_N: NDArray[np.float64] = product_N / np.maximum(length_N, np.finfo(np.float64).tiny)
    return cosine_N


def is_constant(embeds_NE: NDArray[Any]) -> bool:
    """Whether N > 1 embeddings are one and the same, to float32 rounding."""
    if len(embeds_NE) < 2 or not np.isfinite(embeds_NE).all():
        return False
    return bool(np.ptp(embeds_NE, axis=0).max() < ROUNDING)


def finite_rows(x_NE: NDArray[Any]) -> NDArray[np.float64]:
    """Return rows [N, E] in float64; those that are not finite are zeros."""
    finite_N1 = np.isfinite(x_NE).all(axis=1, keepdims=True)
    return np.where(finite_N1, x_NE, 0.0).astype(np.float64)
