"""Tiers of the tests, what they share, and an environment that is the same everywhere.

The folder decides the tier and with it the time limit of a test. A test that needs more says so
with its own ``pytest.mark.timeout``.
"""

import gc
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from filelock import FileLock

import upperson_rt  # noqa: F401 - Before onnxruntime, whose telemetry it turns off.
from tests.helpers.command_line import TRACED_ONCE, run_code
from upperson_rt.machine import trim_heap

# Hundreds of processes import the same files: one of them compiles each.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Set before torch is imported: toy models are faster on one thread, and sums always run in the
# same order.
os.environ["OMP_NUM_THREADS"] = "1"
# In bf16, torch keeps a thousand kernels by default, one for each length of captions that it met.
os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "16"
os.environ["HF_HUB_OFFLINE"] = "1"  # A test that wants to download something fails at once.
os.environ["COLUMNS"] = "100"
for _name in (
    "UPPERSON_BUNDLE", "UPPERSON_GALLERY", "UPPERSON_QUERY_LOG",
    "FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS",  # These make help texts coloured.
):  # fmt: skip
    os.environ.pop(_name, None)
if "PYTEST_XDIST_WORKER" not in os.environ:  # Workers share one folder; it goes at the end.
    os.environ["UPPERSON_CACHE"] = tempfile.mkdtemp(prefix="upperson-tests-")

# Full collections look through all that is imported, for up to a second, and were a third of some
# files' time. `memory_is_given_back` makes one where memory has grown.
gc.set_threshold(10_000, 10, 1_000_000)

if threading.current_thread() is threading.main_thread():
    # What a shell starts in the background ignores Ctrl-C, and so would all that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).parent

_MOST_PEAK_MB = 1500
"""What a process that runs tests should take at most; those that tests start are not in it."""

_STATM = Path("/proc/self/statm")
_MANY_PAGES = 16000  # 64 MB.
_MANY_MODULES = 50
_NO_PARAMETERS = SimpleNamespace(params={})
_kept_pages = 0  # After memory was given back the last time.
_kept_modules = 0  # When what was imported was set aside the last time.
_peak = (0, "")  # The most this process ever took in MB, and the test that took it.
_peaks: dict[str, tuple[int, str]] = {}  # The same of all workers, by name.

TIER_TIMEOUT_S = {
    "unit": 30,  # One module on toy models.
    "parity": 120,  # Two implementations of the same thing, compared.
    "golden": 60,  # Against small committed files.
    "cli": 60,  # The commands as users run them.
    "packaging": 120,  # Wheels, imports, public names, documents.
    "fuzz": 60,  # Odd values and damaged files; see tests.helpers.fuzzing.
    "gpu": 600,  # On an NVIDIA GPU; skipped where there is none.
}
"""Seconds a test may take, without its fixtures: those that take long have their own limit."""


