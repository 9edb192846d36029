"""The Q/DQ pass on two Linears that read one tensor, one of them a row of it."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper, parser

from tests.helpers.toy_graphs import run_graph
from upperson_export.passes.linears import QuantizeLinears
from upperson_rt.errors import InputError
from upperson_rt.machine import EXACT, INT8_SUMS, PAIR_LIMIT, largest_pair

SOURCE = """<ir_version: 9, opset_import: ["" : 19]>
g (float[N, 5, 4] x) => (float[N, 5, 3] kv, float[N, 1, 3] q)
<int64[1] zero = {0}, int64[1] one = {1}> {
    u = Relu(x)
    row = Slice(u, zero, one, one)
    kv = MatMul(u, kv_weight)
    q = MatMul(row, q_weight)
}"""


@pytest.fixture
def proto() -> onnx.ModelProto:
    proto = parser.parse_model(SOURCE)
    rng = np.random.default_rng(0)
    for node in proto.graph.node[2:]:
        node.name = node.output[0]
        weight = rng.standard_normal((4, 3)).astype(np.float32) * [1, 1e-3, 0]
        name = node.input[1]
        proto.graph.initializer.append(numpy_helper.from_array(weight.astype(np.float32), name))
    return proto


def quantized(proto: onnx.ModelProto, amax: dict[str, float], *linears: str) -> onnx.ModelProto:
    model = ir.from_proto(proto)
    assert QuantizeLinears(linears, amax)(model).modified == bool(linears)
    changed = ir.to_proto(model)
    onnx.checker.check_model(changed, full_check=True)
    return changed


def test_each_linear_has_its_own_pairs_and_all_share_one_scale(proto: onnx.ModelProto) -> None:
    graph = quantized(proto, {"u": 4.0}, "kv", "q").graph
    producer = {name: node for node in graph.node for name in node.output}
    activations = []
    for node in graph.node:
        if node.op_type == "MatMul":
            x, weight = (producer[name] for name in node.input)
            assert x.op_type == weight.op_type == "DequantizeLinear"
            assert producer[x.input[0]].op_type == "QuantizeLinear"
            assert [a.i for a in weight.attribute if a.name == "axis"] == [1]
            activations.append(x)
    assert len({node.output[0] for node in activations}) == 2
    # The row is quantized by itself, with the scale of the tensor it comes from.
    assert [producer[node.input[0]].input[0] for node in activations] == ["u", "row"]
    assert {node.input[1] for node in activations} == {"u.scale"}


def test_weights_are_int8_with_a_scale_per_output_channel(proto: onnx.ModelProto) -> None:
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
def test_a_channel_of_tiny_weights_keeps_their_signs(pair_limit: int | None) -> None:
    """Where float16 is coarse, a scale that is not rounded up would have int8 overflow."""
    smallest = float(np.finfo(np.float16).smallest_subnormal)
    steps = np.linspace(1.05, 8, 100)
    weight = np.outer([1, 0, -1, 0.5], 127 * smallest * steps).astype(np.float32)
    proto = parser.parse_model("""<ir_version: 9, opset_import: ["" : 19]>
    g (float[N, 4] x) => (float[N, 100] y) { y = MatMul(x, w) }""")
    proto.graph.node[0].name = "y"
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    model = ir.from_proto(proto)
    QuantizeLinears(["y"], {"x": 1.0}, pair_limit)(model)
    values = {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}
    rounded, scale = values["w.int8"].astype(np.float32), values["w.scale"]
    assert (np.sign(rounded) == np.sign(weight)).all()
    assert (np.abs(rounded * scale - weight) <= 0.501 * scale).all()


def test_a_range_is_never_cut_where_its_scale_is_rounded(proto: onnx.ModelProto) -> None:
    for amax in np.geomspace(1e-4, 1e4, 200):
        constants = quantized(proto, {"u": float(amax)}, "kv").graph.initializer
        (scale,) = (numpy_helper.to_array(item) for item in constants if item.name == "u.scale")
        assert amax * (1 - 1e-6) <= 127 * scale <= amax * 1.001 + 127 * 6e-8


def test_the_result_is_close_and_values_beyond_the_range_are_clipped(
    proto: onnx.ModelProto,
) -> None:
    x = np.random.default_rng(2).uniform(-4, 4, (6, 5, 4)).astype(np.float32)
    expected = run_graph(proto, x)
    for found, exact in zip(
        run_graph(quantized(proto, {"u": 4.0}, "kv", "q"), x), expected, strict=True
    ):
        assert np.abs(found - exact).max() < 0.02 * np.abs(exact).max()
    clipped = run_graph(quantized(proto, {"u": 2.0}, "kv", "q"), x)
    half = run_graph(proto, np.minimum(x, 2))
    for found, exact in zip(clipped, half, strict=True):
        assert np.abs(found - exact).max() < 0.02 * np.abs(exact).max()


def test_other_linears_stay_in_floating_point(proto: onnx.ModelProto) -> None:
    changed = quantized(proto, {"u": 4.0}, "q")
    nodes = {node.name: node for node in changed.graph.node}
    assert list(nodes["kv"].input) == ["u", "kv_weight"]
    assert sum(node.op_type == "QuantizeLinear" for node in changed.graph.node) == 1
    assert not any("Quantize" in n.op_type for n in quantized(proto, {}).graph.node)


@pytest.mark.parametrize("amax", [float("nan"), float("inf"), -1.0, 1e7])
def test_a_range_that_is_no_usable_number_is_refused(proto: onnx.ModelProto, amax: float) -> None:
    with pytest.raises(InputError, match="range of 'u' is"):
        quantized(proto, {"u": amax}, "kv")


def test_a_missing_range_is_refused_and_zero_is_taken(proto: onnx.ModelProto) -> None:
    with pytest.raises(InputError, match="no range of the tensor 'u'"):
        quantized(proto, {"row": 1.0}, "kv")
    found = run_graph(quantized(proto, {"u": 0.0}, "kv", "q"), np.zeros((1, 5, 4), np.float32))
    assert not np.any(found[0])


@pytest.mark.parametrize("inputs", [6, 7])
@pytest.mark.parametrize("spread", ["normal", "uniform", "one of two"])
def test_neighbours_stay_below_the_limit_with_a_small_scale(inputs: int, spread: str) -> None:
    rng = np.random.default_rng(3)
    shape = (inputs, 500)
    weight = {
        "normal": rng.standard_normal(shape),
        "uniform": rng.uniform(-1, 1, shape),
        "one of two": np.where(np.arange(inputs)[:, None] % 2, 0, rng.uniform(-1, 1, shape)),
    }[spread].astype(np.float32)
    source = f"""<ir_version: 9, opset_import: ["" : 19]>
    g (float[N, {inputs}] x) => (float[N, 500] y) {{ y = MatMul(x, w) }}"""
    proto = parser.parse_model(source)
    proto.graph.node[0].name = "y"
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    model = ir.from_proto(proto)
    QuantizeLinears(["y"], {"x": 1.0}, PAIR_LIMIT)(model)
    values = {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}
    rounded, scale = values["w.int8"], values["w.scale"]
    assert largest_pair(rounded).max() <= PAIR_LIMIT
    assert (np.abs(rounded * scale - weight) <= scale / 2 + 1e-6).all()
    finer = np.rint(weight / (0.98 * scale))
    breaks = (largest_pair(finer) > PAIR_LIMIT) | (np.abs(finer).max(axis=0) > 127)
    assert breaks.mean() > 0.95, "scales are larger than they need to be"
    if spread == "one of two":
        assert np.abs(rounded).max(axis=0).min() >= 126, "there is nothing to give way to"
    assert model.metadata_props == {INT8_SUMS: EXACT}


def test_a_pair_that_rounding_lifts_over_the_limit_gets_a_larger_scale() -> None:
    scale = 2.0**-7
    # Their sum is 128 steps in float32, and yet both are rounded up, to 65 and 64.
    weight = (scale * np.array([[64.5 + 2.0**-17], [63.5]])).astype(np.float32)
    assert largest_pair(weight / np.float32(scale)) == PAIR_LIMIT
    assert largest_pair(np.rint(weight / np.float32(scale))) == PAIR_LIMIT + 1
    source = """<ir_version: 9, opset_import: ["" : 19]>
    g (float[N, 2] x) => (float[N, 1] y) { y = MatMul(x, w) }"""
    proto = parser.parse_model(source)
    proto.graph.node[0].name = "y"
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    model = ir.from_proto(proto)
    QuantizeLinears(["y"], {"x": 1.0}, PAIR_LIMIT)(model)
    values = {name: v.const_value.numpy() for name, v in model.graph.initializers.items()}
    assert largest_pair(values["w.int8"]) <= PAIR_LIMIT
    assert scale < values["w.scale"] < 1.01 * scale


def test_without_a_limit_a_file_does_not_say_that_it_is_exact(proto: onnx.ModelProto) -> None:
    changed = quantized(proto, {"u": 4.0}, "kv", "q")
    assert not changed.metadata_props
