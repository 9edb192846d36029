"""A module as a process of its own: whatever it does to itself stays there."""

import json
import os
import subprocess
import sys
from typing import Any

from upperson_rt.errors import BackendError

__all__ = ["run_module", "run_python"]


def run_module(name: str, *arguments: str) -> dict[str, Any]:
    """Run ``python -m``, and return the JSON object that it prints.

    Raises:
        BackendError: The process ends with an error.
    """
    found: dict[str, Any] = json.loads(run_python("-m", name, *arguments))
    return found


def run_python(*arguments: str, called: str = "its process") -> str:
    """Run Python with what this process can import, and return what it prints.

    Queries of that process are not logged: nobody asked them.

    Args:
        arguments: Of Python.
        called: What the process is called in an error.

    Raises:
        BackendError: The process ends with an error.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.pop("UPPERSON_QUERY_LOG", None)
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BackendError(f"{called} ended with code {done.returncode}: {last}")
    return done.stdout
