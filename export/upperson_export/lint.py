"""What TensorRT rejects or gets wrong in a graph, found without TensorRT.

The rules hold for TensorRT 10.3 (JetPack 6) to 11: strongly typed networks, symmetric int8 by
explicit Q/DQ. Each was met in the parser's own messages or in its support matrix.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSETS = range(17, 21)
"""LayerNormalization is one op since 17; the parser of TensorRT 10.3 reads up to 20."""

MAX_TOPK = 3840

_NOT_SUPPORTED = frozenset({
    "BitShift", "Compress", "ConcatFromSequence", "ConvInteger", "Det", "DynamicQuantizeLinear",
    "MatMulInteger", "MaxRoiPool", "MaxUnpool", "Multinomial", "NegativeLogLikelihoodLoss",
    "QLinearConv", "QLinearMatMul", "RandomNormal", "RandomNormalLike", "SequenceAt",
    "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength",
    "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringNormalizer", "TfIdfVectorizer", "Unique",
})  # fmt: skip

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_MIXED_BY_DESIGN = ("QuantizeLinear", "DequantizeLinear", "Cast", "CastLike", "Resize", "Where")
_HALF = np.finfo(np.float16)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that TensorRT would reject or compute wrongly."""

    rule: str
    """Short name of the rule, such as ``zero-point``."""

    node: str
    """Name of the node or constant; of its output if a node has none."""

    message: str
    """What was expected and found."""


