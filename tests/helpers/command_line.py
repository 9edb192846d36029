"""Run the command lines in a process of their own, also from a bare clone without installation."""

import os
import pty
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).parents[2]
SOURCES = [ROOT, ROOT / "calibration", ROOT / "export", ROOT / "runtime"]
Program = Literal["upperson", "upperson-rt"]
TRACED_ONCE = """
import gc, pathlib, sys
gc.set_threshold(10_000, 10, 1_000_000)  # As in tests: a trace makes much that stays.
from tests.helpers.traces import once_in
from upperson.cli import main
from upperson_export import candidates
candidates.export_onnx = once_in(pathlib.Path(sys.argv.pop(1)))
main()
"""
"""``upperson`` that traces each shape of a tower once into its first argument, a folder."""


def run_program(
    program: Program, *arguments: str | Path, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command with the options of `run_code`."""
    return run_code(_main_of(program), *arguments, **options)


def start_program(program: Program, *arguments: object, **options: Any) -> "subprocess.Popen[str]":
    """Start a command with the options of `start_code`."""
    return start_code(_main_of(program), *arguments, **options)


def start_code(
    code: str,
    *arguments: object,
    cwd: Path | None = None,
    output: Path = Path(os.devnull),
    within: Sequence[str] = (),
) -> "subprocess.Popen[str]":
    """Start Python code; stdout goes to ``output``, stderr to the same name with ``.err``."""
    errors = output if output == Path(os.devnull) else output.with_name(f"{output.name}.err")
    with output.open("w") as out, errors.open("w") as err:
        return subprocess.Popen(
            [*within, sys.executable, "-W", "error", "-c", code, *map(str, arguments)],
            cwd=cwd,
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            text=True,
        )


def run_at_terminal(typed: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run ``upperson-rt`` with a terminal as its stdin, on which a line was typed already."""
    ours, theirs = pty.openpty()
    try:
        os.write(ours, f"{typed}\n".encode())
        return subprocess.run(
            [sys.executable, "-c", _main_of("upperson-rt"), *map(str, arguments)],
            stdin=theirs,
            env=environment(),
            capture_output=True,
            text=True,
        )
    finally:
        os.close(theirs)
        os.close(ours)


def run_code(
    code: str,
    *arguments: str | Path,
    cwd: Path | None = None,
    without: Sequence[str] = (),
    timeout_s: float = 60,
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a fresh interpreter, without some packages; warnings are errors there."""
    # None in sys.modules makes `import x` raise ModuleNotFoundError and find_spec("x") return None.
    blocked = f"import sys; sys.modules.update(dict.fromkeys({list(without)!r})); "
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", blocked + code, *map(str, arguments)],
        cwd=cwd,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout_s,
    )


def _main_of(program: Program) -> str:
    return f"from {program.replace('-', '_')}.cli import main; main()"


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, SOURCES))}
