"""What is installed: Python, SQLite and packages, as rows of the diagnosis."""

import platform
import sqlite3
from importlib import import_module
from importlib.util import find_spec

from upperson_doctor.jetson import jetson_advice, jetson_release
from upperson_rt.checks import OPTIONAL, Check, failed, ok, warning
from upperson_rt.errors import install_command, jetson_line
from upperson_rt.machine import version_of
from upperson_rt.printable import one_line

_OLDEST_SQLITE = (3, 24, 0)  # The first with UPSERT.
_OPENCV = (
    "opencv-python", "opencv-python-headless", "opencv-contrib-python",
    "opencv-contrib-python-headless",
)  # fmt: skip


def installed_checks() -> list[Check]:
    """Check everything that needs neither a model nor a GPU."""
    return [
        _python(),
        *_jetson(),
        *_packages(),
        _sqlite(),
        _faiss(),
        _opencv(),
        _optional("av", "camera"),
        _optional("pymilvus", "milvus"),
        _optional("prometheus-client", "metrics"),
        _optional("fastapi", "serve"),
    ]


def _python() -> Check:
    system = f"{platform.system()} {platform.machine()}"
    facts = {"version": platform.python_version(), "system": system}
    detail = f"{platform.python_version()} on {system}"
    if (line := jetson_line()) is not None:
        facts["jetson"] = line
        detail += f", Jetson Linux {line}"
    return ok("python", detail, **facts)


def _jetson() -> list[Check]:
    line = jetson_line()
    if line is None:
        return []
    advice = jetson_advice(jetson_release(), version_of("numpy"), _opencv_versions())
    facts = {"release": line, "advice": advice}
    if not advice:
        return [ok("jetson", "set up as docs/how-to/jetson.md says", **facts)]
    return [warning("jetson", "; ".join(advice), "docs/how-to/jetson.md", **facts)]


def _packages() -> list[Check]:
    checks = [
        _installed(name, module, f"pip install {name}")
        for name, module in (("numpy", "numpy"), ("pillow", "PIL"), ("tokenizers", "tokenizers"))
    ]
    return [*checks, _upperson()]


def _upperson() -> Check:
    """Check that ``upperson`` and the ``upperson-rt`` that it needs are of one release."""
    toolkit, runtime = version_of("upperson"), version_of("upperson-rt")
    names = {"upperson": toolkit, "upperson-rt": runtime}
    found = ", ".join(f"{name} {version}" for name, version in names.items() if version)
    if toolkit not in (None, runtime):
        detail = f"{found}: upperson needs upperson-rt {toolkit}"
        fix = "pip uninstall upperson upperson-rt, then install both from one release"
        return warning("upperson", detail, fix, version=toolkit, runtime=runtime)
    return ok("upperson", found or "from source", version=toolkit or runtime)


def _installed(name: str, module: str, fix: str) -> Check:
    """Check a package that is needed: it is there, and it really imports."""
    version = version_of(name)
    if version is None:
        return failed(name, "not installed", fix)
    problem = _import_problem(module)
    if problem is not None:
        return failed(name, f"{version} does not import: {problem}", f"{fix} --force-reinstall")
    return ok(name, version, version=version)


def _sqlite() -> Check:
    version = sqlite3.sqlite_version
    if sqlite3.sqlite_version_info < _OLDEST_SQLITE:
        return failed("sqlite", f"{version}, galleries need 3.24", "use a newer build of Python")
    return ok("sqlite", version, version=version)


def _faiss() -> Check:
    version = version_of("faiss-cpu") or version_of("faiss-gpu") or version_of("faiss")
    if version is None and find_spec("faiss") is None:
        fix = "pip install faiss-cpu"
        return warning("faiss", "not installed; large galleries need it", fix)
    problem = _import_problem("faiss")
    if problem is not None:
        return failed("faiss", f"{version} does not import: {problem}", "pip install faiss-cpu")
    return ok("faiss", version or "unknown version", version=version)


def _opencv_versions() -> dict[str, str]:
    return {name: version for name in _OPENCV if (version := version_of(name)) is not None}


def _opencv() -> Check:
    """Check OpenCV; several of its distributions overwrite each other's files."""
    found = _opencv_versions()
    if not found and find_spec("cv2") is None:
        return ok("opencv", f"{OPTIONAL}: {install_command('camera')}", distributions=found)
    detail = ", ".join(f"{name} {version}" for name, version in found.items()) or "system package"
    headless = f"pip uninstall opencv-python, then  {install_command('camera')}"
    problem = _import_problem("cv2")
    if problem is not None:
        broken = f"{detail} does not import: {problem}"
        return warning("opencv", broken, headless, distributions=found)
    if len(found) > 1:
        clash = f"{detail} are installed together and overwrite each other"
        return warning("opencv", clash, "pip uninstall all but one of them", distributions=found)
    return ok("opencv", detail, distributions=found)


def _optional(package: str, extra: str) -> Check:
    version = version_of(package)
    detail = version or f"{OPTIONAL}: {install_command(extra)}"
    return ok(package, detail, version=version)


def _import_problem(module: str) -> str | None:
    try:
        import_module(module)
    except Exception as error:  # Packages in pieces raise anything, not only ImportError.
        return one_line(error) or type(error).__name__
    return None
