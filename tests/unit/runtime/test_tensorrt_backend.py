import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.helpers.fake_tensorrt import VERSIONS, install_fake_tensorrt
from tests.helpers.refused import refused
from upperson_rt.backends import open_backend
from upperson_rt.bundle import Bundle
from upperson_rt.errors import BackendError, UsageError
from upperson_tensorrt.cache import EngineCache
from upperson_tensorrt.compile import compile_bundle
from upperson_tensorrt.plugin import TensorRtBackend

MAX_BATCH = 8


@pytest.fixture(scope="module")
def caches(toy_bundle, tmp_path_factory):
    """A cache with engines of each version."""
    found = {}
    for version in VERSIONS:
        with pytest.MonkeyPatch.context() as monkeypatch:
            install_fake_tensorrt(monkeypatch, version)
            found[version] = tmp_path_factory.mktemp("cache")
            compile_bundle(toy_bundle, "fp32", max_batch=MAX_BATCH, cache=found[version])
    return found


@pytest.fixture
def driver(caches, monkeypatch, request):
    """A driver and a TensorRT of a version in their place."""
    version = getattr(request, "param", VERSIONS[0])
    driver, driver.trt = install_fake_tensorrt(monkeypatch, version)
    monkeypatch.setenv("UPPERSON_CACHE", str(caches[version]))
    return driver


on_each_version = pytest.mark.parametrize("driver", VERSIONS, indirect=True)


@pytest.fixture
def open_image(toy_bundle):
    return lambda **options: TensorRtBackend(toy_bundle / "image.fp32.onnx", **options)


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 24, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def assert_right(toy_bundle):
    """A function that embeds images and compares them with ONNX Runtime's, bit by bit."""
    reference = open_backend(toy_bundle / "image.fp32.onnx", "onnxruntime", threads=1)

    def check(backend, rows):
        found = backend.run({"image": rows})["image_embeds"]
        assert (found.shape, found.dtype) == ((len(rows), 16), np.float32)
        if len(rows):
            expected = reference.run({"image": np.ascontiguousarray(rows)})["image_embeds"]
            np.testing.assert_array_equal(found, expected)
        return found

    return check


@on_each_version
def test_a_bundle_runs_with_its_golden_samples_and_no_line_of_the_log_reaches_python(
    toy_bundle, driver, capfd, monkeypatch
):
    monkeypatch.setattr("upperson_rt.backends.find_spec", lambda name: name == "tensorrt")
    backend = open_backend(toy_bundle / "image.fp32.onnx", device="cuda")  # ``auto``.
    assert (backend.name, backend.device) == ("tensorrt", "cuda:0")
    assert backend.version == driver.trt.__version__
    assert backend.record.variant == "fp32"
    opened = Bundle.open(toy_bundle, "fp32", "tensorrt", "cuda")
    assert min(check.min_cosine for check in opened.check_golden_samples()) > 0.99999
    assert opened.encoder().encode_texts(["a man in red", "green"]).shape == (2, 16)
    assert driver.trt.behaviour.python_lines == []
    assert capfd.readouterr().out == ""  # Where programs expect JSON.


def test_any_batch_and_any_view_is_right_and_the_callers_own(open_image, driver, assert_right):
    backend = open_image()
    first = assert_right(backend, images(2))
    kept = first.copy()
    for count in (0, 1, 3, MAX_BATCH, MAX_BATCH + 1, 3 * MAX_BATCH + 5):
        assert_right(backend, images(count, seed=count))
    assert_right(backend, images(6)[::-2, :, ::-1])
    np.testing.assert_array_equal(first, kept)


def test_texts_of_any_length(toy_bundle, driver):
    backend = TensorRtBackend(toy_bundle / "text.fp32.onnx")
    reference = open_backend(toy_bundle / "text.fp32.onnx", "onnxruntime", threads=1)
    for tokens in (2, 5, 12):
        ids = np.random.default_rng(1).integers(2, 12, (11, tokens), dtype=np.int32)
        found, expected = (one.run({"input_ids": ids}) for one in (backend, reference))
        np.testing.assert_allclose(found["text_embeds"], expected["text_embeds"], atol=1e-6)
    with refused("run_failed", BackendError, found="int32 (2, 13)"):
        backend.run({"input_ids": np.ones((2, 13), np.int32)})


def test_wrong_inputs_and_a_failing_gpu_are_errors_and_the_next_run_works(
    open_image, driver, assert_right
):
    backend, rows = open_image(), images(1)
    wrong = (rows.astype(np.float32), rows[:, :-1], rows[0])
    for inputs in ({}, {"other": rows}, *({"image": array} for array in wrong)):
        with refused("run_failed", BackendError):
            backend.run(inputs)
    for function in ("cuStreamSynchronize", "cuMemcpyDtoHAsync_v2"):
        driver.fail[function] = 901
        with refused("cuda_failed", BackendError, function=function):
            backend.run({"image": images(1)})
        driver.fail.clear()
        assert all(not queued for queued in driver.streams.values())
        assert_right(backend, images(3))
    assert driver.current_gpu is None


