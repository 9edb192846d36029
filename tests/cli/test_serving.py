"""``upperson serving``: both formats, and what is refused."""

import json

from tests.helpers.command_line import run_program
from tests.helpers.invoke import run_failing, run_json
from tests.helpers.toy_bundle import make_toy_bundle


def test_serving_writes_both_formats(work):
    make_toy_bundle(work / "bundle")
    (make_toy_bundle(work / "damaged") / "image.fp32.onnx").write_bytes(b"changed")
    for exit_code, code, *arguments in (
        (2, "nothing_to_write", "bundle"),
        (2, "folders_nested", "bundle", "--triton", "a", "--deepstream", "./a"),
        (2, None, "bundle", "--triton", "a", "--variant", "fp8"),
        (3, None, "nowhere", "--triton", "a"),
        (3, None, "bundle", "--triton", "bundle"),
        (6, None, "damaged", "--triton", "a"),
    ):
        run_failing(exit_code, code, "serving", *arguments)
        assert not (work / "a").exists()

    both = ["upperson", "serving", "bundle", "--triton", "models", "--deepstream", "ds"]
    done = run_program(*both, cwd=work, without=["onnx"])
    assert done.returncode == 5
    heavy = ["torch", "open_clip", "onnxruntime", "openvino", "tritonclient"]
    done = run_program(*both, cwd=work, without=heavy)
    assert done.returncode == 0, done.stderr
    assert [line.split(";")[0] for line in done.stdout.splitlines()] == [
        "triton models (fp32)",
        "deepstream ds (fp32)",
    ]
    assert (work / "models/toy_image/config.pbtxt").is_file()
    assert (work / "ds/README.md").is_file()
    content = run_json("serving", "bundle", "--deepstream", "ds", "--variant", "int8")
    assert list(content) == ["bundle", "deepstream"]
    written = content["deepstream"]
    assert (content["bundle"], written["folder"], written["variant"]) == ("bundle", "ds", "int8")
    assert "image.int8.planar.onnx" in written["files"]
    manifest = json.loads((work / "bundle/bundle.json").read_text("utf-8"))
    assert written["fingerprint"] == manifest["fingerprint"]
