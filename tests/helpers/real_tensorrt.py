"""NVIDIA's own Python bindings of TensorRT as plain data, without TensorRT: what they offer.

The bindings are wheels apart from the libraries, and import beside a library of nine empty
functions. As a program: ``install`` unpacks the releases, ``describe MODULE`` prints what one
offers.
"""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

FOLDER = Path(sys.prefix, "bindings")
"""Releases have one module name, so each is unpacked into a folder of its own in here."""

RELEASES = {
    "tensorrt-10.3": "tensorrt-cu12-bindings==10.3.0",  # JetPack 6 has it.
    "tensorrt-10": "tensorrt-cu12-bindings>=10.13,<11",
    "tensorrt-11": "tensorrt-cu13-bindings>=11,<12",
}
"""Folder and requirement."""

EXPORTS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry", "getNvOnnxParserVersion", "getPluginRegistry",
    "initLibNvInferPlugins",
)  # fmt: skip
"""All that the bindings want of libnvinfer, libnvinfer_plugin and libnvonnxparser."""

SAME_TYPE = {
    "SupportsInt": "int",
    "SupportsIndex": "int",
    "Buffer": "buffer",
    "tuple": "Dims",  # Wherever sizes are wanted.
    "list": "Dims",
    "IParserError": "ParserError",
    "capsule": "object",
}
"""Words of pybind11's signatures that mean the same to us."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a function."""

    name: str
    kind: str
    """The last word of its type, such as ``int`` or ``ILogger``."""
    optional: bool


@dataclass(frozen=True)
class Signature:
    """One overload."""

    parameters: tuple[Parameter, ...]
    """Without self."""
    returns: str


@dataclass
class Member:
    """What a class has."""

    kind: str
    """``method``, ``property``, ``value`` (of an enumeration) or ``other``."""
    signatures: tuple[Signature, ...] = ()
    type: str = ""
    """Of a property or value."""
    settable: bool = False
    value: int | None = None


@dataclass
class RealClass:
    """A class of the bindings."""

    bases: tuple[str, ...]
    members: dict[str, Member] = field(default_factory=dict)


def stub_libraries(folder):
    """Compile the nine functions; return why that is impossible, or None."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        return "no C compiler"
    source = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in EXPORTS)
    (folder / "stub.c").write_text(source)
    for major in (10, 11):
        for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
            target = folder / f"lib{name}.so.{major}"
            command = [compiler, "-shared", "-fPIC", "-o", target, folder / "stub.c"]
            subprocess.run(command, check=True)
    return None


def read_bindings(module, *, path=None, libraries=None):
    """Return version and classes of a module, read in a process of its own."""
    env = dict(os.environ)
    if path is not None:
        env["PYTHONPATH"] = str(path)
    if libraries is not None:
        env["LD_LIBRARY_PATH"] = str(libraries)
    done = subprocess.run(
        [sys.executable, __file__, "describe", module],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    return content["version"], {
        name: RealClass(
            tuple(found["bases"]),
            {member: _member(member, what) for member, what in found["members"].items()},
        )
        for name, found in content["classes"].items()
    }


def _member(name, what):
    kind, doc = what["kind"], what["doc"]
    if kind == "property":
        returns = re.search(r"-> *(.+)", doc)
        return Member(kind, type=_kind(returns[1]) if returns else "", settable=what["settable"])
    if kind == "value":
        return Member(kind, type=what["type"], value=what["value"])
    lines = re.findall(rf"(?m)^(?:\d+\. )?{name}\((.*)\) -> (.*)$", doc)
    found = tuple(_signature(*line) for line in lines if line[0] != "*args, **kwargs")
    return Member("method" if found else "other", found)


def _signature(parameters, returns):
    found = []
    for text in _split(parameters):
        name, _, rest = text.partition(":")
        kind, equals, _ = rest.partition(" = ")
        if name.strip() != "self":
            found.append(Parameter(name.strip(), _kind(kind), bool(equals)))
    return Signature(tuple(found), _kind(returns))


def _split(text):
    """Split at the commas that stand in no bracket."""
    depth, start = 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{<") - (letter in ")]}>")
        if letter == "," and not depth:
            yield text[start:place]
            start = place + 1
    if text.strip():
        yield text[start:]


def _kind(text):
    text = text.strip()
    listed = re.fullmatch(r"[Ll]ist\[(.*)\]", text)
    if listed:
        return f"list of {_kind(listed[1])}"
    word = re.split(r"\.|::", text)[-1]
    return SAME_TYPE.get(word, word)


def _describe(module):
    classes = {}
    for name, found in vars(module).items():
        if inspect.isclass(found) and not issubclass(found, BaseException):
            members = {}
            for member in dir(found):
                if member.startswith("_") and member != "__init__":
                    continue
                value = getattr(found, member)
                doc = getattr(value, "__doc__", None) or ""
                if isinstance(value, property):
                    doc = (value.fget.__doc__ or "") if value.fget else ""
                    what = {"kind": "property", "settable": value.fset is not None}
                elif hasattr(type(value), "__members__"):
                    what = {"kind": "value", "type": type(value).__name__, "value": int(value)}
                else:
                    what = {"kind": "method"}
                members[member] = what | {"doc": doc}
            bases = [base.__name__ for base in found.__mro__[1:]]
            classes[name] = {"bases": bases, "members": members}
    return {"version": module.__version__, "classes": classes}


def _install():
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary", ":all:"]
    for release, requirement in RELEASES.items():
        target = FOLDER / release
        shutil.rmtree(target, ignore_errors=True)
        done = subprocess.run([*pip, "--target", target, requirement], stderr=subprocess.DEVNULL)
        if done.returncode != 0:
            print(f"note: no {requirement} for this machine: its contract test will be skipped")


if __name__ == "__main__":
    if sys.argv[1] == "install":
        _install()
    else:
        print(json.dumps(_describe(import_module(sys.argv[2]))))
