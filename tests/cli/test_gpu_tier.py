"""The tests for GPUs, run without one: skipped with a reason, and on the stand-ins they pass."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.gpu import conftest
from tests.helpers.command_line import ROOT, environment

pytestmark = pytest.mark.timeout(300, func_only=True)


def run_tier(folder: Path, **variables: str) -> tuple[Counter[str], str]:
    """Run the tier in a process of its own; return its outcomes, and what it printed."""
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider",
            f"--basetemp={folder / 'tmp'}", "--show-capture=no", "tests/gpu",
        ],
        cwd=ROOT,
        env=environment() | variables,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    last = done.stdout.splitlines()[-1]
    found = {what: int(count) for count, what in re.findall(r"(\d+) (passed|skipped)", last)}
    return Counter(found), done.stdout


def test_without_a_gpu_a_test_is_skipped_with_the_reason_before_its_fixtures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of them show it wherever the whole suite runs without a GPU."""
    monkeypatch.setattr(conftest, "missing_gpu", lambda: "no NVIDIA driver")
    monkeypatch.setattr(conftest, "STAND_IN", False)
    with pytest.raises(pytest.skip.Exception, match="no NVIDIA driver"):
        conftest.pytest_runtest_setup()
    monkeypatch.setattr(conftest, "STAND_IN", True)
    conftest.pytest_runtest_setup()


@pytest.mark.usefixtures("toy_graphs")
def test_on_the_stand_ins_all_but_what_only_a_card_can_do_passes(
    tmp_path: Path, shared_folder: Path
) -> None:
    outcomes, text = run_tier(
        tmp_path, UPPERSON_TEST_GPU="stand-in", UPPERSON_TEST_SHARED=str(shared_folder)
    )
    reasons = Counter[str]()
    for count, reason in re.findall(r"SKIPPED \[(\d+)\] \S+ (.*)", text):
        reasons[reason] += int(count)
    assert reasons.keys() == {"the stand-in is no GPU", "a CPU does not train in fp16"}
    assert reasons.total() == outcomes["skipped"]
    assert outcomes["passed"] >= 25
