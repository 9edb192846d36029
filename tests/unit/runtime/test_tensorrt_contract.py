"""Every name, keyword and signature of TensorRT that we use, against NVIDIA's own bindings.

There are wheels of the bindings alone, without TensorRT; ``make`` unpacks those of several
releases. Names are read from the source, so that a new one is checked without anybody's doing.
CUDA's names are compared with ``cuda.h`` in ``test_tensorrt_cuda.py``.
"""

import inspect
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.fake_cuda import FakeDriver
from tests.helpers.fake_tensorrt import VERSIONS, Buffer, Dims, make_fake_tensorrt
from tests.helpers.real_tensorrt import (
    FOLDER,
    RELEASES,
    Member,
    Parameter,
    RealClass,
    Signature,
    read_bindings,
    stub_libraries,
)
from tests.helpers.tensorrt_names import MODULE, Listed, Tupled, names_used
from upperson_rt.tensorrt.bindings import start_problem

ROOT = Path(__file__).parents[3]
SOURCES = [
    *sorted(
        path
        for folder in ("runtime/upperson_rt", "export/upperson_export")
        for path in (ROOT / folder).rglob("*.py")
        if "tensorrt" in path.read_text()
    ),
    ROOT / "tests/helpers/engine_layers.py",  # Of the tests that run on a GPU alone.
]
RTX = "tensorrt-rtx"


@pytest.fixture(scope="module")
def bindings(tmp_path_factory):
    """A function that reads a release, each once."""
    folder = tmp_path_factory.mktemp("stub")
    problem, known = stub_libraries(folder), {}

    def read(release):
        if release == RTX:
            if find_spec("tensorrt_rtx") is None:
                pytest.skip("needs tensorrt-rtx-cu13: extra 'dev', on Linux and x86-64")
        elif not (FOLDER / release).is_dir():
            pytest.skip(
                f"no bindings in {FOLDER / release}: make puts them there, where PyPI has some"
            )
        elif problem:
            pytest.skip(f"the bindings import beside a library that has to be compiled: {problem}")
        if release not in known:
            module = "tensorrt_rtx" if release == RTX else "tensorrt_bindings"
            path = None if release == RTX else FOLDER / release
            libraries = None if release == RTX else folder
            known[release] = read_bindings(module, path=path, libraries=libraries)
        return known[release]

    return read


def is_a(classes, kinds, wanted):
    """Whether a value of these types, as far as they are known, is taken where one is wanted."""
    if wanted == "Dims":
        return all(isinstance(kind, Tupled | Listed) or kind == "Dims" for kind in kinds)
    if wanted == "buffer":
        return kinds <= {"bytes", "IHostMemory"}
    return wanted == "object" or all(
        kind == wanted or (kind in classes and wanted in classes[kind].bases) for kind in kinds
    )


def problem_with(use, classes):
    """Return why the bindings would refuse a use, or None."""
    if use.owner == MODULE:
        return None if use.name in classes else "the module has no such name"
    if use.owner not in classes:
        return "there is no such class"
    member = classes[use.owner].members.get(use.name)
    if member is None:
        return None if use.optional else "the class has no such name"
    if use.how == "write":
        settable = member.kind == "property" and member.settable
        fits = is_a(classes, use.positional[0], member.type)
        return (
            None
            if settable and fits
            else f"it is a {member.kind}, of {member.type}, settable: {settable}"
        )
    if use.how == "override":
        counts = {len(signature.parameters) for signature in member.signatures}
        return None if len(use.positional) in counts else f"it is called with {counts} arguments"
    if use.how == "call":
        if not any(takes(signature, use, classes) for signature in member.signatures):
            return f"no overload takes this call: {member.signatures}"
    elif member.kind == "other":
        return "it is neither method nor property"
    return None


def takes(signature, use, classes):
    """Whether an overload takes a call."""
    left = list(signature.parameters)
    if len(use.positional) > len(left):
        return False
    given = [(left.pop(0), kind) for kind in use.positional]
    for name, kind in use.keywords:
        found = next((parameter for parameter in left if parameter.name == name), None)
        if found is None:
            return False
        left.remove(found)
        given.append((found, kind))
    return all(parameter.optional for parameter in left) and all(
        is_a(classes, kind, parameter.kind) for parameter, kind in given
    )


