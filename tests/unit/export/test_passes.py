"""Passes on small graphs: Q/DQ on two Linears that read one tensor, and float16."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper, parser

from tests.helpers.refused import refused
from tests.helpers.toy_graphs import run_graph
from upperson_export.passes.half import ToHalf
from upperson_export.passes.linears import QuantizeLinears
from upperson_machine.int8 import EXACT, INT8_SUMS, PAIR_LIMIT, largest_pair
from upperson_rt.errors import InputError

SOURCE = """<ir_version: 9, opset_import: ["" : 19]>
g (float[N, 5, 4] x) => (float[N, 5, 3] kv, float[N, 1, 3] q)
<int64[1] zero = {0}, int64[1] one = {1}> {
    u = Relu(x)
    row = Slice(u, zero, one, one)
    kv = MatMul(u, kv_weight)
    q = MatMul(row, q_weight)
}"""


@pytest.fixture
def proto():
    proto = parser.parse_model(SOURCE)
    rng = np.random.default_rng(0)
    for node in proto.graph.node[2:]:
        node.name = node.output[0]
        weight = rng.standard_normal((4, 3)).astype(np.float32) * [1, 1e-3, 0]
        name = node.input[1]
        proto.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), name))
    return proto


def quantized(proto, amax, *linears):
    model = ir.from_proto(proto)
    assert QuantizeLinears(linears, amax)(model).modified == bool(linears)
    changed = ir.to_proto(model)
    onnx.checker.check_model(changed, full_check=True)
    return changed


def limited(weight, pair_limit=PAIR_LIMIT):
    """Quantize one Linear; return int8 weights, scales, and what the file says of itself."""
    inputs, outputs = weight.shape
    proto = parser.parse_model(f"""<ir_version: 9, opset_import: ["" : 19]>
    g (float[N, {inputs}] x) => (float[N, {outputs}] y) {{ y = MatMul(x, w) }}""")
    proto.graph.node[0].name = "y"
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    model = ir.from_proto(proto)
    QuantizeLinears(["y"], {"x": 1.0}, pair_limit)(model)
    values = {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}
    return values["w.int8"], values["w.scale"], model.metadata_props


def test_weights_are_int8_with_a_scale_per_output_channel(proto):
    constants = {
        item.name: numpy_helper.to_array(item)
        for item in quantized(proto, {"u": 4.0}, "kv", "q").graph.initializer
    }
    for name in ("kv_weight", "q_weight"):
        w = numpy_helper.to_array(next(i for i in proto.graph.initializer if i.name == name))
        w_int8, scale = constants[f"{name}.int8"], constants[f"{name}.scale"]
        assert w_int8.dtype == np.int8
        assert scale.shape == (3,)
        assert w_int8.min() >= -127  # symmetric: -128 would have no counterpart
        assert np.abs(w_int8[:, :2]).max(axis=0).min() > 120  # all levels are used
        assert (np.abs(w_int8 * scale - w) <= scale / 2 + 1e-9).all()
        assert (scale > 0).all(), "a channel of zeros needs a scale, too"
    for name, array in constants.items():
        if name.endswith(".scale"):
            assert (array.astype(np.float16).astype(np.float32) == array).all()
        if name.startswith("zero_point"):
            assert array.dtype == np.int8
            assert not array.any()


@pytest.mark.parametrize("pair_limit", [None, PAIR_LIMIT])
def test_a_channel_of_tiny_weights_keeps_their_signs(pair_limit):
    """Where float16 is coarse, a scale that is not rounded up would have int8 overflow."""
    smallest = float(np.finfo(np.float16).smallest_subnormal)
    steps = np.linspace(1.05, 8, 100)
    weight = np.outer([1, 0, -1, 0.5], 127 * smallest * steps).astype(np.float32)
    rounded, scale, _ = limited(weight, pair_limit)
    assert (np.sign(rounded) == np.sign(weight)).all()
    assert (np.abs(rounded * scale - weight) <= 0.501 * scale).all()


def test_a_range_is_never_cut_where_its_scale_is_rounded(proto):
    for amax in np.geomspace(1e-4, 1e4, 40):
        constants = quantized(proto, {"u": float(amax)}, "kv").graph.initializer
        (scale,) = (numpy_helper.to_array(item) for item in constants if item.name == "u.scale")
        assert amax * (1 - 1e-6) <= 127 * scale <= amax * 1.001 + 127 * 6e-8


@pytest.mark.parametrize("amax", [float("nan"), -1.0, 1e7])
def test_a_range_that_is_no_usable_number_is_refused(proto, amax):
    with refused("range_unusable", InputError, tensor="u"):
        quantized(proto, {"u": amax}, "kv")
    with refused("range_missing", InputError, tensor="u"):
        quantized(proto, {"row": 1.0}, "kv")
    found = run_graph(quantized(proto, {"u": 0.0}, "kv", "q"), np.zeros((1, 5, 4), np.float32))
    assert not np.any(found[0]), "zero is a range, too"


@pytest.mark.parametrize("inputs", [6, 7])
@pytest.mark.parametrize("spread", ["normal", "uniform", "one of two"])
def test_neighbours_stay_below_the_limit_with_a_small_scale(inputs, spread):
    rng = np.random.default_rng(3)
    shape = (inputs, 500)
    weight = {
        "normal": rng.standard_normal(shape),
        "uniform": rng.uniform(-1, 1, shape),
        "one of two": np.where(np.arange(inputs)[:, None] % 2, 0, rng.uniform(-1, 1, shape)),
    }[spread].astype(np.float32)
    rounded, scale, properties = limited(weight)
    assert largest_pair(rounded).max() <= PAIR_LIMIT
    assert (np.abs(rounded * scale - weight) <= scale / 2 + 1e-6).all()
    finer = np.rint(weight / (0.98 * scale))
    breaks = (largest_pair(finer) > PAIR_LIMIT) | (np.abs(finer).max(axis=0) > 127)
    assert breaks.mean() > 0.95, "scales are larger than they need to be"
    if spread == "one of two":
        assert np.abs(rounded).max(axis=0).min() >= 126, "there is nothing to give way to"
    assert properties == {INT8_SUMS: EXACT}
    assert not limited(weight, None)[2]  # Without the limit, sums are not exact.


def test_a_pair_that_rounding_lifts_over_the_limit_gets_a_larger_scale():
    step = 2.0**-7
    # Their sum is 128 steps in float32, and yet both are rounded up, to 65 and 64.
    weight = (step * np.array([[64.5 + 2.0**-17], [63.5]])).astype(np.float32)
    assert largest_pair(weight / np.float32(step)) == PAIR_LIMIT
    assert largest_pair(np.rint(weight / np.float32(step))) == PAIR_LIMIT + 1
    rounded, scale, _ = limited(weight)
    assert largest_pair(rounded) <= PAIR_LIMIT
    assert step < scale < 1.01 * step


TOWER = """<ir_version: 9, opset_import: ["" : 19]>
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
    proto = parser.parse_model(TOWER)
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
