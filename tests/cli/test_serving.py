import json

import pytest
from typer.testing import CliRunner

import upperson.cli
from tests.helpers.command_line import run_program
from tests.helpers.toy_bundle import make_toy_bundle


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_toy_bundle(tmp_path / "bundle")
    return tmp_path


def serving(*arguments):
    return CliRunner().invoke(upperson.cli.app, ["serving", *arguments])


def test_both_formats_at_once(folder):
    result = serving("bundle", "--triton", "models", "--deepstream", "ds")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines() == [
        "triton models (fp32); next:  tritonserver --model-repository=models",
        "deepstream ds (fp32); next:  see ds/README.md",
    ]
    assert (folder / "models/toy_image/config.pbtxt").is_file()
    assert (folder / "ds/README.md").is_file()


def test_json_is_one_object(folder):
    result = serving("bundle", "--deepstream", "ds", "--variant", "int8", "--json")
    assert result.exit_code == 0, result.stderr
    content = json.loads(result.stdout)
    assert content["bundle"] == "bundle"
    assert "triton" not in content
    assert content["deepstream"]["folder"] == "ds"
    assert content["deepstream"]["variant"] == "int8"
    assert "image.int8.planar.onnx" in content["deepstream"]["files"]
    manifest = json.loads((folder / "bundle/bundle.json").read_text("utf-8"))
    assert content["deepstream"]["fingerprint"] == manifest["fingerprint"]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["bundle"], 2, "nothing to write: name a folder with --triton or --deepstream"),
        (["bundle", "--triton", "a", "--deepstream", "./a"], 2, "name two folders"),
        (["bundle", "--triton", "a", "--variant", "fp8"], 2, "has no variant 'fp8'"),
        (["nowhere", "--triton", "a"], 3, "nowhere is not a bundle"),
        (["bundle", "--triton", "bundle"], 3, "not an earlier result"),
    ],
)
def test_errors_are_one_line_and_a_code(folder, arguments, code, message):
    result = serving(*arguments)
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())
    assert result.stdout == ""
    assert not (folder / "a").exists()


def test_a_changed_file_is_exit_code_6(folder):
    (folder / "bundle/image.fp32.onnx").write_bytes(b"changed")
    result = serving("bundle", "--triton", "models")
    assert result.exit_code == 6
    assert "image.fp32.onnx" in result.stderr
    assert not (folder / "models").exists()


def test_without_onnx_it_says_what_to_install(folder):
    done = run_program(
        "upperson", "serving", "bundle", "--triton", "models", cwd=folder, without=["onnx"]
    )
    assert done.returncode == 5
    assert "pip install 'upperson[export]'" in done.stderr


def test_it_needs_neither_torch_nor_a_backend(folder):
    done = run_program(
        "upperson", "serving", "bundle", "--triton", "models", "--deepstream", "ds",
        cwd=folder, without=["torch", "open_clip", "onnxruntime", "openvino", "tritonclient"],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
