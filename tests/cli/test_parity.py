"""``upperson parity`` on runs and bundles, with files that do and do not agree."""

import json
import re
import shutil
import sys
from dataclasses import replace

import pytest

from tests.helpers.invoke import run, run_failing, run_json
from tests.helpers.toy_bundle import draw_person, make_toy_bundle, replace_in_bundle
from tests.helpers.traces import once_in
from upperson_export.parity import subjects
from upperson_rt.manifest import parse_manifest, space_fingerprint

SMALL = ["--count", "9", "--batch-size", "1,4", "--threads", "1"]
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
    assert (found["preprocessing"]["equal"], found["not_run"]) == (True, [])
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


def test_a_failure_names_the_worst_case_and_a_tolerance_that_passes(bundle):
    assert run("parity", bundle, *SMALL).stdout.count("WORST") == 1
    as_json = run("parity", bundle, *SMALL, "--json")
    assert as_json.exit_code == 6
    found = json.loads(as_json.stdout)
    assert (found["ok"], found["error"]["code"]) == (False, "embeddings_differ")
    assert found["worst"]["failure"] in as_json.stderr.splitlines()[-1]
    (floor,) = found["would_pass"].values()
    assert run("parity", bundle, *SMALL, "--min-cosine", floor).exit_code == 0


def test_what_cannot_be_compared_is_refused(bundle, tmp_path, monkeypatch):
    crops = tmp_path / "crops"
    crops.mkdir()
    for number in range(19):
        draw_person(crops / f"{number:02}.png", "red", seed=number)
    found = run_json("parity", bundle, *SMALL, *LOOSE, "--images", crops)
    assert found["images"] == found["captions"] == 9
    assert found["source"].startswith("9 of 19 images at ")  # Evenly.
    (crops / "00.png").write_bytes(b"no picture")
    for code, exit_code, *options in (
        (None, 2, "--batch-size", "1,x"),
        (None, 2, "--batch-size", "0"),
        ("option_out_of_range", 2, "--min-cosine", "1.5"),
        ("option_out_of_range", 2, "--max-error", "0"),
        ("backend_not_single", 2, "--backend", "auto"),
        (None, 2, "--backend", "onnxruntime,onnx"),
        (None, 5, "--backend", "onnxruntime:cuda"),
        (None, 3, "--images", "nowhere"),
        (None, 3, "--images", crops),
        (None, 3, "--run", "nowhere"),
    ):
        error = run_failing(exit_code, code, "parity", bundle, *SMALL, *options)
        assert error["fields"].get("option", options[0]) == options[0]
    run_failing(3, "target_not_found", "parity", tmp_path / "gone")
    run_failing(3, None, "parity", tmp_path)
    run_failing(2, "run_without_bundle", "parity", tmp_path, "--run", tmp_path)

    monkeypatch.setitem(sys.modules, "openvino", None)  # An error only if it is named.
    named = ["parity", bundle, *SMALL, "--backend", "onnxruntime,openvino"]
    assert run_failing(5, "extra_missing", *named)["fields"]["package"] == "openvino"
    found = run_json("parity", bundle, *SMALL, *LOOSE)
    assert {one["backend"].split()[0] for one in found["comparisons"]} == {"onnxruntime"}
    path = bundle / "image.int8.onnx"
    *kept, last = path.read_bytes()
    path.write_bytes(bytes([*kept, last ^ 1]))
    run_failing(6, None, "parity", bundle, *SMALL)


# --- a real run and its bundle ---


@pytest.mark.timeout(180)  # It may trace both towers, in seconds on a quiet machine.
def test_a_run_agrees_with_its_folded_towers_and_a_fresh_export(
    toy_run, shared_folder, monkeypatch
):
    monkeypatch.setattr(subjects, "export_onnx", once_in(shared_folder / "traces"))
    result = run("parity", toy_run, *SMALL)
    assert result.exit_code == 0, result.stderr
    heads = [line for line in result.stdout.splitlines() if line.endswith("max error 1e-05")]
    assert [re.sub(r" \d\S*", "", head) for head in heads] == [
        f"{subject} on cpu: ok, expected max error"
        for subject in ("run on torch", "folded on torch", "fp32 on onnxruntime",
                        "fp32 on openvino")
    ]  # fmt: skip
    assert max(map(len, result.stdout.splitlines())) <= 100


def test_a_bundle_is_compared_with_its_run(site, bundle, tmp_path):
    own = ["--run", site / "run", *SMALL]
    found = run_json("parity", site / "bundle", *own, "--backend", "openvino")
    assert found["reference"].startswith("run, torch ")
    names = dict.fromkeys(
        (one["variant"], one["backend"].split()[0]) for one in found["comparisons"]
    )
    assert list(names)[:3] == [("run", "torch"), ("folded", "torch"), ("fp32", "openvino")]
    for one in found["comparisons"]:
        if one["variant"] == "fp32" and one["to_reference"]:
            assert one["to_reference"]["max_error"] < 1e-5
        if one["inputs"] in ("files", "sentences"):
            assert one["to_reference"]["min_cosine"] > 0.99
    run_failing(3, "bundle_of_other_run", "parity", bundle, *own)
    other = shutil.copytree(site / "bundle", tmp_path / "other")
    with_manifest(other, adapter_sha256="5" * 64)
    run_failing(3, "bundle_of_other_run", "parity", other, *own)

    reworded = shutil.copytree(site / "bundle", tmp_path / "reworded")
    tokenizer = json.loads((reworded / "tokenizer.json").read_text("utf-8"))
    ids = tokenizer["model"]["vocab"]
    ids["a</w>"], ids["the</w>"] = ids["the</w>"], ids["a</w>"]
    replace_in_bundle(reworded, "tokenizer.json", json.dumps(tokenizer).encode())
    with_manifest(reworded)
    run_failing(6, "tokenizer_differs", "parity", reworded, *own)


def with_manifest(bundle, **changes):
    """Change the model in a manifest, and bring its fingerprint in line."""
    path = bundle / "bundle.json"
    found = parse_manifest(path.read_text("utf-8"))
    model = replace(found.model, **changes)
    fingerprint = space_fingerprint(model, found.image, found.text)
    path.write_text(replace(found, model=model, fingerprint=fingerprint).to_json(), "utf-8")