@pytest.mark.parametrize(("eager", "cuda_graphs"), [(False, False), (True, True)])
def test_threads_share_two_lanes(open_image, driver, assert_right, eager, cuda_graphs):
    driver.eager = eager
    backend = open_image(cuda_graphs=cuda_graphs)

    def work(first):
        for i in range(first, 24, 4):
            assert_right(backend, images(1 + i % 11, seed=i))

    with ThreadPoolExecutor(4) as pool:  # Two must not wait for each other's lane.
        list(pool.map(work, range(4)))
    assert len(driver.streams) == 2
    assert all(not queued for queued in driver.streams.values())


def test_a_piece_is_copied_while_another_runs(open_image, driver, assert_right):
    backend = open_image()
    driver.calls.clear()
    assert_right(backend, images(3 * MAX_BATCH + 1))
    to_gpu, wait = "cuMemcpyHtoDAsync_v2", "cuStreamSynchronize"
    order = [name for name in driver.calls if name in (to_gpu, wait)]
    assert order == [to_gpu, to_gpu, wait, to_gpu, wait, to_gpu, wait, wait]


def test_without_memory_for_a_second_lane_batches_take_turns(
    open_image, driver, assert_right, caplog
):
    backend = open_image()
    driver.free_bytes = 0
    for _ in range(2):
        assert_right(backend, images(2 * MAX_BATCH))
    assert caplog.text.count("batches take turns from here on") == 1
    assert len(driver.streams) == 1


def test_an_integrated_gpu_copies_nothing(open_image, driver, assert_right):
    driver.integrated = True
    backend = open_image(cuda_graphs=True)
    for turn in range(6):
        assert_right(backend, images(MAX_BATCH + 3, seed=turn))
    assert not [name for name in driver.calls if name.startswith(("cuMemcpy", "cuMemAlloc"))]
    del backend
    gc.collect()
    assert driver.memory == {}


def test_memory_goes_back(open_image, driver, assert_right):
    backend = open_image(cuda_graphs=True)
    for _ in range(5):
        assert_right(backend, images(2))
    assert (len(driver.memory), len(driver.executables)) == (4, 1)
    del backend
    gc.collect()
    assert (driver.memory, driver.streams, driver.executables) == ({}, {}, {})
    driver.free_bytes = 24 * 8 * 3 * MAX_BATCH - 1
    with refused("cuda_failed", BackendError, status="CUDA_ERROR_OUT_OF_MEMORY"):
        open_image()
    gc.collect()
    assert driver.memory == {}


@on_each_version
def test_graphs_take_over_shapes_that_come_back(open_image, driver, assert_right):
    backend = open_image(cuda_graphs=True)
    for turn in range(6):
        for count in (1, 2, 3, 4, 5, 6):
            assert_right(backend, images(count, seed=turn))
    assert len(driver.executables) == 4  # No more: each holds memory.
    assert driver.calls.count("cuGraphLaunch") == 4 * (1 + 3)  # The first of each is a test.


def test_the_environment_switches_graphs_on(toy_bundle, driver, monkeypatch):
    monkeypatch.delenv("UPPERSON_CUDA_GRAPHS", raising=False)
    for is_on in (False, True):
        encoder = Bundle.open(toy_bundle, "fp32", "tensorrt", "cuda").encoder()
        for _ in range(9):
            encoder.encode_pixels(images(2))
        assert ("cuStreamBeginCapture_v2" in driver.calls) == is_on
        monkeypatch.setenv("UPPERSON_CUDA_GRAPHS", "1")
    monkeypatch.setenv("UPPERSON_CUDA_GRAPHS", "yes")
    with refused("choice_unknown", UsageError, what="UPPERSON_CUDA_GRAPHS"):
        open_backend(toy_bundle / "image.fp32.onnx", "tensorrt", "cuda")


@pytest.mark.parametrize("wrong", [False, True])
def test_a_graph_that_computes_something_else_or_cannot_be_captured_is_not_used(
    open_image, driver, assert_right, caplog, wrong
):
    driver.trt.behaviour.wrong_graphs = wrong
    driver.fail = {} if wrong else {"cuGraphInstantiateWithFlags": 901}
    backend = open_image(cuda_graphs=True)
    for turn in range(8):
        assert_right(backend, images(2, seed=turn))
    assert caplog.text.count("no CUDA graphs from here on") == 1
    assert ("gives other results than the engine" in caplog.text) == wrong
    assert driver.calls.count("cuGraphLaunch") == wrong
    assert driver.graphs == {}


def test_nothing_is_built_or_replaced_on_the_way(toy_bundle, driver, tmp_path, monkeypatch):
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path))
    for name, device, code in (
        ("image.fp32.onnx", "cpu", "device_unknown"),
        ("image.fp32.onnx", "cuda", "no_engine"),
        ("nowhere.onnx", "cuda", "graph_not_loaded"),
    ):
        with refused(code, BackendError):
            open_backend(toy_bundle / name, "tensorrt", device)
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_tensorrt_refuses_is_an_error(open_image, driver, monkeypatch):
    load, made_for = EngineCache.load, VERSIONS[0].encode()
    monkeypatch.setattr(EngineCache, "load", lambda *a: load(*a).replace(made_for, b"10.3.0.30"))
    with refused("engine_refused", BackendError):
        open_image()
