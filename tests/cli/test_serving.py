"""``upperson serving``: both formats, and what is refused."""

import json

import pytest

from tests.helpers.command_line import run_program
from tests.helpers.invoke import run, run_json, run_refused
from tests.helpers.toy_bundle import make_toy_bundle


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_toy_bundle(tmp_path / "bundle")
    return tmp_path


def test_both_formats_in_words_and_one_as_json(folder):
    result = run("serving", "bundle", "--triton", "models", "--deepstream", "ds")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [
        "triton models (fp32); next:  tritonserver --model-repository=models",
        "deepstream ds (fp32); next:  see ds/README.md",
    ]
    assert (folder / "models/toy_image/config.pbtxt").is_file()
    assert (folder / "ds/README.md").is_file()
    content = run_json("serving", "bundle", "--deepstream", "ds", "--variant", "int8")
    assert list(content) == ["bundle", "deepstream"]
    written = content["deepstream"]
    assert (content["bundle"], written["folder"], written["variant"]) == ("bundle", "ds", "int8")
    assert "image.int8.planar.onnx" in written["files"]
    manifest = json.loads((folder / "bundle/bundle.json").read_text("utf-8"))
    assert written["fingerprint"] == manifest["fingerprint"]


@pytest.mark.parametrize(
    ("arguments", "code", "exit_code"),
    [
        (["bundle"], "nothing_to_write", 2),
        (["bundle", "--triton", "a", "--deepstream", "./a"], "folders_nested", 2),
        (["bundle", "--triton", "a", "--variant", "fp8"], None, 2),
        (["nowhere", "--triton", "a"], None, 3),
        (["bundle", "--triton", "bundle"], None, 3),
        (["damaged", "--triton", "a"], None, 6),
    ],
)
def test_errors_are_codes_and_nothing_is_written(folder, arguments, code, exit_code):
    (make_toy_bundle(folder / "damaged") / "image.fp32.onnx").write_bytes(b"changed")
    run_refused("serving", *arguments, code=code, exit_code=exit_code)
    assert not (folder / "a").exists()


def test_it_needs_onnx_but_neither_torch_nor_a_backend(folder):
    command = ["upperson", "serving", "bundle", "--triton", "models", "--deepstream", "ds"]
    done = run_program(*command, cwd=folder, without=["onnx"])
    assert done.returncode == 5
    assert "pip install 'upperson[export]'" in done.stderr
    heavy = ["torch", "open_clip", "onnxruntime", "openvino", "tritonclient"]
    done = run_program(*command, cwd=folder, without=heavy)
    assert done.returncode == 0, done.stderr
