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
    if any(Path(argument.partition("::")[0]).exists() for argument in arguments):
        return run(arguments)
    found = int(pytest.ExitCode.NO_TESTS_COLLECTED)  # Of either: -k may choose from one alone.
    for session in SESSIONS:
        code = run([*arguments, *session])
        if code == pytest.ExitCode.TESTS_FAILED:
            found = code
            if stops_at_a_failure(arguments):
                break
        elif code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
            return code  # Interrupted, or nothing that pytest could run.
        elif found == pytest.ExitCode.NO_TESTS_COLLECTED:
            found = code
    return found


def run(arguments: Sequence[str]) -> int:
    with subprocess.Popen([sys.executable, "-m", "pytest", *arguments]) as session:
        try:
            return session.wait()
        except KeyboardInterrupt:  # Of which the session has heard, too.
            return session.wait()


def stops_at_a_failure(arguments: Sequence[str]) -> bool:
    return any(name.startswith(("-x", "--exitfirst", "--maxfail")) for name in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
