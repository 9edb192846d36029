"""Start a command line, so that Ctrl-C while its modules load ends it without a traceback."""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import NoReturn


def run_program(module: str) -> NoReturn:
    """Import the module of a command line and call its ``main``; Ctrl-C exits with 130."""
    try:
        run: Callable[[], NoReturn] = import_module(module).main
    except KeyboardInterrupt:
        sys.stderr.write("error: interrupted\n")
        raise SystemExit(130) from None
    run()


def main() -> NoReturn:
    """Run ``upperson-rt``."""
    run_program("upperson_rt.cli")
