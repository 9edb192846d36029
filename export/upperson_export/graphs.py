"""A tower's graphs: the float32 one that torch exports, and each variant made from it.

Tensor names, dynamic axes and node names are the product's interface: see ``docs/interface.md``.
"""

import logging
import tempfile
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import nn
from torch.export import Dim

from upperson_calibration.block_linears import block_linears
from upperson_export.passes.node_names import NameByModule
from upperson_export.passes.shape_after_cast import ShapeAfterCast
from upperson_export.passes.simulate_half import SimulateHalf
from upperson_export.variants import VARIANTS, Tensors, VariantName
from upperson_rt.backends import open_backend
from upperson_rt.errors import InputError
from upperson_rt.towers import GRAPH_NAMES, Backend, Tower

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


def build_variant(
    fp32: onnx.ModelProto,
    kind: Tower,
    variant: VariantName,
    amax: Mapping[str, float] | None = None,
    keep_float: Collection[str] = (),
    *,
    largest: Mapping[str, float] | None = None,
) -> onnx.ModelProto:
    """Make one variant of a tower from the float32 graph, which is not changed.

    Args:
        fp32: The graph of `export_onnx`.
        kind: Which tower it is.
        variant: What to make.
        amax: For int8: calibrated range by the name of the tensor that enters a block Linear.
        keep_float: Names of block Linears' MatMul nodes that int8 leaves alone.
        largest: For float16: largest absolute value seen of any float tensor, by name. Where it
            comes near the range of float16, the nodes around compute in float32.

    Raises:
        InputError: The graph is of another tower, a range is missing or not usable, or
            ``keep_float`` names no block Linear.
    """
    names = (fp32.graph.input[0].name, fp32.graph.output[0].name)
    if names != GRAPH_NAMES[kind]:
        raise InputError(
            f"expected the {kind} tower with input and output {GRAPH_NAMES[kind]}, found {names}"
        )
    if VARIANTS[variant].int8 and amax is None:
        raise InputError(f"the variant '{variant}' needs calibrated ranges: calibrate first")
    linears = [linear.node for linear in block_linears(fp32)]
    if unknown := sorted(set(keep_float) - set(linears)):
        raise InputError(
            f"no block Linear is named {', '.join(unknown)}: the graph has {', '.join(linears)}"
        )
    given = Tensors(
        linears=[name for name in linears if name not in keep_float],
        amax=amax or {},
        largest=largest,
    )
    return _changed(fp32, *VARIANTS[variant].passes(given), common.RemoveUnusedNodesPass())


def simulated(typed: onnx.ModelProto) -> onnx.ModelProto:
    """Return a typed graph as one that a CPU computes with float16's range and rounding."""
    return _changed(typed, SimulateHalf())


def open_simulated(path: Path, threads: int | None = None) -> Backend:
    """Open a typed graph in ONNX Runtime with float16's range and rounding."""
    with tempfile.TemporaryDirectory() as folder:
        half = Path(folder, path.name)
        onnx.save(simulated(onnx.load(path)), half)
        return open_backend(half, "onnxruntime", threads=threads)


def float_type_of(backend: Backend) -> str:
    """Return what it computes floats in, such as ``f32`` or ``bf16``; ONNX Runtime has only f32."""
    return str(getattr(backend, "float_type", "f32"))


def _changed(proto: onnx.ModelProto, *passes: ir.passes.InPlacePass) -> onnx.ModelProto:
    model = ir.from_proto(proto)
    for change in passes:
        change(model)
    changed = ir.to_proto(model)
    onnx.checker.check_model(changed)
    return changed
