"""ONNX Runtime node by node, and int8 graphs whose products are summed exactly."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from upperson_rt.backends.onnxruntime import session_options
from upperson_rt.errors import BackendError


class NodeByNode:
    """A graph in ONNX Runtime without any of its optimisations: each node by itself."""

    name, device, version, max_batch = "plain", "cpu", ort.__version__, None

    def __init__(self, model: ir.Model) -> None:
        """Load the graph for one thread of the CPU."""
        options = session_options(ort, 1)
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        content = ir.to_proto(model).SerializeToString()
        self._session = ort.InferenceSession(content, options, ["CPUExecutionProvider"])

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph; see `Backend.run`."""
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(inputs)), strict=True))


def with_exact_products(path: Path) -> ir.Model:
    """Return an int8 graph as ONNX Runtime optimises it, int8 products summed in float64.

    All else, the order of each rounding included, is as it would run: what differs between the two
    is what its kernels for int8 get wrong.
    """
    with tempfile.TemporaryDirectory() as folder:
        options = session_options(ort, 1)
        options.optimized_model_filepath = str(Path(folder, "optimised.onnx"))
        ort.InferenceSession(path, options, ["CPUExecutionProvider"])
        model = ir.from_proto(onnx.load(options.optimized_model_filepath))
    products = [node for node in model.graph if node.op_type == "MatMulIntegerToFloat"]
    if not products:
        raise BackendError(f"ONNX Runtime {ort.__version__} fuses no int8 product of {path}")
    for product in products:
        _sum_in_float64(model.graph, product)
    return model


def _sum_in_float64(graph: ir.Graph, product: ir.Node) -> None:
    """Replace the node: sums of whole numbers below 2**53 are exact in float64."""
    a, b, a_scale, b_scale, a_zero, b_zero, *bias = product.inputs
    tape = ir.tape.Tape()

    def whole(value: ir.Value | None, zero: ir.Value | None) -> ir.Value:
        numbers, zeros = (tape.op("Cast", [x], {"to": ir.DataType.DOUBLE}) for x in (value, zero))
        return tape.op("Sub", [numbers, zeros])

    sums = tape.op("MatMul", [whole(a, a_zero), whole(b, b_zero)])
    sums = tape.op("Cast", [sums], {"to": ir.DataType.FLOAT})
    result = tape.op("Mul", [sums, tape.op("Mul", [a_scale, b_scale])])
    if bias:
        result = tape.op("Add", [result, bias[0]])
    graph.insert_before(product, tape.nodes)
    ir.convenience.replace_all_uses_with(product.outputs[0], result)
    graph.remove(product, safe=True)
