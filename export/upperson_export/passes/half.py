"""From a float32 graph to a typed float16 graph, and from that to a simulated one.

ONNX Runtime has no float16 kernels on a CPU: it computes a typed graph in float32, which hides
overflow and rounding. In the simulated graph every computed float16 tensor is cast to float16 and
back. Products accumulate in float32, as in ONNX Runtime and cuBLAS on GPUs, or in float16, which
TensorRT may choose.
"""

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from upperson_calibration.graph import array_of, constant, new_node
from upperson_calibration.ranges import MOVES_VALUES
from upperson_rt.errors import InputError

LIMIT = 32_752.0
"""Half of float16's largest number: later values may exceed those of calibration."""

MAX_RELATIVE_ERROR = 1e-3
"""Maximum change of a constant's norm by rounding; 11 bits give 2e-4, lost small numbers more."""

ERROR = "/sum_error"
PRODUCTS_A_ROUNDING = 8
"""Products that tensor cores of Turing, the oldest of TensorRT 11, add up before they round to
float16; newer ones add 16."""

_SUMS = next(
    iter(
        ir.from_onnx_text(f"""
<ir_version: 9, opset_import: ["" : 19, "half" : 1]>
unused (float x) => (float y) {{ y = Identity (x) }}

<domain: "half", opset_import: ["" : 19]>
Sums (left, right) => (sum) {{
    size = Constant <value_ints = [{PRODUCTS_A_ROUNDING}]> ()
    most = Constant <value_ints = [{PRODUCTS_A_ROUNDING - 1}]> ()
    columns = Constant <value_ints = [-1]> ()
    rows = Constant <value_ints = [-2]> ()
    nothing = Constant <value_float = 0.0> ()
    length = Shape <start = -1> (left)
    filled = Add (length, most)
    pieces = Div (filled, size)
    count = Squeeze (pieces)
    yes = Cast <to = 9> (count)
    sum = Loop (count, yes, nothing) <body = piece (
        int64 step, bool going, float[] before
    ) => (bool still, float[] after) {{
        start = Mul (step, size)
        end = Add (start, size)
        some = Slice (left, start, end, columns)
        others = Slice (right, start, end, rows)
        exact = MatMul (some, others)
        next = Add (before, exact)
        rounded = Cast <to = 10> (next)
        after = Cast <to = 1> (rounded)
        still = Identity (going)
    }}>
}}
""").functions.values()
    )
)
"""A MatMul of float32 numbers with sums that are rounded to float16, piece by piece."""

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_MAX = float(np.finfo(np.float16).max)
_SUFFIX = {_FLOAT: "fp32", _HALF: "fp16"}


class ToHalf(ir.passes.InPlacePass):
    """Compute in float16 wherever that is safe; inputs and outputs keep their types.

    These stay in float32, with Casts at their border and nowhere else:

    - LayerNormalization: TensorRT 11 computes in the type of the inputs, and squares of a stream
      with values near 1000 leave float16. CLIP was trained this way: float16 with float32 norms.
    - what follows the last norm, which scales the embedding to length 1, but for its MatMul:
      TensorRT for RTX has no float32 matrix product on Turing GPUs;
    - a node with a constant that float16 cannot hold, and the nodes its values are moved to;
    - a node that reads or writes a tensor whose values come near the end of float16's range.

    ``largest`` comes from `upperson_calibration.ranges.largest_values`. Without it all computed
    tensors are assumed to fit, and constants beyond float16 are refused.
    """

    def __init__(self, largest: Mapping[str, float] | None = None) -> None:
        self.largest = largest

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Convert in place."""
        graph = model.graph
        stays_float = self._float_nodes(graph)
        # A value already of the other type, so that it is cast or converted once.
        converted: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        for node in list(graph):
            dtype = _FLOAT if node in stays_float else _HALF
            if node.op_type == "QuantizeLinear" and node.inputs[0] is not None:
                dtype = node.inputs[0].dtype or dtype  # It quantizes what comes.
            if node.op_type == "DequantizeLinear":  # gives what its reader wants
                dtype = _FLOAT if node.successors()[0] in stays_float else _HALF
            for index, value in enumerate(node.inputs):
                if value is None or value.dtype not in (_FLOAT, _HALF) or value.dtype == dtype:
                    continue
                if (value, dtype) not in converted:
                    converted[value, dtype] = _as_type(graph, node, value, dtype)
                node.replace_input_with(index, converted[value, dtype])
            for value in node.outputs:
                if value.dtype == _FLOAT:
                    value.dtype = dtype
                    if node.op_type == "Cast":
                        node.attributes["to"] = ir.AttrInt64("to", dtype)
        for index, value in enumerate(graph.outputs):
            if value.dtype == _HALF:
                name = str(value.name)
                value.name = f"{name}.fp16"
                cast, graph.outputs[index] = _cast(value, _FLOAT, name)
                graph.append(cast)
        return ir.passes.PassResult(model, modified=True)

    def _float_nodes(self, graph: ir.Graph) -> set[ir.Node]:
        norms = [node for node in graph if node.op_type == "LayerNormalization"]
        stays_float = set(norms)
        after = set(norms[-1:])
        wide = {name for name, value in (self.largest or {}).items() if value > LIMIT}
        for name, item in graph.initializers.items():
            if self.largest is None and _largest(item) > _MAX:
                raise InputError(
                    f"the constant '{name}' reaches {_largest(item):.3g}, float16 ends at "
                    f"{_MAX:.0f}: what is computed from it may not fit either, so observe the "
                    "largest values of all tensors first",
                    code="constant_beyond_float16",
                    name=name,
                )
            if not _fits_half(item):
                wide.add(name)
        for node in graph:
            if after.intersection(node.predecessors()):
                after.add(node)
            inputs = {str(value.name) for value in node.inputs if value is not None}
            outputs = {str(value.name) for value in node.outputs}
            if not wide.isdisjoint(inputs | outputs):
                stays_float.add(node)
                if node.op_type in MOVES_VALUES:
                    wide |= outputs
        return stays_float | {node for node in after if node.op_type != "MatMul"}


class AccumulateInFloat32(ir.passes.InPlacePass):
    """Accumulate products of a typed graph in float32: operands cast up, the result cast down.

    The operands keep their float16 values, so a float16 kernel that accumulates in float32 may
    replace casts and product; without one, TensorRT multiplies in float32.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = names

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the casts in place."""
        for node in list(model.graph):
            if node.name not in self.names:
                continue
            for index, value in enumerate(node.inputs):
                assert value is not None
                cast, result = _cast(value, _FLOAT, f"{node.name}/operand{index}")
                model.graph.insert_before(node, cast)
                node.replace_input_with(index, result)
            (value,) = node.outputs
            value.dtype = _FLOAT
            _follow(model.graph, node, value, _HALF)
        return ir.passes.PassResult(model, modified=bool(self.names))


def fp16_products(graph: ir.Graph) -> list[str]:
    """Return the names of the products of float16 numbers; those of int8 accumulate in int32."""
    return [
        str(node.name)
        for node in graph
        if node.op_type == "MatMul"
        and node.outputs[0].dtype == _HALF
        and not any(before.op_type == "DequantizeLinear" for before in node.predecessors())
    ]


class SimulateHalf(ir.passes.InPlacePass):
    """Compute in float32 with every float16 result rounded; the graph's ends keep their types.

    MatMul nodes in ``accumulated`` add `PRODUCTS_A_ROUNDING` products at a time exactly, and then
    round the sum so far to float16.
    """

    def __init__(self, accumulated: Collection[str] = ()) -> None:
        self.accumulated = accumulated

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Convert in place."""
        graph = model.graph
        for item in graph.initializers.values():
            if item.dtype == _HALF and item.const_value is not None:
                array = array_of(item).astype(_FLOAT.numpy())
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
            if node.name in self.accumulated:
                node.domain, node.op_type = _SUMS.domain, _SUMS.name
        if self.accumulated:
            _add_sums(model)
        return ir.passes.PassResult(model, modified=True)


