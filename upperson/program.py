"""Start the command line ``upperson``."""

from typing import NoReturn

from upperson_rt.program import run_program


def main() -> NoReturn:
    """Run ``upperson``."""
    run_program("upperson.cli")
