"""``upperson-rt bench towers`` on a toy bundle."""

import json
import sys
from functools import partial
from importlib.util import find_spec

import pytest

from tests.helpers.command_line import run_program
from tests.helpers.invoke import run_rt
from tests.helpers.toy_bundle import CONTEXT_LENGTH, make_toy_bundle, replace_in_bundle
from upperson_rt.bench.towers import captions

BACKENDS = [name for name in ("onnxruntime", "openvino") if find_spec(name)]
QUICK = ("--batch", "1,3", "--seconds", "0", "--threads", "1")


run = partial(run_rt, "bench", "towers")


@pytest.fixture
def bundle(bundle_and_crops):
    return bundle_and_crops / "bundle"


def test_json_has_every_variant_on_every_backend(bundle):
    result = run("-b", bundle, *QUICK, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    names = [f"{variant} on {backend}" for variant in ("fp32", "int8") for backend in BACKENDS]
    assert list(found["contenders"]) == names
    assert found["baseline"] == names[0]
    assert found["refused"] == {}
    assert found["threads"] == 1
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
    assert [shape[1] for _, inputs, shape in cases if inputs == "padded captions"] == [
        CONTEXT_LENGTH,
        CONTEXT_LENGTH,
    ]
    for case in found["cases"]:
        assert list(case["timings"]) == names
        assert case["timings"][names[0]]["speedup"] == 1
        for timing in case["timings"].values():
            assert timing["runs"] == 3
            assert 0 < timing["p50_ms"] <= timing["p90_ms"] <= timing["p99_ms"]


def test_people_get_tables_and_no_json(bundle):
    result = run("-b", bundle, *QUICK, "--variant", "int8", "--backend", "onnxruntime")
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    rows = [line for line in lines if "int8 on onnxruntime" in line]
    assert any(line.startswith("pictures") and "1.00x" in line for line in rows)
    assert "speed is relative to int8 on onnxruntime" in result.stdout
    assert "{" not in result.stdout
    assert "timing pictures, batch 1" in result.stderr


def test_what_computes_something_else_is_listed_and_not_timed(tmp_path):
    bundle = make_toy_bundle(tmp_path / "bundle")
    other = make_toy_bundle(tmp_path / "other", seed=4)
    replace_in_bundle(bundle, "image.int8.onnx", (other / "image.int8.onnx").read_bytes())
    options = ("-b", bundle, *QUICK, "--backend", "onnxruntime")
    result = run(*options, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert list(found["contenders"]) == ["fp32 on onnxruntime"]
    assert "to its golden embedding, expected at least" in found["refused"]["int8 on onnxruntime"]
    assert "warning: int8 on onnxruntime is not measured" in result.stderr
    assert all(list(case["timings"]) == ["fp32 on onnxruntime"] for case in found["cases"])

    result = run(*options, "--variant", "int8")
    assert result.exit_code == 6
    assert "error: nothing to measure: int8 on onnxruntime" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--variant", "int4"), 2, "did you mean 'int8'"),
        (("--backend", "auto"), 2, "'auto' is no backend to measure"),
        (("--batch", "1,none"), 2, "--batch must be sizes such as 1,2,8,32"),
        (("--batch", "0"), 2, "--batch must be sizes such as 1,2,8,32"),
        (("--seconds", "inf"), 2, "a number of seconds from 0"),
        (("--backend", "tensorflow"), 2, "no backend 'tensorflow'"),
        (("--device", "cuda", "--backend", "onnxruntime"), 5, "device 'cuda' needs ONNX Runtime's"),
        (("-b", "nowhere"), 3, "nowhere is not a bundle"),
    ],
)
def test_errors_are_one_line_and_a_code(bundle, arguments, code, message):
    result = run("-b", bundle, *arguments)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_a_process_that_dies_is_an_error_in_one_line(bundle, monkeypatch):
    monkeypatch.setattr("sys.executable", "/bin/false")
    result = run("-b", bundle, *QUICK, "--variant", "fp32", "--backend", "onnxruntime")
    assert result.exit_code == 5
    assert "its process ended with code 1: it said nothing" in result.stderr


def test_it_needs_no_torch(bundle):
    options = ("-b", bundle, *QUICK, "--variant", "fp32", "--backend", "onnxruntime", "--json")
    heavy = ["torch", "onnx", "open_clip"]
    done = run_program("upperson-rt", "bench", "towers", *options, without=heavy)
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)["contenders"]) == ["fp32 on onnxruntime"]


def test_captions_are_as_long_as_real_ones():
    from upperson.data.vocabulary import clip_tokenizer

    ids = clip_tokenizer().encode(captions(9)).input_ids
    lengths = (ids != 0).sum(axis=1)
    assert 20 <= lengths.min() < lengths.max() <= 30
    assert (ids[0] == ids[8]).all()
    assert len({tuple(row) for row in ids.tolist()}) == 8
