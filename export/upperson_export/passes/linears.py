"""Passes over Linears: INT8 by explicit Q/DQ pairs, and packed queries, keys and values."""

from collections.abc import Collection, Mapping

import numpy as np
import onnx_ir as ir

from upperson_adapter.weights import LEVELS, half_at_least, quantized, weight_scales
from upperson_calibration.graph import array_of, constant, new_node
from upperson_machine.int8 import EXACT, INT8_SUMS
from upperson_rt.errors import InputError

_ROW_SELECTION = ("Slice", "Gather", "GatherElements")


class QuantizeLinears(ir.passes.InPlacePass):
    """Put Q/DQ on both inputs of some MatMul nodes.

    Symmetric int8, zero point 0; weights are stored as int8 with a scale per output channel;
    activations have one scale a tensor, and queries share that of keys and values where they read
    a row of the same tensor. Scales are float16 numbers whatever the graph's type, so a float32
    and a float16 graph round activations to the same integers. Every MatMul has DequantizeLinear
    nodes of its own, which is the pattern that ONNX Runtime, OpenVINO and TensorRT fuse.

    ``pair_limit`` is the maximum sum of the absolute values of two neighbouring int8 weights,
    [2i, out] and [2i + 1, out]: a channel that exceeds it gets a larger scale, and the file is
    marked as exact on every CPU. None is for devices that accumulate in 32 bits.
    """

    def __init__(
        self, linears: Collection[str], amax: Mapping[str, float], pair_limit: int | None = None
    ) -> None:
        self.linears = frozenset(linears)
        self.amax = amax
        self.pair_limit = pair_limit

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the pairs in place."""
        graph = model.graph
        done: dict[ir.Value, ir.Value] = {}
        for node in [node for node in graph if node.name in self.linears]:
            x, weight = node.inputs
            assert x is not None
            assert weight is not None
            source = _whole_tensor(x)
            scale = half_at_least(np.asarray(self._amax_of(source) / LEVELS))
            parameters = [
                constant(graph, f"{source.name}.scale", scale),
                constant(graph, "zero_point", np.zeros((), np.int8)),
            ]
            if x not in done:
                quantize, done[x] = new_node(
                    "QuantizeLinear",
                    [x, *parameters],
                    name=f"{x.name}/QuantizeLinear",
                    dtype=ir.DataType.INT8,
                    shape=x.shape,
                )
                graph.insert_before(node, quantize)
            module = str(node.name).removesuffix("/MatMul")
            dequantize, value = new_node(
                "DequantizeLinear",
                [done[x], *parameters],
                name=f"{module}/DequantizeLinear",
                dtype=ir.DataType.FLOAT,
                shape=x.shape,
            )
            graph.insert_before(node, dequantize)
            node.replace_input_with(0, value)
            node.replace_input_with(1, _quantized_weight(graph, node, weight, self.pair_limit))
        if self.pair_limit is not None:
            model.metadata_props[INT8_SUMS] = EXACT
        return ir.passes.PassResult(model, modified=bool(done))

    def _amax_of(self, value: ir.Value) -> float:
        amax = self.amax.get(str(value.name))
        if amax is None:
            raise InputError(
                f"the calibration has no range of the tensor '{value.name}': it belongs to another "
                "model or another version of the export, calibrate again",
                code="range_missing",
                tensor=value.name,
            )
        if not 0 <= amax <= LEVELS * float(np.finfo(np.float16).max):
            raise InputError(
                f"the calibrated range of '{value.name}' is {amax}: expected a number from 0 to "
                "8e6; look at the calibration data",
                code="range_unusable",
                tensor=value.name,
            )
        return amax


def _whole_tensor(x: ir.Value) -> ir.Value:
    """Return the tensor whose rows ``x`` is a selection of, or ``x`` itself."""
    node = x.producer()
    if node is None or node.op_type not in _ROW_SELECTION or node.inputs[0] is None:
        return x
    return _whole_tensor(node.inputs[0])


def _quantized_weight(
    graph: ir.Graph, node: ir.Node, weight: ir.Value, pair_limit: int | None
) -> ir.Value:
    """Store a weight [in, out] as int8 and return its dequantized value."""
    w_IO = array_of(weight)
    scale_O = weight_scales(w_IO, pair_limit)
    dequantize, value = new_node(
        "DequantizeLinear",
        [
            constant(graph, f"{weight.name}.int8", quantized(w_IO, scale_O)),
            constant(graph, f"{weight.name}.scale", scale_O),
            constant(graph, f"zero_point.{len(scale_O)}", np.zeros(len(scale_O), np.int8)),
        ],
        {"axis": 1},
        name=f"{weight.name}/DequantizeLinear",
        dtype=ir.DataType.FLOAT,
        shape=weight.shape,
    )
    graph.insert_before(node, dequantize)
    return value


# --- Projections to queries, keys and values in one product, arranged as each compiler wants them

_PERM = (0, 2, 1, 3)
"""[N, L, heads, d] to [N, heads, L, d]."""

_PACKED_PERM = (2, 0, 3, 1, 4)
"""[N, L, parts, heads, d] to [parts, N, heads, L, d]."""


class TransposePacked(ir.passes.InPlacePass):
    """Turn Split, then Reshape and Transpose of each part, into Reshape, Transpose, Split.

    The same numbers with one transposition, which puts the parts first: a Split of the first axis
    need not copy anything. OpenVINO cannot see a per-channel scale through a Split of channels:
    there it dequantizes every part of an int8 product on its own.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rearrange in place."""
        modified = False
        for split in [node for node in model.graph if node.op_type == "Split"]:
            if (chains := _chains(split)) is not None:
                _rearrange(model.graph, split, chains)
                modified = True
        return ir.passes.PassResult(model, modified)


class UnpackProjections(ir.passes.InPlacePass):
    """Replace MatMul, Add, Split by one MatMul and Add for each part of the Split.

    TensorRT pushes a Split into the weights and then misses the int8 pattern: the GEMM runs in
    float16. Separate MatMuls on one quantized tensor it merges again, in int8. The parts of
    ``attention.qkv`` are called ``attention.q``, ``attention.k`` and ``attention.v``.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Replace in place."""
        graph = model.graph
        modified = False
        for split in [node for node in graph if node.op_type == "Split"]:
            packed = split.inputs[0]
            add = None if packed is None else packed.producer()
            matmul = None if add is None else next(iter(add.predecessors()), None)
            if add is None or matmul is None or not _is_linear(matmul, add):
                continue
            x, weight = matmul.inputs
            bias = add.inputs[1]
            if x is None or weight is None or bias is None:
                continue
            module, _, parts = str(weight.name).removesuffix(".weight").rpartition(".")
            weights = np.split(array_of(weight), len(split.outputs), axis=1)
            biases = np.split(array_of(bias), len(split.outputs))
            for part, weight_IO, bias_O, output in zip(
                parts, weights, biases, split.outputs, strict=True
            ):
                value, path = x, f"{module}.{part}"
                for operator, name, array in (
                    ("MatMul", f"{path}.weight", weight_IO),
                    ("Add", f"{path}.bias", bias_O),
                ):
                    node, value = new_node(
                        operator,
                        [value, constant(graph, name, np.ascontiguousarray(array))],
                        name=f"{path}/{operator}",
                        dtype=output.dtype,
                        shape=output.shape,
                    )
                    graph.insert_before(split, node)
                output.replace_all_uses_with(value)
            graph.remove([split, add, matmul], safe=True)
            modified = True
        return ir.passes.PassResult(model, modified)


def unpacked(linear: str) -> list[str]:
    """Return the names of the MatMul nodes that one becomes, three of ``attention.qkv/MatMul``."""
    module, _, parts = linear.removesuffix("/MatMul").rpartition(".")
    return [f"{module}.{part}/MatMul" for part in parts] if parts in ("qkv", "kv") else [linear]


def _chains(split: ir.Node) -> list[tuple[ir.Node, ir.Node]] | None:
    """Return Reshape and Transpose of each part, if all parts become [N, heads, L, d] alike."""
    chains = []
    for part in split.outputs:
        reshape = _only_reader(part, "Reshape")
        transpose = reshape and _only_reader(reshape.outputs[0], "Transpose")
        if reshape is None or transpose is None:
            return None
        chains.append((reshape, transpose))
    heads = {_heads(reshape.outputs[0]) for reshape, _ in chains}
    orders = {tuple(transpose.attributes["perm"].as_ints()) for _, transpose in chains}
    return chains if len(heads) == 1 and None not in heads and orders == {_PERM} else None


def _only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    readers = [use.node for use in value.uses()]
    return readers[0] if [node.op_type for node in readers] == [op_type] else None


def _heads(value: ir.Value) -> tuple[int, int] | None:
    """Return the last two sizes of [N, L, heads, d]."""
    if value.shape is None or len(value.shape) != 4:
        return None
    heads, width = value.shape[2], value.shape[3]
    return (heads, width) if isinstance(heads, int) and isinstance(width, int) else None


def _rearrange(graph: ir.Graph, split: ir.Node, chains: list[tuple[ir.Node, ir.Node]]) -> None:
    old_reshape, old_transpose = chains[0]
    heads, width = _heads(old_reshape.outputs[0]) or (0, 0)
    module = str(split.name).removesuffix("/Split")
    sizes = np.array([0, 0, len(chains), heads, width], np.int64)  # 0 keeps N and L.
    reshape = ir.node("Reshape", [split.inputs[0], constant(graph, f"{module}.heads", sizes)])
    transpose = ir.node("Transpose", [reshape.outputs[0]], {"perm": list(_PACKED_PERM)})
    parts = ir.node(
        "Split",
        [transpose.outputs[0]],
        {"axis": 0, "num_outputs": len(chains)},
        num_outputs=len(chains),
    )
    for node, old in ((reshape, old_reshape), (transpose, old_transpose), (parts, split)):
        node.name = old.name
        for value, replaced in zip(node.outputs, old.outputs, strict=True):
            value.name, value.type = replaced.name, replaced.type
    graph.insert_before(split, [reshape, transpose, parts])
    first_axis = constant(graph, "first_axis", np.zeros(1, np.int64))
    for number, ((_, transposed), part) in enumerate(zip(chains, parts.outputs, strict=True)):
        replaced = transposed.outputs[0]
        squeeze, value = new_node(
            "Squeeze",
            [part, first_axis],
            name=f"{module}/Squeeze_{number}",
            dtype=replaced.dtype,
            shape=replaced.shape,
        )
        graph.insert_before(split, squeeze)
        replaced.replace_all_uses_with(value)
    graph.remove([node for chain in chains for node in chain] + [split], safe=True)


def _is_linear(matmul: ir.Node, add: ir.Node) -> bool:
    constants = (matmul.inputs[-1], add.inputs[-1])
    return (
        (matmul.op_type, add.op_type) == ("MatMul", "Add")
        and all(value is not None and value.is_initializer() for value in constants)
        and len(add.outputs[0].uses()) == len(matmul.outputs[0].uses()) == 1
    )
