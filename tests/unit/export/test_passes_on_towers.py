"""Structure of the four variants of both towers: types, Q/DQ, Casts, names."""

from functools import cache

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from tests.helpers.refused import refused
from tests.helpers.toy_graphs import TOWERS, producers, proto_of, toy_graph
from upperson_export.graphs import build_variant
from upperson_export.lint import lint
from upperson_machine.int8 import PAIR_LIMIT, largest_pair
from upperson_rt.errors import InputError

pytestmark = pytest.mark.usefixtures("toy_graphs")

VARIANTS = ("fp16", "int8", "int8-fp16")
BLOCKS = 2
LINEARS = [
    "blocks.0.attention.qkv", "blocks.0.attention.out", "blocks.0.mlp.fc1", "blocks.0.mlp.fc2",
    "blocks.1.attention.kv", "blocks.1.attention.q", "blocks.1.attention.out", "blocks.1.mlp.fc1",
    "blocks.1.mlp.fc2",
]  # fmt: skip


def amax_of(graph):
    return {linear.activation: 4.0 for linear in graph.linears}


@cache
def variant_of(kind, variant):
    fp32 = toy_graph(kind)
    before = fp32.file.read_bytes()
    built = proto_of(build_variant(fp32, variant, amax_of(fp32)))
    assert fp32.file.read_bytes() == before
    return built


UNPACKED = {
    f"blocks.{block}.attention.{letters}": [f"blocks.{block}.attention.{one}" for one in letters]
    for block, letters in enumerate(("qkv", "kv"))
}


def expected_linears(variant):
    """Return the MatMul nodes that must be quantized."""
    names = LINEARS if variant.startswith("int8") else []
    if variant == "int8-fp16":
        names = [part for name in names for part in UNPACKED.get(name, [name])]
    return [f"{name}/MatMul" for name in names]


def nodes_of(model, operator):
    return [node for node in model.graph.node if node.op_type == operator]


each_tower = pytest.mark.parametrize("kind", TOWERS)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


@each_tower
@each_variant
def test_the_block_linears_have_q_dq_on_both_inputs_and_no_other_node_has(kind, variant):
    model = variant_of(kind, variant)
    producer = producers(model)
    readers = [
        node.name
        for node in model.graph.node
        if any(producer[n].op_type == "DequantizeLinear" for n in node.input if n in producer)
    ]
    assert readers == expected_linears(variant)
    scales = {}
    for node in model.graph.node:
        if node.name not in readers:
            continue
        x, weight = (producer[name] for name in node.input)
        assert x.op_type == weight.op_type == "DequantizeLinear"
        assert producer[x.input[0]].op_type == "QuantizeLinear"
        assert weight.input[0] not in producer, "weights are stored as int8"
        module, _, part = node.name.removesuffix("/MatMul").rpartition(".")
        if part not in ("out", "fc1", "fc2"):
            scales.setdefault(module, set()).add(x.input[1])
    # Queries, keys and values share one scale.
    assert list(map(len, scales.values())) == ([1] * BLOCKS if readers else [])
    quantized = nodes_of(model, "QuantizeLinear")
    forbidden = ("adapter", "ln_", "Softmax", "patch", "projection")
    for node in quantized:
        assert not any(part in node.input[0] for part in forbidden), node.input[0]
        assert producer[node.input[0]].op_type in (
            "Add", "Reshape", "Mul", "Slice", "GatherElements"
        )  # fmt: skip
    # qkv, out, fc1, fc2 in every block, and the pooled row that the last block's queries read.
    assert len(quantized) == (4 * BLOCKS + 1 if readers else 0)
    residual = [
        node
        for node in nodes_of(model, "Add")
        if node.name.count(".") == 1 and node.name.startswith("blocks.")
    ]
    assert len(residual) == 4 * BLOCKS  # Two additions of an adapter and two residual ones.
    for node in residual:
        assert not any("Quantize" in producer[name].op_type for name in node.input)


def listed_casts(kind):
    """Return (tensor, type) of the Casts that an fp16 variant has: around norms, L2 included."""
    ends = {"image": ("Concat_2", "Gather"), "text": ("Add", "Gather_3")}[kind]
    stream = [*ends, "blocks.0/Add_2", "blocks.0/Add_4", "blocks.1/Add_2", "projection/MatMul"]
    norms = [f"blocks.{block}.ln_{n}" for block in range(BLOCKS) for n in (1, 2)]
    norms += ["ln_pre", "ln_post"] if kind == "image" else ["ln_final"]
    return {(name, "fp32") for name in stream} | {
        (f"{name}/LayerNormalization", "fp16") for name in norms
    }


