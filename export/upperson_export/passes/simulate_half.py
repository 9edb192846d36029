"""A typed float16 graph to one that rounds as float16 does wherever it runs.

ONNX Runtime has no float16 kernels on a CPU: it computes a typed graph in float32, and neither an
overflow nor a rounding shows. In the simulated graph every computed float16 tensor is cast to
float16 and back; products are summed in float32, as GPUs do.
"""

import onnx_ir as ir

from upperson_export.passes.to_half import MOVES_VALUES

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16


class SimulateHalf(ir.passes.InPlacePass):
    """Compute in float32 with every float16 result rounded; the graph's ends keep their types."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Convert in place."""
        graph = model.graph
        for item in graph.initializers.values():
            if item.dtype == _HALF and item.const_value is not None:
                array = item.const_value.numpy().astype(_FLOAT.numpy())
                item.const_value = ir.tensor(array, name=item.name)
                item.dtype = _FLOAT
        for node in list(graph):
            for value in node.outputs:
                if value.dtype != _HALF:
                    continue
                if node.op_type == "Cast":
                    _follow(graph, node, value, _FLOAT)
                    continue
                value.dtype = _FLOAT
                if node.op_type not in MOVES_VALUES:
                    half = _follow(graph, node, value, _HALF)
                    _follow(graph, half, half.outputs[0], _FLOAT)
        return ir.passes.PassResult(model, modified=True)


def _follow(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Node:
    """Put a Cast behind a node and have everyone who reads the value read the Cast."""
    cast = ir.node("Cast", [value], {"to": dtype}, name=f"{value.name}/{dtype.name}/Cast")
    result = cast.outputs[0]
    result.name, result.dtype, result.shape = f"{value.name}/{dtype.name}", dtype, value.shape
    for reader, index in list(value.uses()):
        if reader is not cast:
            reader.replace_input_with(index, result)
    graph.insert_after(node, cast)
    return cast
