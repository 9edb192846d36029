"""``upperson parity`` on runs and bundles, with files that do and do not agree."""

import json
import re
import shutil
import sys

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.helpers.invoke import run, run_json, run_refused
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


@pytest.fixture
def bundle(tmp_path):
    return make_toy_bundle(tmp_path / "bundle")


def test_a_bundle_whose_variants_agree(bundle):
    found = run_json("parity", bundle, *SMALL, *LOOSE)
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
    shown = run("parity", bundle, *SMALL, *LOOSE).stdout.splitlines()
    assert shown[-1] == f"ok: {len(found['comparisons'])} comparisons agree"


def test_a_failure_names_the_worst_case_and_a_tolerance_that_passes(bundle):
    result = run("parity", bundle, *SMALL)
    assert result.exit_code == 6
    assert result.stdout.count("WORST") == 1
    line = result.stderr.splitlines()[-1]
    assert re.match(
        r"error: int8 on (onnxruntime|openvino) \S+ on cpu, text tower, batch \d, .*: "
        r'caption \d "[^"]+".* 0\.\d{5} .* --min-cosine 0\.\d+ would pass$',
        line,
    ), line
    suggested = re.findall(r"--min-cosine \S+", line)[0].split()
    as_json = run("parity", bundle, *SMALL, "--json")
    assert as_json.exit_code == 6
    found = json.loads(as_json.stdout)
    assert found["ok"] is False
    assert found["worst"]["failure"] in line
    assert found["would_pass"] == {"min_cosine": float(suggested[1])}
    assert found["error"]["code"] == "embeddings_differ"
    assert run("parity", bundle, *SMALL, *suggested).exit_code == 0


@pytest.mark.parametrize(
    ("norm", "fault"),
    [
        # 0 / log(16) is 0 for every image, a direction that the encoder refuses, too.
        ("ReduceLogSumExp", "same embedding"),
        ("ReduceL2", "no finite embedding"),  # 0 / 0.
    ],
)
def test_a_tower_that_ignores_its_input_is_found(bundle, norm, fault):
    model = onnx.load(bundle / "image.int8.onnx")
    (projection,) = [t for t in model.graph.initializer if t.name == "projection"]
    zeros = np.zeros_like(numpy_helper.to_array(projection))
    projection.CopyFrom(numpy_helper.from_array(zeros, "projection"))
    model.graph.node[-2].op_type = norm
    replace_in_bundle(bundle, "image.int8.onnx", model.SerializeToString())
    result = run("parity", bundle, *SMALL, *LOOSE)
    assert result.exit_code == 6
    line = result.stderr.splitlines()[-1]
    assert "image tower" in line
    assert fault in line
    assert "no tolerance" in line
    assert "fp32 on openvino" in result.stdout


def test_own_images_are_taken_evenly_and_a_broken_one_is_refused(bundle, tmp_path):
    crops = tmp_path / "crops"
    crops.mkdir()
    for number in range(19):
        draw_person(crops / f"{number:02}.png", "red", seed=number)
    found = run_json("parity", bundle, *SMALL, *LOOSE, "--images", crops)
    assert found["images"] == found["captions"] == 9
    assert found["source"].startswith("9 of 19 images at ")
    (crops / "00.png").write_bytes(b"no picture")
    run_refused("parity", bundle, *SMALL, "--images", crops, exit_code=3)
    path = bundle / "image.int8.onnx"
    *kept, last = path.read_bytes()
    path.write_bytes(bytes([*kept, last ^ 1]))
    run_refused("parity", bundle, *SMALL, exit_code=6)


@pytest.mark.parametrize(
    ("options", "code", "exit_code"),
    [
        (["--batch", "1,x"], None, 2),
        (["--batch", "0"], None, 2),
        (["--min-cosine", "1.5"], "option_out_of_range", 2),
        (["--min-cosine", "nan"], "option_out_of_range", 2),
        (["--max-error", "0"], "option_out_of_range", 2),
        (["--backends", "auto"], "backend_not_single", 2),
        (["--backends", "onnxruntime,onnx"], None, 2),
        (["--backends", "onnxruntime:cuda"], None, 5),
        (["--images", "nowhere"], None, 3),
        (["--run", "nowhere"], None, 3),
    ],
)
def test_options_that_cannot_be_are_refused(bundle, options, code, exit_code):
    error = run_refused("parity", bundle, *SMALL, *options, code=code, exit_code=exit_code)
    assert error["fields"].get("option", options[0]) == options[0]


def test_a_folder_that_is_neither_is_refused(tmp_path):
    run_refused("parity", tmp_path / "gone", code="target_not_found", exit_code=3)
    run_refused("parity", tmp_path, exit_code=3)
    run_refused("parity", tmp_path, "--run", tmp_path, code="run_without_bundle", exit_code=2)


def test_a_missing_backend_is_an_error_only_if_it_is_named(bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    error = run_refused("parity", bundle, *SMALL, "--backends", "onnxruntime,openvino")
    assert (error["code"], error["fields"]["package"]) == ("extra_missing", "openvino")
    result = run("parity", bundle, *SMALL, *LOOSE)
    assert result.exit_code == 0, result.stderr
    assert "onnxruntime" in result.stdout
    assert "openvino" not in result.stdout + result.stderr


# --- a real run and its bundle ---


@pytest.mark.timeout(180, func_only=True)  # It traces both towers, in seconds on a quiet machine.
def test_a_run_agrees_with_its_folded_towers_and_a_fresh_export(toy_run):
    result = run("parity", toy_run, *SMALL)
    assert result.exit_code == 0, result.stderr
    heads = [line for line in result.stdout.splitlines() if line.endswith("max error 1e-05")]
    assert [re.sub(r" \d\S*", "", head) for head in heads] == [
        f"{subject} on cpu: ok, expected max error"
        for subject in ("run on torch", "folded on torch", "fp32 on onnxruntime",
                        "fp32 on openvino")
    ]  # fmt: skip
    assert "equal in training and runtime" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_a_bundle_is_compared_with_its_run(demo_folder, bundle):
    own = ["--run", demo_folder / "run", *SMALL]
    found = run_json("parity", demo_folder / "bundle", *own, "--backends", "openvino")
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
    run_refused("parity", bundle, *own, code="bundle_of_other_run", exit_code=3)


def test_a_bundle_with_another_tokenizer_than_training_is_refused(demo_folder, tmp_path):
    bundle = shutil.copytree(demo_folder / "bundle", tmp_path / "bundle")
    tokenizer = json.loads((bundle / "tokenizer.json").read_text("utf-8"))
    ids = tokenizer["model"]["vocab"]
    ids["a</w>"], ids["the</w>"] = ids["the</w>"], ids["a</w>"]
    replace_in_bundle(bundle, "tokenizer.json", json.dumps(tokenizer).encode())
    refresh_fingerprint(bundle)
    own = ["--run", demo_folder / "run", *SMALL]
    run_refused("parity", bundle, *own, code="tokenizer_differs", exit_code=6)


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
