"""The tests for GPUs, run without one: on the stand-ins they pass."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.command_line import ROOT, environment


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("toy_graphs")
def test_on_the_stand_ins_all_but_what_only_a_card_can_do_passes(
    tmp_path: Path, shared_folder: Path
) -> None:
    shared = {"UPPERSON_TEST_GPU": "stand-in", "UPPERSON_TEST_SHARED": str(shared_folder)}
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider",
            f"--basetemp={tmp_path / 'tmp'}", "--show-capture=no", "tests/gpu",
        ],
        cwd=ROOT,
        env=environment() | shared,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    reasons = Counter[str]()
    for count, reason in re.findall(r"SKIPPED \[(\d+)\] \S+ (.*)", done.stdout):
        reasons[reason] += int(count)
    assert reasons.keys() == {"the stand-in is no GPU", "a CPU does not train in fp16"}
    (passed, skipped) = re.findall(r"(\d+) (?:passed|skipped)", done.stdout.splitlines()[-1])
    assert (int(skipped), int(passed) >= 25) == (reasons.total(), True)
