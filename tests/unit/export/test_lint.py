"""Each rule of the linter on the smallest graph that breaks it."""

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from upperson_export.lint import lint
from upperson_machine.int8 import EXACT, INT8_SUMS


def findings_of(proto):
    return lint(ir.from_proto(proto))


def model(body, opset=19, more="", x="float[N, 4] x"):
    return parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}]>'
        f"g ({x}) => (y) {'<' + more + '>' if more else ''} {{ {body} }}"
    )


def exact(proto):
    helper.set_model_props(proto, {INT8_SUMS: EXACT})
    return proto


QUANTIZE = "y = QuantizeLinear(x, s, z)"
WEIGHT = "d = DequantizeLinear<axis = 1>(w, s, z)\n y = MatMul(x, d)"
WEIGHTS = "int8[4, 1] w = {{{}}}, float[1] s = {{1.0}}, int8[1] z = {{0}}"
UINT8 = {"x": "uint8[N, 4] x"}
PIXELS = {"x": "float[1, 3, 4, 4] x", "more": "float[4] s = {1, 1, 0.5, 0.5}"}
GAIN = {"x": "float16[N, 4] x", "more": "float16[4] w = {1, 1, 1, 1}"}
PER_CHANNEL = "float[4] s = {1,1,1,1}, int8[4] z = {0,0,0,0}"

# fmt: off
BROKEN = {
    "zero point": (model(QUANTIZE, more="float s = {1.0}, int8 z = {3}"), "zero-point"),
    "uint8": (model(QUANTIZE, more="float s = {1.0}, uint8 z = {0}"), "quantized-type"),
    "int32 bias": (
        model("b = DequantizeLinear(w, s)\n y = Add(x, b)",
              more="int32[4] w = {1, 2, 3, 4}, float s = {1}"),
        "int32-bias",
    ),
    "negative scale": (model(QUANTIZE, more="float s = {-1.0}, int8 z = {0}"), "scale"),
    "scale per channel of an activation": (
        model("y = QuantizeLinear<axis = 1>(x, s, z)", more=PER_CHANNEL), "scale",
    ),
    "computed scale": (
        model(f"s = ReduceMax<keepdims = 0>(x)\n {QUANTIZE}", more="int8 z = {0}"), "scale",
    ),
    "mixed types": (model("h = Cast<to = 10>(x)\n y = Add(x, h)"), "mixed-types"),
    "float64": (model("d = Cast<to = 11>(x)\n e = Exp(d)\n y = Cast<to = 1>(e)"), "double"),
    "pairs that saturate": (exact(model(WEIGHT, more=WEIGHTS.format("1, 2, 100, -29"))), "pairs"),
    "opset too new": (model("y = Relu(x)", opset=23), "opset"),
    "opset too old": (model("y = Relu(x)", opset=13), "opset"),
    "uint8 without a cast": (model("t = Transpose(x)\n y = Cast<to = 1>(t)", **UINT8), "uint8"),
    "shape of uint8": (model("s = Shape(x)\n y = Cast<to = 1>(s)", **UINT8), "uint8"),
    "antialias": (
        model('y = Resize<antialias = 1, mode = "linear">(x, , s)', **PIXELS), "antialias",
    ),
    "large k": (model("y, i = TopK(x, k)", more="int64[1] k = {5000}"), "topk"),
    "dynamic quantization": (
        model("q, s, z = DynamicQuantizeLinear(x)\n y = DequantizeLinear(q, s, z)"), "operator",
    ),
    "norm in float16": (model("y = LayerNormalization(x, w)", **GAIN), "half-norm"),
}
# fmt: on


@pytest.mark.parametrize("name", BROKEN)
def test_each_rule_finds_its_case(name):
    broken, rule = BROKEN[name]
    findings = findings_of(broken)
    assert rule in {finding.rule for finding in findings}
    assert all(finding.node and finding.message for finding in findings)