def pytest_runtest_logfinish(nodeid: str) -> None:
    global _peak
    if (peak_mb := _own_peak_mb()) > _peak[0]:
        _peak = (peak_mb, nodeid)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take what a worker reports when it has finished; one that crashed reports nothing."""
    if peak := getattr(node, "workeroutput", {}).get("peak"):
        _peaks[node.gateway.id] = tuple(peak)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak"] = _peak
    elif not _peaks:
        _peaks["this process"] = _peak


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, (peak_mb, test) in _peaks.items():
        if peak_mb > 0:
            line = f"{name} took {peak_mb:,} MB at most (it should be {_MOST_PEAK_MB:,}), in {test}"
            terminalreporter.write_line(line, red=peak_mb > _MOST_PEAK_MB)


def pytest_unconfigure() -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(os.environ["UPPERSON_CACHE"], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(TESTS):
            continue
        folder = item.path.relative_to(TESTS).parts[0]
        if folder not in TIER_TIMEOUT_S:
            raise pytest.UsageError(
                f"{item.path} is in no tier: put it into one of the folders "
                f"{', '.join(f'tests/{tier}' for tier in TIER_TIMEOUT_S)}"
            )
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(TIER_TIMEOUT_S[folder]))
    # Files that need the quick demo come first, so to one worker: others would wait while it runs.
    with_demo = {item.path for item in items if "quick_demo" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in with_demo)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    gc.disable()  # Imports make much that stays: to look through it again and again takes seconds.
    try:
        return (yield)
    finally:
        gc.enable()


def pytest_collection_finish() -> None:
    _collect_garbage()


@pytest.fixture
def in_memory(tmp_path: Path) -> Iterator[Path]:
    """A folder for what a kill leaves, in memory where possible: most time goes into syncs."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def memory_is_given_back(request: pytest.FixtureRequest) -> Iterator[None]:
    """Return what tests' models took to the system: a worker meets hundreds of them."""
    global _kept_pages
    yield
    for value in getattr(request.node, "callspec", _NO_PARAMETERS).params.values():
        if isinstance(value, BaseException):  # It was raised, and holds all that was there then.
            value.__traceback__ = value.__context__ = None
    if _resident_pages() - _kept_pages > _MANY_PAGES:
        _collect_garbage()  # Graphs are cyclic, and hold their weights until they are collected.
        trim_heap()
        _kept_pages = _resident_pages()


def _collect_garbage() -> None:
    """Collect, and set aside what imports brought: to look through it takes a second each time."""
    global _kept_modules
    many = len(sys.modules) - _kept_modules > _MANY_MODULES
    if many:
        gc.unfreeze()  # What was alive when it was set aside, and is no more, goes.
    gc.collect()
    if many:
        gc.freeze()
        _kept_modules = len(sys.modules)


def _resident_pages() -> int:
    return int(_STATM.read_bytes().split()[1]) if _STATM.exists() else 0


def _own_peak_mb() -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) // 1024 for line in lines if line.startswith("VmHWM")), 0)


class QuickDemo(NamedTuple):
    """The output of ``upperson demo --quick --json``. Tests copy the folder to change it."""

    folder: Path
    stdout: str
    stderr: str


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder that the workers of one session share, and a session within one of its tests."""
    if "UPPERSON_TEST_SHARED" in os.environ:
        return Path(os.environ["UPPERSON_TEST_SHARED"])
    own = tmp_path_factory.getbasetemp()
    return own if worker_id == "master" else own.parent


@pytest.fixture(scope="session")
def toy_graphs(shared_folder: Path) -> None:
    """Export the toy's towers once a session, for `tests.helpers.toy_graphs.toy_graph`."""
    from tests.helpers.toy_graphs import load_toy_graphs  # Takes torch with it.

    folder = shared_folder / "toy_graphs"
    with FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        load_toy_graphs(folder)


@pytest.fixture(scope="session")
def quick_demo(shared_folder: Path) -> QuickDemo:
    """Run the quick demo once a session; workers of one session share it.

    It is what a user of ONNX Runtime alone runs: OpenVINO compiles for longer than all else, and
    other exports are measured on it. Two sites' towers, which have one shape, are traced once.
    """
    shared = shared_folder / "quick_demo"
    with FileLock(f"{shared}.lock"):
        outputs = shared / "outputs.json"
        if not outputs.exists():
            demo = ("demo", "--quick", "--json", "--output", shared / "demo")
            traces = shared_folder / "traces"
            run = run_code(TRACED_ONCE, traces, *demo, without=["openvino"], timeout_s=900)
            assert run.returncode == 0, run.stderr
            outputs.write_text(json.dumps([run.stdout, run.stderr]))
    return QuickDemo(shared / "demo", *json.loads(outputs.read_text()))


@pytest.fixture(scope="session")
def demo_folder(quick_demo: QuickDemo) -> Path:
    """The quick demo's folder, with people, run, bundle, gallery and report."""
    return quick_demo.folder
