"""``upperson parity`` on runs and bundles, with files that do and do not agree."""

import json
import re
import shutil
import sys

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from typer.testing import CliRunner

import upperson.cli
from tests.helpers.toy_bundle import draw_person, make_toy_bundle, replace_in_bundle
from upperson_rt.manifest import (
    FileEntry,
    ImageSection,
    ModelSection,
    TextSection,
    space_fingerprint,
)

SMALL = ["--count", "9", "--batch", "1,4", "--threads", "1"]
LOOSE = ["--min-cosine", "0.5"]
"""The toy's int8 is far off on purpose."""


def run(*arguments):
    return CliRunner().invoke(upperson.cli.app, ["parity", *map(str, arguments)])


def error_line(result):
    return result.stderr.splitlines()[-1]


@pytest.fixture
def bundle(tmp_path):
    return make_toy_bundle(tmp_path / "bundle")


def test_a_bundle_whose_variants_agree(bundle):
    result = run(bundle, *SMALL, *LOOSE, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert list(found) == [
        "target", "ok", "reference", "source", "images", "captions", "batch_sizes",
        "preprocessing", "worst", "would_pass", "comparisons", "not_run",
    ]  # fmt: skip
    assert (found["ok"], found["worst"], found["would_pass"]) == (True, None, None)
    assert found["reference"].startswith("fp32, onnxruntime ")
    assert found["source"] == "9 synthetic people"
    assert found["preprocessing"]["equal"] is True
    assert found["not_run"] == []
    kinds = {
        (one["variant"], one["backend"].split()[0], one["tower"], one["batch_size"])
        for one in found["comparisons"]
    }
    assert kinds == {
        (variant, backend, tower, size)
        for variant in ("fp32", "int8")
        for backend in ("onnxruntime", "openvino")
        for tower in ("image", "text", "both")
        for size in (1, 4)
    }
    for one in found["comparisons"]:
        loose = {"max_error": 1e-5, "min_cosine": None}, {"max_error": None, "min_cosine": 0.5}
        assert one["tolerance"] == loose[one["variant"] == "int8"]
        assert one["ranking"]["top_k"] == 9
        assert (one["to_reference"] is None) == (one["tower"] == "both")
    shown = run(bundle, *SMALL, *LOOSE).stdout.splitlines()
    assert shown[-1] == f"ok: {len(found['comparisons'])} comparisons agree"


def test_a_failure_names_the_worst_case_and_a_tolerance_that_passes(bundle):
    result = run(bundle, *SMALL)
    assert result.exit_code == 6
    assert "comparisons agree" not in result.stdout
    line = error_line(result)
    assert re.match(
        r"error: int8 on (onnxruntime|openvino) \S+ on cpu, text tower, batch \d, .*: "
        r'caption \d "[^"]+".* has cosine 0\.\d{5} to the reference, expected at least 0\.99 '
        r"\(\d+ of \d+ comparisons fail\); --min-cosine 0\.\d+ would pass$",
        line,
    ), line
    assert "int8 on openvino" in result.stdout
    assert result.stdout.count("WORST") == 1
    suggested = re.findall(r"--min-cosine \S+", line)[0].split()
    assert run(bundle, *SMALL, *suggested).exit_code == 0

    as_json = run(bundle, *SMALL, "--json")
    assert as_json.exit_code == 6
    found = json.loads(as_json.stdout)
    assert found["ok"] is False
    assert found["worst"]["failure"] in line
    assert found["would_pass"] == {"min_cosine": float(suggested[1])}


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        # 0 / log(16) is 0 for every image, which is no direction: the encoder refuses it, too.
        ("ReduceLogSumExp", "every image has the same embedding"),
        ("ReduceL2", "has no finite embedding"),  # 0 / 0.
    ],
)
def test_a_tower_that_ignores_its_input_is_found(bundle, norm, message):
    model = onnx.load(bundle / "image.int8.onnx")
    (projection,) = [t for t in model.graph.initializer if t.name == "projection"]
    zeros = np.zeros_like(numpy_helper.to_array(projection))
    projection.CopyFrom(numpy_helper.from_array(zeros, "projection"))
    model.graph.node[-2].op_type = norm
    replace_in_bundle(bundle, "image.int8.onnx", model.SerializeToString())
    result = run(bundle, *SMALL, *LOOSE)
    assert result.exit_code == 6
    assert "image tower" in error_line(result)
    assert message in error_line(result)
    assert "no tolerance makes this right" in error_line(result)
    assert "fp32 on openvino" in result.stdout


def test_a_changed_file_is_refused_before_anything_runs(bundle):
    path = bundle / "image.int8.onnx"
    *kept, last = path.read_bytes()
    path.write_bytes(bytes([*kept, last ^ 1]))
    result = run(bundle, *SMALL)
    assert result.exit_code == 6
    assert "has sha256" in error_line(result)


