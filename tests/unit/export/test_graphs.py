"""The structure of exported float32 graphs, and what folding and smoothing refuse."""

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, numpy_helper

from tests.helpers.refused import refused
from tests.helpers.toy_clip import toy_model
from tests.helpers.toy_graphs import FOLD, TOWERS, graph_of, proto_of, toy_graph
from upperson_calibration.graph import BlockLinear
from upperson_export import graphs
from upperson_export.fold import fold_image_tower, fold_text_tower, smooth
from upperson_export.graphs import require_one_file, write_with_weights
from upperson_export.parity import require_parity
from upperson_rt.errors import InputError, IntegrityError, UsageError

pytestmark = pytest.mark.usefixtures("toy_graphs")


BLOCK = {
    "mlp.fc2": None,  # Reads a GELU, through which no factor passes.
    "mlp.fc1": "ln_2",
    "attention.out": "attention.out",
}
LINEARS = {
    "blocks.0": {"attention.qkv": "ln_1", **BLOCK},
    "blocks.1": {"attention.q": "ln_1", "attention.kv": "ln_1", **BLOCK},
}
"""Block Linears by block, with the site of each one's input."""

CONTRACT = {
    "image": [
        ("image", TensorProto.UINT8, ["batch", 48, 32, 3]),
        ("image_embeds", TensorProto.FLOAT, ["batch", 24]),
    ],
    "text": [
        ("input_ids", TensorProto.INT32, ["batch", "length"]),
        ("text_embeds", TensorProto.FLOAT, ["batch", 24]),
    ],
}


def described(value):
    tensor = value.type.tensor_type
    return (
        value.name,
        tensor.elem_type,
        [dim.dim_param or dim.dim_value for dim in tensor.shape.dim],
    )


@pytest.mark.parametrize("tower", TOWERS)
def test_the_graph_has_the_contracts_ends_and_is_plain(tower):
    model = proto_of(toy_graph(tower))
    graph = model.graph
    assert [described(value) for value in (*graph.input, *graph.output)] == CONTRACT[tower]
    operators = Counter(node.op_type for node in graph.node)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 19)]
    assert model.ir_version == 9
    assert not model.functions
    # Norms: two a block, and one or two outside. A decomposed one would overflow in float16.
    assert operators["LayerNormalization"] == (6 if tower == "image" else 5)
    assert not {"Pow", "ReduceMean", "Erf", "Einsum", "If", "Loop"} & set(operators)
    assert operators["Softmax"] == 2
    assert operators["Cast"] == (1 if tower == "image" else 0)
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert not any(node.metadata_props or node.doc_string for node in graph.node)
    # The query scale is inside the weights: softmax(q k^T) v has no Mul or Div.
    scaled = [node.name for node in graph.node if node.op_type in ("Mul", "Div")]
    outside = {"patch/Mul", "projection/Div"}
    assert all("mlp" in name or name in outside for name in scaled), scaled
    if tower == "image":
        assert {node.op_type for node in graph.node if "image" in node.input} == {"Cast"}
    for initializer in graph.initializer:  # Masks, too.
        assert np.isfinite(numpy_helper.to_array(initializer)).all(), initializer.name


@pytest.mark.parametrize("tower", TOWERS)
def test_the_graph_is_described_by_its_tower(tower):
    graph = toy_graph(tower)
    nodes = {node.name: node for node in proto_of(graph).graph.node}
    expected = {
        BlockLinear(
            node=f"{block}.{name}/MatMul",
            activation=nodes[f"{block}.{name}/MatMul"].input[0],
            weight=f"{block}.{name}.weight",
            site=None if site is None else f"{block}.{site}",
        )
        for block, linears in LINEARS.items()
        for name, site in linears.items()
    }
    assert set(graph.linears) == expected
    order = list(nodes)
    assert [item.node for item in graph.linears] == sorted(
        (item.node for item in expected), key=order.index
    )
    inputs = {item.weight: item.activation for item in graph.linears}
    assert inputs["blocks.0.attention.qkv.weight"] == "blocks.0/Add"
    assert inputs["blocks.1.attention.q.weight"] != inputs["blocks.1.attention.kv.weight"]


def test_weights_that_the_exporter_merged_are_not_exchanged(tmp_path):
    model = toy_graph("image").load()
    twins = [model.graph.initializers[f"blocks.0.ln_{number}.bias"] for number in (1, 2)]
    twins[1].replace_all_uses_with(twins[0])
    del model.graph.initializers[str(twins[1].name)]
    ir.save(model, tmp_path / "merged.onnx")
    merged = replace(toy_graph("image"), file=tmp_path / "merged.onnx")
    tower = FOLD["image"](toy_model())
    assert write_with_weights(merged, tower, tmp_path / "other.onnx") is None
    assert not (tmp_path / "other.onnx").exists()


def test_a_tower_that_no_file_can_hold_is_refused(monkeypatch):
    tower = FOLD["text"](toy_model())
    require_one_file(tower, "text")
    monkeypatch.setattr(graphs, "MAX_FILE_BYTES", 1_000_000)
    with refused("tower_too_large", InputError, tower="text"):
        require_one_file(tower, "text")


WIDTH = 64


@pytest.mark.usefixtures("toy_graphs")
def test_a_file_of_other_weights_and_a_run_that_diverged_are_told_apart():
    pixels = torch.randint(0, 256, (4, 48, 32, 3), dtype=torch.uint8).numpy()
    tower = fold_image_tower(toy_model(seed=1))
    path = graph_of(tower, "image").file
    require_parity(tower, path, "image", pixels)
    with refused("export_differs", IntegrityError, tower="image", batch=1, input=0):
        require_parity(fold_image_tower(toy_model(seed=2)), path, "image", pixels)
    model = toy_model()
    with torch.no_grad():
        model.image.blocks[0].mlp.c_fc.weight.mul_(1e30)  # Finite; its products are not.
    tower = fold_image_tower(model)
    with refused("embedding_not_finite", InputError, tower="image"):
        require_parity(tower, graph_of(tower, "image").file, "image", pixels)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(value):
    model = toy_model()
    with torch.no_grad():
        model.text.blocks[1].lora.key.down[0, 0] = value
    fold_image_tower(model)
    with refused("weight_not_finite", InputError, tower="text", tensor="blocks.1.lora.key.down"):
        fold_text_tower(model)


def test_an_unknown_activation_is_refused():
    model = toy_model()
    model.image.blocks[0].mlp.gelu = torch.nn.Tanh()
    with refused("activation_unknown", UsageError, found="Tanh"):
        fold_image_tower(model)


# --- Smoothing: tests/parity/test_export.py checks that a tower computes the same


@pytest.fixture
def tower():
    return fold_image_tower(toy_model())


@pytest.mark.parametrize(
    ("site", "values", "code"),
    [
        ("blocks.2.ln_1", np.ones(WIDTH), "site_unknown"),
        ("blocks.0.mlp.fc2", np.ones(WIDTH), "site_unknown"),
        ("blocks.0.ln_1", np.ones(WIDTH - 1), "factors_unusable"),
        ("blocks.0.ln_1", np.zeros(WIDTH), "factors_unusable"),
        ("blocks.0.ln_2", np.full(WIDTH, np.nan), "factors_unusable"),
    ],
)
def test_factors_that_do_not_fit_are_refused(tower, site, values, code):
    with refused(code, InputError, site=site):
        smooth(tower, {site: values.astype(np.float32)})
