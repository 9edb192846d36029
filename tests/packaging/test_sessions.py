"""``make test``: which sessions run for which arguments, and what its exit code says."""

import subprocess

import pytest

from tests import sessions
from tests.helpers.command_line import ROOT
from tests.sessions import SESSIONS, main


@pytest.fixture
def ran(monkeypatch):
    """Sessions that would run; each takes the next code."""

    def run(arguments):
        begun.append(list(arguments))
        return codes.pop(0)

    begun, codes = [], []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sessions, "run", run)
    return begun, codes


@pytest.mark.parametrize(
    ("codes", "code"),
    [
        ([0, 0], 0), ([0, 1], 1), ([1, 0], 1), ([1, 1], 1), ([0, 5], 0), ([5, 0], 0), ([5, 5], 5),
        ([1, 5], 1), ([5, 1], 1), ([2], 2), ([0, 2], 2), ([1, 3], 3), ([4], 4),
    ],
)  # fmt: skip
def test_the_code_is_that_of_all_tests(ran, codes, code):
    begun, next_codes = ran
    next_codes += codes
    assert main(["-q", "-k", "gallery"]) == code
    expected = [["-q", "-k", "gallery", *session] for session in SESSIONS[: len(codes)]]
    assert begun == expected


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["-q", "tests/cli"], 5),
        (["tests/conftest.py"], 5),
        (["tests/conftest.py::test_x"], 5),
        (["-x"], 1),
        (["--maxfail=1"], 1),
    ],
)
def test_named_files_and_the_first_failure_end_after_one_session(ran, arguments, code):
    begun, codes = ran
    codes += [code]
    assert main(arguments) == code
    assert len(begun) == 1


def test_make_runs_them_with_more_arguments_last():
    done = subprocess.run(
        ["make", "-n", "-C", str(ROOT), "-o", ".venv/.installed", "test", "ARGS=-k gallery -n 0"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "tests.sessions" in line]
    assert line.endswith(" -k gallery -n 0")