class ShowAccumulationErrors(ir.passes.InPlacePass):
    """Add outputs with the error that fp16 accumulation of each product alone would cause.

    An output is named as its MatMul node, with `ERROR` appended. It is the norm of the error over
    that of the result; infinite or not a number if a sum overflows.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = names

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Add the outputs in place."""
        graph = model.graph
        for node in list(graph):
            if node.name not in self.names:
                continue
            label, exact = f"{node.name}{ERROR}", node.outputs[0]
            sums = ir.node(_SUMS.name, node.inputs, domain=_SUMS.domain, name=f"{label}/sums")
            error = ir.node("Sub", [sums.outputs[0], exact], name=f"{label}/sub")
            norms = [
                ir.node("ReduceL2", [value], {"keepdims": 0}, name=f"{label}/{place}")
                for place, value in enumerate((error.outputs[0], exact))
            ]
            ratio, result = new_node(
                "Div",
                [norm.outputs[0] for norm in norms],
                name=label,
                dtype=_FLOAT,
                shape=ir.Shape([]),
            )
            graph.insert_after(node, [sums, error, *norms, ratio])
            graph.outputs.append(result)
        _add_sums(model)
        return ir.passes.PassResult(model, modified=True)


def _add_sums(model: ir.Model) -> None:
    model.functions[_SUMS.identifier()] = _SUMS
    model.graph.opset_imports[_SUMS.domain] = 1


def _largest(value: ir.Value) -> float:
    """Return the largest absolute value of a float32 constant, 0 for everything else."""
    if value.const_value is None or value.dtype != _FLOAT:
        return 0.0
    return float(np.abs(array_of(value)).max(initial=0))


def _fits_half(value: ir.Value) -> bool:
    if value.const_value is None or value.dtype != _FLOAT:
        return True
    array = array_of(value)
    with np.errstate(over="ignore"):
        error = array.astype(np.float16).astype(np.float32) - array
    norm = float(np.linalg.norm(array.ravel()))
    return norm == 0 or float(np.linalg.norm(error.ravel())) <= MAX_RELATIVE_ERROR * norm


def _as_type(graph: ir.Graph, reader: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Value:
    name = f"{value.name}.{_SUFFIX[dtype]}"
    if value.const_value is not None:
        return constant(graph, name, array_of(value).astype(dtype.numpy()))
    cast, result = _cast(value, dtype, name)
    graph.insert_before(reader, cast)
    return result


def _follow(graph: ir.Graph, node: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Node:
    """Put a Cast behind a node; all readers of the value read the Cast."""
    cast, result = _cast(value, dtype, f"{value.name}/{dtype.name}")
    for reader, index in list(value.uses()):
        if reader is not cast:
            reader.replace_input_with(index, result)
    graph.insert_after(node, cast)
    return cast


def _cast(value: ir.Value, dtype: ir.DataType, result: str) -> tuple[ir.Node, ir.Value]:
    return new_node(
        "Cast",
        [value],
        {"to": dtype},
        name=f"{result}/Cast",
        result=result,
        dtype=dtype,
        shape=value.shape,
    )
