import gc
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.fake_tensorrt import VERSIONS, install_fake_tensorrt
from tests.helpers.toy_bundle import make_toy_bundle
from upperson_rt.backends import open_backend
from upperson_rt.backends.tensorrt import TensorRtBackend
from upperson_rt.bundle import Bundle
from upperson_rt.compile import compile_bundle
from upperson_rt.errors import BackendError, IntegrityError, UsageError
from upperson_rt.tensorrt.cache import EngineCache

MAX_BATCH = 8


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_toy_bundle(tmp_path_factory.mktemp("trt") / "bundle")


@pytest.fixture(scope="module")
def caches(bundle, tmp_path_factory):
    """A cache with engines of each version."""
    found = {}
    for version in VERSIONS:
        with pytest.MonkeyPatch.context() as monkeypatch:
            install_fake_tensorrt(monkeypatch, version)
            found[version] = tmp_path_factory.mktemp("cache")
            compile_bundle(bundle, "fp32", max_batch=MAX_BATCH, cache=found[version])
    return found


@pytest.fixture(params=VERSIONS)
def driver(request, caches, monkeypatch):
    driver, driver.trt = install_fake_tensorrt(monkeypatch, request.param)
    monkeypatch.setenv("UPPERSON_CACHE", str(caches[request.param]))
    driver.memory_before = dict(driver.memory)
    return driver


@pytest.fixture
def one_version(caches, monkeypatch):
    driver, driver.trt = install_fake_tensorrt(monkeypatch, VERSIONS[0])
    monkeypatch.setenv("UPPERSON_CACHE", str(caches[VERSIONS[0]]))
    return driver


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 24, 8, 3), dtype=np.uint8)


def expected(bundle, tower, rows):
    name = "image" if tower == "image" else "input_ids"
    reference = open_backend(bundle / f"{tower}.fp32.onnx", "onnxruntime", threads=1)
    return reference.run({name: rows})[f"{tower}_embeds"]


def test_it_says_what_runs(bundle, driver):
    backend = open_backend(bundle / "image.fp32.onnx", "tensorrt", "cuda")
    assert (backend.name, backend.device) == ("tensorrt", "cuda:0")
    assert backend.version == driver.trt.__version__
    assert backend.record.variant == "fp32"


def test_auto_prefers_tensorrt_on_a_gpu(bundle, one_version, monkeypatch):
    monkeypatch.setattr("upperson_rt.backends.find_spec", lambda name: name == "tensorrt")
    assert open_backend(bundle / "image.fp32.onnx", device="cuda").name == "tensorrt"


@pytest.mark.parametrize("count", [0, 1, 3, MAX_BATCH, MAX_BATCH + 1, 3 * MAX_BATCH + 5])
def test_any_batch_is_right(bundle, driver, count):
    backend = TensorRtBackend(bundle / "image.fp32.onnx")
    rows = images(count)
    found = backend.run({"image": rows})["image_embeds"]
    assert (found.shape, found.dtype) == ((count, 16), np.float32)
    if count:
        np.testing.assert_array_equal(found, expected(bundle, "image", rows))


@pytest.mark.parametrize("tokens", [2, 5, 12])
def test_texts_of_any_length(bundle, driver, tokens):
    backend = TensorRtBackend(bundle / "text.fp32.onnx")
    ids = np.random.default_rng(1).integers(2, 12, (11, tokens), dtype=np.int32)
    found = backend.run({"input_ids": ids})["text_embeds"]
    np.testing.assert_allclose(found, expected(bundle, "text", ids), atol=1e-6)


def test_views_are_taken_as_they_are(bundle, one_version):
    backend = TensorRtBackend(bundle / "image.fp32.onnx")
    rows = images(6)[::-2, :, ::-1]
    found = backend.run({"image": rows})["image_embeds"]
    np.testing.assert_array_equal(found, expected(bundle, "image", np.ascontiguousarray(rows)))


def test_outputs_belong_to_the_caller(bundle, one_version):
    backend = TensorRtBackend(bundle / "image.fp32.onnx")
    first = backend.run({"image": images(2)})["image_embeds"]
    kept = first.copy()
    backend.run({"image": images(2, seed=1)})
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"other": images(1)}, "one input is 'image', found other"),
        ({}, "found none"),
        ({"image": images(1).astype(np.float32)}, r"is uint8 \(N, 24, 8, 3\), found float32"),
        ({"image": images(1)[:, :-1]}, r"found uint8 \(1, 23, 8, 3\)"),
        ({"image": images(1)[0]}, r"found uint8 \(24, 8, 3\)"),
    ],
)
def test_wrong_inputs_are_an_error(bundle, one_version, inputs, message):
    backend = TensorRtBackend(bundle / "image.fp32.onnx")
    with pytest.raises(BackendError, match=f"TensorRT failed: .*{message}"):
        backend.run(inputs)


