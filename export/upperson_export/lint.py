"""Linter for graphs: what TensorRT rejects or computes wrongly, and what saturates on a CPU.

The rules hold for TensorRT 10.3 (JetPack 6) to 11: strongly typed networks, symmetric int8 by
explicit Q/DQ. Each comes from the parser's own messages or its support matrix.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir.passes import common

from upperson_export.variants import VARIANTS
from upperson_machine.int8 import EXACT, INT8_SUMS, PAIR_LIMIT, largest_pair

OPSETS = range(17, 21)
"""LayerNormalization is one op since 17; the parser of TensorRT 10.3 reads up to 20."""

MAX_TOPK = 3840

_QUANTIZED = [ir.DataType[row.quantized] for row in VARIANTS.values() if row.quantized]

_NOT_SUPPORTED = frozenset({
    "BitShift", "Compress", "ConcatFromSequence", "ConvInteger", "Det", "DynamicQuantizeLinear",
    "MatMulInteger", "MaxRoiPool", "MaxUnpool", "Multinomial", "NegativeLogLikelihoodLoss",
    "QLinearConv", "QLinearMatMul", "RandomNormal", "RandomNormalLike", "SequenceAt",
    "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength",
    "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringNormalizer", "TfIdfVectorizer", "Unique",
})  # fmt: skip

_FLOAT, _HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
_FLOATS = {_FLOAT, _HALF, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}
_QDQ = ("QuantizeLinear", "DequantizeLinear")
_MIXED_BY_DESIGN = (*_QDQ, "Cast", "CastLike", "Resize", "Where")
_HALF_MAX = float(np.finfo(np.float16).max)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that TensorRT would reject or compute wrongly."""

    rule: str
    node: str
    """Name of the node or constant; of its output if a node has none."""
    message: str


def lint(model: ir.Model) -> list[Finding]:
    """Return what TensorRT 10.3 to 11 would reject, in the order of the rules; empty is good."""
    typed = model.clone()
    for node in typed.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.type = value.shape = None  # Inferred, since a file may be wrong.
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=False)(typed)
    findings = [*_opset(typed), *_functions(typed)]
    for rule, operators in _NODE_RULES.items():
        nodes = [node for node in typed.graph if not operators or node.op_type in operators]
        findings += [Finding(name, _name(n), text) for n in nodes for name, text in rule(typed, n)]
    return [*findings, *_constants(typed)]


def _array(node: ir.Node, index: int) -> npt.NDArray[Any] | None:
    """Return a constant input, or None if it is absent or computed."""
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()


def _opset(model: ir.Model) -> Iterator[Finding]:
    for domain, version in model.opset_imports.items():
        if domain in ("", "ai.onnx") and version not in OPSETS:
            yield Finding(
                "opset", "model", f"opset {OPSETS[0]} to {OPSETS[-1]} expected, found {version}"
            )


def _constants(model: ir.Model) -> Iterator[Finding]:
    constants = [*model.graph.initializers.values()]
    constants += [node.outputs[0] for node in model.graph if node.op_type == "Constant"]
    for value in constants:
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is None or tensor.dtype not in (_FLOAT, _HALF):
            continue
        array = tensor.numpy()
        largest = np.abs(array).max(initial=0)
        if not np.isfinite(array).all():
            message = "finite numbers expected; a mask is -1e4 instead of -inf"
            yield Finding("not-finite", str(value.name), message)
        elif largest > _HALF_MAX and any(
            node.op_type == "Cast" and node.attributes.get_int("to") == _HALF
            for node in value.consumers()
        ):
            message = f"a Cast to float16 turns {largest:.3g} into infinity"
            yield Finding("half-range", str(value.name), message)
        elif tensor.dtype == _HALF and largest == _HALF_MAX:
            message = f"it was clipped to {_HALF_MAX:.0f}: keep it in float32"
            yield Finding("half-range", str(value.name), message)


def _name(node: ir.Node) -> str:
    return node.name or str(node.outputs[0].name)


def _type_name(dtype: ir.DataType | None) -> str:
    return "undefined" if dtype is None else dtype.name.lower()


def _functions(model: ir.Model) -> Iterator[Finding]:
    for name in sorted(function.name for function in model.functions.values()):
        yield Finding("function", name, "a plain graph expected, found an ONNX function")


# --- Rules for one node: they yield the name of the rule and what was expected and found

_Problems: TypeAlias = Iterator[tuple[str, str]]


