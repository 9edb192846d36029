"""ONNX Runtime and OpenVINO: where they run, in what numbers, and what is an error."""

import os
import sys
from importlib.util import find_spec
from unittest.mock import Mock

import numpy as np
import onnx
import pytest

from tests.helpers.command_line import run_code
from tests.helpers.refused import refused
from tests.helpers.toy_bundle import save_graph
from upperson_onnxruntime.backend import session_options
from upperson_openvino import backend as openvino_backend
from upperson_openvino.backend import PIECE, OpenVinoBackend
from upperson_rt import backends
from upperson_rt.backends import auto_order, open_backend
from upperson_rt.errors import BackendError, UsageError
from upperson_rt.machine import Processor, processor
from upperson_rt.towers import run_tower


@pytest.fixture
def text_tower(toy_bundle):
    return toy_bundle / "text.fp32.onnx"


@pytest.fixture(params=["onnxruntime", "openvino"])
def name(request):
    if find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return request.param


def test_backends_agree_and_outputs_belong_to_the_caller(text_tower, name):
    ids = np.array([[3, 4, 5, 0], [6, 7, 8, 9]], np.int32)
    backend = open_backend(text_tower, name, threads=1)
    assert (backend.name, backend.device) == (name, "cpu")
    assert backend.version[0].isdigit()
    embeds = backend.run({"input_ids": ids})["text_embeds"]
    reference = open_backend(text_tower, "onnxruntime", threads=1).run({"input_ids": ids})
    np.testing.assert_allclose(embeds, reference["text_embeds"], atol=1e-5)
    kept = embeds.copy()
    backend.run({"input_ids": ids[::-1]})
    np.testing.assert_array_equal(embeds, kept)


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_nothing_is_read_beyond_a_tensor(tmp_path, name, batch_dims):
    """A graph takes from four rows as text towers of before 27 November 2026 did."""
    rows = np.arange(1, 17, dtype=np.float32).reshape(4, 4)
    shape = "4, 4" if batch_dims == 0 else "4"
    graph = f"""rows (int32[4, L] ids) => (float[{shape}] taken) {{
        found = ArgMax<axis = -1, keepdims = 0>(ids)
        places = Unsqueeze(found, last)
        taken = GatherND<batch_dims = {batch_dims}>(rows, places)
    }}"""
    save_graph(tmp_path / "rows.onnx", graph, rows=rows, last=np.array([1]))
    backend = open_backend(tmp_path / "rows.onnx", name, threads=1)
    ids = np.zeros((4, 4000), np.int32)
    ids[range(4), [3, 0, 2, 1]] = 1
    expected = rows[[3, 0, 2, 1]] if batch_dims == 0 else rows[range(4), [3, 0, 2, 1]]
    np.testing.assert_array_equal(backend.run({"ids": ids})["taken"], expected)
    for place in (4, 5, 100, 3999):
        ids[:] = 0
        ids[:, place] = 1
        if name == "openvino":
            assert not backend.run({"ids": ids})["taken"].any()
        else:
            with refused("run_failed", BackendError):
                backend.run({"ids": ids})


def test_what_cannot_run_is_an_error_and_nothing_falls_back(text_tower, tmp_path, name, capfd):
    missing = {"onnxruntime": ("provider_missing", "device_unknown")}
    codes = missing.get(name, ("device_missing", "device_missing"))
    for device, code in zip(("cuda:7", "tpu"), codes, strict=True):
        with refused(code, BackendError, device=device):
            open_backend(text_tower, name, device=device)
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"\x08\x07junk")
    with refused("graph_not_loaded", BackendError, path=str(path)):
        open_backend(path, name)
    with refused("run_failed", BackendError):
        open_backend(text_tower, name, threads=1).run({"other": np.zeros((1, 2), np.int32)})
    # Nor does a library print what a graph holds: names would reach the terminal as they are.
    graph = "graph (float[N, M] x) => (float[N, M] y) { y = Add(x, w) }"
    save_graph(path, graph, w=np.ones(7, "f"))
    model = onnx.load(path)
    model.graph.node[0].name = "\x1b]0;owned\x07"
    onnx.save(model, path)
    backend = open_backend(path, name, threads=1)
    capfd.readouterr()  # OpenVINO says something of a file that is no graph.
    with refused("run_failed", BackendError):
        backend.run({"x": np.zeros((1, 3), np.float32)})
    assert capfd.readouterr() == ("", "")


def test_auto_takes_the_first_installed_and_bad_arguments_are_refused(text_tower, monkeypatch):
    assert auto_order("cpu") == ("onnxruntime", "openvino")
    assert auto_order("cuda:1") == ("tensorrt", "onnxruntime")
    assert open_backend(text_tower, threads=1).name == "onnxruntime"
    with refused("backend_unknown", UsageError):
        open_backend(text_tower, "tensorflow")
    with refused("out_of_range", UsageError, what="threads"):
        open_backend(text_tower, threads=0)
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with refused("no_backend", BackendError, device="cpu", extra="cpu"):
        open_backend(text_tower)


