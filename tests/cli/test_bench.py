"""``upperson-rt bench towers`` and ``bench query`` on a toy bundle."""

import json
import os
import sys
from functools import partial
from importlib.util import find_spec

import pytest

from tests.helpers.command_line import run_program
from tests.helpers.invoke import refusal, run_rt
from tests.helpers.toy_bundle import CONTEXT_LENGTH, make_toy_bundle, replace_in_bundle
from upperson.data.vocabulary import clip_tokenizer
from upperson_bench import processes
from upperson_bench.towers import captions

BACKENDS = [name for name in ("onnxruntime", "openvino") if find_spec(name)]
QUICK = ("--batch", "1,3", "--seconds", "0", "--threads", "1")

towers = partial(run_rt, "bench", "towers")
query = partial(run_rt, "bench", "query", "red")


@pytest.fixture
def bundle(bundle_and_crops):
    return bundle_and_crops / "bundle"


@pytest.fixture
def folders(bundle, gallery_of_crops):
    return ("-b", bundle, "-g", gallery_of_crops)


def with_another_tower(folder, file):
    """A bundle with the int8 tower of another model."""
    another = make_toy_bundle(folder / "another", seed=4)
    bundle = make_toy_bundle(folder / "bundle")
    replace_in_bundle(bundle, file, (another / file).read_bytes())
    return bundle


def test_towers_have_every_variant_on_every_backend(bundle):
    result = towers("-b", bundle, *QUICK, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
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
    cases = [(case["tower"], case["inputs"], case["shape"]) for case in found["cases"]]
    assert [(tower, inputs, shape[0]) for tower, inputs, shape in cases] == [
        ("image", "pictures", 1),
        ("image", "pictures", 3),
        ("text", "captions", 1),
        ("text", "padded captions", 1),
        ("text", "captions", 3),
        ("text", "padded captions", 3),
    ]
    padded = {shape[1] for _, inputs, shape in cases if inputs == "padded captions"}
    assert padded == {CONTEXT_LENGTH}
    for case in found["cases"]:
        assert list(case["timings"]) == names
        assert case["timings"][names[0]]["speedup"] == 1
        for timing in case["timings"].values():
            assert timing["runs"] == 3
            assert 0 < timing["p50_ms"] <= timing["p90_ms"] <= timing["p99_ms"]


def test_towers_without_json_are_tables(bundle):
    result = towers("-b", bundle, *QUICK, "--variant", "int8", "--backend", "onnxruntime")
    assert result.exit_code == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if "int8 on onnxruntime" in line]
    assert any(line.startswith("pictures") and "1.00x" in line for line in rows)
    assert "{" not in result.stdout
    assert "timing pictures, batch 1" in result.stderr


def test_a_wrong_tower_is_listed_and_not_timed(tmp_path):
    bundle = with_another_tower(tmp_path, "image.int8.onnx")
    options = ("-b", bundle, *QUICK, "--backend", "onnxruntime")
    result = towers(*options, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert list(found["contenders"]) == ["fp32 on onnxruntime"]
    assert list(found["refused"]) == ["int8 on onnxruntime"]
    assert all(list(case["timings"]) == ["fp32 on onnxruntime"] for case in found["cases"])
    refusal(towers(*options, "--variant", "int8", "--json"), 6)


@pytest.mark.parametrize(
    ("arguments", "exit_code"),
    [
        (("--variant", "int4"), 2),
        (("--backend", "auto"), 2),
        (("--seconds", "inf"), 2),
        (("--backend", "tensorflow"), 2),
        (("--device", "cuda", "--backend", "onnxruntime"), 5),
        (("-b", "nowhere"), 3),
    ],
)
def test_errors_of_towers(bundle, arguments, exit_code):
    refusal(towers("-b", bundle, *arguments, "--json"), exit_code)


def test_a_process_that_dies_is_an_error_in_one_line(bundle, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    options = ("-b", bundle, *QUICK, "--variant", "fp32", "--backend", "onnxruntime")
    refusal(towers(*options, "--json"), 5)


def test_towers_need_no_torch(bundle):
    options = ("-b", bundle, *QUICK, "--variant", "fp32", "--backend", "onnxruntime", "--json")
    heavy = ["torch", "onnx", "open_clip"]
    done = run_program("upperson-rt", "bench", "towers", *options, without=heavy)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["contenders"]) == ["fp32 on onnxruntime"]


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
    assert result.exit_code == 0, result.stderr
    assert "processes, in turns: 3/3" in result.stderr
    found = json.loads(result.stdout)
    timings = found["timings"]
    assert {name: timing["runs"] for name, timing in timings.items()} == {
        "python": 2,
        "import": 2,
        "query": 2,
        "running": 50,
    }
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


def test_queries_run_what_the_options_name(folders, monkeypatch):
    ran = []
    monkeypatch.setattr(processes, "run_python", lambda *arguments, **_: ran.append(arguments[2:]))
    result = query(*folders, "--rounds", 1, "--variant", "fp32")
    assert result.exit_code == 0, result.stderr
    assert [line.split("  ")[0] for line in result.stdout.splitlines()[4:-1]] == [
        "a process that does nothing",
        "a process that imports onnxruntime",
        "upperson-rt query, from start to end",
        "a query in a running process",
    ]
    assert [arguments[:1] for arguments in ran].count(("query",)) == 2  # One is not timed.
    command = next(arguments for arguments in ran if arguments)
    assert command[command.index("--variant") + 1] == "fp32"
    assert command[command.index("--backend") + 1] == "onnxruntime"


def test_errors_of_query(folders, tmp_path):
    refusal(query(*folders[:2], "-g", tmp_path / "nowhere", "--json"), 3)
    other = with_another_tower(tmp_path, "text.int8.onnx")
    refusal(query("-b", other, *folders[2:], "--json"), 6)