def constants(array, cast=False):
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    nodes = [helper.make_node("Cast", ["c"], ["half"], name="cast", to=10)] if cast else []
    nodes.append(helper.make_node("Add", ["x", "half" if cast else "c"], ["y"], name="add"))
    ends = [helper.make_tensor_value_info(name, 10 if cast else kind, [2]) for name in "xy"]
    initializers = [numpy_helper.from_array(array, "c")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])


@pytest.mark.parametrize(
    ("graph", "rule"),
    [
        (constants(np.array([0, -np.inf], np.float32)), "not-finite"),
        (constants(np.array([0, np.nan], np.float16)), "not-finite"),
        (constants(np.array([1e5, 1], np.float32), cast=True), "half-range"),
        (constants(np.array([65504, 1], np.float16)), "half-range"),
    ],
    ids=["infinite mask", "nan", "cast to half", "clipped"],
)
def test_constants_that_float16_cannot_hold(graph, rule):
    assert [finding.rule for finding in findings_of(graph)] == [rule]


def test_custom_operators_and_functions_are_found():
    graph = constants(np.ones(2, np.float32))
    graph.graph.node[0].domain = "com.microsoft"
    graph.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    add = helper.make_node("Add", ["a", "a"], ["b"])
    opsets = [helper.make_opsetid("", 19)]
    graph.functions.append(helper.make_function("own", "Twice", ["a"], ["b"], [add], opsets))
    assert {finding.rule for finding in findings_of(graph)} == {"operator", "function"}


LOOP = """
    n = Constant<value = int64 {2}>()
    go = Constant<value = bool {1}>()
    y = Loop<body = b (int64 i, bool c, float[N, 4] a) => (bool d, float[N, 4] e) {
        d = Identity(c)
        q = QuantizeLinear(a, s, z)
        e = DequantizeLinear(q, s, z)
    }>(n, go, x)
"""
IF = """
    m = ReduceMax<keepdims = 0>(x)
    c = Cast<to = 9>(m)
    y = If<
        then_branch = t () => (float[N, 4] a) { a = Relu(x) },
        else_branch = f () => (float[N, 4] b) { b = Neg(x) }
    >(c)
"""
SCAN = """
    f, y = Scan<num_scan_inputs = 1, body = b (float a, float[4] r) => (float h, float[4] e) {
        h = Identity(a)
        e = Relu(r)
    }>(o, x)
"""


@pytest.mark.parametrize("body", [LOOP, IF, SCAN], ids=["loop", "if", "scan"])
def test_a_node_with_a_graph_inside_is_refused(body):
    graph = model(body, more="float s = {1.0}, uint8 z = {3}, float o = {0}")
    (finding,) = (finding for finding in findings_of(graph) if finding.rule == "subgraph")
    assert finding.node == graph.graph.node[-1].output[0]


def test_a_graph_for_tensorrt_has_no_findings():
    good = model(
        "f = Cast<to = 1>(x)\n q = QuantizeLinear(f, s, z)\n d = DequantizeLinear(q, s, z)\n"
        " w = DequantizeLinear<axis = 1>(w8, ws, wz)\n y = MatMul(d, w)",
        x="uint8[N, 2] x",
        more="float s = {0.5}, int8 z = {0}, int8[2, 2] w8 = {1, 2, 3, 4},"
        " float[2] ws = {1, 2}, int8[2] wz = {0, 0}",
    )
    assert findings_of(good) == []
    # Pairs matter only in a file that is marked as exact, and are those of neighbours.
    assert findings_of(model(WEIGHT, more=WEIGHTS.format("1, 127, 100, -29"))) == []
    assert findings_of(exact(model(WEIGHT, more=WEIGHTS.format("1, 127, 100, -28")))) == []


def test_types_are_inferred_whatever_a_file_says_of_them():
    mixed = model("h = Cast<to = 10>(x)\n y = Add(x, h)")
    mixed.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["N", 4]))
    assert [finding.rule for finding in findings_of(mixed)] == ["mixed-types"]