def test_openvino_on_another_device_is_noticed(text_tower, monkeypatch):
    core = pytest.importorskip("openvino").Core
    run = core.compile_model
    monkeypatch.setattr(core, "available_devices", ["CPU", "GPU"])
    monkeypatch.setattr(
        core, "compile_model", lambda self, model, device, config: run(self, model, "CPU", config)
    )
    with refused("device_not_started", BackendError, device="gpu"):
        open_backend(text_tower, "openvino", device="gpu")


def test_the_cuda_provider_is_used_and_nothing_else(text_tower, monkeypatch, capsys):
    """ONNX Runtime behaves as with a GPU: the session is a real one on the CPU."""
    ort, opened, starts = pytest.importorskip("onnxruntime"), [], True
    real = ort.InferenceSession

    def session(path, options, providers, enable_fallback=1):
        opened.append((providers, enable_fallback))
        made = real(path, options, providers=["CPUExecutionProvider"])
        if starts:
            made.get_providers = lambda: [name for name, _ in providers]
        return made

    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: available)
    monkeypatch.setattr(ort, "InferenceSession", session)
    monkeypatch.setattr(ort, "preload_dlls", lambda: print("no libcudnn.so.9"), raising=False)
    backend = open_backend(text_tower, "onnxruntime", device="cuda:1")
    assert (backend.name, backend.device, backend.max_batch) == ("onnxruntime", "cuda:1", None)
    assert opened == [([("CUDAExecutionProvider", {"device_id": "1", "use_tf32": "0"})], 0)]
    assert capsys.readouterr() == ("", "no libcudnn.so.9\n")
    open_backend(text_tower, "onnxruntime", device="cpu")
    assert capsys.readouterr() == ("", "")
    starts = False  # ONNX Runtime falls back silently.
    with refused("device_not_started", BackendError, device="cuda"):
        open_backend(text_tower, "onnxruntime", device="cuda")
    monkeypatch.setattr(ort, "__version__", "1.17.3")  # Without the switch for TF32.
    with refused("onnxruntime_too_old", BackendError, version="1.17.3"):
        open_backend(text_tower, "onnxruntime", device="cuda")
    assert open_backend(text_tower, "onnxruntime", device="cpu").name == "onnxruntime"


def test_a_gpu_that_fails_later_is_an_error_and_not_the_cpu(text_tower):
    pytest.importorskip("onnxruntime")
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    backend = open_backend(text_tower, "onnxruntime", threads=1)
    broken = Mock(wraps=backend._session._sess)
    broken.run.side_effect = state.EPFail("CUDA failure 719")
    backend._session._sess = broken
    with refused("run_failed", BackendError):
        backend.run({"input_ids": np.array([[3]], np.int32)})
    assert broken.run.call_count == 1


def test_threads_of_onnx_runtime_sleep_while_they_wait():
    options = session_options(pytest.importorskip("onnxruntime"), 2)
    for pool in ("intra_op", "inter_op"):
        assert options.get_session_config_entry(f"session.{pool}.allow_spinning") == "0"
    assert options.intra_op_num_threads == 2


