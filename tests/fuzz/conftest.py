"""What fuzz targets share; `make fuzz` ends with the number of examples that each tried."""

from pathlib import Path

import pytest

import upperson_rt
from tests.helpers import fuzzing
from tests.helpers.fuzzing import as_json
from tests.helpers.toy_bundle import make_toy_bundle

_executions: dict[str, int] = {}


@pytest.fixture(scope="session")
def bundle(tmp_path_factory):
    return make_toy_bundle(tmp_path_factory.mktemp("fuzz") / "bundle")


@pytest.fixture(scope="session")
def encoder(bundle):
    return upperson_rt.open(bundle, "fp32", "onnxruntime", threads=1)


@pytest.fixture
def written(tmp_path_factory):
    """Write bytes, or a document as JSON, into a new folder; return the file."""

    def write(name, content):
        path = tmp_path_factory.mktemp("files") / name
        if not isinstance(content, bytes):
            content = as_json(content).encode("utf-8", "surrogatepass")
        path.write_bytes(content)
        return path

    return write


@pytest.fixture(autouse=True)
def _count_executions(request: pytest.FixtureRequest, record_property):
    yield
    record_property("executions", fuzzing.counts.get(request.function.__name__, 0))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    targets = [item for item in items if item.path.parent == Path(__file__).parent]
    for item in targets:  # They try long texts.
        item.add_marker(pytest.mark.filterwarnings("ignore:Generating overly large repr"))
    if fuzzing.SECONDS:
        processes = getattr(config, "workerinput", {"workercount": 1})["workercount"]
        fuzzing.share["seconds"] = fuzzing.SECONDS * processes / max(1, len(targets))
        # Finds a target that hangs, and has room for shrinking and for a busy machine.
        for item in targets:
            item.add_marker(pytest.mark.timeout(300 + 3 * fuzzing.share["seconds"]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    for name, count in report.user_properties:
        if report.when == "teardown" and name == "executions":
            _executions[report.nodeid] = count


def pytest_terminal_summary(terminalreporter) -> None:
    if fuzzing.SECONDS:
        terminalreporter.section("executions")
        for test, count in sorted(_executions.items()):
            terminalreporter.line(f"{count:8d}  {test}")
        terminalreporter.line(f"{sum(_executions.values()):8d}  in all")
