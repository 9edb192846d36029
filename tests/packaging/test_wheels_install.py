"""Both wheels in a fresh environment of the oldest and the newest Python.

Needs a package index, as ``test_slim_wheel.py`` does; it installs the locked releases.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import upperson_rt
from tests.helpers.locks import ALL, read_lock
from tests.helpers.toy_bundle import make_toy_bundle
from tests.packaging.test_packaging import PACKAGES
from tests.packaging.test_slim_wheel import PIP, call

OLDEST, NEWEST = "3.10", "3.13"


def find_python(version: str) -> str | None:
    """Find an interpreter of that version that can make environments, also among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    places = [shutil.which(f"python{version}"), *map(str, pyenv.glob(f"{version}.*/bin/python"))]
    code = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    for place in filter(None, places):
        done = subprocess.run([place, "-c", code], capture_output=True, text=True)
        if done.stdout.strip() == version:  # pyenv's shims are there for versions that do not run.
            return place
    return None if version == OLDEST else sys.executable


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_toy_bundle(tmp_path_factory.mktemp("toy") / "bundle")


@pytest.fixture
def programs(request, wheels, tmp_path):
    """The bin folder of an environment of one Python with both wheels, and one engine."""
    if (python := find_python(request.param)) is None:
        pytest.skip(
            f"no Python {request.param} that has venv and ensurepip was found on PATH or in pyenv: "
            "the wheels were not installed with this version"
        )
    toolkit, runtime = wheels
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("".join(f"{locked.requirement}\n" for locked in read_lock(ALL)))
    folder = tmp_path / "venv" / "bin"
    # The oldest has its own pip, as users do; to make that takes seconds.
    own = request.param == OLDEST
    call(python, "-m", "venv", *([] if own else ["--without-pip"]), "venv", cwd=tmp_path)
    pip = (folder / "python", "-m", "pip") if own else (*PIP, folder / "python")
    call(
        *pip, "install", "--quiet", "--no-compile", "--constraint", constraints,
        f"{toolkit}[cpu-slim]", runtime, cwd=tmp_path, timeout_s=400,
    )  # fmt: skip
    call(*pip, "check", cwd=tmp_path)
    yield folder
    shutil.rmtree(tmp_path / "venv")


@pytest.mark.parametrize("programs", [OLDEST, NEWEST], indirect=True)
def test_both_wheels_install_in_one_call_and_work_on_one_engine(programs, bundle, tmp_path):
    (packages,) = programs.parent.glob("lib/*/site-packages")
    ours = [path for path in packages.glob("upperson*") if path.suffix == ""]
    assert {path.name for path in ours} == PACKAGES.keys()
    call(programs / "python", "-m", "compileall", "-q", *ours, cwd=tmp_path)

    def run(program, *words, code=0):
        return json.loads(call(programs / program, *words, "--json", cwd=tmp_path, code=code))

    assert (
        call(programs / "upperson", "--version", cwd=tmp_path).split()[-1]
        == upperson_rt.__version__
    )
    ids = ("--train-ids", 0, "--val-ids", 0, "--test-ids", 2)
    run("upperson", "data", "synthesize", "people", *ids, "--views", 1)
    indexed = run("upperson-rt", "index", "-b", bundle, "-g", "gallery", "people")
    assert (indexed["indexed"], indexed["skipped"]) == (2, [])
    found = run("upperson-rt", "query", "-b", bundle, "-g", "gallery", "woman in red coat")
    assert (found["backend"], len(found["hits"])) == ("onnxruntime", 2)
    checks = run("upperson-rt", "doctor", "-b", bundle, "-g", "gallery")
    assert checks["ok"], checks
    call(programs / "upperson", "export", "runs/none", cwd=tmp_path, code=5)
