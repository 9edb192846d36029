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

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RUNTIME = {path.name: path for path in sorted((ROOT / "runtime").glob("upperson_*"))}
"""The core and its optional packages: what the slim wheel holds."""
PACKAGES = {
    "upperson": ROOT / "upperson",
    "upperson_synthetic": ROOT / "upperson_synthetic",
    "upperson_calibration": ROOT / "calibration" / "upperson_calibration",
    "upperson_export": ROOT / "export" / "upperson_export",
    **RUNTIME,
}
BASE = "upperson/assets/upperson-small.safetensors"
MOST_BASE_BYTES = 8_000_000
"""What the small base may add to the wheel and to the packed repository."""


def read_toml(path):
    return tomllib.loads(path.read_text("utf-8"))


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


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    with zipfile.ZipFile(build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))) as file:
        yield file


@pytest.fixture(scope="module")
def slim_wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slim")
    with zipfile.ZipFile(build(ROOT / "runtime", "wheel", folder)) as file:
        yield file


@pytest.fixture(scope="module")
def sdist_names(tmp_path_factory):
    with tarfile.open(build(ROOT, "sdist", tmp_path_factory.mktemp("sdist"))) as file:
        return {name.partition("/")[2] for name in file.getnames()}


def content_of(wheel):
    return {name for name in wheel.namelist() if ".dist-info/" not in name}


def metadata_of(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def source_files(package):
    """Every file of a package as it is called in a wheel."""
    return {
        f"{package}/{path.relative_to(PACKAGES[package]).as_posix()}"
        for path in PACKAGES[package].rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_two_projects_agree():
    root, slim = read_toml(ROOT / "pyproject.toml"), read_toml(ROOT / "runtime" / "pyproject.toml")
    assert root["build-system"] == slim["build-system"]
    for key in ("dependencies", "requires-python", "license", "dynamic"):
        assert root["project"][key] == slim["project"][key], key
    for extra, packages in slim["project"]["optional-dependencies"].items():
        assert root["project"]["optional-dependencies"][extra] == packages, extra
    for name, entry in slim["project"]["scripts"].items():
        assert root["project"]["scripts"][name] == entry
    version_files = {
        (ROOT / root["tool"]["hatch"]["version"]["path"]).resolve(),
        (ROOT / "runtime" / slim["tool"]["hatch"]["version"]["path"]).resolve(),
    }
    assert version_files == {PACKAGES["upperson_rt"] / "__init__.py"}


def test_gpu_packages_are_asked_for_where_they_exist():
    """PyPI has neither for ARM: an extra that names them there would fail, or bring a stub."""
    extras = read_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    (gpu,) = map(Requirement, extras["gpu"])
    assert gpu.extras == {"cuda", "cudnn"}
    for requirement in (gpu, *map(Requirement, (*extras["trt"], *extras["trt-cu12"]))):
        for machine, wanted in (("x86_64", True), ("aarch64", requirement.name == "onnxruntime")):
            marker = requirement.marker
            assert (marker is None or marker.evaluate({"platform_machine": machine})) == wanted


def test_the_container_folders_are_no_packages():
    for folder in ("calibration", "export", "runtime"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_every_package_is_typed():
    for package, folder in PACKAGES.items():
        assert (folder / "py.typed").is_file(), package
        assert (folder / "__init__.py").is_file(), package


def test_the_small_base_is_there_and_small():
    weights = ROOT / BASE
    assert weights.is_file(), f"{BASE} is missing: make it as upperson/pretrain.py says"
    # git packs with zlib, too.
    assert len(zlib.compress(weights.read_bytes(), level=6)) <= MOST_BASE_BYTES


def test_the_wheel_holds_its_packages_whole(wheel):
    names = content_of(wheel)
    assert {name.partition("/")[0] for name in names} == PACKAGES.keys()
    assert names == set().union(*map(source_files, PACKAGES))
    for name in (
        BASE,
        "upperson/assets/upperson-small.json",
        "upperson/templates/demo.html.j2",
        "upperson/recipes/synthetic.yaml",
        *(f"{package}/py.typed" for package in PACKAGES),
    ):
        assert name in names
    assert wheel.getinfo(BASE).compress_size <= MOST_BASE_BYTES


def test_the_wheel_holds_no_tests_and_no_leftovers(wheel, slim_wheel):
    for names in (content_of(wheel), content_of(slim_wheel)):
        for name in names:
            assert "tests" not in name.split("/")
            assert not name.endswith((".pyc", ".toml", ".so", ".onnx", ".npz"))


def test_the_wheels_describe_themselves(wheel, slim_wheel):
    for file, name, scripts in (
        (wheel, "upperson", {"upperson", "upperson-rt"}),
        (slim_wheel, "upperson-rt", {"upperson-rt"}),
    ):
        metadata = metadata_of(file)
        assert metadata["Name"] == name
        assert metadata["Version"] == upperson_rt.__version__
        assert metadata["License-Expression"] == "Apache-2.0"
        assert metadata["Requires-Python"] == ">=3.10"
        assert len(metadata.get_payload()) > 200  # The README.
        (entry_points,) = (n for n in file.namelist() if n.endswith("entry_points.txt"))
        found = configparser.ConfigParser(delimiters="=")
        found.read_string(file.read(entry_points).decode())
        assert found["console_scripts"].keys() == scripts
        expected = read_toml(ROOT / "pyproject.toml")["project"]["entry-points"]
        assert {g: dict(found[g]) for g in found if g.startswith("upperson.")} == expected


def test_the_base_install_needs_no_torch(wheel, slim_wheel):
    for file in (wheel, slim_wheel):
        required = metadata_of(file).get_all("Requires-Dist")
        always = {line.split(">=")[0] for line in required if "extra ==" not in line}
        assert always == {"faiss-cpu", "numpy", "pillow", "rich", "tokenizers", "typer"}


def test_the_slim_wheel_is_the_runtime_and_nothing_else(wheel, slim_wheel):
    assert content_of(slim_wheel) == set().union(*map(source_files, RUNTIME))
    for name in content_of(slim_wheel):
        assert slim_wheel.read(name) == wheel.read(name)


def test_the_source_distribution_builds_and_tests_itself(sdist_names):
    for path in (
        *PACKAGES.values(),
        ROOT / "benchmarks",
        ROOT / "tests",
    ):
        for file in path.rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert file.relative_to(ROOT).as_posix() in sdist_names
    for name in (
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "Makefile",
        "README.md",
        "SECURITY.md",
        "deploy/requirements-edge.txt",
        "pyproject.toml",
        "runtime/README.md",
        "runtime/pyproject.toml",
    ):
        assert name in sdist_names
    tops = {name.split("/")[0] for name in sdist_names}
    assert not tops & {"demo", "runs", "bundle", "gallery", ".venv", ".git"}
