"""A module as a process of its own: whatever it does to itself stays there."""

import json
import os
import subprocess
import sys
from typing import Any

from upperson_rt.errors import BackendError

__all__ = ["run_module"]


def run_module(name: str, *arguments: str) -> dict[str, Any]:
    """Run ``python -m``, and return the JSON object that it prints.

    Raises:
        BackendError: The process ends with an error.
    """
    done = subprocess.run(
        [sys.executable, "-m", name, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BackendError(f"its process ended with code {done.returncode}: {last}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found
