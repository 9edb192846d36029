"""Pictures go through OpenVINO in pieces of one size, for which a graph of its own is compiled."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.refused import refused
from upperson_openvino import backend as backend_module
from upperson_openvino.backend import PIECE, OpenVinoBackend
from upperson_rt.errors import BackendError
from upperson_rt.towers import run_tower

pytest.importorskip("openvino")

SIZE = (4, 2, 3)
WIDTH = 5


def write_tower(path, name, shape, dtype, output):
    """Write a tower that multiplies what enters it, as one row, by a constant matrix."""
    weight = np.random.default_rng(0).normal(size=(int(np.prod(SIZE)), WIDTH)).astype(np.float32)
    row = np.array([-1, len(weight)], np.int64)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", [name], ["x"], to=TensorProto.FLOAT),
            helper.make_node("Reshape", ["x", "row"], ["r"]),
            helper.make_node("MatMul", ["r", "weight"], [output]),
        ],
        "tower",
        [helper.make_tensor_value_info(name, dtype, shape)],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["N", WIDTH])],
        [numpy_helper.from_array(value, key) for key, value in (("row", row), ("weight", weight))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture
def image_tower(tmp_path):
    return write_tower(
        tmp_path / "image.onnx", "image", ["N", *SIZE], TensorProto.UINT8, "image_embeds"
    )


@pytest.fixture
def text_tower(tmp_path):
    return write_tower(
        tmp_path / "text.onnx", "input_ids", ["N", "L"], TensorProto.INT32, "text_embeds"
    )


@pytest.mark.parametrize("count", [1, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE])
def test_every_number_of_pictures_comes_out_right(image_tower, count):
    backend = OpenVinoBackend(image_tower, threads=1)
    assert backend.max_batch == PIECE
    pixels = np.random.default_rng(count).integers(0, 256, (count, *SIZE), np.uint8)
    weight = numpy_helper.to_array(onnx.load(image_tower).graph.initializer[1])
    expected = pixels.reshape(count, -1).astype(np.float32) @ weight
    np.testing.assert_allclose(run_tower(backend, "image", pixels), expected, rtol=1e-4, atol=1e-2)


def test_full_pieces_run_in_a_graph_without_unknown_sizes(image_tower):
    backend = OpenVinoBackend(image_tower, threads=1)
    piece, any_number = (
        request.get_compiled_model().inputs[0].get_partial_shape()
        for request in (backend._piece, backend._any)
    )
    assert piece.is_static
    assert list(piece.to_shape()) == [PIECE, *SIZE]
    assert any_number.is_dynamic
    # Their results differ in the tensors that they leave behind.
    full = backend.run({"image": np.full((PIECE, *SIZE), 7, np.uint8)})["image_embeds"]
    np.testing.assert_array_equal(backend._piece.get_output_tensor().data, full)
    backend.run({"image": np.zeros((3, *SIZE), np.uint8)})
    assert backend._any.get_output_tensor().shape[0] == 3


def test_captions_of_any_number_run_at_once(text_tower):
    assert OpenVinoBackend(text_tower, threads=1).max_batch is None


def test_many_threads_get_all_pictures_at_once(image_tower, monkeypatch):
    monkeypatch.setattr(backend_module, "_FEW_THREADS", 0)
    assert OpenVinoBackend(image_tower, threads=1).max_batch is None


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [3, PIECE])
def test_a_failed_run_is_an_error_and_not_the_result_of_the_run_before(image_tower, threads, count):
    backend = OpenVinoBackend(image_tower, threads=threads)
    right = {"image": np.zeros((count, *SIZE), np.uint8)}
    backend.run(right)
    with refused("run_failed", BackendError):
        backend.run({"image": np.zeros((count, 9, 9, 3), np.uint8)})
    np.testing.assert_array_equal(backend.run(right)["image_embeds"], 0)


def test_inputs_of_another_name_or_type_are_refused(image_tower):
    backend = OpenVinoBackend(image_tower, threads=1)
    pixels = np.zeros((1, *SIZE), np.uint8)
    for inputs in ({}, {"image": pixels.astype(np.float32)}, {"pixels": pixels}):
        with refused("run_failed", BackendError):
            backend.run(inputs)
