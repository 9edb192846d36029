"""Smoothing factors: they move activation outliers into weights, which have a scale per channel.

After G. Xiao et al., "SmoothQuant", ICML 2023. The input u of a block Linear is divided by a
factor for each channel and the weight's row multiplied by it:

    u W = (u / s) (diag(s) W),      s_c = amax_c ** alpha / wmax_c ** (1 - alpha)

A site is the producer that such factors fold into; the description of a graph says which Linears
read from it, and some have none.

Factors are powers of 2 ** (1 / 8), which costs no accuracy and lets a file hold them exactly.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from upperson_calibration.graph import BlockLinear, TowerGraph, array_of
from upperson_calibration.ranges import Observed, output_error
from upperson_rt.errors import InputError

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Tried at every site; SmoothQuant itself uses 0.5 to 0.9 for a whole model."""

STEPS_PER_OCTAVE = 8

_LARGEST_OCTAVE = 12
"""Factors lie between 2 ** -12 and 2 ** 12: smoothed weights stay inside float16's range."""

_LARGEST_EXPONENT = 100
"""Limit for a file."""


@dataclass(frozen=True, slots=True)
class Smoothing:
    """The smoothing of one site, as in a calibration file."""

    alpha: float | None
    """None: rounding is best without factors."""
    error_before: float
    """Relative squared error of the Linears' int8 outputs without factors, on held-out samples."""
    error_after: float
    log2_factors_in_eighths: str
    """Whole numbers, by channel, in one line, for ``diff``."""

    def __post_init__(self) -> None:
        name = "log2_factors_in_eighths"
        try:
            exponents_C = self.exponents
        except ValueError as error:
            raise InputError(f"{name}: expected whole numbers: {error}") from error
        if not len(exponents_C):
            raise InputError(f"{name}: expected numbers, found none")
        if max(map(abs, exponents_C.tolist())) > _LARGEST_EXPONENT:
            raise InputError(f"{name}: expected numbers from -100 to 100")

    @property
    def exponents(self) -> NDArray[np.int64]:
        """log2(s) in eighths, by channel [C]."""
        return np.array([int(word) for word in self.log2_factors_in_eighths.split()], np.int64)

    @property
    def factors(self) -> NDArray[np.float32]:
        """Divisors s of the channels, [C]."""
        return factors_of(self.exponents)


def factors_of(exponents: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return s for its log2 in eighths."""
    factors: NDArray[np.float32] = np.exp2(exponents / STEPS_PER_OCTAVE).astype(np.float32)
    return factors


def choose_smoothing(graph: TowerGraph, observed: Mapping[str, Observed]) -> dict[str, Smoothing]:
    """Search alpha at every site of a tower for the least error of its Linears, in graph order."""
    initializers = graph.load().graph.initializers
    sites: dict[str, list[BlockLinear]] = {}
    for linear in graph.linears:
        if linear.site is not None:
            sites.setdefault(linear.site, []).append(linear)
    return {
        # Where q and kv are apart, q reads some of the rows that kv reads.
        site: _search(
            max((observed[linear.activation] for linear in linears), key=lambda seen: seen.amax),
            np.concatenate([array_of(initializers[linear.weight]) for linear in linears], axis=1),
        )
        for site, linears in sites.items()
    }


def _search(seen: Observed, weight_IO: NDArray[np.float32]) -> Smoothing:
    """Choose alpha on held-out samples.

    On the samples that set the factors, the strongest smoothing always looks best; others then
    saturate.
    """
    wmax_I = np.abs(weight_IO).max(axis=1)

    def error(alpha: float | None) -> float:
        errors = []
        for half in (0, 1):
            rows = seen.rows[seen.row_half != half]
            amax_I = seen.half_max[half]
            if not len(rows) or not amax_I.any():  # There is one sample.
                rows, amax_I = seen.rows, seen.channel_max
            s_I = factors_of(_exponents(amax_I, wmax_I, alpha))
            smoothed = rows / s_I, weight_IO * s_I[:, None]
            errors.append(output_error(*smoothed, float((amax_I / s_I).max())))
        return float(np.mean(errors))

    errors = {alpha: error(alpha) for alpha in (None, *ALPHAS)}
    best = min(errors, key=lambda alpha: errors[alpha])
    exponents = " ".join(map(str, _exponents(seen.channel_max, wmax_I, best).tolist()))
    return Smoothing(best, errors[None], errors[best], exponents)


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
