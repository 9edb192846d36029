"""INT8 by explicit Q/DQ pairs around Linears."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from upperson_calibration.graph import array_of, constant, new_node
from upperson_calibration.ranges import LEVELS
from upperson_rt.backends.saturation import EXACT, INT8_SUMS, largest_pair
from upperson_rt.errors import InputError

_ROW_SELECTION = ("Slice", "Gather", "GatherElements")


class QuantizeLinears(ir.passes.InPlacePass):
    """Put Q/DQ on both inputs of some MatMul nodes and nowhere else.

    Symmetric int8, zero point 0; weights are stored as int8 with a scale per output channel;
    activations have one scale a tensor, and queries share that of keys and values where they read
    a row of the same tensor. Scales are float16 numbers whatever the graph's type, so a float32
    and a float16 graph round activations to the same integers. Every MatMul has DequantizeLinear
    nodes of its own, which is the pattern that ONNX Runtime, OpenVINO and TensorRT fuse.

    Args:
        linears: Names of MatMul nodes with a constant second input [in, out].
        amax: Largest absolute value of the tensor that enters them, by tensor name.
        pair_limit: The most that two neighbouring int8 weights [2i, out] and [2i + 1, out] may add
            up to, in absolute values; a channel that exceeds it gets a larger scale, and the file
            says of itself that its sums are exact on every CPU. None for devices that add up in 32
            bits.
    """

    def __init__(
        self,
        linears: Collection[str],
        amax: Mapping[str, float],
        pair_limit: int | None = None,
    ) -> None:
        self.linears = frozenset(linears)
        self.amax = amax
        self.pair_limit = pair_limit

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Insert the pairs in place.

        Raises:
            InputError: A range is missing or is no usable number.
        """
        graph = model.graph
        quantized: dict[ir.Value, ir.Value] = {}
        for node in [node for node in graph if node.name in self.linears]:
            x, weight = node.inputs
            assert x is not None
            assert weight is not None
            source = _whole_tensor(x)
            scale = _half_at_least(np.asarray(self._amax_of(source) / LEVELS))
            parameters = [
                constant(graph, f"{source.name}.scale", scale),
                constant(graph, "zero_point", np.zeros((), np.int8)),
            ]
            if x not in quantized:
                quantize, quantized[x] = new_node(
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
                [quantized[x], *parameters],
                name=f"{module}/DequantizeLinear",
                dtype=ir.DataType.FLOAT,
                shape=x.shape,
            )
            graph.insert_before(node, dequantize)
            node.replace_input_with(0, value)
            node.replace_input_with(1, _quantized_weight(graph, node, weight, self.pair_limit))
        if self.pair_limit is not None:
            model.metadata_props[INT8_SUMS] = EXACT
        return ir.passes.PassResult(model, modified=bool(quantized))

    def _amax_of(self, value: ir.Value) -> float:
        amax = self.amax.get(str(value.name))
        if amax is None:
            raise InputError(
                f"the calibration has no range of the tensor '{value.name}': it belongs to another "
                "model or another version of the export, calibrate again"
            )
        if not 0 <= amax <= LEVELS * float(np.finfo(np.float16).max):
            raise InputError(
                f"the calibrated range of '{value.name}' is {amax}: expected a number from 0 to "
                "8e6; look at the calibration data"
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
    scale_O = _weight_scales(w_IO, pair_limit)
    int8_IO = np.rint(w_IO / scale_O).astype(np.int8)
    dequantize, value = new_node(
        "DequantizeLinear",
        [
            constant(graph, f"{weight.name}.int8", int8_IO),
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


def _weight_scales(
    w_IO: npt.NDArray[np.float32], pair_limit: int | None
) -> npt.NDArray[np.float32]:
    """Return the smallest scale [out] of each channel whose int8 weights stay in their limits."""
    step_O = np.abs(w_IO).max(axis=0) / LEVELS
    if pair_limit is None:
        return _half_at_least(step_O)
    scale_O = _half_at_least(np.maximum(step_O, largest_pair(w_IO) / pair_limit))
    # Rounding may lift a pair over the limit: a few steps of float16 more, and it no longer does.
    while (over_O := largest_pair(np.rint(w_IO / scale_O)) > pair_limit).any():
        scale_O[over_O] = np.nextafter(scale_O[over_O].astype(np.float16), np.float16(np.inf))
    return scale_O


def _half_at_least(scale: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Round up to float16 numbers above 0, returned as float32: rounded down, values would clip."""
    half = np.maximum(scale, np.finfo(np.float16).smallest_subnormal).astype(np.float16)
    above = np.nextafter(half, np.float16(np.inf))
    rounded: npt.NDArray[np.float32] = np.where(half < scale, above, half).astype(np.float32)
    return rounded