def test_texts_that_are_too_long_are_an_error(bundle, one_version):
    backend = TensorRtBackend(bundle / "text.fp32.onnx")
    with pytest.raises(BackendError, match=r"is int32 \(N, 2 to 12\), found int32 \(2, 13\)"):
        backend.run({"input_ids": np.ones((2, 13), np.int32)})


def test_a_failing_gpu_is_an_error_and_the_next_run_works(bundle, one_version):
    backend = TensorRtBackend(bundle / "image.fp32.onnx")
    one_version.fail["cuStreamSynchronize"] = 901
    with pytest.raises(BackendError, match="cuStreamSynchronize failed with CUDA_ERROR_STREAM"):
        backend.run({"image": images(1)})
    one_version.fail.clear()
    found = backend.run({"image": images(3)})["image_embeds"]
    np.testing.assert_array_equal(found, expected(bundle, "image", images(3)))
    assert one_version.current_gpu is None


@pytest.mark.parametrize("eager", [False, True])
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_threads_share_two_lanes(bundle, one_version, eager, cuda_graphs):
    one_version.eager = eager
    backend = TensorRtBackend(bundle / "image.fp32.onnx", cuda_graphs=cuda_graphs)
    batches = [images(1 + i % 11, seed=i) for i in range(24)]
    found = {}

    def work(start):
        for i in range(start, len(batches), 4):
            found[i] = backend.run({"image": batches[i]})["image_embeds"]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, batch in enumerate(batches):
        np.testing.assert_array_equal(found[i], expected(bundle, "image", batch))
    assert len(one_version.streams) == 2
    assert all(not queued for queued in one_version.streams.values())


@pytest.mark.parametrize("eager", [False, True])
def test_a_piece_is_copied_while_another_runs(bundle, one_version, eager):
    one_version.eager = eager
    backend = TensorRtBackend(bundle / "image.fp32.onnx")
    rows = images(3 * MAX_BATCH + 1)
    one_version.calls.clear()
    found = backend.run({"image": rows})["image_embeds"]
    np.testing.assert_array_equal(found, expected(bundle, "image", rows))
    to_gpu, wait = "cuMemcpyHtoDAsync_v2", "cuStreamSynchronize"
    order = [name for name in one_version.calls if name in (to_gpu, wait)]
    assert order == [to_gpu, to_gpu, wait, to_gpu, wait, to_gpu, wait, wait]


def test_without_memory_for_a_second_lane_batches_take_turns(bundle, one_version, caplog):
    backend = TensorRtBackend(bundle / "image.fp32.onnx")
    one_version.free_bytes = 0
    for _ in range(2):
        rows = images(2 * MAX_BATCH)
        found = backend.run({"image": rows})["image_embeds"]
        np.testing.assert_array_equal(found, expected(bundle, "image", rows))
    assert caplog.text.count("batches take turns from here on") == 1
    assert len(one_version.streams) == 1


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_an_integrated_gpu_copies_nothing(bundle, caches, monkeypatch, cuda_graphs):
    driver, _ = install_fake_tensorrt(monkeypatch, VERSIONS[0], integrated=True)
    monkeypatch.setenv("UPPERSON_CACHE", str(caches[VERSIONS[0]]))
    backend = TensorRtBackend(bundle / "image.fp32.onnx", cuda_graphs=cuda_graphs)
    for turn in range(6):
        rows = images(MAX_BATCH + 3, seed=turn)
        found = backend.run({"image": rows})["image_embeds"]
        np.testing.assert_array_equal(found, expected(bundle, "image", rows))
    assert not [name for name in driver.calls if name.startswith(("cuMemcpy", "cuMemAlloc"))]
    del backend
    gc.collect()
    assert driver.memory == {}


def test_no_line_of_the_log_reaches_python(bundle, driver, capfd):
    backend = TensorRtBackend(bundle / "image.fp32.onnx")
    backend.run({"image": images(1)})
    assert driver.trt.behaviour.python_lines == []
    assert capfd.readouterr().out == ""  # Where programs expect JSON.


def test_memory_goes_back(bundle, one_version):
    backend = TensorRtBackend(bundle / "image.fp32.onnx", cuda_graphs=True)
    for _ in range(5):
        backend.run({"image": images(2)})
    assert len(one_version.memory) == 4
    assert len(one_version.executables) == 1
    del backend
    gc.collect()
    assert (one_version.memory, one_version.streams, one_version.executables) == ({}, {}, {})


def test_memory_goes_back_if_there_is_too_little(bundle, one_version):
    one_version.free_bytes = 24 * 8 * 3 * MAX_BATCH - 1
    with pytest.raises(BackendError, match="OUT_OF_MEMORY"):
        TensorRtBackend(bundle / "image.fp32.onnx")
    gc.collect()
    assert one_version.memory == {}


