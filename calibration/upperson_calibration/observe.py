"""Watch the activations that enter the block Linears while calibration samples stream through.

Nothing grows with the number of samples: a tensor leaves its maxima, a histogram of 1 MiB and a
fixed number of rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

from upperson_calibration.block_linears import block_linears
from upperson_calibration.histogram import AbsHistogram
from upperson_calibration.session import batches, open_session
from upperson_rt.errors import InputError

Progress = Callable[[int, int], None]
"""Called with (done, total) samples."""

KEPT_ROWS = 256
"""Rows kept of a tensor: enough to compare roundings of its Linear, 9 MB a block of ViT-B/16."""


@dataclass(slots=True)
class Observed:
    """What calibration saw of one activation tensor [N, L, C]."""

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
    graph: Path,
    inputs: NDArray[Any],
    *,
    batch_size: int = 8,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Observed]:
    """Run a float32 tower over samples and watch what enters its block Linears.

    Captions run sorted by length, and what a tower computes at padding is left out: it reaches no
    embedding, so it must not set a range.

    Args:
        graph: The float32 ONNX file.
        inputs: uint8 [N, H, W, 3] or zero-padded int32 [N, L].
        batch_size: Samples run at a time; memory is proportional to it.
        threads: CPU threads; None lets ONNX Runtime choose.
        progress: Told after each batch.

    Returns:
        Observations by the name of the activation tensor, in graph order.

    Raises:
        InputError: There is no sample, the graph has no block Linear, or an activation is not
            finite.
    """
    if not len(inputs):
        raise InputError("calibration needs at least one sample, found none")
    session, names = _watched(graph, threads)
    input_name = session.get_inputs()[0].name
    observed: dict[str, Observed] = {}
    # One row of each sample that is drawn, or several of each where samples are few.
    rng = np.random.default_rng(0)
    drawn = np.zeros(len(inputs), np.int64)
    drawn[rng.permutation(len(inputs))[:KEPT_ROWS]] = -(-KEPT_ROWS // len(inputs))
    kept = dict.fromkeys(names, 0)
    done = 0
    for samples, batch, lengths in batches(inputs, batch_size):
        for name, value_NLC in zip(names, session.run(names, {input_name: batch}), strict=True):
            rows_RC, places = _valid_rows(value_NLC, batch, lengths)
            if name not in observed:
                # At once: small pieces among large passing arrays would fragment the heap.
                observed[name] = _nothing(rows_RC.shape[1], int(drawn.sum()))
            seen = observed[name]
            seen.histogram.add(rows_RC)
            for sample, own in zip(samples, places, strict=True):
                own_RC, half = rows_RC[own], sample % 2
                largest = np.maximum(own_RC.max(axis=0), -own_RC.min(axis=0))
                np.maximum(seen.half_max[half], largest, out=seen.half_max[half])
                picked = own_RC[rng.permutation(len(own_RC))[: drawn[sample]]]
                row = slice(kept[name], kept[name] + len(picked))
                seen.rows[row], seen.row_half[row] = picked, half
                kept[name] = row.stop
            if not np.isfinite(seen.half_max).all():
                raise InputError(
                    f"{graph.name}: the activation '{name}' is not finite for a calibration "
                    "sample: the model diverged or its weights are damaged"
                )
        done += len(samples)
        if progress is not None:
            progress(done, len(inputs))
    for name, seen in observed.items():
        seen.rows, seen.row_half = seen.rows[: kept[name]], seen.row_half[: kept[name]]
    return observed


def _nothing(channels: int, rows: int) -> Observed:
    return Observed(
        AbsHistogram(),
        np.zeros((2, channels), np.float32),
        np.empty((rows, channels), np.float32),
        np.empty(rows, np.int64),
    )


def _watched(graph: Path, threads: int | None) -> tuple["onnxruntime.InferenceSession", list[str]]:
    """Open the graph with the block Linears' inputs among its outputs."""
    model = onnx.load(graph)
    names = list(dict.fromkeys(linear.activation for linear in block_linears(model)))
    if not names:
        raise InputError(
            f"{graph} has no block Linear to calibrate: pass the fp32 graph of a tower that "
            " upperson export  wrote"
        )
    model.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
    )
    return open_session(model, graph.parent, threads), names


def _valid_rows(
    value_NLC: NDArray[np.float32], batch: NDArray[Any], lengths: NDArray[np.int64] | None
) -> tuple[NDArray[np.float32], list[slice]]:
    """Return the rows [R, C] that are no padding, and the places of each sample's among them."""
    samples, tokens, channels = value_NLC.shape
    counts = np.full(samples, tokens)
    rows_RC = value_NLC.reshape(-1, channels)
    # In the last block a tensor may hold the pooled rows alone, one a sample.
    if lengths is not None and tokens == batch.shape[1]:
        counts = lengths
        rows_RC = rows_RC[(np.arange(tokens) < lengths[:, None]).reshape(-1)]
    ends = np.cumsum(counts)
    return rows_RC, list(map(slice, ends - counts, ends))
