"""Projections to queries, keys and values in one product, arranged as each compiler wants them."""

import numpy as np
import onnx_ir as ir

from upperson_calibration.graph import array_of, constant, new_node

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
