"""A console in a process of its own, as a user starts it."""

import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.helpers.command_line import start_program


class Served(NamedTuple):
    url: str
    process: "subprocess.Popen[str]"
    output: Path
    errors: Path


@contextmanager
def served(folder: Path, *arguments: object, within: Sequence[str] = ()) -> Iterator[Served]:
    """Start ``upperson-rt serve`` in a folder, wait until it answers, and end it in the end."""
    output, errors = folder / "serve.out", folder / "serve.out.err"
    command = ("upperson-rt", "serve", "--port", 0, *arguments)
    process = start_program(*command, cwd=folder, output=output, within=within)
    try:
        while (found := re.search(r"console: (\S+)/\n", output.read_text())) is None:
            assert process.poll() is None, errors.read_text()
            time.sleep(0.02)
        yield Served(found[1], process, output, errors)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(60)
