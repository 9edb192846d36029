"""Logistic regression: log-odds from features, with numpy alone.

Shapes: N rows, F features, W weights (features, their products if there are any, a constant).
"""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError

_MOST = 50.0
"""Of log-odds, and least."""


@dataclass(frozen=True, kw_only=True)
class Logistic:
    """A fitted model."""

    middle: tuple[float, ...]
    """(F,) means of the features that it was fitted on."""
    scale: tuple[float, ...]
    """(F,) their standard deviations."""
    weights: tuple[float, ...]
    """(W,) of the features in units of their scale; the last one is the constant's."""

    def __post_init__(self) -> None:
        count = len(self.middle)
        if len(self.scale) != count or len(self.weights) not in (
            count + 1,
            count + 1 + count * (count + 1) // 2,
        ):
            raise InputError(
                f"{count} features have {count} scales and {count + 1} weights, or those of their "
                f"products as well; found {len(self.scale)} and {len(self.weights)}",
                code="weights_unfit",
            )
        if not all(one > 0 for one in self.scale):
            raise InputError("expected scales above 0", code="weights_unfit")

    @cached_property
    def _arrays(self) -> tuple[NDArray[np.float64], ...]:
        """Middle, scale and weights: alerts compute log-odds a thousand times a commit."""
        return np.array(self.middle), np.array(self.scale), np.array(self.weights)

    def log_odds(self, features_NF: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return (N,) log-odds."""
        middle_F, scale_F, weights_W = self._arrays
        has_products = len(weights_W) > len(middle_F) + 1
        inputs_NW = inputs_of(features_NF, middle_F, scale_F, has_products)
        with np.errstate(over="ignore", invalid="ignore"):  # Of a file from outside.
            found_N = np.nan_to_num(inputs_NW @ weights_W, nan=-_MOST)
        found: NDArray[np.float64] = np.clip(found_N, -_MOST, _MOST)
        return found


def probability(log_odds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the probability, 0 to 1, of log-odds of any size."""
    found: NDArray[np.float64] = 0.5 * (1 + np.tanh(np.asarray(log_odds) / 2))
    return found


def log_odds(probability_N: NDArray[np.float64], least: float = 1e-9) -> NDArray[np.float64]:
    """Return the log-odds of probabilities, at ``least`` that far from 0 and 1."""
    inside_N = np.clip(probability_N, least, 1 - least)
    found: NDArray[np.float64] = np.log(inside_N) - np.log1p(-inside_N)
    return found


@cache
def _pairs(count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the places of the features of each product."""
    first, second = np.triu_indices(count)
    return first, second


def inputs_of(
    features_NF: NDArray[np.float64],
    middle_F: NDArray[np.float64],
    scale_F: NDArray[np.float64],
    products: bool,
) -> NDArray[np.float64]:
    """Return what (N, W) weights apply to: scaled features, their products if wanted, and ones."""
    own_NF = (features_NF - middle_F) / scale_F
    columns = [own_NF]
    if products:
        first, second = _pairs(own_NF.shape[1])
        columns.append(own_NF[:, first] * own_NF[:, second])
    return np.concatenate([*columns, np.ones((len(own_NF), 1))], axis=1)
