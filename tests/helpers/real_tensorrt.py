"""What NVIDIA's own Python bindings of TensorRT offer, as plain data and without TensorRT.

The bindings are wheels apart from the libraries, and import beside nine empty functions.
As a program: ``install`` unpacks the releases, ``describe`` prints what one offers.
"""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(sys.prefix, "bindings")
"""Releases have one module name, so each is unpacked into a folder of its own in here."""

RELEASES = {
    "tensorrt-10.3": "tensorrt-cu12-bindings==10.3.0",  # JetPack 6 has it.
    "tensorrt-10": "tensorrt-cu12-bindings>=10.13,<11",
    "tensorrt-11": "tensorrt-cu13-bindings>=11,<12",
}

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
    "tuple": "Dims",  # Wherever sizes are wanted.
    "list": "Dims",
    "buffer": "Buffer",
    "IParserError": "ParserError",
}


def import_as_tensorrt(release, folder):
    """Return the environment in which a release imports as ``tensorrt``; None if it cannot."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if not (FOLDER / release).is_dir() or compiler is None:
        return None
    source = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in EXPORTS)
    (folder / "stub.c").write_text(source)
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        target = folder / f"lib{name}.so.{release.partition('-')[2][:2]}"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", target, folder / "stub.c"], check=True)
    text = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
    (folder / "tensorrt.py").write_text(text)
    paths = (folder, FOLDER / release, Path(__file__).parents[2] / "runtime")
    return {"LD_LIBRARY_PATH": str(folder), "PYTHONPATH": os.pathsep.join(map(str, paths))}


def describe():
    """Return the classes of ``tensorrt``, and of each its members.

    The value of an enumeration is its number, a property its type and whether it can be set, a
    method its overloads: a list of parameters, each its name, type and whether it can be left out.
    """
    import tensorrt

    return {
        name: {
            member: _describe(member, getattr(cls, member))
            for member in dir(cls)
            if member == "__init__" or not member.startswith("_")
        }
        for name, cls in vars(tensorrt).items()
        if inspect.isclass(cls) and not issubclass(cls, BaseException)
    }


def _describe(name, member):
    if isinstance(member, property):
        returns = re.search(r"-> *(.+)", getattr(member.fget, "__doc__", None) or "")
        return {"property": _word(returns[1]) if returns else "", "set": member.fset is not None}
    if hasattr(type(member), "__members__"):
        return int(member)
    overloads = re.findall(rf"(?m)^(?:\d+\. )?{name}\((.*)\) -> ", member.__doc__ or "")
    return [list(map(_parameter, _split(text))) for text in overloads]


def _parameter(text):
    name, _, rest = text.partition(":")
    kind, equals, _ = rest.partition(" = ")
    return [name.strip(), _word(kind), bool(equals)]


def _split(text):
    """Return what stands between the commas that stand in no bracket, without self."""
    while (shorter := re.sub(r"\[[^][]*\]|\([^()]*\)|<[^<>]*>", "", text)) != text:
        text = shorter
    return [part for part in text.split(",") if part.partition(":")[0].strip() not in ("", "self")]


def _word(text):
    word = re.split(r"\.|::", text.strip())[-1]
    return SAME_TYPE.get(word.lower() if word in ("Buffer", "List") else word, word)


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
        print(json.dumps(describe()))