def test_own_images_are_taken_evenly_and_named(bundle, tmp_path):
    (tmp_path / "crops").mkdir()
    for number in range(19):
        draw_person(tmp_path / "crops" / f"{number:02}.png", "red", seed=number)
    result = run(bundle, *SMALL, *LOOSE, "--images", tmp_path / "crops", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["images"] == found["captions"] == 9
    assert found["source"].startswith("9 of 19 images at ")
    (tmp_path / "crops" / "00.png").write_bytes(b"no picture")
    result = run(bundle, *SMALL, "--images", tmp_path / "crops")
    assert result.exit_code == 3
    assert "cannot read image" in error_line(result)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--batch", "1,x"], 2, "--batch must be sizes such as 1,2,8,32, found '1,x'"),
        (["--batch", "0"], 2, "--batch must be sizes"),
        (["--min-cosine", "1.5"], 2, "--min-cosine must be above 0 and at most 1"),
        (["--min-cosine", "nan"], 2, "--min-cosine must be above 0 and at most 1"),
        (["--max-error", "0"], 2, "--max-error must be above 0"),
        (["--backends", "auto"], 2, "'auto' is no backend to compare"),
        (["--backends", "onnxruntime,onnx"], 2, "no backend 'onnx'"),
        (["--backends", "onnxruntime:cuda"], 5, "CUDAExecutionProvider"),
        (["--images", "nowhere"], 3, "no such file or folder: nowhere"),
        (["--run", "nowhere"], 3, "expected a run folder with config.yaml"),
    ],
)
def test_options_that_cannot_be_are_one_line(bundle, options, code, message):
    result = run(bundle, *SMALL, *options)
    assert result.exit_code == code, result.stderr
    assert message in error_line(result)
    assert result.stdout == ""


def test_a_folder_that_is_neither_is_refused(tmp_path):
    result = run(tmp_path / "gone")
    assert result.exit_code == 3
    assert "expected a run folder or a bundle" in error_line(result)
    result = run(tmp_path)
    assert result.exit_code == 3
    assert "expected a run folder with config.yaml" in error_line(result)
    result = run(tmp_path, "--run", tmp_path)
    assert result.exit_code == 2
    assert "--run goes with a bundle" in error_line(result)


def test_a_backend_that_is_asked_for_and_not_installed_ends_with_5(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    result = run(bundle, *SMALL, "--backends", "onnxruntime,openvino")
    assert result.exit_code == 5, result.stderr
    assert "needs the package 'openvino'" in error_line(result)
    result = run(bundle, *SMALL, *LOOSE)
    assert result.exit_code == 0, result.stderr
    assert "onnxruntime" in result.stdout
    assert "openvino" not in result.stdout + result.stderr  # Nobody asked for it.


# --- a real run and its bundle ---


@pytest.mark.timeout(180, func_only=True)  # It traces both towers, in seconds on a quiet machine.
def test_a_run_agrees_with_its_folded_towers_and_a_fresh_export(toy_run):
    result = run(toy_run, *SMALL)
    assert result.exit_code == 0, result.stderr
    heads = [line for line in result.stdout.splitlines() if line.endswith("max error 1e-05")]
    assert [re.sub(r" \d\S*", "", head) for head in heads] == [
        f"{subject} on cpu: ok, expected max error"
        for subject in ("run on torch", "folded on torch", "fp32 on onnxruntime",
                        "fp32 on openvino")
    ]  # fmt: skip
    assert "equal in training and runtime" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_a_bundle_is_compared_with_its_run(demo_folder):
    bundle = demo_folder / "bundle"
    result = run(bundle, "--run", demo_folder / "run", *SMALL, "--backends", "openvino", "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["reference"].startswith("run, torch ")
    names = list(
        dict.fromkeys((one["variant"], one["backend"].split()[0]) for one in found["comparisons"])
    )
    assert names[:3] == [("run", "torch"), ("folded", "torch"), ("fp32", "openvino")]
    for one in found["comparisons"]:
        if one["variant"] == "fp32" and one["to_reference"]:
            assert one["to_reference"]["max_error"] < 1e-5
        if one["inputs"] in ("files", "sentences"):
            assert one["to_reference"]["min_cosine"] > 0.99


def test_a_bundle_of_another_run_is_refused(demo_folder, bundle, tmp_path):
    result = run(bundle, "--run", demo_folder / "run", *SMALL)
    assert result.exit_code == 3
    assert "the bundle was not exported from the run" in error_line(result)


def test_a_bundle_with_another_tokenizer_than_training_is_refused(demo_folder, tmp_path):
    bundle = shutil.copytree(demo_folder / "bundle", tmp_path / "bundle")
    tokenizer = json.loads((bundle / "tokenizer.json").read_text("utf-8"))
    ids = tokenizer["model"]["vocab"]
    ids["a</w>"], ids["the</w>"] = ids["the</w>"], ids["a</w>"]
    replace_in_bundle(bundle, "tokenizer.json", json.dumps(tokenizer).encode())
    refresh_fingerprint(bundle)
    result = run(bundle, "--run", demo_folder / "run", *SMALL)
    assert result.exit_code == 6
    assert "the bundle's tokenizer.json gives the caption" in error_line(result)


def refresh_fingerprint(bundle):
    """Bring the manifest's fingerprint in line with its sections."""
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text("utf-8"))
    text = manifest["text"]
    manifest["fingerprint"] = space_fingerprint(
        ModelSection(**manifest["model"]),
        ImageSection(**manifest["image"]),
        TextSection(
            context_length=text["context_length"], tokenizer=FileEntry(**text["tokenizer"])
        ),
    )
    path.write_text(json.dumps(manifest), "utf-8")
