"""How large the numbers inside a tower become, which decides what float16 can hold."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper

from upperson_export.passes.to_half import MOVES_VALUES
from upperson_rt.errors import InputError

_SUFFIX = "/largest"


def largest_values(
    model: onnx.ModelProto, batches: Iterable[npt.NDArray[Any]], threads: int | None = None
) -> dict[str, float]:
    """Return the largest absolute value of each computed float tensor, by name.

    The maxima are taken inside the graph, so memory does not grow with the number of tensors.
    Tensors that only move values of others are left out.

    Args:
        model: A float32 tower; it is not changed.
        batches: Inputs of the tower, padding included: an infinite number in a padded row would
            spoil the others, too.
        threads: CPU threads; None lets ONNX Runtime choose.

    Raises:
        InputError: There is no batch, or a value is not finite.
    """
    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    graph = watched.graph
    floats = {
        value.name
        for value in (*graph.value_info, *graph.output)
        if value.type.tensor_type.elem_type == TensorProto.FLOAT
    }
    names = [
        output
        for node in model.graph.node
        for output in node.output
        if output in floats and node.op_type not in MOVES_VALUES
    ]
    for name in names:
        graph.node.append(helper.make_node("Abs", [name], [f"{name}/abs"]))
        graph.node.append(
            helper.make_node("ReduceMax", [f"{name}/abs"], [name + _SUFFIX], keepdims=0)
        )
        graph.output.append(helper.make_tensor_value_info(name + _SUFFIX, TensorProto.FLOAT, []))
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    del watched, graph
    largest = np.full(len(names), -1.0)
    for batch in batches:
        found = session.run([name + _SUFFIX for name in names], {model.graph.input[0].name: batch})
        # NaN passes through maximum, unlike through a comparison.
        largest = np.maximum(largest, found)
    if (largest == -1).any():
        raise InputError("at least one batch is needed to see how large values become")
    for name, value in zip(names, largest, strict=True):
        if not np.isfinite(value):
            raise InputError(f"the tensor '{name}' is not finite: the model diverged")
    return dict(zip(names, largest.tolist(), strict=True))
