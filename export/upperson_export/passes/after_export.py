"""Passes for every exported graph: readable names, and a Cast alone at a uint8 input."""

import ast
from collections import Counter

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"


class NameByModule(ir.passes.InPlacePass):
    """Name every node ``<module path>/<OpType>``, numbered if a module repeats an operator.

    An output gets its node's name, with ``.1`` and so on for further ones, so that tensor names in
    calibration files are readable and do not depend on the exporter's counters. Weights, inputs and
    outputs of the graph keep their names. A node without a recorded module path belongs to the
    module of its first reader.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rename in place."""
        uses: Counter[str] = Counter()
        for node in model.graph:
            name = f"{_module_path(node)}/{node.op_type}".lstrip("/")
            uses[name] += 1
            node.name = name if uses[name] == 1 else f"{name}_{uses[name]}"
            for index, value in enumerate(node.outputs):
                if not value.is_graph_output():
                    value.name = f"{node.name}.{index}" if index else node.name
        return ir.passes.PassResult(model, modified=True)


def _module_path(node: ir.Node) -> str:
    scopes = node.metadata_props.get(_SCOPES)
    if scopes is None:
        readers = node.successors()
        return _module_path(readers[0]) if readers else ""
    # A list literal of the enclosing modules, outermost first, then the traced value.
    modules = ast.literal_eval(scopes)[:-1]
    path = str(modules[-1]) if modules else ""
    return "" if path.startswith("_") else path  # the exporter's own helpers


class ShapeAfterCast(ir.passes.InPlacePass):
    """Let Shape nodes read the Cast of an 8-bit graph input instead of the input itself.

    TensorRT takes uint8 at the border of a network only: nothing but a Cast may read it.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewire in place."""
        modified = False
        for value in model.graph.inputs:
            casts = [node for node in value.consumers() if node.op_type == "Cast"]
            if value.dtype != ir.DataType.UINT8 or not casts:
                continue
            for node in [node for node in value.consumers() if node.op_type == "Shape"]:
                node.replace_input_with(0, casts[0].outputs[0])
                modified = True
        if modified:
            model.graph.sort()
        return ir.passes.PassResult(model, modified)