@pytest.mark.skipif(sys.platform != "linux", reason="alternate signal stacks are Linux's")
def test_ctrl_c_after_openvino_is_an_exception_and_no_crash(toy_bundle):
    code = """
import gc, signal, sys
from upperson_rt.backends import open_backend
towers = {name: open_backend(f"{sys.argv[1]}/{name}.fp32.onnx", "openvino")
          for name in ("image", "text")}
del towers["image"]
gc.collect()
towers.clear()
gc.collect()
signal.signal(signal.SIGINT, signal.default_int_handler)  # A job in the background ignores it.
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = run_code(code, toy_bundle)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


# --- What OpenVINO computes floats in: float32 for float graphs, bf16 beside int8 where it is


@pytest.fixture
def has_bf16():
    openvino = pytest.importorskip("openvino")
    capabilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return "BF16" in capabilities and processor().has_bf16


WEIGHT = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
X = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)


@pytest.fixture
def float_graph(tmp_path):
    graph = "product (float[N, 64] x) => (float[N, 64] y) { y = MatMul(x, w) }"
    return save_graph(tmp_path / "float.onnx", graph, w=WEIGHT)


@pytest.fixture
def int8_graph(tmp_path):
    """The same with Q/DQ around both operands."""
    graph = """product (float[N, 64] x) => (float[N, 64] y) {
        x8 = QuantizeLinear(x, scale, zero)
        xq = DequantizeLinear(x8, scale, zero)
        w = DequantizeLinear(w8, scale, zero)
        y = MatMul(xq, w)
    }"""
    constants = {"scale": np.array(0.05, np.float32), "zero": np.array(0, np.int8)}
    w8 = np.clip(np.round(WEIGHT / 0.05), -127, 127).astype(np.int8)
    return save_graph(tmp_path / "int8.onnx", graph, w8=w8, **constants)


def test_floats_are_float32_but_bf16_beside_int8_where_the_cpu_has_it(
    float_graph, int8_graph, has_bf16, monkeypatch
):
    backend = OpenVinoBackend(float_graph, threads=1)
    assert backend.float_type == "f32"
    np.testing.assert_allclose(backend.run({"x": X})["y"], X @ WEIGHT, atol=1e-4)
    backend = OpenVinoBackend(int8_graph, threads=1)
    bounded = "ONEDNN_MAX_CPU_ISA" in os.environ  # By the kernels of an older processor.
    assert backend.float_type == ("bf16" if has_bf16 and not bounded else "f32")
    monkeypatch.setattr(openvino_backend, "_has_bf16", lambda core, device: False)
    exact = OpenVinoBackend(int8_graph, threads=1)
    assert exact.float_type == "f32"
    expected = exact.run({"x": X})["y"]
    error = np.abs(backend.run({"x": X})["y"] - expected).max()
    assert error <= 2**-7 * np.abs(expected).max()


def test_bf16_that_the_cpu_would_emulate_or_has_no_kernels_for_is_not_used(int8_graph, monkeypatch):
    pytest.importorskip("openvino")
    with monkeypatch.context() as patch:
        patch.setenv("ONEDNN_MAX_CPU_ISA", "avx2")
        assert OpenVinoBackend(int8_graph, threads=1).float_type == "f32"
    without = Processor("Skylake", frozenset({"avx2", "avx512f", "avx512_vnni"}))
    monkeypatch.setattr(openvino_backend, "processor", lambda: without)
    assert OpenVinoBackend(int8_graph, threads=1).float_type == "f32"


def test_floats_other_than_wanted_are_refused(float_graph, int8_graph, has_bf16, monkeypatch):
    graph, found = (float_graph, "bf16") if has_bf16 else (int8_graph, "f32")
    if has_bf16:  # Which OpenVINO then chooses by itself.
        core = pytest.importorskip("openvino").Core
        compile_model = core.compile_model

        def without_hint(self, model, device, config):
            del config["INFERENCE_PRECISION_HINT"]
            return compile_model(self, model, device, config)

        monkeypatch.setattr(core, "compile_model", without_hint)
    else:
        monkeypatch.setattr(openvino_backend, "_has_bf16", lambda core, device: True)
    with refused("float_type_differs", BackendError, found=found):
        OpenVinoBackend(graph, threads=1)


# --- Pictures go through OpenVINO in pieces of one size, for which a graph of its own is compiled

SIZE = (4, 2, 3)
TOWER_WEIGHT = np.random.default_rng(0).normal(size=(24, 5)).astype(np.float32)


@pytest.fixture
def image_tower(tmp_path):
    """A tower that multiplies each picture, as one row, by a constant matrix."""
    pytest.importorskip("openvino")
    graph = """tower (uint8[N, 4, 2, 3] image) => (float[N, 5] image_embeds) {
        x = Cast<to = 1>(image)
        r = Reshape(x, row)
        image_embeds = MatMul(r, weight)
    }"""
    row = np.array([-1, 24], np.int64)
    return save_graph(tmp_path / "image.onnx", graph, row=row, weight=TOWER_WEIGHT)


def test_pictures_run_in_pieces_whatever_their_number(image_tower):
    backend = OpenVinoBackend(image_tower, threads=1)
    assert backend.max_batch == PIECE
    for count in (1, PIECE - 1, PIECE + 1, 3 * PIECE):
        pixels = np.random.default_rng(count).integers(0, 256, (count, *SIZE), np.uint8)
        expected = pixels.reshape(count, -1).astype(np.float32) @ TOWER_WEIGHT
        found = run_tower(backend, "image", pixels)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-2)
    # Whole pieces have a graph of their own, which keeps its last result.
    full = backend.run({"image": np.full((PIECE, *SIZE), 7, np.uint8)})["image_embeds"]
    np.testing.assert_array_equal(backend._piece.get_output_tensor().data, full)


def test_a_failed_run_is_an_error_and_not_the_result_of_the_run_before(image_tower):
    backend = OpenVinoBackend(image_tower, threads=2)
    for count in (3, PIECE):
        right = {"image": np.zeros((count, *SIZE), np.uint8)}
        backend.run(right)
        for wrong in (
            {"image": np.zeros((count, 9, 9, 3), np.uint8)},
            {},
            {"image": right["image"].astype(np.float32)},
            {"pixels": right["image"]},
        ):
            with refused("run_failed", BackendError):
                backend.run(wrong)
        np.testing.assert_array_equal(backend.run(right)["image_embeds"], 0)