def test_graphs_take_over_shapes_that_come_back(bundle, driver):
    backend = TensorRtBackend(bundle / "image.fp32.onnx", cuda_graphs=True)
    for turn in range(6):
        for count in (1, 2, 3, 4, 5, 6):
            rows = images(count, seed=turn)
            found = backend.run({"image": rows})["image_embeds"]
            np.testing.assert_array_equal(found, expected(bundle, "image", rows))
    assert len(driver.executables) == 4  # No more: each holds memory.
    assert driver.calls.count("cuGraphLaunch") == 4 * (1 + 3)  # The first of each is a test.


@pytest.mark.parametrize(
    ("said", "captured"), [(None, False), ("", False), ("0", False), ("1", True)]
)
def test_the_environment_switches_graphs_on(bundle, one_version, monkeypatch, said, captured):
    monkeypatch.delenv("UPPERSON_CUDA_GRAPHS", raising=False)
    if said is not None:
        monkeypatch.setenv("UPPERSON_CUDA_GRAPHS", said)
    encoder = Bundle.open(bundle, "fp32", "tensorrt", "cuda").encoder()
    for _ in range(9):
        encoder.encode_pixels(images(2))
    assert ("cuStreamBeginCapture_v2" in one_version.calls) == captured


def test_the_environment_says_on_or_off(bundle, one_version, monkeypatch):
    monkeypatch.setenv("UPPERSON_CUDA_GRAPHS", "yes")
    with pytest.raises(UsageError, match=r"must be 1 \(on\) or 0 \(off\), found 'yes'"):
        open_backend(bundle / "image.fp32.onnx", "tensorrt", "cuda")


def test_a_graph_that_computes_something_else_is_not_used(bundle, one_version, caplog):
    one_version.trt.behaviour.wrong_graphs = True
    backend = TensorRtBackend(bundle / "image.fp32.onnx", cuda_graphs=True)
    for turn in range(8):
        found = backend.run({"image": images(2, seed=turn)})["image_embeds"]
        np.testing.assert_array_equal(found, expected(bundle, "image", images(2, seed=turn)))
    assert caplog.text.count("gives other results than the engine") == 1
    assert one_version.calls.count("cuGraphLaunch") == 1


def test_an_engine_that_cannot_be_captured_runs_as_before(bundle, one_version, caplog):
    one_version.fail["cuGraphInstantiateWithFlags"] = 901
    backend = TensorRtBackend(bundle / "image.fp32.onnx", cuda_graphs=True)
    for turn in range(8):
        found = backend.run({"image": images(2, seed=turn)})["image_embeds"]
        np.testing.assert_array_equal(found, expected(bundle, "image", images(2, seed=turn)))
    assert caplog.text.count("no CUDA graphs from here on") == 1
    assert one_version.graphs == {}


def test_a_bundle_runs_with_its_canaries(bundle, driver):
    opened = Bundle.open(bundle, "fp32", "tensorrt", "cuda")
    checks = opened.check_canaries()
    assert min(check.min_cosine for check in checks) > 0.99999
    assert opened.encoder().encode_texts(["a man in red", "green"]).shape == (2, 16)


def test_nothing_is_built_or_replaced_on_the_way(bundle, one_version, tmp_path, monkeypatch):
    with pytest.raises(BackendError, match="'tensorrt' has no device 'cpu': say  --device cuda"):
        open_backend(bundle / "image.fp32.onnx", "tensorrt", "cpu")
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path))
    with pytest.raises(BackendError, match=r"no engine for .*image\.fp32\.onnx with TensorRT 10"):
        open_backend(bundle / "image.fp32.onnx", "tensorrt", "cuda")
    with pytest.raises(BackendError, match=r"cannot load .*nowhere\.onnx: No such file"):
        open_backend(bundle / "nowhere.onnx", "tensorrt", "cuda")
    assert list(tmp_path.iterdir()) == []


def test_a_changed_engine_is_refused(bundle, one_version, caches, tmp_path, monkeypatch):
    engines = tmp_path / "engines"
    engines.mkdir()
    for path in Path(caches[VERSIONS[0]] / "engines").glob("image-*"):
        (engines / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv("UPPERSON_CACHE", str(tmp_path))
    open_backend(bundle / "image.fp32.onnx", "tensorrt", "cuda")
    (engine,) = engines.glob("image-*.engine")
    engine.write_bytes(engine.read_bytes() + b"x")
    with pytest.raises(IntegrityError, match="changed or damaged"):
        open_backend(bundle / "image.fp32.onnx", "tensorrt", "cuda")


def test_an_engine_that_tensorrt_refuses(bundle, one_version, monkeypatch):
    load = EngineCache.load
    monkeypatch.setattr(
        EngineCache, "load", lambda *a: load(*a).replace(b"10.3.0.26", b"10.3.0.30")
    )
    refused = r"refuses the engine: the engine plan file is not compatible; .*upperson-rt compile"
    with pytest.raises(BackendError, match=refused):
        open_backend(bundle / "image.fp32.onnx", "tensorrt", "cuda")
