"""``upperson-rt bench towers`` and ``bench query`` on a toy bundle."""

import json
import os
import sys
from functools import partial
from importlib.util import find_spec

import pytest

from tests.helpers.command_line import run_program
from tests.helpers.invoke import refusal, run_rt, run_rt_json
from tests.helpers.toy_bundle import CONTEXT_LENGTH, make_toy_bundle, replace_in_bundle
from upperson.data.vocabulary import clip_tokenizer
from upperson_bench import processes
from upperson_bench.towers import captions

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


def test_captions_are_as_long_as_real_ones():
    ids = clip_tokenizer().encode(captions(9)).input_ids
    lengths = (ids != 0).sum(axis=1)
    assert 20 <= lengths.min() < lengths.max() <= 30
    assert (ids[0] == ids[8]).all()
    assert len({tuple(row) for row in ids.tolist()}) == 8


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

    ran = []
    monkeypatch.setattr(processes, "run_python", lambda *words, **_: ran.append(words[2:]))
    result = query(*folders, "--rounds", 1, "--variant", "fp32")
    assert len(result.stdout.splitlines()[4:-1]) == 4, "a row for each kind"
    assert [words[:1] for words in ran].count(("query",)) == 2  # One is not timed.
    command = next(words for words in ran if words)
    assert command[command.index("--variant") + 1] == "fp32"
    assert command[command.index("--backend") + 1] == "onnxruntime"