@each_tower
@each_variant
def test_casts_stand_around_norms_and_nowhere_else(kind, variant):
    model = variant_of(kind, variant)
    producer = producers(model)
    casts = nodes_of(model, "Cast")
    half = variant.endswith("fp16")
    if kind == "image":
        first = casts.pop(0)
        assert first == model.graph.node[0]
        assert list(first.input) == ["image"]
        assert first.attribute[0].i == (TensorProto.FLOAT16 if half else TensorProto.FLOAT)
    found = [(node.input[0], node.output[0].removeprefix(f"{node.input[0]}.")) for node in casts]
    assert len(set(found)) == len(found)
    assert set(found) == (listed_casts(kind) if half else set())
    for node in casts:
        source = producer[node.input[0]]
        assert source.op_type != "Cast", "ping-pong"
        to_half = node.attribute[0].i == TensorProto.FLOAT16
        assert to_half == (source.op_type == "LayerNormalization")


@each_tower
@each_variant
def test_types_are_those_of_the_variant(kind, variant):
    graph = onnx.shape_inference.infer_shapes(variant_of(kind, variant), strict_mode=True).graph
    types = {
        value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)
    }
    wanted = TensorProto.FLOAT16 if variant.endswith("fp16") else TensorProto.FLOAT
    for node in graph.node:
        if node.op_type in ("LayerNormalization", "ReduceL2", "Div"):
            assert types[node.output[0]] == TensorProto.FLOAT, node.name
        elif node.op_type in ("MatMul", "Softmax", "Sigmoid"):
            assert types[node.output[0]] == wanted, node.name
    assert types[f"{kind}_embeds"] == TensorProto.FLOAT
    input_type = graph.input[0].type.tensor_type.elem_type
    assert input_type == (TensorProto.UINT8 if kind == "image" else TensorProto.INT32)
    assert graph.output[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    weights = {
        item.data_type
        for item in graph.initializer
        if len(item.dims) == 2 and item.name.startswith("blocks.")
    }
    # Adapters keep floating point weights.
    assert weights == ({TensorProto.INT8, wanted} if variant.startswith("int8") else {wanted})


@each_tower
@each_variant
def test_graphs_are_plain_readable_and_clean(kind, variant):
    model = variant_of(kind, variant)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert {"blocks.0.ln_1", "blocks.0.adapter_attn.down", "blocks.0.mlp"} <= {
        name.partition("/")[0] for name in names
    }
    assert not nodes_of(model, "GatherND"), "OpenVINO reads beyond a tensor in it"
    assert lint(ir.from_proto(model)) == []
    used = {name for node in model.graph.node for name in node.input}
    assert all(item.name in used for item in model.graph.initializer)


def constants_of(kind, variant):
    return {
        item.name.removesuffix(".fp16"): onnx.numpy_helper.to_array(item)
        for item in variant_of(kind, variant).graph.initializer
    }


@each_tower
def test_int8_for_cpus_keeps_the_pair_limit_and_both_int8_round_activations_alike(kind):
    found, scales = {}, []
    for variant in ("int8", "int8-fp16"):
        constants = constants_of(kind, variant)
        weights = [w for name, w in constants.items() if name.endswith(".weight.int8")]
        fc1 = [w for name, w in constants.items() if "fc1" in name and name.endswith(".int8")]
        most = max(largest_pair(weight).max() for weight in weights)
        largest = max(abs(weight.astype(int)).max(axis=0).min() for weight in fc1)
        found[variant] = (most <= PAIR_LIMIT, largest >= 126)  # A GPU uses all levels.
        scales.append(
            {name: float(x) for name, x in constants.items()
             if name.endswith(".scale") and not x.ndim}
        )  # fmt: skip
    assert found == {"int8": (True, False), "int8-fp16": (False, True)}
    assert len(scales[0]) >= 6
    assert scales[0] == scales[1]


@each_tower
@pytest.mark.parametrize("variant", ["int8", "int8-fp16"])
def test_mixed_precision_leaves_named_linears_alone(kind, variant):
    fp32 = toy_graph(kind)
    kept = ["blocks.0.attention.qkv/MatMul", "blocks.1.mlp.fc2/MatMul"]
    amax = {linear.activation: 4.0 for linear in fp32.linears if linear.node not in kept}
    model = proto_of(build_variant(fp32, variant, amax, kept))
    touched = [node.name for node in nodes_of(model, "DequantizeLinear")]
    assert not any("qkv" in name or "blocks.1.mlp.fc2" in name for name in touched)
    assert not any(name.startswith("blocks.0.attention.q/") for name in touched)
    assert any("blocks.0.mlp.fc2" in name for name in touched)
    assert lint(ir.from_proto(model)) == []


def test_a_variant_without_ranges_or_with_an_unknown_linear_is_refused():
    fp32 = toy_graph("image")
    with refused("ranges_missing", InputError, variant="int8"):
        build_variant(fp32, "int8")
    with refused("linear_unknown", InputError, found=["nothing/MatMul"]):
        build_variant(fp32, "int8", {}, ["nothing/MatMul"])