@pytest.mark.parametrize("release", [*RELEASES, RTX])
def test_every_name_that_is_used_is_there_and_takes_what_it_is_given(bindings, release):
    version, classes = bindings(release)
    uses = [use for use in names_used(SOURCES, classes) if release == RTX or not use.for_rtx]
    problems = [f"{use}: {problem}" for use in uses if (problem := problem_with(use, classes))]
    assert not problems, f"TensorRT {version} refuses:\n" + "\n".join(problems)
    names = {(use.owner, use.name) for use in uses}
    calls = [use for use in uses if use.how == "call"]
    print(f"TensorRT {version}: {len(names)} names, {len(uses)} uses, {len(calls)} of them calls")
    assert len(names) >= 65, "names are not found any more"
    if release != RTX:
        assert not any(use.for_rtx for use in uses)


def public(thing):
    return {name: value for name, value in vars(thing).items() if not name.startswith("_")}


FAKE_TYPES = {Dims: "Dims", Buffer: "buffer"}


def word(annotation):
    """The type of a parameter as the bindings write it."""
    if annotation in FAKE_TYPES:
        return FAKE_TYPES[annotation]
    return getattr(annotation, "__name__", "").replace("NoneType", "None") or "str"


@pytest.mark.parametrize("release", RELEASES)
def test_the_stand_in_offers_nothing_that_the_bindings_lack(bindings, release):
    version, classes = bindings(release)
    stand_in = {"tensorrt-10.3": VERSIONS[0], "tensorrt-10": VERSIONS[1]}.get(release, VERSIONS[2])
    fake = make_fake_tensorrt(stand_in, FakeDriver())
    problems, counted = [], 0
    for name, cls in public(fake).items():
        if not inspect.isclass(cls):
            continue
        if name not in classes:
            problems.append(f"{name}: there is no such class")
            continue
        real = classes[name].members
        values = {member: int(value) for member, value in getattr(cls, "__members__", {}).items()}
        for member, value in values.items():
            counted += 1
            if member not in real or real[member].value != value:
                problems.append(f"{name}.{member} is not {value}")
        if values:
            continue
        members = public(cls)
        if real.get("__init__") and real["__init__"].signatures and name != "Dims":
            members["__init__"] = cls.__init__
        for member, value in members.items():
            counted += 1
            problems += [
                f"{name}.{member}: {problem}"
                for problem in differences(member, value, real.get(member))
            ]
    assert not problems, f"TensorRT {version}:\n" + "\n".join(problems)
    print(f"TensorRT {version}: all {counted} names of the stand-in, with the same parameters")
    assert counted >= 75


def differences(name, value, real):
    """Yield what differs between a member of the stand-in and the bindings'."""
    if real is None:
        yield "the bindings have no such name"
    elif isinstance(value, property):
        if real.kind != "property":
            yield f"it is no property but a {real.kind}"
        elif value.fset and not real.settable:
            yield "it cannot be set"
        else:
            kind = inspect.signature(value.fget).return_annotation
            if kind not in (inspect.Signature.empty, None) and word(kind) != real.type:
                yield f"it is {real.type}, not {word(kind)}"
    elif inspect.isfunction(value):
        _, *parameters = inspect.signature(value).parameters.values()
        if not any(same_parameters(parameters, signature) for signature in real.signatures):
            yield f"other parameters: {[str(p) for p in parameters]}, not {real.signatures}"
    elif real.kind not in ("value", "other", "method"):
        yield f"it is a {real.kind}"


def same_parameters(ours, signature):
    theirs = signature.parameters
    return (
        [parameter.name for parameter in ours] == [p.name for p in theirs[: len(ours)]]
        and all(parameter.optional for parameter in theirs[len(ours) :])
        and all(
            own.annotation in (inspect.Parameter.empty, str | None)
            or word(own.annotation) == other.kind
            for own, other in zip(ours, theirs, strict=False)
        )
        and all(
            other.optional == (own.default is not inspect.Parameter.empty)
            for own, other in zip(ours, theirs, strict=False)
        )
    )


