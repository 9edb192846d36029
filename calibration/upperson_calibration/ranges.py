"""Activation ranges of int8: observe activations, then estimate the largest value to represent.

A step is amax / 127, and values beyond amax saturate. Estimators of amax, from a histogram of |x|:

- ``min-max``: nothing saturates; one outlier makes all steps coarse.
- ``percentile-P``: P percent of the values do not saturate.
- ``entropy``: least Kullback-Leibler divergence between the values and their 128 levels, after
  S. Migacz, "8-bit inference with TensorRT", GTC 2017. ONNX Runtime's own takes 2 s a tensor, 40
  times as long, and with its default of 128 bins has only one candidate to choose from.
- ``mse``: least mean squared error of rounding and saturating together.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from upperson_adapter.weights import LEVELS
from upperson_calibration.graph import ObservedBatch, SampleStream, TowerGraph, new_node
from upperson_rt.encoder import Progress
from upperson_rt.errors import InputError

# --- Observe the activations of a float32 tower while calibration samples stream through
#
# Memory does not grow with the number of samples: a tensor leaves its maxima, a histogram of 1 MiB
# and a fixed number of rows.

KEPT_ROWS = 256
"""Rows kept of a tensor, to compare roundings of its Linear: 9 MB a block of ViT-B/16."""

MOVES_VALUES = (
    "Concat", "Expand", "Gather", "GatherElements", "Reshape", "Slice", "Split", "Squeeze",
    "Transpose", "Unsqueeze",
)  # fmt: skip
"""Operators whose outputs hold values of their inputs."""

_DROPPED_BITS = 14
BINS = 1 << (31 - _DROPPED_BITS)
_CHUNK = 1 << 18  # Values at a time: 2 MB of bin numbers, which stay in the cache.


class AbsHistogram:
    """Counts of |x| in fixed bins, 1 MiB.

    Bins are the upper bits of a float32: all of its exponent and 9 bits of its mantissa. Each is at
    most 0.2 % wide, from the smallest value to the largest, so samples can stream through although
    the range is unknown; equal bins would have to be guessed or to grow.
    """

    def __init__(self) -> None:
        self._counts: NDArray[np.int64] = np.zeros(BINS, np.int64)

    def add(self, values: NDArray[np.float32]) -> None:
        """Count finite values of any shape, C-contiguous."""
        bits = values.reshape(-1).view(np.uint32)
        for start in range(0, len(bits), _CHUNK):
            chunk = bits[start : start + _CHUNK] & np.uint32(0x7FFFFFFF)
            self._counts += np.bincount(chunk >> _DROPPED_BITS, minlength=BINS)

    def bins(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """Return lower edges, upper edges and counts of the bins that are not empty, ascending."""
        used = np.flatnonzero(self._counts)
        lower, upper = (
            (edge.astype(np.uint32) << _DROPPED_BITS).view(np.float32).astype(np.float64)
            for edge in (used, used + 1)
        )
        return lower, upper, self._counts[used]

    def in_equal_bins(self, count: int, amax: float) -> NDArray[np.float64]:
        """Count again in ``count`` equal bins of [0, amax]; a bin's values lie evenly within it."""
        lower, upper, counts = self.bins()
        edges = np.concatenate([[0.0], np.stack([lower, upper], axis=1).reshape(-1)])
        below = np.cumsum(counts)
        at_edges = np.concatenate([[0], np.stack([below - counts, below], axis=1).reshape(-1)])
        cumulative = np.interp(np.linspace(0, amax, count + 1), edges, at_edges)
        cumulative[-1] = below[-1]  # The last bin's upper edge lies beyond the maximum.
        # Exact zeros sit on the first edge, and belong into the first bin.
        cumulative[0] = 0
        return np.diff(cumulative)


@dataclass(slots=True)
class Observed:
    """Statistics of one activation tensor [N, L, C]."""

    histogram: AbsHistogram
    half_max: NDArray[np.float32]
    """Largest absolute value by channel, [2, C]: of every other sample, and of the rest."""
    rows: NDArray[np.float32]
    """A few rows [R, C], drawn evenly over samples."""
    row_half: NDArray[np.int64]
    """[R] the half, 0 or 1, of each row's sample."""

    @property
    def channel_max(self) -> NDArray[np.float32]:
        """Largest absolute value by channel, [C]."""
        largest: NDArray[np.float32] = self.half_max.max(axis=0)
        return largest

    @property
    def amax(self) -> float:
        """Largest absolute value."""
        return float(self.channel_max.max())


