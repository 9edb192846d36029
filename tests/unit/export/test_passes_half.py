"""The float16 pass: what stays in float32, and where the Casts are."""

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, numpy_helper, parser

from tests.helpers.refused import refused
from upperson_export.passes.half import ToHalf
from upperson_rt.errors import InputError

SOURCE = """<ir_version: 9, opset_import: ["" : 19]>
tower (uint8[N, 4] image) => (float[N, 2] embeds)
<float centre = {128.0}, float eps = {1e-12}, int64[1] last = {-1}> {
    pixels = Cast<to = 1>(image)
    x = Sub(pixels, centre)
    normed = LayerNormalization<axis = -1>(x, gain, bias)
    again = LayerNormalization<axis = -1>(normed, gain, bias)
    hidden = MatMul(again, weight)
    sum = Add(x, hidden)
    final = LayerNormalization<axis = -1>(sum, gain, bias)
    raw = MatMul(final, projection)
    length = ReduceL2(raw, last)
    safe = Max(length, eps)
    embeds = Div(raw, safe)
}"""


def tower(**constants):
    rng = np.random.default_rng(0)
    values = {
        "gain": np.ones(4),
        "bias": np.zeros(4),
        "weight": rng.standard_normal((4, 4)),
        "projection": rng.standard_normal((4, 2)),
    } | constants
    proto = parser.parse_model(SOURCE)
    for node in proto.graph.node:
        node.name = node.output[0]
    for name, value in values.items():
        proto.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    return onnx.shape_inference.infer_shapes(proto)


def half(proto, largest=None):
    model = ir.from_proto(proto)
    ToHalf(largest)(model)
    changed = ir.to_proto(model)
    del changed.graph.value_info[:]  # inferred again, and so checked
    onnx.checker.check_model(changed, full_check=True)
    return onnx.shape_inference.infer_shapes(changed, strict_mode=True)


def casts_of(model):
    return [(n.input[0], n.output[0]) for n in model.graph.node if n.op_type == "Cast"]


def types_of(model):
    graph = model.graph
    values = (*graph.input, *graph.value_info, *graph.output)
    found = {value.name: value.type.tensor_type.elem_type for value in values}
    return found | {item.name: item.data_type for item in graph.initializer}


def test_norms_and_the_length_of_the_embedding_stay_float32_between_single_casts():
    model = half(tower())
    types = types_of(model)
    names = ("normed", "again", "final", "raw.fp32", "length", "safe", "embeds", "gain")
    assert {types[name] for name in names} == {TensorProto.FLOAT}
    half_names = ("pixels", "x", "hidden", "sum", "raw", "weight.fp16", "projection.fp16")
    assert {types[name] for name in half_names} == {TensorProto.FLOAT16}
    # The first cast goes straight to float16; a norm after a norm needs none.
    assert casts_of(model) == [
        ("image", "pixels"), ("x", "x.fp32"), ("again", "again.fp16"), ("sum", "sum.fp32"),
        ("final", "final.fp16"), ("raw", "raw.fp32"),
    ]  # fmt: skip


def test_values_beyond_the_limit_are_computed_in_float32():
    model = half(tower(), {"hidden": 50_000.0, "sum": 50_000.0, "x": 900.0})
    types = types_of(model)
    assert types["hidden"] == types["sum"] == types["weight"] == TensorProto.FLOAT
    assert types["x"] == TensorProto.FLOAT16
    assert [source for source, _ in casts_of(model)] == ["image", "x", "final", "raw"]


def test_constants_that_lose_too_much_stay_float32():
    small = 1e-7 * np.random.default_rng(1).standard_normal((4, 4))
    types = types_of(half(tower(weight=small)))
    assert types["weight"] == types["hidden"] == TensorProto.FLOAT
    large = tower(weight=np.full((4, 4), 1e6))
    with refused("constant_beyond_float16", InputError, name="weight"):
        half(large)
    types = types_of(half(large, {"hidden": 4e6, "sum": 4e6}))
    assert types["weight"] == types["hidden"] == types["sum"] == TensorProto.FLOAT


def test_a_graph_without_norms_keeps_the_types_of_inputs_and_outputs():
    proto = parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 19]>'
        "g (uint8[N] x) => (float[N] y) { f = Cast<to = 1>(x)\n y = Relu(f) }"
    )
    model = half(onnx.shape_inference.infer_shapes(proto))
    assert types_of(model)["y"] == TensorProto.FLOAT
    assert [node.op_type for node in model.graph.node] == ["Cast", "Relu", "Cast"]
