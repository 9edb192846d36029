"""How large the numbers inside a tower become, which decides what float16 can hold."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper

from upperson_calibration.session import batches, open_session
from upperson_export.passes.to_half import MOVES_VALUES
from upperson_rt.errors import InputError

Progress = Callable[[int, int], None]
"""Called with (done, total) samples."""

_HIGH, _LOW = "/high", "/low"


def largest_values(
    graph: Path,
    inputs: npt.NDArray[Any],
    *,
    batch_size: int = 8,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Return the largest absolute value of each computed float tensor, by name.

    The extremes are taken inside the graph, so memory grows neither with tensors nor with samples.
    Tensors that only move values of others are left out.

    Args:
        graph: The ONNX file of a float32 tower.
        inputs: uint8 [N, H, W, 3] or zero-padded int32 [N, L]. Padding inside a batch counts: an
            infinite number in a padded row would spoil the others, too.
        batch_size: Samples run at a time; memory is proportional to it.
        threads: CPU threads; None lets ONNX Runtime choose.
        progress: Told after each batch.

    Raises:
        InputError: There is no sample, or a value is not finite.
    """
    if not len(inputs):
        raise InputError("at least one sample is needed to see how large values become")
    model = onnx.load(graph)
    names = _watch(model.graph)
    session = open_session(model, graph.parent, threads)
    input_name = session.get_inputs()[0].name
    wanted = [name + end for name in names for end in (_HIGH, _LOW)]
    largest = np.zeros(len(names))
    done = 0
    for samples, batch, _ in batches(inputs, batch_size):
        found = np.abs(session.run(wanted, {input_name: batch})).reshape(-1, 2)
        # NaN passes through maximum, unlike through a comparison.
        largest = np.maximum(largest, found.max(axis=1))
        done += len(samples)
        if progress is not None:
            progress(done, len(inputs))
    for name, value in zip(names, largest, strict=True):
        if not np.isfinite(value):
            raise InputError(f"the tensor '{name}' is not finite: the model diverged")
    return dict(zip(names, largest.tolist(), strict=True))


def _watch(graph: onnx.GraphProto) -> list[str]:
    """Add the extremes of every computed float tensor as outputs; return the tensors' names."""
    floats = {
        value.name
        for value in (*graph.value_info, *graph.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    names: list[str] = []
    nodes: list[NodeProto] = []
    for node in graph.node:
        nodes.append(node)
        if node.op_type in MOVES_VALUES:
            continue
        for name in node.output:
            if name not in floats:
                continue
            names.append(name)
            for reduce, end in (("ReduceMax", _HIGH), ("ReduceMin", _LOW)):
                # Right behind its tensor: at the end of the graph, all tensors would live until it.
                nodes.append(helper.make_node(reduce, [name], [name + end], keepdims=0))
                graph.output.append(
                    helper.make_tensor_value_info(name + end, TensorProto.FLOAT, [])
                )
    del graph.node[:]
    graph.node.extend(nodes)
    return names