def observe(
    graph: TowerGraph,
    inputs: NDArray[Any],
    *,
    batch_size: int = 8,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Observed]:
    """Run a float32 tower over samples and observe the inputs of its block Linears, by name.

    Values at padding are left out: they reach no embedding, so they must not set a range. Memory is
    proportional to the batch.

    Raises:
        InputError: There is no sample, or an activation is not finite.
    """
    names = list(dict.fromkeys(linear.activation for linear in graph.linears))

    def give_out(changed: ir.Graph) -> None:
        values = ir.convenience.create_value_mapping(changed)
        changed.outputs.extend(values[name] for name in names)

    stream = SampleStream(graph, inputs, give_out, batch_size=batch_size, threads=threads)
    observed: dict[str, Observed] = {}
    # One row of each sample that is drawn, or several of each where samples are few.
    rng = np.random.default_rng(0)
    drawn = np.zeros(len(inputs), np.int64)
    drawn[rng.permutation(len(inputs))[:KEPT_ROWS]] = -(-KEPT_ROWS // len(inputs))
    kept = dict.fromkeys(names, 0)
    for batch in stream.run(names, progress=progress):
        for name, value_NLC in zip(names, batch.outputs, strict=True):
            rows_RC, places = _valid_rows(value_NLC, batch)
            if name not in observed:
                # At once: small pieces among large passing arrays would fragment the heap.
                channels, count = rows_RC.shape[1], int(drawn.sum())
                observed[name] = Observed(
                    AbsHistogram(),
                    np.zeros((2, channels), np.float32),
                    np.empty((count, channels), np.float32),
                    np.empty(count, np.int64),
                )
            seen = observed[name]
            seen.histogram.add(rows_RC)
            for sample, own in zip(batch.samples, places, strict=True):
                own_RC, half = rows_RC[own], sample % 2
                largest = np.maximum(own_RC.max(axis=0), -own_RC.min(axis=0))
                np.maximum(seen.half_max[half], largest, out=seen.half_max[half])
                picked = own_RC[rng.permutation(len(own_RC))[: drawn[sample]]]
                row = slice(kept[name], kept[name] + len(picked))
                seen.rows[row], seen.row_half[row] = picked, half
                kept[name] = row.stop
            if not np.isfinite(seen.half_max).all():
                raise InputError(
                    f"{graph.file.name}: the activation '{name}' is not finite for a calibration "
                    "sample: the model diverged or its weights are damaged",
                    code="activation_not_finite",
                    tensor=name,
                )
    for name, seen in observed.items():
        seen.rows, seen.row_half = seen.rows[: kept[name]], seen.row_half[: kept[name]]
    return observed


def largest_values(
    graph: TowerGraph,
    inputs: NDArray[Any],
    *,
    batch_size: int = 8,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Return the largest absolute value of each computed float tensor, for float16.

    Extremes are computed inside the graph, so memory does not grow with tensors. Tensors that only
    move values of others are left out. Padding inside a batch counts: an infinite number in a
    padded row would spoil the others, too.
    """
    names: list[str] = []

    def give_out(changed: ir.Graph) -> None:
        names.extend(_give_extremes(changed))

    stream = SampleStream(graph, inputs, give_out, batch_size=batch_size, threads=threads)
    wanted = [name + end for name in names for end in (_HIGH, _LOW)]
    largest = np.zeros(len(names))
    for batch in stream.run(wanted, progress=progress):
        found = np.abs(batch.outputs).reshape(-1, 2)
        # NaN passes through maximum, unlike through a comparison.
        largest = np.maximum(largest, found.max(axis=1))
    for name, value in zip(names, largest, strict=True):
        if not np.isfinite(value):
            raise InputError(f"the tensor '{name}' is not finite: the model diverged")
    return dict(zip(names, largest.tolist(), strict=True))


_HIGH, _LOW = "/high", "/low"


def _give_extremes(graph: ir.Graph) -> list[str]:
    """Add the extremes of every computed float tensor to the outputs; return the tensors' names."""
    names = []
    for node in list(graph):
        if node.op_type in MOVES_VALUES:
            continue
        for value in [value for value in node.outputs if value.dtype == ir.DataType.FLOAT]:
            names.append(str(value.name))
            for operator, end in (("ReduceMax", _HIGH), ("ReduceMin", _LOW)):
                reduce, extreme = new_node(
                    operator,
                    [value],
                    {"keepdims": 0},
                    name=f"{value.name}{end}",
                    dtype=value.dtype,
                    shape=ir.Shape([]),
                )
                # Right behind its tensor: at the end of the graph, all tensors would live until it.
                graph.insert_after(node, reduce)
                graph.outputs.append(extreme)
    return names


def _valid_rows(
    value_NLC: NDArray[np.float32], batch: ObservedBatch
) -> tuple[NDArray[np.float32], list[slice]]:
    """Return the rows [R, C] that are no padding, and the places of each sample's among them."""
    samples, tokens, channels = value_NLC.shape
    counts = np.full(samples, tokens)
    rows_RC = value_NLC.reshape(-1, channels)
    # In the last block a tensor may hold the pooled rows alone, one a sample.
    if batch.lengths is not None and tokens == batch.inputs.shape[1]:
        counts = batch.lengths
        rows_RC = rows_RC[(np.arange(tokens) < counts[:, None]).reshape(-1)]
    ends = np.cumsum(counts)
    return rows_RC, list(map(slice, ends - counts, ends))


# --- Symmetric int8: estimators of the largest value to represent, and the error of rounding


Estimator = Literal[
    "min-max", "percentile-99.9", "percentile-99.99", "percentile-99.999", "entropy", "mse"
]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
DEFAULT_ESTIMATOR: Estimator = "percentile-99.999"

_ENTROPY_BINS = 2048
_MSE_CANDIDATES = 120
_MSE_SMALLEST = 1e-3
"""Smallest range tried, as a share of the largest value."""

_SMALLEST = 1e-30
"""Replaces zero as a divisor; float32 still holds a step of it."""


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
    """Return the best end of the range as a share of the last bin's end."""
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
    """Round x to 255 steps of [-amax, amax]; values beyond saturate."""
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
