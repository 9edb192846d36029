"""What we call of TensorRT against NVIDIA's own bindings, of which there are wheels without it.

Every name of our source has to be in each release and in the stand-in, and the stand-in may have no
name, parameter, type or number that is not theirs. It refuses what pybind11 refuses, so the other
tests, which run our source on it, check the arguments.
"""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.helpers import fake_tensorrt, real_tensorrt
from tests.helpers.fake_cuda import FakeDriver
from upperson_tensorrt import bindings

SOURCES = [
    *Path(bindings.__file__).parent.glob("*.py"),
    Path(__file__).parents[2] / "gpu/test_layers.py",
]

OURS = {
    "append", "clear", "file", "itemsize", "logger", "max", "min", "nbytes", "opt", "release",
    "update", "value",
}  # fmt: skip
"""What these files call something of their own by; it happens to be a name of TensorRT, too."""

ON_A_GPU = {
    "IBuilderConfig": {"profiling_verbosity"},
    "ProfilingVerbosity": {"DETAILED"},
    "ICudaEngine": {"create_engine_inspector"},
    "EngineInspector": {"get_engine_information"},
    "LayerInformationFormat": {"JSON"},
}
"""Not in the stand-in: for TensorRT for RTX, and for tests that need a GPU."""


@pytest.fixture(scope="module", params=real_tensorrt.RELEASES)
def release(request, tmp_path_factory):
    """What a release offers, and how to import it."""
    env = real_tensorrt.import_as_tensorrt(request.param, tmp_path_factory.mktemp("bindings"))
    if env is None:
        pytest.skip("needs a C compiler, and bindings that make unpacks where PyPI has some")
    command = [sys.executable, real_tensorrt.__file__, "describe"]
    text = subprocess.run(command, env=os.environ | env, check=True, capture_output=True).stdout
    version = dict(zip(real_tensorrt.RELEASES, fake_tensorrt.VERSIONS, strict=True))[request.param]
    fake = fake_tensorrt.make_fake_tensorrt(version, FakeDriver())
    return SimpleNamespace(classes=json.loads(text), fake=fake, env=env)


def test_every_name_of_our_source_is_there_and_in_the_stand_in(release):
    nodes = [node for path in SOURCES for node in ast.walk(ast.parse(path.read_text()))]
    attributes = [node for node in nodes if isinstance(node, ast.Attribute)]
    used, missing = {node.attr for node in attributes}, set()
    real = set(release.classes).union(*release.classes.values())
    fake = set(fakes := classes_of(release.fake)).union(*fakes.values())
    assert (used & real) - OURS.union(ON_A_GPU, *ON_A_GPU.values()) <= fake
    assert used & fake <= real
    for name, members in ON_A_GPU.items():
        assert members <= release.classes[name].keys()
    for place in map(ast.unparse, attributes):
        if named := re.fullmatch(r"(?:self\._)?trt\.(\w+)(?:\.(\w+))?", place):
            members = release.classes.get(named[1])
            if members is None or (named[2] or "__init__") not in members:
                missing.add(named[1])
    assert missing == {"ComputeCapability", "__version__"}  # RTX has the first.


def classes_of(fake):
    return {
        name: {
            member: value
            for base in reversed(cls.__mro__)
            if base.__module__ == fake_tensorrt.__name__
            for member, value in vars(base).items()
            if member == "__init__" or not member.startswith("_")
        }
        for name, cls in vars(fake).items()
        if inspect.isclass(cls)
    }


def test_the_stand_in_offers_nothing_that_the_bindings_lack(release):
    found = {
        f"{name}.{member}": f"{value}, not {theirs}"
        for name, members in classes_of(release.fake).items()
        for member, value in members.items()
        if not is_like(value, theirs := release.classes.get(name, {}).get(member))
        if (member, theirs) != ("__init__", [])  # Made by other methods alone.
    }
    assert found == {}


def is_like(ours, theirs):
    """Whether a member of the stand-in is what the bindings have by that name."""
    if isinstance(theirs, int):
        return int(ours) == theirs
    if isinstance(theirs, dict):
        kind = inspect.signature(ours.fget).return_annotation.__name__
        return kind == theirs["property"] and bool(ours.fset) <= theirs["set"]
    _, *wanted = inspect.signature(ours).parameters.values()
    return any(
        len(overload) >= len(wanted)
        and all(optional for _, _, optional in overload[len(wanted) :])
        and all(
            (p.name, p.default is not p.empty) == (name, optional)
            and (p.annotation is p.empty or p.annotation.__name__ == kind)
            for p, (name, kind, optional) in zip(wanted, overload, strict=False)
        )
        for overload in theirs or ()
    )


LOGS = """
from upperson_tensorrt.bindings import import_tensorrt, trt_log
trt = import_tensorrt()
log = trt_log(trt)
assert isinstance(log.recorder, trt.IErrorRecorder) and isinstance(log.logger, trt.ILogger)
log.logger.log(trt.Logger.ERROR, "goes nowhere")
assert log.recorder.report_error(trt.ErrorCodeTRT.INTERNAL_ERROR, "one\\n two")
assert (log.recorder.num_errors(), log.recorder.has_overflowed()) == (1, False)
assert log.recorder.get_error_code(0) == trt.ErrorCodeTRT.INTERNAL_ERROR
assert (log.recorder.get_error_desc(0), log.take_errors()) == ("one two", "one two")
layers = trt_log(trt, layers=True)
layers.logger.log(trt.Logger.VERBOSE, "Layers: a table")
assert layers.layers == "Layers: a table"
"""


def test_our_log_is_made_of_the_real_classes_and_a_failed_start_is_reported(release, monkeypatch):
    for name, value in release.env.items():
        monkeypatch.setenv(name, value)
    done = subprocess.run([sys.executable, "-c", LOGS], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    problem = "TypeError: pybind11::init(): factory function returned nullptr"
    assert bindings.start_problem() == problem
