"""Each rule of the linter on the smallest graph that breaks it."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

from upperson_export.lint import Finding, lint
from upperson_rt.machine import EXACT, INT8_SUMS


def findings_of(proto: onnx.ModelProto) -> list[Finding]:
    return lint(ir.from_proto(proto))


INT8_ZERO = "int8 z = {0}"


def model(body: str, opset: int = 19, more: str = "", x: str = "float[N, 4] x") -> onnx.ModelProto:
    return parser.parse_model(
        f'<ir_version: 9, opset_import: ["" : {opset}]>'
        f"g ({x}) => (y) {'<' + more + '>' if more else ''} {{ {body} }}"
    )


def exact(proto: onnx.ModelProto) -> onnx.ModelProto:
    helper.set_model_props(proto, {INT8_SUMS: EXACT})
    return proto


BROKEN = {
    "zero point": (
        model("y = QuantizeLinear(x, s, z)", more="float s = {1.0}, int8 z = {3}"),
        "zero-point",
    ),
    "uint8 quantization": (
        model("y = QuantizeLinear(x, s, z)", more="float s = {1.0}, uint8 z = {0}"),
        "quantized-type",
    ),
    "int32 bias": (
        model(
            "b = DequantizeLinear(w, s)\n y = Add(x, b)",
            more="int32[4] w = {1, 2, 3, 4}, float s = {1}",
        ),
        "int32-bias",
    ),
    "negative scale": (
        model("y = QuantizeLinear(x, s, z)", more=f"float s = {{-1.0}}, {INT8_ZERO}"),
        "scale",
    ),
    "scale per channel of an activation": (
        model(
            "y = QuantizeLinear<axis = 1>(x, s, z)",
            more="float[4] s = {1,1,1,1}, int8[4] z = {0,0,0,0}",
        ),
        "scale",
    ),
    "computed scale": (
        model("s = ReduceMax<keepdims = 0>(x)\n y = QuantizeLinear(x, s, z)", more=INT8_ZERO),
        "scale",
    ),
    "mixed types": (
        model("h = Cast<to = 10>(x)\n y = Add(x, h)"),
        "mixed-types",
    ),
    "float64": (model("d = Cast<to = 11>(x)\n e = Exp(d)\n y = Cast<to = 1>(e)"), "double"),
    "pairs that saturate": (
        exact(
            model(
                "d = DequantizeLinear<axis = 1>(w, s, z)\n y = MatMul(x, d)",
                more="int8[4, 1] w = {1, 2, 100, -29}, float[1] s = {1.0}, int8[1] z = {0}",
            )
        ),
        "pairs",
    ),
    "opset too new": (model("y = Relu(x)", opset=23), "opset"),
    "opset too old": (model("y = Relu(x)", opset=13), "opset"),
    "uint8 without a cast": (
        model("t = Transpose(x)\n y = Cast<to = 1>(t)", x="uint8[N, 4] x"),
        "uint8",
    ),
    "shape of uint8": (
        model("s = Shape(x)\n y = Cast<to = 1>(s)", x="uint8[N, 4] x"),
        "uint8",
    ),
    "antialias": (
        model(
            'y = Resize<antialias = 1, mode = "linear">(x, , s)',
            x="float[1, 3, 4, 4] x",
            more="float[4] s = {1, 1, 0.5, 0.5}",
        ),
        "antialias",
    ),
    "large k": (model("y, i = TopK(x, k)", more="int64[1] k = {5000}"), "topk"),
    "dynamic quantization": (
        model("q, s, z = DynamicQuantizeLinear(x)\n y = DequantizeLinear(q, s, z)"),
        "operator",
    ),
    "norm in float16": (
        model(
            "y = LayerNormalization(x, w)",
            x="float16[N, 4] x",
            more="float16[4] w = {1, 1, 1, 1}",
        ),
        "half-norm",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_rule_finds_its_case(name: str) -> None:
    broken, rule = BROKEN[name]
    findings = findings_of(broken)
    assert rule in {finding.rule for finding in findings}
    assert all(finding.node and finding.message for finding in findings)


def constants(array: np.ndarray, cast: bool = False) -> onnx.ModelProto:
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    nodes = [helper.make_node("Cast", ["c"], ["half"], name="cast", to=10)] if cast else []
    nodes.append(helper.make_node("Add", ["x", "half" if cast else "c"], ["y"], name="add"))
    value = helper.make_tensor_value_info
    kind_of_x = 10 if cast else kind
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", kind_of_x, [2])],
        [value("y", kind_of_x, [2])],
        [numpy_helper.from_array(array, "c")],
    )
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
def test_constants_that_float16_cannot_hold(graph: onnx.ModelProto, rule: str) -> None:
    assert [finding.rule for finding in findings_of(graph)] == [rule]


def test_custom_operators_and_functions_are_found() -> None:
    graph = constants(np.ones(2, np.float32))
    graph.graph.node[0].domain = "com.microsoft"
    graph.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    function = helper.make_function(
        "own", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])],
        [helper.make_opsetid("", 19)],
    )  # fmt: skip
    graph.functions.append(function)
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


@pytest.mark.parametrize(
    ("body", "found"),
    [
        (LOOP, "found Loop with body"),
        (IF, "found If with then_branch, else_branch"),
        (SCAN, "found Scan with body"),
    ],
    ids=["loop", "if", "scan"],
)
def test_a_node_with_a_graph_inside_is_refused(body: str, found: str) -> None:
    graph = model(body, more="float s = {1.0}, uint8 z = {3}, float o = {0}")
    (finding,) = (finding for finding in findings_of(graph) if finding.rule == "subgraph")
    assert finding.node == graph.graph.node[-1].output[0]
    assert found in finding.message


def test_what_tensorrt_takes_is_not_complained_about() -> None:
    good = model(
        "f = Cast<to = 1>(x)\n q = QuantizeLinear(f, s, z)\n d = DequantizeLinear(q, s, z)\n"
        " w = DequantizeLinear<axis = 1>(w8, ws, wz)\n y = MatMul(d, w)",
        x="uint8[N, 2] x",
        more=f"float s = {{0.5}}, {INT8_ZERO}, int8[2, 2] w8 = {{1, 2, 3, 4}},"
        " float[2] ws = {1, 2}, int8[2] wz = {0, 0}",
    )
    assert findings_of(good) == []


def test_pairs_are_a_matter_of_what_the_file_says_of_itself() -> None:
    body = "d = DequantizeLinear<axis = 1>(w, s, z)\n y = MatMul(x, d)"
    more = "int8[4, 1] w = {{1, 127, 100, {}}}, float[1] s = {{1.0}}, int8[1] z = {{0}}"
    assert findings_of(model(body, more=more.format(-29))) == []  # It does not say it is exact.
    assert findings_of(exact(model(body, more=more.format(-28)))) == []  # Neighbours add to 128.


def test_types_are_inferred_whatever_a_file_says_of_them() -> None:
    mixed = model("h = Cast<to = 10>(x)\n y = Add(x, h)")
    mixed.graph.value_info.append(helper.make_tensor_value_info("h", TensorProto.FLOAT, ["N", 4]))
    assert [finding.rule for finding in findings_of(mixed)] == ["mixed-types"]
