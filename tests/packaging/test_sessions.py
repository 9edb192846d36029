"""``make test`` and ``make gpu``: what runs for which arguments, and with which exit code."""

import subprocess

import pytest

from tests import sessions
from tests.helpers.command_line import ROOT

BOTH = [[*session] for session in sessions.SESSIONS]


@pytest.mark.parametrize(
    ("arguments", "codes", "code"),
    [
        *(
            ("-q", codes, code)
            for codes, code in (
                ([0, 0], 0), ([0, 1], 1), ([1, 0], 1), ([1, 1], 1), ([0, 5], 0), ([5, 0], 0),
                ([5, 5], 5), ([1, 5], 1), ([5, 1], 1), ([2], 2), ([0, 2], 2), ([1, 3], 3), ([4], 4),
            )
        ),
        # Named files are one session, and the first failure ends all.
        ("-q tests/cli", [5], 5),
        ("tests/conftest.py::test_x", [5], 5),
        ("-x", [1], 1),
        ("--maxfail=1", [1], 1),
    ],
)  # fmt: skip
def test_the_code_is_that_of_all_tests(monkeypatch, arguments, codes, code):
    begun, left = [], list(codes)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sessions, "run", lambda words: begun.append(words) or left.pop(0))
    assert sessions.main(arguments.split()) == code
    named = "tests/" in arguments
    expected = [[]] if named else BOTH[: len(codes)]
    assert begun == [[*arguments.split(), *session] for session in expected]


@pytest.mark.parametrize(
    ("target", "steps"),
    [
        ("test", ["tests.sessions", "-k gallery -n 0"]),
        ("gpu", ["benchmarks.gpu --check", "pytest -q -n 0 tests/gpu", "benchmarks.gpu -k gall"]),
    ],
)
def test_make_runs_them_with_more_arguments_last(target, steps):
    command = ["make", "-n", "-C", str(ROOT), "-o", ".venv/.installed", target]
    done = subprocess.run(
        [*command, "ARGS=-k gallery -n 0"], capture_output=True, text=True, check=True
    )
    places = [done.stdout.find(step) for step in steps]
    assert -1 not in places
    assert places == sorted(places)
