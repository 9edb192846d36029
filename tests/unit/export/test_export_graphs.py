"""The structure of exported graphs: names, types, axes, and where Q/DQ stands."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from tests.helpers.toy_clip import toy_ids, toy_model, toy_pixels
from upperson_calibration.reader import BatchReader
from upperson_export.fold import fold_image_tower, fold_text_tower
from upperson_export.onnx import export_onnx
from upperson_export.quantize import block_linears, quantize_int8
from upperson_rt.backends import open_backend
from upperson_rt.encoder import run_tower

pytestmark = pytest.mark.timeout(240)

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


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export both towers of the toy in fp32 and int8 once."""
    folder = tmp_path_factory.mktemp("graphs")
    model = toy_model()
    export_onnx(fold_image_tower(model), "image", folder / "image.fp32.onnx", example=toy_pixels(3))
    export_onnx(fold_text_tower(model), "text", folder / "text.fp32.onnx", example=toy_ids([4, 9]))
    readers = {
        "image": BatchReader("image", toy_pixels(24).numpy()),
        "text": BatchReader("input_ids", toy_ids([5, 9, 14] * 8).numpy()),
    }
    for tower, reader in readers.items():
        quantize_int8(folder / f"{tower}.fp32.onnx", folder / f"{tower}.int8.onnx", reader)
    return folder


def axes(value: onnx.ValueInfoProto) -> list[object]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_inputs_and_outputs_have_the_contracts_names_types_and_axes(
    graphs: Path, precision: str
) -> None:
    image = onnx.load(graphs / f"image.{precision}.onnx").graph
    text = onnx.load(graphs / f"text.{precision}.onnx").graph
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


@pytest.mark.parametrize("tower", ["image", "text"])
def test_the_graph_is_plain_and_readable(graphs: Path, tower: str) -> None:
    model = onnx.load(graphs / f"{tower}.fp32.onnx")
    operators = Counter(node.op_type for node in model.graph.node)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 19)]
    assert not model.functions
    # Norms: two a block, and one or two outside. A decomposed one would overflow in FP16.
    assert operators["LayerNormalization"] == (6 if tower == "image" else 5)
    assert not {"Pow", "ReduceMean", "Erf", "Einsum", "If", "Loop"} & set(operators)
    assert operators["Softmax"] == 2
    assert operators["Cast"] == (1 if tower == "image" else 0)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert block_linears(model) == LINEARS or sorted(block_linears(model)) == sorted(LINEARS)
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


def test_the_uint8_image_feeds_a_cast_alone(graphs: Path) -> None:
    graph = onnx.load(graphs / "image.fp32.onnx").graph
    readers = {node.op_type for node in graph.node if "image" in node.input}
    assert readers <= {"Cast", "Shape"}


def test_masks_are_finite(graphs: Path) -> None:
    for initializer in onnx.load(graphs / "text.fp32.onnx").graph.initializer:
        assert np.isfinite(numpy_helper.to_array(initializer)).all(), initializer.name


def test_the_query_scale_is_inside_the_weights(graphs: Path) -> None:
    """No Mul or Div in attention: softmax(q k^T) v as TensorRT wants it."""
    for tower in ("image", "text"):
        nodes = onnx.load(graphs / f"{tower}.fp32.onnx").graph.node
        scaled = [node.name for node in nodes if node.op_type in ("Mul", "Div")]
        outside = {"patch/Mul", "projection/Div"}
        assert all("mlp" in name or name in outside for name in scaled), scaled


@pytest.mark.parametrize("tower", ["image", "text"])
def test_int8_quantizes_the_block_linears_and_nothing_else(graphs: Path, tower: str) -> None:
    graph = onnx.load(graphs / f"{tower}.int8.onnx").graph
    producer = {output: node for node in graph.node for output in node.output}
    quantized = [
        node.name
        for node in graph.node
        if any(
            name in producer and producer[name].op_type == "DequantizeLinear" for name in node.input
        )
    ]
    # In the last block the pooled row is taken from the tensor that keys and values share.
    taken = [name for name in quantized if name.startswith("blocks.1/")]
    assert len(taken) <= 1
    assert all("Slice" in name or "Gather" in name for name in taken)
    assert sorted(set(quantized) - set(taken)) == sorted(LINEARS)
    for node in graph.node:
        if node.name in LINEARS:
            assert [producer[name].op_type for name in node.input] == ["DequantizeLinear"] * 2


@pytest.mark.parametrize("tower", ["image", "text"])
def test_int8_is_symmetric_per_channel_for_weights_per_tensor_for_activations(
    graphs: Path, tower: str
) -> None:
    graph = onnx.load(graphs / f"{tower}.int8.onnx").graph
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    weights = activations = 0
    for node in graph.node:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        value, scale, zero = node.input
        assert constants[zero].dtype == np.int8
        assert not constants[zero].any()
        assert (constants[scale] > 0).all()
        if node.op_type == "DequantizeLinear" and value in constants:
            weights += 1
            assert constants[scale].shape == (constants[value].shape[1],)
        elif node.op_type == "QuantizeLinear":
            activations += 1
            assert constants[scale].size == 1
    assert weights == len(LINEARS)
    assert 0 < activations <= len(LINEARS)


@pytest.mark.parametrize(
    ("tower", "rows"), [("image", toy_pixels(17)), ("text", toy_ids([7] * 17))]
)
def test_int8_stays_close_to_fp32(graphs: Path, tower: str, rows: object) -> None:
    found = {
        precision: run_tower(
            open_backend(graphs / f"{tower}.{precision}.onnx", "onnxruntime"),
            tower,  # type: ignore[arg-type]
            rows.numpy(),  # type: ignore[attr-defined]
        )
        for precision in ("fp32", "int8")
    }
    cosine = (found["fp32"] * found["int8"]).sum(axis=1)
    assert cosine.min() > 0.98
    assert cosine.min() < 1 - 1e-7, "int8 did not change anything"
