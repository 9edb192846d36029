"""Factors that move outliers of activations into weights, where int8 has a scale per channel.

After G. Xiao et al., "SmoothQuant", ICML 2023. The input u of a block Linear is divided by a
factor for each channel and the weight's row multiplied by it:

    u W = (u / s) (diag(s) W),      s_c = amax_c ** alpha / wmax_c ** (1 - alpha)

A site is where such factors fold into what stands before. ``blocks.i.ln_1`` and ``blocks.i.ln_2``
divide gain and bias of the norm and the columns of the adapter's up projection, since the input of
qkv and fc1 is LN(x) + adapter(x). ``blocks.i.attention.out`` divides the value columns and prefix
values. The input of fc2 follows a GELU, through which no factor can pass.

Factors are powers of 2 ** (1 / 8), which costs no accuracy and lets a file hold them exactly.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from numpy.typing import NDArray

from upperson_calibration.block_linears import BlockLinear, block_linears, weights_of
from upperson_calibration.observe import Observed
from upperson_calibration.rounding import output_error

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Tried at every site; SmoothQuant itself uses 0.5 to 0.9 for a whole model."""

STEPS_PER_OCTAVE = 8

_LARGEST_OCTAVE = 12
"""Factors lie between 2 ** -12 and 2 ** 12: smoothed weights stay inside float16's range."""


@dataclass(frozen=True, slots=True)
class Smoothing:
    """What is done at one site."""

    alpha: float | None
    """None: rounding is best without factors."""

    exponents: NDArray[np.int64]
    """log2(s) in eighths, by channel [C]."""

    error_before: float
    """Relative squared error of the Linears' int8 outputs without factors, on unseen samples."""

    error_after: float
    """The same with factors."""

    @property
    def factors(self) -> NDArray[np.float32]:
        """Divisors s of the channels, [C]."""
        return factors_of(self.exponents)


def factors_of(exponents: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return s for its log2 in eighths."""
    factors: NDArray[np.float32] = np.exp2(exponents / STEPS_PER_OCTAVE).astype(np.float32)
    return factors


def choose_smoothing(
    model: onnx.ModelProto, observed: Mapping[str, Observed]
) -> dict[str, Smoothing]:
    """Search alpha at every site of a tower for the least error of its Linears.

    Args:
        model: The float32 graph.
        observed: Its activations.

    Returns:
        By site, in graph order.
    """
    weights = weights_of(model)
    sites: dict[str, list[BlockLinear]] = {}
    for linear in block_linears(model):
        if (site := site_of(linear.module)) is not None:
            sites.setdefault(site, []).append(linear)
    return {
        # Where q and kv are apart, q reads some of the rows that kv reads.
        site: _search(
            max((observed[linear.activation] for linear in linears), key=lambda seen: seen.amax),
            np.concatenate([weights[linear.module] for linear in linears], axis=1),
        )
        for site, linears in sites.items()
    }


def site_of(module: str) -> str | None:
    """Return the site before a block Linear, or None before fc2."""
    block, _, name = module.partition(".attention.")
    if name:
        return module if name == "out" else f"{block}.ln_1"
    return re.sub(r"\.mlp\.fc1$", ".ln_2", module) if module.endswith(".fc1") else None


def _search(seen: Observed, weight_IO: NDArray[np.float32]) -> Smoothing:
    """Choose alpha on samples that did not set the factors.

    Factors made from the maxima of few samples leave unseen ones no room: judged on the same
    samples, the strongest smoothing always looks best and then saturates.
    """
    wmax_I = np.abs(weight_IO).max(axis=1)

    def error(alpha: float | None) -> float:
        errors = []
        for half in (0, 1):
            rows = seen.rows[seen.row_half != half]
            amax_I = seen.half_max[half]
            if not len(rows) or not amax_I.any():  # There is one sample alone.
                rows, amax_I = seen.rows, seen.channel_max
            s_I = factors_of(_exponents(amax_I, wmax_I, alpha))
            smoothed = rows / s_I, weight_IO * s_I[:, None]
            errors.append(output_error(*smoothed, float((amax_I / s_I).max())))
        return float(np.mean(errors))

    errors = {alpha: error(alpha) for alpha in (None, *ALPHAS)}
    best = min(errors, key=lambda alpha: errors[alpha])
    return Smoothing(best, _exponents(seen.channel_max, wmax_I, best), errors[None], errors[best])


def _exponents(
    amax_C: NDArray[np.float32], wmax_C: NDArray[np.float32], alpha: float | None
) -> NDArray[np.int64]:
    """Return SmoothQuant's factors with geometric mean near 1, as log2 in eighths."""
    # A channel that is never active, or never read, has no range to balance.
    live = (amax_C > 0) & (wmax_C > 0)
    octaves = np.zeros(len(amax_C))
    if alpha is not None and live.any():
        octaves[live] = alpha * np.log2(amax_C[live], dtype=np.float64)
        octaves[live] -= (1 - alpha) * np.log2(wmax_C[live], dtype=np.float64)
        octaves[live] -= octaves[live].mean()
    octaves = np.clip(octaves, -_LARGEST_OCTAVE, _LARGEST_OCTAVE)
    return np.round(STEPS_PER_OCTAVE * octaves).astype(np.int64)