def _operator(model: ir.Model, node: ir.Node) -> _Problems:
    functions = {function.name for function in model.functions.values()}
    if node.domain not in ("", "ai.onnx") and node.op_type not in functions:
        yield "operator", f"{node.domain}::{node.op_type} would need a plugin"
    elif node.op_type in _NOT_SUPPORTED:
        yield "operator", f"the parser does not know {node.op_type}"


def _subgraph(model: ir.Model, node: ir.Node) -> _Problems:
    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    if bodies := [one.name for one in node.attributes.values() if one.type in graphs]:
        found = f"a plain graph expected, found {node.op_type} with {', '.join(bodies)}"
        yield "subgraph", f"{found}, which no other rule looks into"


def _zero_point(model: ir.Model, node: ir.Node) -> _Problems:
    zero = _array(node, 2)
    if zero is not None and np.any(zero):
        yield "zero-point", f"0 expected, found {zero.ravel()[:4]}"
    elif len(node.inputs) > 2 and node.inputs[2] is not None and zero is None:
        yield "zero-point", "a constant 0 expected, found a computed one"


def _quantized_type(model: ir.Model, node: ir.Node) -> _Problems:
    value = node.outputs[0] if node.op_type == "QuantizeLinear" else node.inputs[0]
    found = None if value is None else value.dtype
    if found == ir.DataType.INT32:
        yield "int32-bias", "an int32 bias cannot be dequantized: keep biases in floating point"
    elif found not in _QUANTIZED:
        expected = " or ".join(dict.fromkeys(map(_type_name, _QUANTIZED)))
        yield "quantized-type", f"{expected} expected, found {_type_name(found)}"


def _scale(model: ir.Model, node: ir.Node) -> _Problems:
    scale = _array(node, 1)
    if scale is None:
        yield "scale", "a constant expected, found a computed scale"
    elif not np.all(np.isfinite(scale) & (scale > 0)):
        yield "scale", "numbers above 0 expected"
    elif scale.size > 1 and _array(node, 0) is None:
        yield "scale", f"one scale for an activation expected, found {scale.size}"


def _saturating_pair(model: ir.Model, node: ir.Node) -> _Problems:
    if model.metadata_props.get(INT8_SUMS) != EXACT:
        return
    weight = _array(node, 0)
    if weight is not None and (most := int(largest_pair(weight).max())) > PAIR_LIMIT:
        yield (
            "pairs",
            f"two neighbouring int8 weights add up to {most}, at most {PAIR_LIMIT} expected in a "
            "graph that says it is exact: a CPU without VNNI would saturate",
        )


def _mixed_types(model: ir.Model, node: ir.Node) -> _Problems:
    found = {value.dtype for value in node.inputs if value is not None and value.dtype in _FLOATS}
    if len(found) > 1 and node.op_type not in _MIXED_BY_DESIGN:
        names = " and ".join(sorted(map(_type_name, found)))
        yield "mixed-types", f"one floating point type expected: {names}"


def _double(model: ir.Model, node: ir.Node) -> _Problems:
    if any(value.dtype == ir.DataType.DOUBLE for value in node.outputs):
        yield "double", "float32 or float16 expected, found float64"


def _uint8(model: ir.Model, node: ir.Node) -> _Problems:
    uses = [value for value in node.inputs if value and value.dtype == ir.DataType.UINT8]
    if uses and node.op_type not in ("Cast", *_QDQ):
        yield "uint8", f"uint8 '{uses[0].name}' may feed nothing but a Cast, found {node.op_type}"


def _resize(model: ir.Model, node: ir.Node) -> _Problems:
    if node.attributes.get_int("antialias", 0):
        yield "antialias", "antialias=0 expected: resize before the graph"


def _topk(model: ir.Model, node: ir.Node) -> _Problems:
    k = _array(node, 1)
    if k is None or int(k.max()) > MAX_TOPK:
        yield "topk", f"a constant k up to {MAX_TOPK} expected"


def _norm(model: ir.Model, node: ir.Node) -> _Problems:
    if node.inputs[0] is not None and node.inputs[0].dtype == _HALF:
        yield "half-norm", "float32 input expected: TensorRT 11 would square in float16"


_NODE_RULES: Mapping[Callable[[ir.Model, ir.Node], _Problems], Sequence[str]] = {
    _operator: (),
    _subgraph: (),
    _zero_point: _QDQ,
    _quantized_type: _QDQ,
    _scale: _QDQ,
    _saturating_pair: ("DequantizeLinear",),
    _mixed_types: (),
    _double: (),
    _uint8: (),
    _resize: ("Resize",),
    _topk: ("TopK",),
    _norm: ("LayerNormalization",),
}
"""Each rule with the operators that it looks at; all if none is named."""
