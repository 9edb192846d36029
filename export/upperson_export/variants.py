"""The four precisions of a tower, each made from its float32 graph."""

from collections.abc import Collection, Mapping
from typing import Literal

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from upperson_calibration.block_linears import block_linears
from upperson_export.passes.quantize_linears import QuantizeLinears
from upperson_export.passes.simulate_half import SimulateHalf
from upperson_export.passes.to_half import ToHalf
from upperson_export.passes.transpose_packed import TransposePacked
from upperson_export.passes.unpack_projections import UnpackProjections, unpacked
from upperson_rt.errors import InputError
from upperson_rt.towers import GRAPH_NAMES, Tower

Variant = Literal["fp32", "fp16", "int8", "int8-fp16"]
"""fp32; fp16 typed, for GPUs; int8 on a float32 base, for CPUs; int8 on float16, for TensorRT."""


def build_variant(
    fp32: onnx.ModelProto,
    kind: Tower,
    variant: Variant,
    amax: Mapping[str, float] | None = None,
    keep_float: Collection[str] = (),
    *,
    largest: Mapping[str, float] | None = None,
) -> onnx.ModelProto:
    """Make one precision of a tower. The given graph is not changed.

    Args:
        fp32: The graph of :func:`upperson_export.onnx.export_onnx`.
        kind: Which tower it is.
        variant: What to make.
        amax: Ranges for the int8 variants: largest absolute value by the name of the tensor that
            enters a block Linear.
        keep_float: Names of block Linears' MatMul nodes that int8 leaves alone.
        largest: For the fp16 variants: largest absolute value seen of any float tensor, by name.
            Where it comes near the range of float16, the nodes around compute in float32.

    Raises:
        InputError: The graph is of another tower, a range is missing or not usable, or
            ``keep_float`` names no block Linear.
    """
    names = (fp32.graph.input[0].name, fp32.graph.output[0].name)
    if names != GRAPH_NAMES[kind]:
        raise InputError(
            f"expected the {kind} tower with input and output {GRAPH_NAMES[kind]}, found {names}"
        )
    model = ir.from_proto(fp32)
    linears = _quantized(fp32, keep_float)
    if variant == "int8-fp16":
        UnpackProjections()(model)
        linears = [part for name in linears for part in unpacked(name)]
    if variant in ("int8", "int8-fp16"):
        if amax is None:
            raise InputError(f"the variant '{variant}' needs calibrated ranges: calibrate first")
        QuantizeLinears(linears, amax)(model)
    if variant == "int8":
        TransposePacked()(model)
    if variant in ("fp16", "int8-fp16"):
        ToHalf(largest)(model)
    common.RemoveUnusedNodesPass()(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    return proto


def simulated(typed: onnx.ModelProto) -> onnx.ModelProto:
    """Return a typed graph as one that a CPU computes with float16's range and rounding."""
    model = ir.from_proto(typed)
    SimulateHalf()(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    return proto


def _quantized(fp32: onnx.ModelProto, keep_float: Collection[str]) -> list[str]:
    names = [linear.node for linear in block_linears(fp32)]
    unknown = sorted(set(keep_float) - set(names))
    if unknown:
        raise InputError(
            f"no block Linear is named {', '.join(unknown)}: the graph has {', '.join(names)}"
        )
    return [name for name in names if name not in keep_float]