@dataclass(frozen=True)
class _Graph:
    """A graph with what the rules look up."""

    model: onnx.ModelProto
    constants: dict[str, TensorProto] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)

    @staticmethod
    def of(model: onnx.ModelProto) -> "_Graph":
        constants = {item.name: item for item in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                constants[node.output[0]] = node.attribute[0].t
        types = {name: item.data_type for name, item in constants.items()}
        for value in (*model.graph.input, *_inferred(model)):
            types[value.name] = value.type.tensor_type.elem_type
        return _Graph(model, constants, types)

    def nodes(self, *ops: str) -> Iterator[onnx.NodeProto]:
        return (node for node in self.model.graph.node if not ops or node.op_type in ops)

    def array(self, node: onnx.NodeProto, index: int) -> npt.NDArray[Any] | None:
        """Return a constant input, or None if it is absent or computed."""
        name = node.input[index] if index < len(node.input) else ""
        return numpy_helper.to_array(self.constants[name]) if name in self.constants else None


def lint(model: onnx.ModelProto) -> list[Finding]:
    """Return what TensorRT 10.3 to 11 would reject, in the order of the rules; empty is good."""
    graph = _Graph.of(model)
    return [finding for rule in _RULES for finding in rule(graph)]


def _inferred(model: onnx.ModelProto) -> Iterator[onnx.ValueInfoProto]:
    """Types of all values, inferred on a copy without the large weights."""
    light = onnx.ModelProto()
    light.CopyFrom(_without_weights(model))
    graph = onnx.shape_inference.infer_shapes(light).graph
    yield from graph.value_info
    yield from graph.output


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = model.graph
    small = [item for item in graph.initializer if len(item.dims) < 2]
    inputs = [
        helper.make_tensor_value_info(item.name, item.data_type, item.dims)
        for item in graph.initializer
        if len(item.dims) >= 2
    ]
    light = helper.make_graph(graph.node, graph.name, [*graph.input, *inputs], graph.output, small)
    return helper.make_model(
        light, opset_imports=model.opset_import, functions=model.functions, ir_version=10
    )


def _opset(graph: _Graph) -> Iterator[Finding]:
    for opset in graph.model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version not in OPSETS:
            yield Finding(
                "opset",
                "model",
                f"opset {OPSETS[0]} to {OPSETS[-1]} expected, found {opset.version}",
            )


def _operators(graph: _Graph) -> Iterator[Finding]:
    functions = {function.name for function in graph.model.functions}
    for name in sorted(functions):
        yield Finding("function", name, "a plain graph expected, found an ONNX function")
    for node in graph.nodes():
        if node.domain not in ("", "ai.onnx") and node.op_type not in functions:
            yield Finding(
                "operator", _name(node), f"{node.domain}::{node.op_type} would need a plugin"
            )
        elif node.op_type in _NOT_SUPPORTED:
            yield Finding("operator", _name(node), f"the parser does not know {node.op_type}")


def _subgraphs(graph: _Graph) -> Iterator[Finding]:
    for node in graph.nodes():
        bodies = [
            attribute.name
            for attribute in node.attribute
            if attribute.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
        ]
        if bodies:
            message = f"a plain graph expected, found {node.op_type} with {', '.join(bodies)}"
            yield Finding("subgraph", _name(node), f"{message}, which no other rule looks into")


def _zero_points(graph: _Graph) -> Iterator[Finding]:
    for node in graph.nodes("QuantizeLinear", "DequantizeLinear"):
        zero = graph.array(node, 2)
        if zero is not None and np.any(zero):
            yield Finding("zero-point", _name(node), f"0 expected, found {zero.ravel()[:4]}")
        elif len(node.input) > 2 and node.input[2] and zero is None:
            yield Finding("zero-point", _name(node), "a constant 0 expected, found a computed one")


def _quantized_types(graph: _Graph) -> Iterator[Finding]:
    for node in graph.nodes("QuantizeLinear", "DequantizeLinear"):
        name = node.output[0] if node.op_type == "QuantizeLinear" else node.input[0]
        found = graph.types.get(name, TensorProto.UNDEFINED)
        if found == TensorProto.INT32:
            message = "an int32 bias cannot be dequantized: keep biases in floating point"
            yield Finding("int32-bias", _name(node), message)
        elif found != TensorProto.INT8:
            message = f"int8 expected, found {_type_name(found)}"
            yield Finding("quantized-type", _name(node), message)


def _scales(graph: _Graph) -> Iterator[Finding]:
    for node in graph.nodes("QuantizeLinear", "DequantizeLinear"):
        scale = graph.array(node, 1)
        if scale is None:
            yield Finding("scale", _name(node), "a constant expected, found a computed scale")
        elif not np.all(np.isfinite(scale) & (scale > 0)):
            yield Finding("scale", _name(node), "numbers above 0 expected")
        elif scale.size > 1 and node.input[0] not in graph.constants:
            message = f"one scale for an activation expected, found {scale.size}"
            yield Finding("scale", _name(node), message)


def _mixed_types(graph: _Graph) -> Iterator[Finding]:
    for node in graph.nodes():
        if node.op_type in _MIXED_BY_DESIGN:
            continue
        found = {graph.types.get(name) for name in node.input if name} & set(_FLOATS)
        if len(found) > 1:
            names = " and ".join(sorted(_type_name(item) for item in found if item is not None))
            yield Finding("mixed-types", _name(node), f"one floating point type expected: {names}")


def _double(graph: _Graph) -> Iterator[Finding]:
    for node in graph.nodes():
        if any(graph.types.get(name) == TensorProto.DOUBLE for name in node.output):
            yield Finding("double", _name(node), "float32 or float16 expected, found float64")


def _uint8(graph: _Graph) -> Iterator[Finding]:
    for node in graph.nodes():
        uses = [name for name in node.input if graph.types.get(name) == TensorProto.UINT8]
        if uses and node.op_type not in ("Cast", "QuantizeLinear", "DequantizeLinear"):
            message = f"uint8 '{uses[0]}' may feed nothing but a Cast, found {node.op_type}"
            yield Finding("uint8", _name(node), message)


def _resize(graph: _Graph) -> Iterator[Finding]:
    for node in graph.nodes("Resize"):
        if _attribute(node, "antialias", 0):
            message = "antialias=0 expected: resize before the graph"
            yield Finding("antialias", _name(node), message)


def _topk(graph: _Graph) -> Iterator[Finding]:
    for node in graph.nodes("TopK"):
        k = graph.array(node, 1)
        if k is None or int(k.max()) > MAX_TOPK:
            yield Finding("topk", _name(node), f"a constant k up to {MAX_TOPK} expected")


def _constants(graph: _Graph) -> Iterator[Finding]:
    cast_down = {
        node.input[0]
        for node in graph.nodes("Cast")
        if _attribute(node, "to", 0) == TensorProto.FLOAT16
    }
    for name, item in graph.constants.items():
        if item.data_type not in (TensorProto.FLOAT, TensorProto.FLOAT16):
            continue
        array = numpy_helper.to_array(item)
        if not np.isfinite(array).all():
            message = "finite numbers expected; a mask is -1e4 instead of -inf"
            yield Finding("not-finite", name, message)
        elif name in cast_down and np.abs(array).max(initial=0) > _HALF.max:
            message = f"a Cast to float16 turns {np.abs(array).max():.3g} into infinity"
            yield Finding("half-range", name, message)
        elif item.data_type == TensorProto.FLOAT16 and np.abs(array).max(initial=0) == _HALF.max:
            message = f"it was clipped to {_HALF.max:.0f}: keep it in float32"
            yield Finding("half-range", name, message)


def _norms(graph: _Graph) -> Iterator[Finding]:
    for node in graph.nodes("LayerNormalization"):
        if graph.types.get(node.input[0]) == TensorProto.FLOAT16:
            message = "float32 input expected: TensorRT 11 would square in float16"
            yield Finding("half-norm", _name(node), message)


def _name(node: onnx.NodeProto) -> str:
    return node.name or node.output[0]


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    values: Mapping[str, int] = {
        attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute
    }
    return values.get(name, default)


def _type_name(elem_type: int) -> str:
    return str(TensorProto.DataType.Name(elem_type)).lower()


_RULES: tuple[Callable[[_Graph], Iterator[Finding]], ...] = (
    _opset, _operators, _subgraphs, _zero_points, _quantized_types, _scales, _mixed_types, _double,
    _uint8, _resize, _topk, _constants, _norms,
)  # fmt: skip
