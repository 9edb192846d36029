"""Heads of a packed projection, transposed together."""

import numpy as np
import onnx_ir as ir

_PERM = (0, 2, 1, 3)
"""[N, L, heads, d] to [N, heads, L, d]."""


class TransposePacked(ir.passes.InPlacePass):
    """Turn Split, then Reshape and Transpose of each part, into Reshape, Transpose, Split.

    The same numbers with one transposition. OpenVINO cannot see a per-channel scale through a
    Split of channels: there it dequantizes every part of an int8 product on its own.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rearrange in place."""
        modified = False
        for split in [node for node in model.graph if node.op_type == "Split"]:
            if (chains := _chains(split)) is not None:
                _rearrange(model.graph, split, chains)
                modified = True
        return ir.passes.PassResult(model, modified)


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
    sizes = np.array([0, 0, heads * len(chains), width], np.int64)  # 0 keeps N and L.
    name = f"{str(split.name).removesuffix('/Split')}.heads"
    shape = ir.val(name, const_value=ir.tensor(sizes, name=name))
    graph.register_initializer(shape)
    reshape = ir.node("Reshape", [split.inputs[0], shape])
    transpose = ir.node("Transpose", [reshape.outputs[0]], {"perm": list(_PERM)})
    attributes = {"axis": 1, "num_outputs": len(chains)}
    parts = ir.node("Split", [transpose.outputs[0]], attributes, num_outputs=len(chains))
    for node, old in ((reshape, old_reshape), (transpose, old_transpose), (parts, split)):
        node.name = old.name
        for value, replaced in zip(node.outputs, old.outputs, strict=True):
            value.name, value.type = replaced.name, replaced.type
    graph.insert_before(split, [reshape, transpose, parts])
    for (_, transposed), part in zip(chains, parts.outputs, strict=True):
        part.shape = transposed.outputs[0].shape
        transposed.outputs[0].replace_all_uses_with(part)
    graph.remove([node for chain in chains for node in chain] + [split], safe=True)
