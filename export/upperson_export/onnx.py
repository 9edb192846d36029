"""Plain towers to ONNX files.

Tensor names, dynamic axes and node names are the product's interface: see ``docs/interface.md``.
"""

import logging
import warnings
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import nn
from torch.export import Dim

from upperson_export.passes.node_names import NameByModule
from upperson_export.passes.shape_after_cast import ShapeAfterCast
from upperson_rt.towers import GRAPH_NAMES, Tower

OPSET = 19
"""QuantizeLinear takes float16 since 19, which int8-fp16 needs; TensorRT 10.3 reads up to 20."""

IR_VERSION = 9
"""What opset 19 needs; ONNX Runtime 1.17 reads no later one."""

DYNAMIC_AXES: dict[Tower, dict[int, str]] = {
    "image": {0: "batch"},
    "text": {0: "batch", 1: "length"},
}
"""Axes of the input that may have any size, by name."""


def export_onnx(tower: nn.Module, kind: Tower, path: Path, *, example: torch.Tensor) -> None:
    """Trace a plain tower and write one self-contained ONNX file.

    Args:
        tower: A plain image or text tower in evaluation mode.
        kind: Which of the two it is.
        path: Where to write.
        example: An input of batch 2 or more; dynamic axes must not be 1 or the context length.
    """
    input_name, output_name = GRAPH_NAMES[kind]
    dims = {"batch": Dim("batch", min=1)}
    if kind == "text":
        dims["length"] = Dim("length", min=2, max=len(tower.get_parameter("positions")))
    with warnings.catch_warnings(), torch.no_grad():
        # The exporter warns about its own internals; a wrong graph is caught by parity instead.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            tower,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[input_name],
            output_names=[output_name],
            dynamic_shapes=({axis: dims[name] for axis, name in DYNAMIC_AXES[kind].items()},),
            optimize=True,
            verbose=False,
        )
    assert program is not None  # only None with the legacy exporter
    model = program.model
    ir.passes.Sequential(
        ShapeAfterCast(),
        NameByModule(),
        # Tracebacks of the exporting machine, among others.
        common.ClearMetadataAndDocStringPass(),
        common.RemoveUnusedNodesPass(),
    )(model)
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props.clear()
    model.ir_version = IR_VERSION
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    onnx.save(proto, path)
