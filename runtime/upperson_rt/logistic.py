"""Logistic regression: log-odds from features, fitted by Newton's method with numpy alone.

Shapes: N rows, F features, W weights (features, their products if there are any, a constant).
"""

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError

_STEPS = 100
_CLOSE = 1e-9
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
        inputs_NW = _inputs(features_NF, middle_F, scale_F, has_products)
        with np.errstate(over="ignore", invalid="ignore"):  # Of a file from outside.
            found_N = np.nan_to_num(inputs_NW @ weights_W, nan=-_MOST)
        found: NDArray[np.float64] = np.clip(found_N, -_MOST, _MOST)
        return found


def fit_logistic(
    features_NF: NDArray[np.float64],
    right_N: NDArray[np.bool_],
    *,
    products: bool,
    ridge: float,
    prior: Logistic | None = None,
) -> Logistic:
    """Fit the log-odds of ``right_N``.

    ``products`` adds the products of every two features and their squares. ``ridge`` is the penalty
    on squared weights, or on their squared distance from those of ``prior``, a model of the same
    features; without a prior the constant is free.
    """
    if prior is None:
        middle_F, scale_F = features_NF.mean(axis=0), np.maximum(features_NF.std(axis=0), 1e-6)
        inputs_NW = _inputs(features_NF, middle_F, scale_F, products)
        prior_W = np.zeros(inputs_NW.shape[1])
        penalty_W = np.full(len(prior_W), ridge)
        penalty_W[-1] = 1e-9
    else:
        middle_F, scale_F = np.array(prior.middle), np.array(prior.scale)
        inputs_NW = _inputs(features_NF, middle_F, scale_F, products)
        prior_W = np.array(prior.weights)
        penalty_W = np.full(len(prior_W), ridge)
    weights_W = prior_W.copy()

    def loss(at_W: NDArray[np.float64]) -> float:
        log_odds_N = inputs_NW @ at_W
        surprise = np.logaddexp(0, log_odds_N).sum() - log_odds_N[right_N].sum()
        return float(surprise + (penalty_W * np.square(at_W - prior_W)).sum() / 2)

    for _ in range(_STEPS):
        likely_N = probability(inputs_NW @ weights_W)
        gradient_W = inputs_NW.T @ (likely_N - right_N) + penalty_W * (weights_W - prior_W)
        curvature_WW = (inputs_NW.T * (likely_N * (1 - likely_N))) @ inputs_NW
        step_W = np.linalg.solve(curvature_WW + np.diag(penalty_W), gradient_W)
        before = loss(weights_W)
        while loss(weights_W - step_W) > before and np.abs(step_W).max() > _CLOSE:
            step_W /= 2  # Newton's step may go too far.
        weights_W -= step_W
        if np.abs(step_W).max() < _CLOSE:
            break
    return Logistic(
        middle=tuple(middle_F.tolist()),
        scale=tuple(scale_F.tolist()),
        weights=tuple(weights_W.tolist()),
    )


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


def _inputs(
    features_NF: NDArray[np.float64],
    middle_F: NDArray[np.float64],
    scale_F: NDArray[np.float64],
    products: bool,
) -> NDArray[np.float64]:
    own_NF = (features_NF - middle_F) / scale_F
    columns = [own_NF]
    if products:
        first, second = _pairs(own_NF.shape[1])
        columns.append(own_NF[:, first] * own_NF[:, second])
    return np.concatenate([*columns, np.ones((len(own_NF), 1))], axis=1)
