"""How many examples each target tried, told at the end of `make fuzz`."""

import pytest

from tests.helpers import fuzzing

_executions: dict[str, int] = {}


@pytest.fixture(autouse=True)
def _count_executions(request: pytest.FixtureRequest, record_property):
    yield
    record_property("executions", fuzzing.counts.get(request.function.__name__, 0))


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