@pytest.fixture(params=RELEASES)
def as_tensorrt(request, bindings, tmp_path, monkeypatch):
    """Let processes started from here import a release as ``tensorrt``; it starts nowhere."""
    bindings(request.param)
    text = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    (tmp_path / "tensorrt.py").write_text(text)
    assert stub_libraries(tmp_path) is None
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    paths = [tmp_path, FOLDER / request.param, ROOT / "runtime"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, paths)))


def test_a_tensorrt_that_cannot_start_is_told_from_one_that_can(as_tensorrt):
    assert start_problem() == "TypeError: pybind11::init(): factory function returned nullptr"


LOGS = """
import sys
from upperson_rt.tensorrt.bindings import import_tensorrt, trt_log
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


def test_our_log_is_made_of_the_real_classes(as_tensorrt):
    done = subprocess.run([sys.executable, "-c", LOGS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# What finds mistakes has to find them: bindings of one class, and source with one mistake each.


def method(*parameters):
    return Member("method", (Signature(tuple(parameters), "None"),))


SMALL = {
    "Runtime": RealClass(
        ("object",),
        {
            "__init__": method(Parameter("logger", "ILogger", False)),
            "load": method(Parameter("plan", "buffer", False), Parameter("n", "int", True)),
            "version": Member("property", type="str"),
            "depth": Member("property", type="int", settable=True),
        },
    ),
    "Logger": RealClass(("ILogger", "object"), {"__init__": method()}),
    "ILogger": RealClass(("object",), {"log": method(Parameter("text", "str", False))}),
}

RIGHT = """
class Session:
    def __init__(self, trt):
        self._trt = trt
        self._runtime, self._other = self._make(), 1
    def _make(self):
        return self._trt.Runtime(self._trt.Logger())
    def run(self, plan):
        self._runtime.depth = 3
        return [one.version for one in [self._runtime]], self._runtime.load(b"x", n=1)
def logger(trt):
    class Log(trt.ILogger):
        def log(self, text): pass
    return Log()
def use(session, trt):
    return session._runtime.load(b"x", 1) and trt.Runtime(logger(trt))
"""


@pytest.mark.parametrize(
    ("right", "wrong", "problem"),
    [
        ("one.version", "one.verson", "Runtime.verson (read): the class has no such name"),
        ("trt.ILogger)", "trt.ILoger)", "the module.ILoger (read): the module has no such name"),
        ('(b"x", n=1)', '(b"x", count=1)', "Runtime.load (call): no overload takes this call"),
        ('(b"x", n=1)', '(b"x", n="1")', "Runtime.load (call): no overload takes this call"),
        ('(b"x", 1)', '("x", 1)', "Runtime.load (call): no overload takes this call"),
        ('(b"x", 1)', '(b"x", 1, 2)', "Runtime.load (call): no overload takes this call"),
        ('(b"x", 1)', "()", "Runtime.load (call): no overload takes this call"),
        ("self._trt.Logger())", '"log")', "Runtime.__init__ (call): no overload takes this call"),
        (".depth = 3", ".version = '3'", "Runtime.version (write): it is a property, of str"),
        (".depth = 3", ".depth = '3'", "Runtime.depth (write): it is a property, of int"),
        ("log(self, text)", "log(self, a, text)", "ILogger.log (override): it is called with {1}"),
        ("def log(", "def write(", "ILogger.write (override): the class has no such name"),
    ],
)
def test_a_wrong_use_is_found(tmp_path, right, wrong, problem):
    path = tmp_path / "source.py"

    def problems():
        uses = names_used([path], SMALL)
        return [f"{use}: {found}" for use in uses if (found := problem_with(use, SMALL))]

    path.write_text(RIGHT)
    assert problems() == []
    assert len(names_used([path], SMALL)) == 14
    assert RIGHT.count(right) == 1
    path.write_text(RIGHT.replace(right, wrong))
    assert any(problem in found for found in problems()), problems()
