"""What OpenVINO computes floats in: float32 for float graphs, bf16 beside int8 where it is."""

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.refused import refused
from upperson_openvino.backend import OpenVinoBackend
from upperson_rt.errors import BackendError
from upperson_rt.machine import Processor, processor

openvino = pytest.importorskip("openvino")

CPU_HAS_BF16 = (
    "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    and processor().has_bf16
)
BOUNDED = "ONEDNN_MAX_CPU_ISA" in os.environ
"""Whether the whole session runs with the kernels of an older processor."""


def make_product(path, *, int8):
    """Write y = x W, with Q/DQ around both operands or without."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(64, 64)).astype(np.float32)
    constants = {"scale": np.array(0.05, np.float32), "zero": np.array(0, np.int8)}
    nodes = []
    if int8:
        constants["w8"] = np.clip(np.round(weight / 0.05), -127, 127).astype(np.int8)
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["x8"]),
            helper.make_node("DequantizeLinear", ["x8", "scale", "zero"], ["xq"]),
            helper.make_node("DequantizeLinear", ["w8", "scale", "zero"], ["w"]),
        ]
    else:
        constants["w"] = weight
    nodes.append(helper.make_node("MatMul", ["xq" if int8 else "x", "w"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 64])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 9
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


@pytest.fixture
def float_graph(tmp_path):
    return make_product(tmp_path / "float.onnx", int8=False)


@pytest.fixture
def int8_graph(tmp_path):
    return make_product(tmp_path / "int8.onnx", int8=True)


def test_a_float_graph_computes_in_float32_on_every_cpu(float_graph):
    backend = OpenVinoBackend(float_graph, threads=1)
    assert backend.float_type == "f32"
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    weight = numpy_helper.to_array(onnx.load(float_graph).graph.initializer[-1])
    np.testing.assert_allclose(backend.run({"x": x})["y"], x @ weight, atol=1e-4)


def test_beside_int8_floats_are_bf16_where_the_cpu_has_it(int8_graph, monkeypatch):
    backend = OpenVinoBackend(int8_graph, threads=1)
    assert backend.float_type == ("bf16" if CPU_HAS_BF16 and not BOUNDED else "f32")
    monkeypatch.setattr("upperson_openvino.backend._has_bf16", lambda core, device: False)
    exact = OpenVinoBackend(int8_graph, threads=1)
    assert exact.float_type == "f32"
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    expected = exact.run({"x": x})["y"]
    error = np.abs(backend.run({"x": x})["y"] - expected).max()
    assert error <= 2**-7 * np.abs(expected).max()


def test_bf16_that_the_cpu_would_emulate_is_not_used(int8_graph, monkeypatch):
    without = Processor("Skylake", frozenset({"avx2", "avx512f", "avx512_vnni"}))
    monkeypatch.setattr("upperson_openvino.backend.processor", lambda: without)
    assert OpenVinoBackend(int8_graph, threads=1).float_type == "f32"


def test_no_bf16_is_asked_of_kernels_that_are_bounded(int8_graph, monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
    assert OpenVinoBackend(int8_graph, threads=1).float_type == "f32"


def test_floats_other_than_asked_for_are_refused(float_graph, int8_graph, monkeypatch):
    if CPU_HAS_BF16:  # Which OpenVINO then chooses by itself.
        compile_model = openvino.Core.compile_model

        def unasked(core, model, device, config):
            del config["INFERENCE_PRECISION_HINT"]
            return compile_model(core, model, device, config)

        monkeypatch.setattr(openvino.Core, "compile_model", unasked)
        with refused("float_type_differs", BackendError, found="bf16"):
            OpenVinoBackend(float_graph, threads=1)
    else:
        monkeypatch.setattr("upperson_openvino.backend._has_bf16", lambda core, device: True)
        with refused("float_type_differs", BackendError, found="f32"):
            OpenVinoBackend(int8_graph, threads=1)
