"""Symmetric int8: the largest absolute value it should still represent, and what rounding costs.

A step is amax / 127, and what lies beyond amax saturates. Ways to choose amax, from a histogram of
|x|:

- ``min-max``: nothing saturates; one outlier makes all steps coarse.
- ``percentile-P``: P percent of the values do not saturate.
- ``entropy``: least Kullback-Leibler divergence between the values and their 128 levels, after
  S. Migacz, "8-bit inference with TensorRT", GTC 2017. ONNX Runtime's own takes 2 s a tensor, 40
  times as long, and with its default of 128 bins has only one candidate to choose from.
- ``mse``: least mean squared error of rounding and saturating together.
"""

from collections.abc import Mapping
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from upperson_calibration.observe import Observed

Estimator = Literal[
    "min-max", "percentile-99.9", "percentile-99.99", "percentile-99.999", "entropy", "mse"
]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
DEFAULT_ESTIMATOR: Estimator = "percentile-99.999"

LEVELS = 127
"""Positive steps of symmetric int8."""

_ENTROPY_BINS = 2048
_MSE_CANDIDATES = 120
_MSE_SMALLEST = 1e-3
"""Smallest range tried, as a part of the largest value."""

_SMALLEST = 1e-30
"""Stands for zero where something is divided by it; float32 still holds a step of it."""


def estimate(observed: Mapping[str, Observed], estimator: Estimator) -> dict[str, float]:
    """Estimate every tensor's range; zero only for a tensor that is zero everywhere."""
    return {name: amax_of(tensor, estimator) for name, tensor in observed.items()}


def amax_of(tensor: Observed, estimator: Estimator) -> float:
    """Estimate one tensor's range, at most its largest absolute value."""
    if estimator == "min-max" or tensor.amax == 0:
        return tensor.amax
    if estimator == "entropy":
        found = _entropy(tensor.histogram.in_equal_bins(_ENTROPY_BINS, tensor.amax)) * tensor.amax
    elif estimator == "mse":
        found = _mse(*tensor.histogram.bins(), tensor.amax)
    else:
        _, upper, counts = tensor.histogram.bins()
        below = np.cumsum(counts) / counts.sum()
        found = float(upper[np.searchsorted(below, float(estimator.partition("-")[2]) / 100)])
    return min(found, tensor.amax)


def _entropy(counts: NDArray[np.float64]) -> float:
    """Return the best end of the range as a part of the last bin's end."""
    levels = LEVELS + 1
    ends = np.arange(levels, len(counts) + 1)
    divergence = [_divergence(counts, end, levels) for end in ends.tolist()]
    return float(ends[int(np.argmin(divergence))]) / len(counts)


def _divergence(counts: NDArray[np.float64], end: int, levels: int) -> float:
    """KL divergence of the first ``end`` bins, with the rest in the last one, to their levels."""
    kept = counts[:end]
    p = kept.copy()
    p[-1] += counts[end:].sum()
    level_of_bin = np.arange(end) * levels // end
    filled = kept > 0
    mass = np.bincount(level_of_bin, weights=kept, minlength=levels)
    width = np.bincount(level_of_bin, weights=filled, minlength=levels)
    q = np.where(filled, mass[level_of_bin] / np.maximum(width[level_of_bin], 1), 0.0)
    present = p > 0
    # Saturated values may land in a bin that was empty: a small mass keeps the quotient finite.
    q = np.maximum(q, 1e-9 * counts.sum())
    p, q = p / p.sum(), q / q[present].sum()
    return float((p[present] * np.log(p[present] / q[present])).sum())


def _mse(
    lower: NDArray[np.float64], upper: NDArray[np.float64], counts: NDArray[np.int64], amax: float
) -> float:
    """Return the range with the least squared error, among ranges in geometric steps."""
    values = np.minimum((lower + upper) / 2, amax)
    ranges = amax * np.geomspace(_MSE_SMALLEST, 1, _MSE_CANDIDATES)
    errors = []
    for end in ranges:
        step = end / LEVELS
        rounded = np.minimum(np.round(values / step), LEVELS) * step
        errors.append((counts * (values - rounded) ** 2).sum())
    return float(ranges[int(np.argmin(errors))])


def round_activation(x: NDArray[np.float32], amax: float) -> NDArray[np.float32]:
    """Round x to 255 steps of [-amax, amax]; what lies beyond saturates."""
    return _rounded(x, np.float32(max(amax, _SMALLEST) / LEVELS))


def round_weight(weight_IO: NDArray[np.float32]) -> NDArray[np.float32]:
    """Round a weight [in, out] with one scale for each output."""
    amax_O = np.maximum(np.abs(weight_IO).max(axis=0), np.float32(_SMALLEST))
    return _rounded(weight_IO, amax_O / LEVELS)


def output_error(
    rows_RI: NDArray[np.float32], weight_IO: NDArray[np.float32], amax: float
) -> float:
    """Return |int8 output - float output|^2 / |float output|^2 of x W over sampled rows x."""
    exact = rows_RI @ weight_IO
    error = round_activation(rows_RI, amax) @ round_weight(weight_IO) - exact
    return float((error**2).sum() / max(float((exact**2).sum()), _SMALLEST))


def _rounded(x: NDArray[np.float32], step: NDArray[np.float32] | np.float32) -> NDArray[np.float32]:
    rounded: NDArray[np.float32] = np.clip(np.round(x / step), -LEVELS, LEVELS) * step
    return rounded
