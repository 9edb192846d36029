"""Passes that rename and rearrange, each on a graph of a few nodes."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper, parser

from tests.helpers.toy_graphs import run_graph
from upperson_export.passes.after_export import NameByModule, ShapeAfterCast
from upperson_export.passes.linears import TransposePacked, UnpackProjections, unpacked

HEADER = '<ir_version: 9, opset_import: ["" : 19]>'


def scoped(node, scopes):
    node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes


def test_nodes_and_values_are_named_after_their_module():
    proto = parser.parse_model(
        HEADER + "g (float[N, 4] x) => (float[N, 2] y) {"
        " t0 = Relu(x)\n t1 = Relu(t0)\n"
        " a, b = Split<axis = 1, num_outputs = 2>(t1)\n y = Add(a, b) }"
    )
    model = ir.from_proto(proto)
    for node, scopes in zip(
        model.graph,
        ["['', 'mlp', 'relu']", "['', 'mlp', 'relu_1']", None, "['', 'add']"],
        strict=True,
    ):
        if scopes:
            scoped(node, scopes)
    NameByModule()(model)
    named = {node.name: [value.name for value in node.outputs] for node in model.graph}
    assert named == {
        "mlp/Relu": ["mlp/Relu"],
        "mlp/Relu_2": ["mlp/Relu_2"],
        "Split": ["Split", "Split.1"],  # of its reader, which is in no module
        "Add": ["y"],
    }
    assert model.graph.inputs[0].name == "x"


def test_only_the_cast_reads_a_uint8_input():
    proto = parser.parse_model(
        HEADER + "g (uint8[N, 4] x) => (float[N, 4] y, int64[2] s) {"
        " s = Shape(x)\n y = Cast<to = 1>(x) }"
    )
    model = ir.from_proto(proto)
    assert ShapeAfterCast()(model).modified
    changed = ir.to_proto(model)
    onnx.checker.check_model(changed)
    assert [(node.op_type, list(node.input)) for node in changed.graph.node] == [
        ("Cast", ["x"]),
        ("Shape", ["y"]),
    ]
    assert not ShapeAfterCast()(model).modified


def packed_projection():
    rng = np.random.default_rng(0)
    proto = parser.parse_model(
        HEADER + "g (float[N, 3] x) => (float[N, 2] q, float[N, 2] k, float[N, 2] v) {"
        " p = MatMul(x, weight)\n s = Add(p, bias)\n"
        " q0, k0, v0 = Split<axis = 1, num_outputs = 3>(s)\n"
        " q = Relu(q0)\n k = Relu(k0)\n v = Relu(v0) }"
    )
    for node in proto.graph.node[:2]:  # The text format knows no dots in names.
        node.input[1] = f"attention.qkv.{node.input[1]}"
    weight = rng.standard_normal((3, 6)).astype(np.float32)
    bias = rng.standard_normal(6).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "attention.qkv.weight"))
    proto.graph.initializer.append(numpy_helper.from_array(bias, "attention.qkv.bias"))
    return proto


def test_a_packed_projection_becomes_three_that_compute_the_same():
    proto = packed_projection()
    model = ir.from_proto(proto)
    assert UnpackProjections()(model).modified
    changed = ir.to_proto(model)
    onnx.checker.check_model(changed)
    linears = [node for node in changed.graph.node if node.op_type == "MatMul"]
    assert [node.name for node in linears] == unpacked("attention.qkv/MatMul")
    assert [list(node.input) for node in linears] == [
        ["x", f"attention.{part}.weight"] for part in "qkv"
    ]
    assert not any(node.op_type == "Split" for node in changed.graph.node)
    x = np.random.default_rng(1).standard_normal((5, 3)).astype(np.float32)
    for found, expected in zip(run_graph(changed, x), run_graph(proto, x), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not UnpackProjections()(model).modified


@pytest.mark.parametrize(
    ("linear", "parts"),
    [
        ("blocks.0.attention.qkv/MatMul", "qkv"),
        ("blocks.0.attention.kv/MatMul", "kv"),
        ("blocks.0.attention.q/MatMul", "q"),
    ],
)
def test_the_parts_are_named_by_the_letters_of_the_whole(linear, parts):
    assert unpacked(linear) == [f"blocks.0.attention.{part}/MatMul" for part in parts]
    assert unpacked("blocks.0.mlp.fc1/MatMul") == ["blocks.0.mlp.fc1/MatMul"]


def packed_heads(*perms):
    """Two heads of three: each part of a Split reshaped, and transposed as given."""
    parts = [f"p{number}" for number in range(len(perms))]
    body = f"{', '.join(parts)} = Split<axis = 2, num_outputs = {len(parts)}>(x)\n"
    for part, perm in zip(parts, perms, strict=True):
        body += f"r_{part} = Reshape({part}, shape)\n"
        body += f"t_{part} = Transpose<perm = [{perm}]>(r_{part})\n"
        body += f"y_{part} = Relu(t_{part})\n"
    outputs = ", ".join(f"float[N, ?, ?, ?] y_{part}" for part in parts)
    proto = parser.parse_model(
        HEADER + f"g (float[N, L, {6 * len(parts)}] x) => ({outputs})"
        f"<int64[4] shape = {{0, 0, 2, 3}}> {{ {body} }}"
    )
    for number, node in enumerate(proto.graph.node):
        node.name = node.op_type if node.op_type == "Split" else f"{node.op_type}_{number}"
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


@pytest.mark.parametrize("count", [2, 3])
def test_heads_of_a_packed_projection_are_transposed_together(count):
    model = packed_heads(*["0, 2, 1, 3"] * count)
    before = ir.to_proto(model)
    assert TransposePacked()(model).modified
    changed = ir.to_proto(model)
    onnx.checker.check_model(changed, full_check=True)
    kinds = [node.op_type for node in changed.graph.node]
    assert kinds == ["Reshape", "Transpose", "Split", *["Squeeze"] * count, *["Relu"] * count]
    x = np.random.default_rng(2).standard_normal((4, 5, 6 * count)).astype(np.float32)
    for found, expected in zip(run_graph(changed, x), run_graph(before, x), strict=True):
        np.testing.assert_array_equal(found, expected)
    assert not TransposePacked()(model).modified


def test_parts_that_are_turned_differently_are_left_alone():
    model = packed_heads("0, 2, 1, 3", "0, 2, 3, 1")
    before = ir.to_proto(model)
    assert not TransposePacked()(model).modified
    assert ir.to_proto(model) == before
