"""Fits a logistic regression by Newton's method, with numpy alone; shapes as of `logistic`."""

import numpy as np
from numpy.typing import NDArray

from upperson_rt.logistic import Logistic, inputs_of, probability

_STEPS = 100
_CLOSE = 1e-9


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
        inputs_NW = inputs_of(features_NF, middle_F, scale_F, products)
        prior_W = np.zeros(inputs_NW.shape[1])
        penalty_W = np.full(len(prior_W), ridge)
        penalty_W[-1] = 1e-9
    else:
        middle_F, scale_F = np.array(prior.middle), np.array(prior.scale)
        inputs_NW = inputs_of(features_NF, middle_F, scale_F, products)
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
