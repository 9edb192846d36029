import builtins
import sys
from importlib.util import find_spec
from types import ModuleType
from unittest.mock import Mock

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.helpers.command_line import run_code
from tests.helpers.refused import refused
from tests.helpers.toy_bundle import make_toy_bundle
from upperson_rt import backends
from upperson_rt.backends import auto_order, open_backend
from upperson_rt.backends.onnxruntime import session_options
from upperson_rt.errors import BackendError, UsageError


@pytest.fixture(scope="module")
def text_tower(tmp_path_factory):
    return make_toy_bundle(tmp_path_factory.mktemp("backends") / "bundle") / "text.fp32.onnx"


@pytest.fixture(params=["onnxruntime", "openvino"])
def name(request):
    if find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return request.param


def test_backends_agree_and_say_what_runs(text_tower, name):
    ids = np.array([[3, 4, 5, 0], [6, 7, 8, 9]], np.int32)
    backend = open_backend(text_tower, name, threads=1)
    assert (backend.name, backend.device) == (name, "cpu")
    assert backend.version[0].isdigit()
    embeds = backend.run({"input_ids": ids})["text_embeds"]
    reference = open_backend(text_tower, "onnxruntime", threads=1).run({"input_ids": ids})
    np.testing.assert_allclose(embeds, reference["text_embeds"], atol=1e-5)


def test_outputs_belong_to_the_caller(text_tower, name):
    backend = open_backend(text_tower, name, threads=1)
    first = backend.run({"input_ids": np.array([[3]], np.int32)})["text_embeds"]
    kept = first.copy()
    backend.run({"input_ids": np.array([[4, 5]], np.int32)})
    np.testing.assert_array_equal(first, kept)


def rows_that_argmax_finds(path, batch_dims):
    """Write a graph that takes from four rows as text towers of before 27 November 2026 did."""
    rows = np.arange(1, 17, dtype=np.float32).reshape(4, 4)
    graph = helper.make_graph(
        [
            helper.make_node("ArgMax", ["ids"], ["found"], axis=-1, keepdims=0),
            helper.make_node("Unsqueeze", ["found", "last"], ["places"]),
            helper.make_node("GatherND", ["rows", "places"], ["taken"], batch_dims=batch_dims),
        ],
        "rows",
        [helper.make_tensor_value_info("ids", TensorProto.INT32, [4, None])],
        [helper.make_tensor_value_info("taken", TensorProto.FLOAT, [4, 4][batch_dims:])],
        [numpy_helper.from_array(rows, "rows"), numpy_helper.from_array(np.array([1]), "last")],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return rows


@pytest.mark.parametrize("batch_dims", [0, 1])
def test_nothing_is_read_beyond_a_tensor(tmp_path, name, batch_dims):
    rows = rows_that_argmax_finds(tmp_path / "rows.onnx", batch_dims)
    backend = open_backend(tmp_path / "rows.onnx", name, threads=1)
    ids = np.zeros((4, 4000), np.int32)
    for number, place in enumerate((3, 0, 2, 1)):
        ids[number, place] = 1
    taken = backend.run({"ids": ids})["taken"]
    expected = rows[[3, 0, 2, 1]] if batch_dims == 0 else rows[range(4), [3, 0, 2, 1]]
    np.testing.assert_array_equal(taken, expected)
    for place in (4, 5, 100, 3999):
        ids[:] = 0
        ids[:, place] = 1
        if name == "openvino":
            assert not backend.run({"ids": ids})["taken"].any()
        else:
            with refused("run_failed", BackendError):
                backend.run({"ids": ids})


def test_opsets_are_found_where_openvino_2024_has_them(tmp_path, monkeypatch):
    opset8 = pytest.importorskip("openvino.opset8")
    runtime = ModuleType("openvino.runtime")
    runtime.opset8 = opset8
    monkeypatch.delattr("openvino.opset8")
    monkeypatch.setitem(sys.modules, "openvino.opset8", None)
    monkeypatch.setitem(sys.modules, "openvino.runtime", runtime)
    rows = rows_that_argmax_finds(tmp_path / "rows.onnx", 0)
    taken = open_backend(tmp_path / "rows.onnx", "openvino", threads=1).run(
        {"ids": np.eye(4, dtype=np.int32)}
    )["taken"]
    np.testing.assert_array_equal(taken, rows)


def test_what_cannot_run_is_an_error_and_nothing_falls_back(text_tower, tmp_path, name):
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


def test_auto_takes_the_first_installed(text_tower, monkeypatch):
    assert auto_order("cpu") == ("onnxruntime", "openvino")
    assert auto_order("cuda:1") == ("tensorrt", "onnxruntime")
    assert open_backend(text_tower, threads=1).name == "onnxruntime"
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    with refused("no_backend", BackendError, device="cpu", extra="cpu"):
        open_backend(text_tower)


@pytest.mark.parametrize("package", ["onnxruntime", "openvino"])
def test_missing_package_says_how_to_install_it(text_tower, monkeypatch, package):
    real_import = builtins.__import__

    def fail(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fail)
    monkeypatch.delitem(sys.modules, package, raising=False)
    with refused("extra_missing", BackendError, package=package, extra="cpu"):
        open_backend(text_tower, package)


def test_silent_fall_back_of_onnx_runtime_is_noticed(text_tower, monkeypatch):
    ort = pytest.importorskip("onnxruntime")
    available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: available)
    session = ort.InferenceSession
    monkeypatch.setattr(
        ort,
        "InferenceSession",
        lambda path, options, providers, **others: session(
            path, options, providers=["CPUExecutionProvider"], **others
        ),
    )
    with refused("device_not_started", BackendError, device="cuda"):
        open_backend(text_tower, "onnxruntime", device="cuda")


