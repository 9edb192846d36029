import json
import os
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec

import pytest

from tests.helpers.toy_bundle import make_toy_bundle
from upperson_rt.errors import install_command


def test_a_hint_names_the_distribution_that_is_installed(monkeypatch):
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert install_command("gpu") == "pip install 'upperson[gpu]'"

    def distribution(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", distribution)
    assert install_command("gpu") == "pip install 'upperson-rt[gpu]'"


SLEEPING = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "5000",
    "KMP_BLOCKTIME": "0",
    "OPENBLAS_THREAD_TIMEOUT": "4",
}


def run_with(code, *arguments, without=(), **variables):
    """Run code with these variables in place of some that are set here."""
    env = {name: value for name, value in os.environ.items() if name not in without}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=env | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize(
    ("own", "set_here"),
    [({}, SLEEPING), ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OPENBLAS_THREAD_TIMEOUT": "4"})],
)
def test_threads_sleep_while_they_wait_unless_the_user_chose(own, set_here):
    code = "import json, os, upperson_rt; print(json.dumps(dict(os.environ)))"
    found = json.loads(run_with(code, without=SLEEPING, **own).stdout)
    assert {name: found[name] for name in SLEEPING if name in found} == own | set_here


OPENING = """
import os, sys
import upperson_rt
from upperson_rt.bundle import Bundle

Bundle.open(sys.argv[1], "fp32", sys.argv[2], threads=1).encoder().encode_texts(["red"])
open_files = {os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd")}
print(*(path for path in open_files if path.startswith(os.environ["HOME"])))
print(*(name for name in sys.modules if name.startswith("openvino_telemetry")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="open files are listed by /proc")
@pytest.mark.parametrize("library", ["onnxruntime", "openvino"])
def test_libraries_report_nothing_to_their_makers(tmp_path, library):
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    bundle, home = make_toy_bundle(tmp_path / "bundle"), tmp_path / "home"
    home.mkdir()
    hidden = ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "UPPERSON_CACHE", "CI", "TF_BUILD")
    done = run_with(OPENING, bundle, library, without=hidden, HOME=str(home))
    assert done.stdout.split() == []
    assert [path for path in home.rglob("*") if path.is_file()] == []
