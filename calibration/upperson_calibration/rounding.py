"""What int8 does to a Linear, in float: symmetric, per-tensor activations, per-channel weights."""

import numpy as np
from numpy.typing import NDArray

from upperson_calibration.estimators import LEVELS

_SMALLEST = 1e-30
"""Stands for zero where something is divided by it; float32 still holds a step of it."""


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
    """Return |int8 output - float output|^2 / |float output|^2 of x W over sampled rows.

    Args:
        rows_RI: Rows that enter the Linear.
        weight_IO: Its weight.
        amax: Range of its input.
    """
    exact = rows_RI @ weight_IO
    error = round_activation(rows_RI, amax) @ round_weight(weight_IO) - exact
    return float((error**2).sum() / max(float((exact**2).sum()), _SMALLEST))


def _rounded(x: NDArray[np.float32], step: NDArray[np.float32] | np.float32) -> NDArray[np.float32]:
    rounded: NDArray[np.float32] = np.clip(np.round(x / step), -LEVELS, LEVELS) * step
    return rounded
