"""Tests of models of real size run in a process of their own: their memory ends with it."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path

from tests.helpers.command_line import run_code


def alone(test: Callable[[Path], None]) -> Callable[[Path], None]:
    """Run a test that takes ``tmp_path`` in a process of its own; the tier's time limit holds."""
    code = f"import pathlib, sys\nfrom {test.__module__} import {test.__name__} as test\n"
    code += "test.__wrapped__(pathlib.Path(sys.argv[1]))"

    @functools.wraps(test)
    def run(tmp_path: Path) -> None:
        done = run_code(code, tmp_path, timeout_s=600)
        assert done.returncode == 0, done.stderr

    assert list(inspect.signature(test).parameters) == ["tmp_path"]
    return run
