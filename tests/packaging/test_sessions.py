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


@pytest.mark.parametrize("place", ["tests/cli", "tests/conftest.py", "tests/conftest.py::test_x"])
def test_named_files_run_in_one_session(ran, place):
    begun, codes = ran
    codes += [5]
    assert main(["-q", place]) == 5
    assert begun == [["-q", place]]


@pytest.mark.parametrize("option", ["-x", "--maxfail=1", "--exitfirst"])
def test_the_first_failure_is_the_last_session_if_that_is_asked_for(ran, option):
    begun, codes = ran
    codes += [1]
    assert main([option]) == 1
    assert len(begun) == 1


def test_the_second_session_takes_what_the_first_leaves():
    (first,), (everything, *left_out) = SESSIONS
    assert (ROOT / first).is_dir()
    assert ROOT / everything == (ROOT / first).parent
    assert left_out == [f"--ignore={first}"]


def test_make_runs_them_with_more_arguments_last():
    done = subprocess.run(
        ["make", "-n", "-C", str(ROOT), "-o", ".venv/.installed", "test", "ARGS=-k gallery -n 0"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "tests.sessions" in line]
    assert line.endswith(" -k gallery -n 0")
