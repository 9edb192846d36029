"""The slim wheel in a fresh environment, as it arrives on an edge device.

It needs a package index: it installs what ``deploy/requirements-edge.txt`` locks, as the image
does, and the wheel over it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.invoke import run_rt_json
from tests.helpers.locks import EDGE

SENTENCE = "woman in red coat"


def call(*command, cwd, code=0, timeout_s=60):
    """Run a command without anything of this environment in it; return its stdout."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTHON")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


PIP = (sys.executable, "-m", "pip", "--python")


@pytest.fixture(scope="module")
def edge(wheels, tmp_path_factory) -> Path:
    """The bin folder of a fresh environment with the slim wheel and the locked packages only.

    The packages are those of the environment that ``make sbom`` made, if the variable names it.
    """
    folder = tmp_path_factory.mktemp("edge")
    made = os.environ.get("UPPERSON_TEST_EDGE")
    venv = Path(made) if made else folder / "venv"
    install = (*PIP, venv / "bin" / "python", "install", "--quiet", "--no-compile", "--no-deps")
    if not made:
        call(sys.executable, "-m", "venv", "--without-pip", venv, cwd=folder, timeout_s=120)
        call(*install, "--require-hashes", "-r", EDGE, cwd=folder, timeout_s=400)
    call(*install, "--force-reinstall", wheels[1], cwd=folder)
    return venv / "bin"


def test_the_environment_holds_no_training_packages_and_fits_together(edge, tmp_path):
    absent = ["torch", "onnx", "open_clip", "torchvision", "upperson", "upperson_export",
              "upperson_calibration"]  # fmt: skip
    code = f"from importlib.util import find_spec; print(*filter(find_spec, {absent!r}))"
    assert call(edge / "python", "-c", code, cwd=tmp_path).split() == []
    assert not (edge / "upperson").exists()
    call(*PIP, edge / "python", "check", cwd=tmp_path)


def test_the_slim_runtime_searches_indexes_and_checks_itself(edge, demo_folder, tmp_path):
    bundle = ["-b", demo_folder / "bundle"]

    def run(*words):
        return json.loads(call(edge / "upperson-rt", *words, *bundle, "--json", cwd=tmp_path))

    query = ["query", "-g", demo_folder / "gallery", SENTENCE, "-k", "5"]
    found = run(*query)
    assert found["query"] == SENTENCE
    assert (found["backend"], found["device"], found["items"]) == ("onnxruntime", "cpu", 80)
    hits = found["hits"]
    assert [hit["rank"] for hit in hits] == [1, 2, 3, 4, 5]
    scores = [hit["score"] for hit in hits]
    assert scores == sorted(scores, reverse=True)
    assert all(Path(hit["source"]).is_file() for hit in hits)
    expected = {hit["key"]: hit["score"] for hit in run_rt_json(*query, *bundle)["hits"]}
    # The same file in possibly another release of the backend: scores agree closely.
    assert hits[0]["score"] == pytest.approx(max(expected.values()), abs=0.02)
    assert len(expected.keys() & {hit["key"] for hit in hits}) >= 4

    pictures = sorted((demo_folder / "people").rglob("test/*.jpg"))[:3]
    indexed = run("index", "-g", "new", *pictures)
    assert (indexed["indexed"], indexed["items"], indexed["skipped"]) == (3, 3, [])
    for backend in ("onnxruntime", "openvino"):
        checks = run("doctor", "-g", "new", "--backend", backend)
        assert checks["ok"], checks
