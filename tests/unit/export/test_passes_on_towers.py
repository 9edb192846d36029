"""Structure of the four variants of both towers: types, Q/DQ, Casts, names."""

from collections import Counter
from functools import cache

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto

from tests.helpers.toy_graphs import TOWERS, producers, proto_of, toy_graph
from upperson_export.graphs import build_variant
from upperson_export.lint import lint
from upperson_export.passes.linears import unpacked
from upperson_export.variants import VariantName
from upperson_rt.errors import InputError
from upperson_rt.machine import PAIR_LIMIT, largest_pair
from upperson_rt.towers import Tower

pytestmark = pytest.mark.usefixtures("toy_graphs")

VARIANTS: tuple[VariantName, ...] = ("fp32", "fp16", "int8", "int8-fp16")
BLOCKS = 2


@cache
def variant_of(kind: Tower, variant: VariantName) -> onnx.ModelProto:
    fp32 = toy_graph(kind)
    amax = {linear.activation: 4.0 for linear in fp32.linears}
    return proto_of(build_variant(fp32, variant, amax))


def expected_linears(variant: VariantName) -> list[str]:
    """Return the MatMul nodes that must be quantized."""
    names = [
        f"blocks.{block}.{module}/MatMul"
        for block in range(BLOCKS)
        for module in (
            *(["attention.qkv"] if block < BLOCKS - 1 else ["attention.kv", "attention.q"]),
            "attention.out",
            "mlp.fc1",
            "mlp.fc2",
        )
    ]
    if variant == "int8-fp16":
        return [part for name in names for part in unpacked(name)]
    return names if variant == "int8" else []


each_tower = pytest.mark.parametrize("kind", TOWERS)
each_variant = pytest.mark.parametrize("variant", VARIANTS)


@each_tower
@each_variant
def test_the_block_linears_have_q_dq_on_both_inputs_and_nothing_else_has(
    kind: Tower, variant: VariantName
) -> None:
    model = variant_of(kind, variant)
    producer = producers(model)
    readers = [
        node.name
        for node in model.graph.node
        if any(producer[n].op_type == "DequantizeLinear" for n in node.input if n in producer)
    ]
    assert readers == expected_linears(variant)
    for node in model.graph.node:
        if node.name in readers:
            x, weight = (producer[name] for name in node.input)
            assert x.op_type == weight.op_type == "DequantizeLinear"
            assert producer[x.input[0]].op_type == "QuantizeLinear"
            assert weight.input[0] not in producer, "weights are stored as int8"
    quantized = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    forbidden = ("adapter", "ln_", "Softmax", "patch", "projection")
    for node in quantized:
        assert not any(part in node.input[0] for part in forbidden), node.input[0]
        assert producer[node.input[0]].op_type in (
            "Add",
            "Reshape",
            "Mul",
            "Slice",
            "GatherElements",
        )
    # qkv, out, fc1, fc2 in every block, and the pooled row that the last block's queries read.
    assert len(quantized) == (4 * BLOCKS + 1 if readers else 0)


@each_tower
@each_variant
def test_no_library_reads_beyond_a_tensor(kind: Tower, variant: VariantName) -> None:
    """OpenVINO does in GatherND, which indexing with a tensor exports; not in Gather."""
    assert "GatherND" not in {node.op_type for node in variant_of(kind, variant).graph.node}


@each_tower
@each_variant
def test_residual_adds_are_untouched(kind: Tower, variant: VariantName) -> None:
    model = variant_of(kind, variant)
    producer = producers(model)
    adds = [
        node
        for node in model.graph.node
        if node.op_type == "Add" and node.name.count(".") == 1 and node.name.startswith("blocks.")
    ]
    assert len(adds) == 4 * BLOCKS  # two additions of an adapter and two residual ones
    for node in adds:
        assert not any("Quantize" in producer[name].op_type for name in node.input)


