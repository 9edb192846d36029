"""Engines of the toy model: built, compared, kept, run by threads and as CUDA graphs."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.helpers.toy_graphs import TOWERS, toy_inputs
from upperson_export.variants import VARIANTS
from upperson_rt.agreement import compare_embeds
from upperson_rt.backends import open_backend
from upperson_rt.bundle import Bundle
from upperson_rt.towers import run_tower
from upperson_tensorrt.compile import compile_bundle
from upperson_tensorrt.plugin import TensorRtBackend

MAX_BATCH = 8
NAMES = ("fp32", "fp16", "int8-fp16")

variants = pytest.mark.parametrize("variant", NAMES)
towers = pytest.mark.parametrize("tower", TOWERS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def compiled(trt, bundle, cache):
    return {
        variant: compile_bundle(bundle, variant, max_batch=MAX_BATCH, cache=cache)
        for variant in NAMES
    }


@pytest.fixture
def open_engine(compiled, bundle, cache):
    def open_(tower, variant, cuda_graphs=False):
        file = bundle / f"{tower}.{variant}.onnx"
        return TensorRtBackend(file, cache=cache, cuda_graphs=cuda_graphs)

    return open_


@variants
def test_engines_are_built_and_agree_with_onnx_runtime(compiled, variant):
    for tower in compiled[variant].towers:
        assert not tower.reused
        lowest = min(one.min_cosine for one in tower.record.comparisons)
        print(
            f"{tower.tower} {variant}: {tower.record.build_seconds} s, lowest cosine {lowest:.6f}"
        )
        assert lowest >= VARIANTS[variant].canary_min_cosine
        assert {one.batch_size for one in tower.record.comparisons} >= {1, MAX_BATCH}


def test_what_is_there_is_used_again_and_what_is_gone_is_built(compiled, bundle, cache):
    notes = []

    def again():
        found = compile_bundle(bundle, "fp16", max_batch=MAX_BATCH, cache=cache, note=notes.append)
        return [tower.reused for tower in found.towers]

    assert again() == [True, True]
    compiled["fp16"].towers[0].path.unlink()
    assert again() == [False, True]
    assert again() == [True, True]
    assert not any("timings of earlier builds could not be used" in note for note in notes)


@variants
def test_a_bundle_opens_on_its_engines_and_embeds_as_fp32_does(
    compiled, bundle, cache, variant, monkeypatch
):
    monkeypatch.setenv("UPPERSON_CACHE", str(cache))
    opened = Bundle.open(bundle, variant, "tensorrt", "cuda")
    opened.check_golden_samples()
    for tower in TOWERS:
        rows = toy_inputs(tower, 2 * MAX_BATCH + 3)
        reference = open_backend(bundle / f"{tower}.fp32.onnx", "onnxruntime")
        agreement = compare_embeds(
            run_tower(reference, tower, rows), run_tower(opened.backend(tower), tower, rows)
        )
        print(f"{tower} {variant} against fp32 on the CPU: {agreement.min_cosine:.6f}")
        assert agreement.agrees(min_cosine=VARIANTS[variant].canary_min_cosine).all()


@variants
@towers
def test_cuda_graphs_change_no_bit(open_engine, tower, variant, caplog):
    plain, graphs = (open_engine(tower, variant, on) for on in (False, True))
    for turn in range(6):
        for count in (1, 3, MAX_BATCH):
            rows = toy_inputs(tower, MAX_BATCH + turn)[turn:][:count]
            np.testing.assert_array_equal(
                run_tower(graphs, tower, rows), run_tower(plain, tower, rows)
            )
    assert len(graphs._session._graph_handles) >= 3  # It was by graphs that they were computed.
    assert "no CUDA graphs" not in caplog.text


@towers
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_eight_threads_share_an_engine(open_engine, tower, cuda_graphs):
    rows = toy_inputs(tower, 40)
    batches = [rows[i : i + 1 + i % (MAX_BATCH + 3)] for i in range(24)]
    alone = open_engine(tower, "fp16")
    expected = [run_tower(alone, tower, batch) for batch in batches]
    backend = open_engine(tower, "fp16", cuda_graphs)
    wrong = []

    def loop(first):
        for turn in range(3):
            for i in range(first, len(batches), 8):
                found = run_tower(backend, tower, batches[i])
                if not np.array_equal(found, expected[i]):
                    wrong.append(i + 100 * turn)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(loop, range(8)))
    assert wrong == []


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_torch_may_compute_beside_an_engine(torch_gpu, open_engine, cuda_graphs):
    matrix = torch_gpu.randn(512, 512, device="cuda")
    product = matrix @ matrix
    rows = toy_inputs("image", MAX_BATCH)
    expected = run_tower(open_engine("image", "fp16"), "image", rows)
    backend = open_engine("image", "fp16", cuda_graphs)
    stop, wrong = threading.Event(), []

    def multiply():
        while not stop.is_set():
            if not torch_gpu.equal(matrix @ matrix, product):
                wrong.append("torch")

    thread = threading.Thread(target=multiply)
    thread.start()
    try:
        for _ in range(50):
            np.testing.assert_array_equal(run_tower(backend, "image", rows), expected)
    finally:
        stop.set()
        thread.join()
    assert wrong == []
