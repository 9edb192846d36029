"""What ``make test`` runs: the unit tests, then all others, each in worker processes of their own.

A worker keeps what tests import, and what libraries make for themselves, until its session ends.

python -m tests.sessions [OPTIONS OF PYTEST] [FILES]
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

SESSIONS = (("tests/unit",), ("tests", "--ignore=tests/unit"))


def main(arguments: Sequence[str]) -> int:
    """Run both, or one if files are named; return what pytest would for all of them."""
    named = any(Path(argument.partition("::")[0]).exists() for argument in arguments)
    goes_on = {pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED}  # -k may choose from one.
    if not any(name.startswith(("-x", "--exitfirst", "--maxfail")) for name in arguments):
        goes_on.add(pytest.ExitCode.TESTS_FAILED)
    codes = []
    for session in [()] if named else SESSIONS:
        codes.append(run([*arguments, *session]))
        if codes[-1] not in goes_on:
            break
    bad = [code for code in codes if code not in (0, pytest.ExitCode.NO_TESTS_COLLECTED)]
    return bad[-1] if bad else min(codes)


def run(arguments: Sequence[str]) -> int:
    with subprocess.Popen([sys.executable, "-m", "pytest", *arguments]) as session:
        try:
            return session.wait()
        except KeyboardInterrupt:  # Of which the session has heard, too.
            return session.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
