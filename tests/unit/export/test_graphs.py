"""The structure of exported float32 graphs: names, types, axes, and which operators."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from tests.helpers.toy_clip import toy_model
from tests.helpers.toy_graphs import FOLD, TOWERS, proto_of, toy_graph
from upperson_calibration.graph import BlockLinear
from upperson_export import graphs
from upperson_export.graphs import require_one_file, write_with_weights
from upperson_rt.errors import InputError
from upperson_rt.towers import Tower

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


def axes(value: onnx.ValueInfoProto) -> list[object]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_inputs_and_outputs_have_the_contracts_names_types_and_axes() -> None:
    image, text = (proto_of(toy_graph(tower)).graph for tower in TOWERS)
    assert [(v.name, v.type.tensor_type.elem_type, axes(v)) for v in image.input] == [
        ("image", TensorProto.UINT8, ["batch", 48, 32, 3])
    ]
    assert [(v.name, v.type.tensor_type.elem_type, axes(v)) for v in image.output] == [
        ("image_embeds", TensorProto.FLOAT, ["batch", 24])
    ]
    assert [(v.name, v.type.tensor_type.elem_type, axes(v)) for v in text.input] == [
        ("input_ids", TensorProto.INT32, ["batch", "length"])
    ]
    assert [(v.name, v.type.tensor_type.elem_type, axes(v)) for v in text.output] == [
        ("text_embeds", TensorProto.FLOAT, ["batch", 24])
    ]


@pytest.mark.parametrize("tower", TOWERS)
def test_the_graph_is_plain_and_readable(tower: Tower) -> None:
    model = proto_of(toy_graph(tower))
    operators = Counter(node.op_type for node in model.graph.node)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 19)]
    assert model.ir_version == 9
    assert not model.functions
    # Norms: two a block, and one or two outside. A decomposed one would overflow in FP16.
    assert operators["LayerNormalization"] == (6 if tower == "image" else 5)
    assert not {"Pow", "ReduceMean", "Erf", "Einsum", "If", "Loop"} & set(operators)
    assert operators["Softmax"] == 2
    assert operators["Cast"] == (1 if tower == "image" else 0)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


@pytest.mark.parametrize("tower", TOWERS)
def test_the_graph_is_described_by_its_tower(tower: Tower) -> None:
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


def test_weights_that_the_exporter_merged_are_not_exchanged(tmp_path: Path) -> None:
    tower = FOLD["image"](toy_model())
    model = toy_graph("image").load()
    twins = [model.graph.initializers[f"blocks.0.ln_{number}.bias"] for number in (1, 2)]
    twins[1].replace_all_uses_with(twins[0])
    del model.graph.initializers[str(twins[1].name)]
    ir.save(model, tmp_path / "merged.onnx")
    merged = replace(toy_graph("image"), file=tmp_path / "merged.onnx")
    assert write_with_weights(merged, tower, tmp_path / "other.onnx") is None
    assert not (tmp_path / "other.onnx").exists()


def test_the_uint8_image_feeds_a_cast_alone() -> None:
    graph = proto_of(toy_graph("image")).graph
    readers = {node.op_type for node in graph.node if "image" in node.input}
    assert readers == {"Cast"}


def test_masks_are_finite() -> None:
    for initializer in proto_of(toy_graph("text")).graph.initializer:
        assert np.isfinite(numpy_helper.to_array(initializer)).all(), initializer.name


def test_the_query_scale_is_inside_the_weights() -> None:
    """No Mul or Div in attention: softmax(q k^T) v as TensorRT wants it."""
    for tower in TOWERS:
        nodes = proto_of(toy_graph(tower)).graph.node
        scaled = [node.name for node in nodes if node.op_type in ("Mul", "Div")]
        outside = {"patch/Mul", "projection/Div"}
        assert all("mlp" in name or name in outside for name in scaled), scaled


def test_a_tower_that_no_file_can_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = FOLD["text"](toy_model())
    require_one_file(tower, "text")
    monkeypatch.setattr(graphs, "MOST_FILE_BYTES", 1_000_000)
    with pytest.raises(InputError, match=r"the text tower has 0\.0 GiB of weights .* smaller base"):
        require_one_file(tower, "text")
