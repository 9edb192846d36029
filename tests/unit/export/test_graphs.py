"""The structure of exported float32 graphs: names, types, axes, and which operators."""

from collections import Counter

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from tests.helpers.toy_graphs import TOWERS, toy_graph
from upperson_calibration.block_linears import block_linears
from upperson_rt.towers import Tower

pytestmark = pytest.mark.timeout(240)  # The first test exports the towers.

LINEARS = [
    "blocks.0.attention.qkv/MatMul",
    "blocks.0.attention.out/MatMul",
    "blocks.0.mlp.fc1/MatMul",
    "blocks.0.mlp.fc2/MatMul",
    "blocks.1.attention.kv/MatMul",
    "blocks.1.attention.q/MatMul",
    "blocks.1.attention.out/MatMul",
    "blocks.1.mlp.fc1/MatMul",
    "blocks.1.mlp.fc2/MatMul",
]


def axes(value: onnx.ValueInfoProto) -> list[object]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_inputs_and_outputs_have_the_contracts_names_types_and_axes() -> None:
    image, text = toy_graph("image").graph, toy_graph("text").graph
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
    model = toy_graph(tower)
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
    assert sorted(item.node for item in block_linears(model)) == sorted(LINEARS)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_the_uint8_image_feeds_a_cast_alone() -> None:
    graph = toy_graph("image").graph
    readers = {node.op_type for node in graph.node if "image" in node.input}
    assert readers == {"Cast"}


def test_masks_are_finite() -> None:
    for initializer in toy_graph("text").graph.initializer:
        assert np.isfinite(numpy_helper.to_array(initializer)).all(), initializer.name


def test_the_query_scale_is_inside_the_weights() -> None:
    """No Mul or Div in attention: softmax(q k^T) v as TensorRT wants it."""
    for tower in TOWERS:
        nodes = toy_graph(tower).graph.node
        scaled = [node.name for node in nodes if node.op_type in ("Mul", "Div")]
        outside = {"patch/Mul", "projection/Div"}
        assert all("mlp" in name or name in outside for name in scaled), scaled