@each_tower
@pytest.mark.parametrize("variant", ["int8", "int8-fp16"])
def test_queries_keys_and_values_share_one_scale(kind: Tower, variant: VariantName) -> None:
    model = variant_of(kind, variant)
    producer = producers(model)
    scales: dict[str, set[str]] = {}
    for node in model.graph.node:
        module, _, part = node.name.removesuffix("/MatMul").rpartition(".")
        if node.name in expected_linears(variant) and part not in ("out", "fc1", "fc2"):
            scales.setdefault(module, set()).add(producer[node.input[0]].input[1])
    assert len(scales) == BLOCKS
    assert all(len(found) == 1 for found in scales.values()), scales


@each_tower
@each_variant
def test_only_the_int8_of_cpus_splits_heads_that_are_in_place(
    kind: Tower, variant: VariantName
) -> None:
    model = variant_of(kind, variant)
    producer = producers(model)
    splits = [node for node in model.graph.node if node.op_type == "Split"]
    sources = {producer[node.input[0]].op_type for node in splits}
    if variant == "int8-fp16":
        assert not splits  # Projections are unpacked.
    else:
        assert len(splits) == BLOCKS
        assert sources == ({"Transpose"} if variant == "int8" else {"Add"})
        axes = {attribute.i for node in splits for attribute in node.attribute[:1]}
        assert axes == ({0} if variant == "int8" else {2})


def listed_casts(kind: Tower) -> set[tuple[str, str]]:
    """Return (tensor, type) of the Casts that an fp16 variant has: around norms, L2 included."""
    stream = {
        "image": [
            "Concat_2", "blocks.0/Add_2", "blocks.0/Add_4", "blocks.1/Add_2", "Gather",
        ],
        "text": ["Add", "blocks.0/Add_2", "blocks.0/Add_4", "blocks.1/Add_2", "Gather_3"],
    }[kind]  # fmt: skip
    stream.append("projection/MatMul")
    norms = [f"blocks.{block}.ln_{n}" for block in range(BLOCKS) for n in (1, 2)]
    norms += ["ln_pre", "ln_post"] if kind == "image" else ["ln_final"]
    return {(name, "fp32") for name in stream} | {
        (f"{name}/LayerNormalization", "fp16") for name in norms
    }


@each_tower
@pytest.mark.parametrize("variant", ["fp16", "int8-fp16"])
def test_casts_stand_around_norms_and_nowhere_else(kind: Tower, variant: VariantName) -> None:
    model = variant_of(kind, variant)
    producer = producers(model)
    casts = [node for node in model.graph.node if node.op_type == "Cast"]
    if kind == "image":
        first = model.graph.node[0]
        assert (first.op_type, list(first.input)) == ("Cast", ["image"])
        assert first.attribute[0].i == TensorProto.FLOAT16
        casts.remove(first)
    found = [(node.input[0], node.output[0].removeprefix(f"{node.input[0]}.")) for node in casts]
    assert len(set(found)) == len(found)
    assert set(found) == listed_casts(kind)
    for node in casts:
        source = producer[node.input[0]]
        assert source.op_type != "Cast", "ping-pong"
        to_half = node.attribute[0].i == TensorProto.FLOAT16
        assert to_half == (source.op_type == "LayerNormalization")


@each_tower
@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_a_float32_base_has_no_cast_but_that_of_the_pixels(
    kind: Tower, variant: VariantName
) -> None:
    casts = [node for node in variant_of(kind, variant).graph.node if node.op_type == "Cast"]
    assert [node.input[0] for node in casts] == (["image"] if kind == "image" else [])


@each_tower
@each_variant
def test_types_are_those_of_the_variant(kind: Tower, variant: VariantName) -> None:
    model = onnx.shape_inference.infer_shapes(variant_of(kind, variant), strict_mode=True)
    graph = model.graph
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
    assert weights == (
        {TensorProto.INT8, wanted} if variant.startswith("int8") else {wanted}
    )  # adapters keep floating point weights


