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
    channel_max: NDArray[np.float32]
    """Largest absolute value by channel, [C]."""

    rows: NDArray[np.float32]
    """A few rows [R, C], drawn evenly over samples."""

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
            channel_max = np.maximum(rows_RC.max(axis=0), -rows_RC.min(axis=0))
            if not np.isfinite(channel_max).all():
                raise InputError(
                    f"{graph.name}: the activation '{name}' is not finite for a calibration "
                    "sample: the model diverged or its weights are damaged"
                )
            if name not in observed:
                # At once: small pieces among large passing arrays would fragment the heap.
                rows = np.empty((drawn.sum(), rows_RC.shape[1]), np.float32)
                observed[name] = Observed(AbsHistogram(), np.zeros_like(channel_max), rows)
            seen = observed[name]
            seen.histogram.add(rows_RC)
            np.maximum(seen.channel_max, channel_max, out=seen.channel_max)
            for sample, own in zip(samples, places, strict=True):
                picked = rng.permutation(own)[: drawn[sample]]
                seen.rows[kept[name] : kept[name] + len(picked)] = rows_RC[picked]
                kept[name] += len(picked)
        done += len(samples)
        if progress is not None:
            progress(done, len(inputs))
    for name, seen in observed.items():
        seen.rows = seen.rows[: kept[name]]
    return observed


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
) -> tuple[NDArray[np.float32], list[NDArray[np.int64]]]:
    """Return the rows [R, C] that are no padding, and the places of each sample's among them."""
    samples, tokens, channels = value_NLC.shape
    counts = np.full(samples, tokens)
    rows_RC = value_NLC.reshape(-1, channels)
    # In the last block a tensor may hold the pooled rows alone, one a sample.
    if lengths is not None and tokens == batch.shape[1]:
        counts = lengths
        rows_RC = rows_RC[(np.arange(tokens) < lengths[:, None]).reshape(-1)]
    ends = np.cumsum(counts)
    return rows_RC, [np.arange(end - count, end) for end, count in zip(ends, counts, strict=True)]