def test_openvino_on_another_device_is_noticed(text_tower, monkeypatch):
    core = pytest.importorskip("openvino").Core
    monkeypatch.setattr(core, "available_devices", ["CPU", "GPU"])
    monkeypatch.setattr(
        core,
        "compile_model",
        lambda self, model, device, config, run=core.compile_model: run(self, model, "CPU", config),
    )
    with refused("device_not_started", BackendError, device="gpu"):
        open_backend(text_tower, "openvino", device="gpu")


class FakeCuda:
    """ONNX Runtime as it behaves with a GPU: the session is a real one on the CPU."""

    def __init__(self, monkeypatch):
        self.ort = pytest.importorskip("onnxruntime")
        self.session, self.asked, self.preloaded = self.ort.InferenceSession, [], 0
        available = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr(self.ort, "get_available_providers", lambda: available)
        monkeypatch.setattr(self.ort, "InferenceSession", self.open)
        monkeypatch.setattr(self.ort, "preload_dlls", self.preload, raising=False)

    def preload(self):
        print("Failed to load libcudnn.so.9")
        self.preloaded += 1

    def open(self, path, options, providers, enable_fallback=1):
        self.asked.append((providers, enable_fallback))
        session = self.session(path, options, providers=["CPUExecutionProvider"])
        session.get_providers = lambda: [name for name, _ in providers]
        return session


def test_the_cuda_provider_is_used_and_nothing_else(text_tower, monkeypatch, capsys):
    cuda = FakeCuda(monkeypatch)
    backend = open_backend(text_tower, "onnxruntime", device="cuda:1")
    assert (backend.name, backend.device, backend.max_batch) == ("onnxruntime", "cuda:1", None)
    assert cuda.asked == [([("CUDAExecutionProvider", {"device_id": "1", "use_tf32": "0"})], 0)]
    assert cuda.preloaded == 1
    assert capsys.readouterr() == ("", "Failed to load libcudnn.so.9\n")
    open_backend(text_tower, "onnxruntime", device="cpu")
    assert cuda.preloaded == 1


def test_an_onnxruntime_without_the_switch_for_tf32(text_tower, monkeypatch):
    cuda = FakeCuda(monkeypatch)
    monkeypatch.setattr(cuda.ort, "__version__", "1.17.3")
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


def test_bad_arguments(text_tower):
    with refused("backend_unknown", UsageError):
        open_backend(text_tower, "tensorflow")
    with refused("out_of_range", UsageError, what="threads"):
        open_backend(text_tower, threads=0)


@pytest.mark.skipif(sys.platform != "linux", reason="alternate signal stacks are Linux's")
@pytest.mark.parametrize("first", ["image", "text"])
def test_ctrl_c_after_openvino_is_an_exception_and_no_crash(text_tower, first):
    code = """
import gc, signal, sys
from upperson_rt.backends import open_backend
towers = {name: open_backend(f"{sys.argv[1]}/{name}.fp32.onnx", "openvino")
          for name in ("image", "text")}
del towers[sys.argv[2]]
gc.collect()
towers.clear()
gc.collect()
signal.signal(signal.SIGINT, signal.default_int_handler)  # A job in the background ignores it.
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""
    done = run_code(code, text_tower.parent, first)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def test_a_graph_that_fails_prints_nothing_by_itself(tmp_path, name, capfd):
    """Its names would reach the terminal as they are."""
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"], name="\x1b]0;owned\x07")],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", "M"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones(7, np.float32), "w")],
    )
    opsets = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    onnx.save(model, tmp_path / "graph.onnx")
    backend = open_backend(tmp_path / "graph.onnx", name, threads=1)
    with refused("run_failed", BackendError):
        backend.run({"x": np.zeros((1, 3), np.float32)})
    assert capfd.readouterr() == ("", "")
