"""``python -m benchmarks.training`` on the small base, two steps."""

import json
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import loader, training, training_step
from benchmarks.random_model import ModelSpec
from benchmarks.training_step import (
    CONTENDERS,
    LITERAL,
    OURS,
    OURS_BF16,
    OURS_CHECKPOINTED,
    peak_extra_bytes,
)
from upperson_rt.errors import InputError, UsageError

SMALL = ("--base", "upperson-small", "--height", "192", "--width", "64")
ONE_THREAD = ("--steps", "2", "--threads", "1")
QUICK = (*SMALL, "--height", "96", "--width", "32", *ONE_THREAD)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(training.app, arguments)


@pytest.mark.timeout(180)
def test_json_says_what_ran_on_what_and_that_losses_are_equal(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contenders = (LITERAL, OURS, OURS_CHECKPOINTED)  # The table has all of them.
    monkeypatch.setattr(training, "CONTENDERS", contenders)
    result = run(*SMALL, *ONE_THREAD, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["step"]["base"] == "upperson-small"
    assert found["step"]["steps"] == 2
    assert found["threads"] == 1
    assert {"cpu", "packages", "instruction_sets"} <= found["machine"].keys()
    assert found["machine"]["packages"].keys() == {"torch", "open_clip_torch"}
    assert tuple(found["contenders"]) == contenders
    for name, measured in found["contenders"].items():
        assert len(measured["seconds"]) == 2, name
        assert 0 < measured["p50_ms"] <= measured["p90_ms"] <= measured["p99_ms"], name
        assert len(set(measured["losses"])) == 3, f"{name}: warm-up and timed steps train"
    for name in (OURS, OURS_CHECKPOINTED):
        assert found["contenders"][name]["loss_difference"] <= 1e-4
    assert found["contenders"][LITERAL]["speedup"] == 1
    if sys.platform == "linux":
        peaks = {name: m["peak_extra_bytes"] for name, m in found["contenders"].items()}
        assert 0 < peaks[OURS_CHECKPOINTED] < peaks[OURS] < peaks[LITERAL]


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the processes that measure memory, as on systems that cannot."""
    monkeypatch.setattr(training, "peak_extra_bytes", lambda *_: None)


@pytest.mark.usefixtures("no_memory")
def test_people_get_a_table_without_json() -> None:
    result = run(*QUICK)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert any(line.startswith(LITERAL) and "1.00x" in line for line in lines)
    for name in CONTENDERS:
        assert any(line.startswith(name) and "not measured" in line for line in lines), name
    assert "{" not in result.stdout
    assert ("no instructions for bf16 here" in result.stdout) == (OURS_BF16 not in CONTENDERS)


@pytest.mark.usefixtures("no_memory")
def test_without_instructions_for_bf16_its_contender_is_left_out_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "CONTENDERS", (LITERAL, OURS))
    result = run(*QUICK)
    assert result.exit_code == 0, result.stderr
    assert "no instructions for bf16 here: 'ours bf16' is left out" in result.stdout


@pytest.mark.usefixtures("no_memory")
def test_unequal_losses_are_a_failed_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "LOSS_TOLERANCE", -1.0)
    result = run(*QUICK)
    assert result.exit_code == 6
    assert "does not train as 'literal fp32'" in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--base", "nothing"), "base 'nothing' is unknown"),
        ((*SMALL, "--height", "100"), "image size 100x64"),
    ],
)
@pytest.mark.usefixtures("no_memory")
def test_what_cannot_be_built_is_a_usage_error(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is measured on Linux only")
def test_a_memory_process_that_fails_is_an_error_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise UsageError("base 'nothing' is unknown")

    with monkeypatch.context() as patch:
        patch.setattr(training_step, "call_in_fresh_process", refuse)
        with pytest.raises(UsageError, match="base 'nothing' is unknown"):
            peak_extra_bytes(ModelSpec(base="nothing"), LITERAL, 1)
    monkeypatch.setattr("sys.executable", "/bin/false")  # As if it were killed for want of memory.
    with pytest.raises(InputError, match=r"memory of 'literal fp32' .* ended with code 1.* lower"):
        peak_extra_bytes(ModelSpec(), LITERAL, 1)


def test_loading_is_timed_with_all_contenders() -> None:
    options = (
        "--pictures", "8", "--times", "2", "--batch-size", "4", "--height", "48", "--width", "32",
        "--workers", "0", "--rounds", "1",
    )  # fmt: skip
    result = CliRunner().invoke(loader.app, [*options, "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert tuple(found["contenders"]) == loader.CONTENDERS
    for name, measured in found["contenders"].items():
        assert measured["items_per_s"] > 0, name
        assert measured["cpu_ms_per_picture"] > 0, name
    sizes = {name: measured["batch_bytes"] for name, measured in found["contenders"].items()}
    pixels = 4 * 48 * 32 * 3
    assert sizes[loader.LITERAL] == 4 * pixels + 4 * 8
    assert pixels < sizes[loader.FILES] < 2 * pixels
    assert 0 < sizes[loader.CACHE] == sizes[loader.FILES] - pixels
    assert found["moving_ms"] > 0
    assert 16 * 4 * 5 < found["handed_bytes"] < 16 * 300 + 10_000  # Ids of 16 captions, places.
    table = CliRunner().invoke(loader.app, options)
    assert table.exit_code == 0, table.stderr
    assert all(name in table.stdout for name in loader.CONTENDERS)
