"""Kills commands before each call that syncs a file or changes a name, one call after the other.

    python -m tests.helpers.kills_at_calls train --trials 100

Where `tests.helpers.kills` draws moments at random, most of which fall into computing, this visits
each step between two states of a folder. The outcomes are the same.
"""

import os
import signal
import socket
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest

from tests.helpers import kills
from tests.helpers.power_loss import build_disk_calls, calls_of
from tests.helpers.trials import parse

KINDS = ("export", "import", "train")


class CommandAtCalls(kills.Command):
    """Kills its first process before the first call, the next before the second, and so on."""

    def __init__(self, arguments: tuple[str, ...], rng: np.random.Generator) -> None:
        self._calls = self._kills = 0
        super().__init__(arguments, rng)
        print(f"{arguments[0]} makes {self._calls} calls", file=sys.stderr)

    def run(self, kill: bool = False, arguments: tuple[str, ...] = ()) -> tuple[int, str]:
        before = None
        if kill:
            before = 1 + self._kills % (self._calls + 1)
            self._kills += 1
        with (
            tempfile.TemporaryDirectory() as folder,
            socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener,
        ):
            address = str(Path(folder, "calls"))
            listener.bind(address)
            listener.listen()
            child = os.fork()
            if child == 0:
                os.environ["DISK_CALLS"] = address
                kills._become(self._module, arguments or self.arguments)
            made, status = _answered(listener, child, before)
        if before is None and not self._calls:
            self._calls = made
        return os.waitstatus_to_exitcode(status), Path("log").read_text()


def _answered(listener: socket.socket, child: int, before: int | None) -> tuple[int, int]:
    """Let a process make its calls, but not the one of that number; return how many, and status."""
    made = status = 0

    def has_ended() -> bool:
        nonlocal status
        ended, status = os.waitpid(child, os.WNOHANG)
        return bool(ended)

    for connection, _ in calls_of(listener, has_ended):
        made += 1
        if made == before:
            os.kill(child, signal.SIGKILL)
        else:
            connection.send(b".")
    return made, status


def main() -> int:
    options = parse(__doc__, KINDS, trials=100)
    if "LD_PRELOAD" not in os.environ:  # It is read when a process starts.
        with tempfile.TemporaryDirectory() as folder:
            library = build_disk_calls(Path(folder))
            command = [sys.executable, "-m", "tests.helpers.kills_at_calls", *sys.argv[1:]]
            return os.spawnve(
                os.P_WAIT, sys.executable, command, os.environ | {"LD_PRELOAD": str(library)}
            )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kills, "Command", CommandAtCalls)
        return kills.run_trials(options.kinds, options.trials, seed=0)


if __name__ == "__main__":
    sys.exit(main())
