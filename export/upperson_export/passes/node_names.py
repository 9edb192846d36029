"""Name nodes after the module they come from, so that graphs and logs can be read."""

import ast
from collections import Counter

import onnx

_SCOPES = "pkg.torch.onnx.name_scopes"


def name_nodes_by_module(model: onnx.ModelProto) -> None:
    """Rename every node to ``<module path>/<OpType>``, numbered where a module repeats an op.

    The exporter records the path of modules for each node; values keep their names.
    """
    uses: Counter[str] = Counter()
    for node in model.graph.node:
        name = f"{_module_path(node)}/{node.op_type}".lstrip("/")
        uses[name] += 1
        node.name = name if uses[name] == 1 else f"{name}_{uses[name]}"


def _module_path(node: onnx.NodeProto) -> str:
    for entry in node.metadata_props:
        if entry.key == _SCOPES:
            # A list literal of the enclosing modules, outermost first, then the traced value.
            scopes = ast.literal_eval(entry.value)
            path = str(scopes[-2]) if len(scopes) > 1 else ""
            return "" if path.startswith("_") else path  # the exporter's own helpers
    return ""
