"""Constants that passes add to a graph."""

from typing import Any

import numpy.typing as npt
import onnx_ir as ir


def constant(graph: ir.Graph, name: str, array: npt.NDArray[Any]) -> ir.Value:
    """Return the initializer of that name, made if it is not there."""
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    return graph.initializers[name]