@each_tower
@each_variant
def test_graphs_are_plain_readable_and_clean(kind: Tower, variant: VariantName) -> None:
    model = variant_of(kind, variant)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 19)]
    assert not model.functions
    names = [node.name for node in model.graph.node]
    assert all(count == 1 for count in Counter(names).values())
    parts = {name.partition("/")[0] for name in names if name.startswith("blocks.0")}
    assert {
        "blocks.0", "blocks.0.ln_1", "blocks.0.adapter_attn.down", "blocks.0.adapter_attn.up",
        "blocks.0.attention", "blocks.0.attention.out", "blocks.0.ln_2", "blocks.0.mlp.fc1",
        "blocks.0.mlp", "blocks.0.mlp.fc2", "blocks.0.adapter_mlp.down",
    } <= parts  # fmt: skip
    assert lint(ir.from_proto(model)) == []
    used = {name for node in model.graph.node for name in node.input}
    assert all(item.name in used for item in model.graph.initializer)


@each_tower
def test_int8_for_cpus_keeps_a_limit_and_int8_for_gpus_uses_all_of_its_levels(kind: Tower) -> None:
    found = {}
    for variant in ("int8", "int8-fp16"):
        constants = {
            item.name.removesuffix(".fp16"): onnx.numpy_helper.to_array(item)
            for item in variant_of(kind, variant).graph.initializer  # type: ignore[arg-type]
            if "fc1" in item.name
        }
        weights = [array for name, array in constants.items() if name.endswith(".weight.int8")]
        assert weights
        most = max([largest_pair(weight).max() for weight in weights])
        largest = max([abs(weight.astype(int)).max(axis=0).min() for weight in weights])
        found[variant] = (most <= PAIR_LIMIT, largest >= 126)
    assert found == {"int8": (True, False), "int8-fp16": (False, True)}


@each_tower
def test_both_int8_variants_round_activations_alike(kind: Tower) -> None:
    scales = [
        {
            item.name.removesuffix(".fp16"): float(onnx.numpy_helper.to_array(item))
            for item in variant_of(kind, variant).graph.initializer  # type: ignore[arg-type]
            if item.name.removesuffix(".fp16").endswith(".scale") and not item.dims
        }
        for variant in ("int8", "int8-fp16")
    ]
    assert len(scales[0]) >= 6
    assert scales[0] == scales[1]


@each_tower
def test_mixed_precision_leaves_named_linears_alone(kind: Tower) -> None:
    fp32 = toy_graph(kind)
    kept = ["blocks.0.attention.qkv/MatMul", "blocks.1.mlp.fc2/MatMul"]
    amax = {linear.activation: 4.0 for linear in fp32.linears if linear.node not in kept}
    for variant in ("int8", "int8-fp16"):
        model = proto_of(build_variant(fp32, variant, amax, kept))  # type: ignore[arg-type]
        inputs = {node.name: list(node.input) for node in model.graph.node}
        touched = [name for name in inputs if name.endswith("/DequantizeLinear")]
        assert not any("qkv" in name or "blocks.1.mlp.fc2" in name for name in touched)
        assert not any(name.startswith("blocks.0.attention.q/") for name in touched)
        assert any("blocks.0.mlp.fc2" in name for name in touched)
        assert lint(ir.from_proto(model)) == []


def test_what_cannot_be_built_is_refused() -> None:
    fp32 = toy_graph("image")
    with pytest.raises(InputError, match="needs calibrated ranges"):
        build_variant(fp32, "int8")
    with pytest.raises(InputError, match="no block Linear is named nothing/MatMul"):
        build_variant(fp32, "int8", {}, ["nothing/MatMul"])


def test_the_given_graph_is_not_changed() -> None:
    fp32 = toy_graph("image")
    before = fp32.file.read_bytes()
    amax = {linear.activation: 4.0 for linear in fp32.linears}
    for variant in VARIANTS:
        build_variant(fp32, variant, amax)
    assert fp32.file.read_bytes() == before
