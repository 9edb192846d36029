"""``upperson-rt bench towers``, ``bench query`` and ``bench pipeline`` on a toy bundle."""

import json
import os
import sys
import threading
import time
from functools import partial
from importlib.util import find_spec

import pytest

from tests.helpers.command_line import run_program
from tests.helpers.invoke import refusal, run_rt, run_rt_json
from tests.helpers.toy_bundle import CONTEXT_LENGTH, make_toy_bundle, replace_in_bundle
from upperson_camera import bench
from upperson_rt.encoder import Encoder
from upperson_rt.gallery.sqlite import SqliteGallery

BACKENDS = [name for name in ("onnxruntime", "openvino") if find_spec(name)]
QUICK = ("--batch-size", "1,3", "--duration", "0", "--threads", "1")
ONE = ("--variant", "int8", "--backend", "onnxruntime")

towers = partial(run_rt, "bench", "towers")
query = partial(run_rt, "bench", "query", "red")


@pytest.fixture
def bundle(bundle_and_crops):
    return bundle_and_crops / "bundle"


@pytest.fixture
def folders(bundle, gallery_of_crops):
    return ("-b", bundle, "-g", gallery_of_crops)


def test_towers_have_every_variant_on_every_backend(bundle):
    found = run_rt_json("bench", "towers", "-b", bundle, *QUICK)
    names = [f"{variant} on {backend}" for variant in ("fp32", "int8") for backend in BACKENDS]
    assert list(found["contenders"]) == names
    assert (found["baseline"], found["refused"], found["threads"]) == (names[0], {}, 1)
    assert {"cpu", "instruction_sets", "load_average", "python"} <= found["machine"].keys()
    for name, contender in found["contenders"].items():
        assert contender["device"] == "cpu"
        assert contender["version"][0].isdigit()
        assert contender["start_s"] > 0
        assert contender["canary_min_cosine"] > 0.9999
        if name.endswith("openvino"):
            assert contender["float_type"] == "f32", "the toy has no int8 in it"
        if sys.platform == "linux":
            assert contender["peak_rss_bytes"] > 1e7
    cases = [(case["inputs"], case["shape"][0]) for case in found["cases"]]
    assert cases == [
        ("pictures", 1), ("pictures", 3), ("captions", 1), ("padded captions", 1),
        ("captions", 3), ("padded captions", 3),
    ]  # fmt: skip
    padded = [case["shape"][1] for case in found["cases"] if case["inputs"] == "padded captions"]
    assert padded == [CONTEXT_LENGTH] * 2
    for case in found["cases"]:
        assert list(case["timings"]) == names
        first = case["timings"][names[0]]
        for timing in case["timings"].values():
            assert timing["runs"] == 3
            assert 0 < timing["p50_ms"] <= timing["p90_ms"] <= timing["p99_ms"]
            assert timing["speedup"] == pytest.approx(first["p50_ms"] / timing["p50_ms"])


def test_towers_without_json_are_tables_and_need_no_torch(bundle):
    command = ("bench", "towers", "-b", bundle, *QUICK, *ONE)
    done = run_program("upperson-rt", *command, without=["torch", "onnx", "open_clip"])
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "int8 on onnxruntime" in line]
    assert any(line.startswith("pictures") and "1.00x" in line for line in rows)
    assert "timing pictures, batch 1" in done.stderr


def test_towers_that_cannot_be_measured(bundle, folders, tmp_path, monkeypatch):
    another, wrong = (make_toy_bundle(tmp_path / str(seed), seed=seed) for seed in (4, 0))
    for file in ("image.int8.onnx", "text.int8.onnx"):
        replace_in_bundle(wrong, file, (another / file).read_bytes())
    found = run_rt_json("bench", "towers", "-b", wrong, *QUICK, *ONE[2:])
    assert list(found["contenders"]) == ["fp32 on onnxruntime"]
    assert list(found["refused"]) == ["int8 on onnxruntime"]
    assert all(list(case["timings"]) == ["fp32 on onnxruntime"] for case in found["cases"])
    refusal(towers("-b", wrong, *QUICK, *ONE, "--json"), 6)
    refusal(query("-b", wrong, *folders[2:], "--json"), 6)
    refusal(query(*folders[:2], "-g", tmp_path / "nowhere", "--json"), 3)
    for exit_code, *options in (
        (2, "--variant", "int4"),
        (2, "--backend", "auto"),
        (2, "--duration", "inf"),
        (2, "--backend", "tensorflow"),
        (5, "--device", "cuda", "--backend", "onnxruntime"),
        (3, "-b", "nowhere"),
    ):
        refusal(towers("-b", bundle, *options, "--json"), exit_code)
    monkeypatch.setattr("sys.executable", "/bin/false")  # A process that dies.
    refusal(towers("-b", bundle, *QUICK, *ONE, "--json"), 5)


