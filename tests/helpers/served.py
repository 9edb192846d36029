"""A console in a process of its own, as a user starts it."""

import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.helpers.command_line import start_program


class Served(NamedTuple):
    """Where it answers, and its process."""

    url: str
    process: "subprocess.Popen[str]"
    output: Path


@contextmanager
def served(folder: Path, *arguments: object) -> Iterator[Served]:
    """Start ``upperson-rt serve`` in a folder, wait until it answers, and end it in the end."""
    output = folder / "serve.out"
    process = start_program(
        "upperson-rt", "serve", "--port", 0, *arguments, cwd=folder, output=output
    )
    try:
        while (found := re.search(r"console: (\S+)/\n", output.read_text())) is None:
            errors = output.with_name("serve.out.err").read_text()
            assert process.poll() is None, errors
            time.sleep(0.02)
        yield Served(found[1], process, output)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        process.wait(60)
