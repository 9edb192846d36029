"""The wheels and the source distribution, built offline as pip would build them."""

import configparser
import subprocess
import sys
import tarfile
import zipfile
import zlib
from email.parser import Parser

import pytest
from packaging.requirements import Requirement

import upperson_rt
from tests.helpers.command_line import ROOT
from tests.helpers.locks import read_toml

RUNTIME = {path.name: path for path in sorted((ROOT / "runtime").glob("upperson_*"))}
"""What ``upperson-rt`` holds: the core and its optional packages."""
TOOLKIT = {
    "upperson": ROOT / "upperson",
    "upperson_synthetic": ROOT / "upperson_synthetic",
    "upperson_calibration": ROOT / "calibration" / "upperson_calibration",
    "upperson_export": ROOT / "export" / "upperson_export",
}
"""What ``upperson`` holds."""
PACKAGES = TOOLKIT | RUNTIME
BASE = "upperson/assets/upperson-small.safetensors"
MOST_BASE_BYTES = 8_000_000
"""What the small base may add to the wheel and to the packed repository."""


def build(project, target, folder):
    """Build a distribution with the backend that pip would use, but offline."""
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", target, "-d", str(folder)],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (file,) = folder.iterdir()
    return file


@pytest.fixture
def archives(wheels):
    """The same two as open archives."""
    with zipfile.ZipFile(wheels[0]) as toolkit, zipfile.ZipFile(wheels[1]) as runtime:
        yield toolkit, runtime


@pytest.fixture(scope="module")
def sdists(tmp_path_factory):
    """The source distributions of ``upperson``, with the whole repository, and ``upperson-rt``."""
    return [
        build(project, "sdist", tmp_path_factory.mktemp("sdist"))
        for project in (ROOT, ROOT / "runtime")
    ]


def content_of(wheel):
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


def files_in(folder):
    return [
        path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]


def source_files(package):
    """Every file of a package as it is called in a wheel."""
    folder = PACKAGES[package]
    return {f"{package}/{path.relative_to(folder).as_posix()}" for path in files_in(folder)}


def test_the_toolkit_needs_the_runtime_of_its_own_version_and_names_all_its_extras():
    toolkit, runtime = (read_toml(folder)["project"] for folder in (ROOT, ROOT / "runtime"))
    assert toolkit["dependencies"] == [f"upperson-rt=={upperson_rt.__version__}"]
    extras = {name: [f"upperson-rt[{name}]"] for name in runtime["optional-dependencies"]}
    assert extras.items() <= toolkit["optional-dependencies"].items()
    for key in ("requires-python", "license"):
        assert toolkit[key] == runtime[key], key
    assert (ROOT / "LICENSE").read_bytes() == (ROOT / "runtime" / "LICENSE").read_bytes()


def test_gpu_packages_are_asked_for_where_they_exist():
    """PyPI has neither for ARM: an extra that names them there would fail, or bring a stub."""
    extras = read_toml(ROOT / "runtime")["project"]["optional-dependencies"]
    (gpu,) = map(Requirement, extras["gpu"])
    assert gpu.extras == {"cuda", "cudnn"}
    for requirement in (gpu, *map(Requirement, (*extras["trt"], *extras["trt-cu12"]))):
        for machine, wanted in (("x86_64", True), ("aarch64", requirement.name == "onnxruntime")):
            marker = requirement.marker
            assert (marker is None or marker.evaluate({"platform_machine": machine})) == wanted


def test_every_package_is_typed_and_the_small_base_is_small():
    for folder in ("calibration", "export", "runtime"):
        assert not (ROOT / folder / "__init__.py").exists(), "it only holds packages"
    for package, folder in PACKAGES.items():
        assert (folder / "py.typed").is_file(), package
        assert (folder / "__init__.py").is_file(), package
    # git packs with zlib, too.
    assert len(zlib.compress((ROOT / BASE).read_bytes(), level=6)) <= MOST_BASE_BYTES


def test_the_wheels_hold_their_packages_whole_and_nothing_else(archives):
    toolkit, runtime = archives
    assert content_of(toolkit) == set().union(*map(source_files, TOOLKIT))
    assert content_of(runtime) == set().union(*map(source_files, RUNTIME))
    assert content_of(toolkit) >= {
        BASE,
        "upperson/assets/upperson-small.json",
        "upperson/templates/demo.html.j2",
        "upperson/recipes/synthetic.yaml",
    }
    assert content_of(runtime) >= {
        f"upperson_console/locale/{language}/LC_MESSAGES/console.mo" for language in ("de", "fr")
    }
    assert toolkit.getinfo(BASE).compress_size <= MOST_BASE_BYTES
    for name in content_of(toolkit) | content_of(runtime):
        assert "tests" not in name.split("/")
        assert not name.endswith((".pyc", ".toml", ".so", ".onnx", ".npz"))


def test_the_wheels_describe_themselves_and_need_no_torch(archives):
    always = (
        {f"upperson-rt=={upperson_rt.__version__}"},
        {"faiss-cpu", "numpy", "pillow", "rapidfuzz", "rich", "tokenizers", "typer"},
    )
    projects = (ROOT, ROOT / "runtime")
    for file, folder, packages in zip(archives, projects, always, strict=True):
        project = read_toml(folder)["project"]
        (place,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(file.read(place).decode())
        assert (metadata["Name"], metadata["Version"]) == (
            project["name"], upperson_rt.__version__
        )  # fmt: skip
        assert metadata["License-Expression"] == "Apache-2.0"
        assert metadata["Author"] == "UP-Person Edge developers"
        assert metadata["Requires-Python"] == ">=3.10"
        assert len(metadata.get_payload()) > 200  # The README.
        required = metadata.get_all("Requires-Dist")
        assert {line.split(">=")[0] for line in required if "extra ==" not in line} == packages
        (entry_points,) = (n for n in file.namelist() if n.endswith("entry_points.txt"))
        found = configparser.ConfigParser(delimiters="=")
        found.read_string(file.read(entry_points).decode())
        assert found["console_scripts"].keys() == {project["name"]}
        groups = {name: dict(found[name]) for name in found if name.startswith("upperson.")}
        assert groups == project.get("entry-points", {})


def test_an_index_would_take_the_wheels_and_source_distributions(wheels, sdists):
    files = [*wheels, *sdists]
    done = subprocess.run(
        [sys.executable, "-m", "twine", "--no-color", "check", "--strict", *files],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("PASSED") == len(files) == 4


def test_the_source_distribution_builds_and_tests_itself(sdists):
    with tarfile.open(sdists[0]) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    for folder in (*PACKAGES.values(), ROOT / "benchmarks", ROOT / "tests"):
        assert names >= {path.relative_to(ROOT).as_posix() for path in files_in(folder)}
    assert names >= {
        ".dockerignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md",
        "SECURITY.md", "deploy/requirements-edge.txt", "pyproject.toml", "runtime/README.md",
        "runtime/pyproject.toml",
    }  # fmt: skip
    tops = {name.split("/")[0] for name in names}
    assert not tops & {"demo", "runs", "bundle", "gallery", ".venv", ".git"}