def test_queries_are_timed_in_turns(folders, tmp_path, monkeypatch):
    log = tmp_path / "queries.log"
    monkeypatch.setenv("UPPERSON_QUERY_LOG", str(log))
    result = query(*folders, "--rounds", 2, "--threads", 1, "--json")
    assert "processes, in turns: 3/3" in result.stderr
    found = json.loads(result.stdout)
    timings = found["timings"]
    runs = {name: timing["runs"] for name, timing in timings.items()}
    assert runs == {"python": 2, "import": 2, "query": 2, "running": 50}
    p50 = {name: timing["p50_ms"] for name, timing in timings.items()}
    assert all(milliseconds > 0 for milliseconds in p50.values())
    if os.name == "posix":
        cpu = {name: timing["cpu_ms"] for name, timing in timings.items()}
        # Counted in ticks of 10 ms: a process that does nothing may take none.
        assert 0 <= cpu["python"] < cpu["import"] < cpu["query"]
        assert found["beyond_import_cpu_s"] == pytest.approx((cpu["query"] - cpu["import"]) / 1000)
    assert found["beyond_import_s"] == pytest.approx((p50["query"] - p50["import"]) / 1000)
    assert (found["backend"], found["variant"], found["items"]) == ("onnxruntime", "int8", 6)
    assert not log.exists(), "a benchmark is no query of a user"


# Pipeline


@pytest.fixture
def pipeline(bundle, overload):
    options = ("-b", bundle, "--threads", 1, "--duration", 1)
    return partial(run_rt, "bench", "pipeline", *options)


@pytest.fixture
def overload(monkeypatch):
    """Slow while it is measured, the encoder does nothing at all while frames are submitted."""
    encode_pixels, run_load = Encoder.encode_pixels, bench._Load.run
    submit_all = bench._Load._submit
    loaded, held, submitted = threading.Event(), threading.Event(), threading.Event()

    def slow(self, pixels, batch_size=32):
        if loaded.is_set():
            held.set()
            submitted.wait()
        else:
            time.sleep(0.01 * len(pixels))
        return encode_pixels(self, pixels, batch_size)

    def run_all(self, *arguments):
        loaded.set()
        try:
            run_load(self, *arguments)
        finally:
            submitted.set()

    def submit(self, *given):
        submit_all(self, *given)
        held.wait(20)  # On a busy machine the encoder may not have come that far in a second,
        time.sleep(0.3)  # and its time is sampled while frames are submitted.

    monkeypatch.setattr(bench._Load, "_submit", submit)
    monkeypatch.setattr(Encoder, "encode_pixels", slow)
    monkeypatch.setattr(bench._Load, "run", run_all)
    monkeypatch.setattr(bench, "Pipeline", partial(bench.Pipeline, crop_queue=8))
    monkeypatch.setattr(bench, "_CAPACITY_S", 0.05)
    monkeypatch.setattr(bench, "_SAMPLE_S", 0.05)


@pytest.mark.parametrize("options", [(), ("--vectors-only", "--drop", "newest", "--cameras", "1")])
def test_what_goes_in_comes_out_or_is_counted(pipeline, options, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    result = pipeline("--json", "--overload", "8", *options)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    frames, crops = found["frames"], found["crops"]
    assert frames["submitted"] == frames["processed"] + sum(frames["dropped"].values())
    assert crops["detections"] == crops["committed"] + sum(crops["dropped"].values())
    assert crops["detections"] == found["people_per_frame"] * frames["processed"]
    assert found["acknowledged"] == found["rows"] == crops["committed"] > 0
    assert sum(frames["dropped"].values()) + sum(crops["dropped"].values()) > 0
    assert 4 <= found["people_per_frame"] <= 200
    assert 0 < found["encoder_busy_share"] <= 1
    assert 0 < found["submit_ms"]["p50"] <= found["submit_ms"]["p99"] <= found["submit_ms"]["max"]
    assert found["cameras"] == (1 if options else 2)
    assert found["pictures_saved"] == (not options)
    assert found["problems"] == []
    assert list(tmp_path.glob("upperson-bench-*")) == [], "nothing is left behind"


def test_a_broken_promise_is_printed_and_ends_with_6(pipeline, monkeypatch):
    table = pipeline()
    assert table.exit_code == 0, table.stderr
    rows = {line.split()[0]: line.split() for line in table.stdout.splitlines() if line}
    assert int(rows["frames"][1]) > 0
    assert rows["promises"][1:] == ["all", "kept"]
    add = SqliteGallery.add

    def forgetful(self, items, vectors, variant=None):
        return add(self, items[1:], vectors[1:], variant)

    monkeypatch.setattr(SqliteGallery, "add", forgetful)
    result = pipeline("--json")
    assert result.exit_code == 6
    assert "acknowledged rows" in json.loads(result.stdout)["problems"][0]


def test_errors_are_one_line_and_a_code(pipeline):
    for code, *options in (
        ("only_files_wait", "--drop", "block"),
        ("unknown_policy", "--drop", "some"),
        ("setting_out_of_range", "--overload", "inf"),
        (None, "--variant", "int4"),
    ):
        refusal(pipeline(*options, "--json"), 2, code)
