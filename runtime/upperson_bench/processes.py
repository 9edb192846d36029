"""Fresh Python processes: what one does to itself stays there, and what it costs can be timed."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upperson_machine.description import resident_bytes
from upperson_rt.errors import (
    BackendError,
    InputError,
    IntegrityError,
    UppersonError,
    UsageError,
)
from upperson_rt.printable import one_line

if TYPE_CHECKING:
    from upperson_autotune.timing import Timing
    from upperson_rt.retriever import Retriever


_ERRORS: dict[int, type[UppersonError]] = {
    error.exit_code: error for error in (UsageError, InputError, BackendError, IntegrityError)
}


def call_in_fresh_process(
    function: Callable[..., Any], *arguments: object, environment: Mapping[str, str] | None = None
) -> Any:
    """Call a module's function in a process of its own; return or raise what it returns or raises.

    Arguments and result are JSON values. The process imports that module and little else, so its
    memory is that of the function. BackendError if it ends with an error.
    """
    task = json.dumps([function.__module__, function.__qualname__, arguments])
    found = json.loads(run_python("-m", __name__, task, environment=environment))
    if "error" in found:
        raise _ERRORS.get(found["exit_code"], BackendError)(found["error"])
    return found["result"]


def run_python(
    *arguments: str,
    called: str = "its process",
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run Python in `child_environment`, and return what it prints; ``called`` is for the error."""
    done = subprocess.run(
        [sys.executable, *arguments],
        env=child_environment() | dict(environment or {}),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    if done.returncode:
        *_, last = done.stderr.strip().splitlines() or ["it said nothing"]
        raise BackendError(f"{called} ended with code {done.returncode}: {last}")
    return done.stdout


def child_environment() -> dict[str, str]:
    """Return variables for a Python that can import what this process can, and logs no query."""
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    variables.pop("UPPERSON_QUERY_LOG", None)
    return variables


def time_processes(
    commands: Mapping[str, Sequence[str]],
    *,
    rounds: int,
    progress: Callable[[str, int, int], None],
) -> "dict[str, Timing]":
    """Time fresh Python processes from start to end, in turns, after an untimed one of each.

    From the second one on files are in the system's cache: what a disk takes is not measured.
    ``progress`` gets the current work, how much of it is done, and of how much.
    """
    from upperson_autotune.timing import time_in_turns

    return time_in_turns(
        {
            name: partial(run_python, *arguments, called="a process")
            for name, arguments in commands.items()
        },
        warmup=1,
        rounds=rounds,
        cpu_clock=_children_cpu_s if os.name == "posix" else None,
        progress=lambda done: progress("processes, in turns", done, rounds + 1),
    )


def _children_cpu_s() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _run_task(task: str) -> None:
    module, name, arguments = json.loads(task)
    try:
        found = {"result": getattr(import_module(module), name)(*arguments)}
    except UppersonError as error:
        found = {"error": one_line(error), "exit_code": error.exit_code}
    sys.stdout.write(f"{json.dumps(found)}\n")


# --- What a fresh process costs: until both towers are ready, and until a query has its result
#
# Such a process imports this file: nothing heavy before its clock runs.

PROGRAM = ("-c", "from upperson_rt.cli import main; main()")
"""Arguments of Python that make it ``upperson-rt``."""

_RUNNING_ROUNDS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class Startup:
    """A fresh process that is ready to embed pictures and sentences."""

    version: str
    """Version of the backend's library."""
    device: str
    """What really runs."""
    float_type: str | None
    """What the backend computes floats in; None if it is unknown."""
    start_s: float
    """From the first import until both towers are loaded and their golden samples have passed."""
    peak_rss_bytes: int | None
    """Most memory the process ever had resident; None where the system does not count it."""
    canary_min_cosine: float
    """The worst of both towers' golden samples."""


def measure_startup(
    bundle: Path,
    variant: str,
    backend: str,
    device: str,
    threads: int | None,
    trust: Path | None = None,
) -> Startup:
    """Start a variant of a bundle on a backend, in a process of its own; see `Bundle.open`."""
    where = (str(bundle), variant, backend, device, threads, trust and str(trust))
    return Startup(**call_in_fresh_process(_start, *where))


def _start(
    bundle: str, variant: str, backend: str, device: str, threads: int | None, trust: str | None
) -> dict[str, Any]:
    started = time.perf_counter()
    from upperson_rt.bundle import Bundle

    opened = Bundle.open(bundle, variant, backend, device, threads=threads, trust=trust)
    worst = min(check.min_cosine for check in opened.check_golden_samples())
    running = opened.backend("image")
    return asdict(
        Startup(
            version=running.version,
            device=running.device,
            float_type=getattr(running, "float_type", None),
            start_s=time.perf_counter() - started,
            peak_rss_bytes=resident_bytes("VmHWM"),
            canary_min_cosine=worst,
        )
    )


def time_query(
    retriever: "Retriever",
    sentence: str,
    options: Sequence[str],
    library: str,
    *,
    rounds: int,
    progress: Callable[[str, int, int], None],
) -> "dict[str, Timing]":
    """Time ``upperson-rt query`` against the import of the library that runs the model.

    Args:
        retriever: Has the bundle and the gallery loaded that the options name.
        sentence: The query.
        options: Of ``upperson-rt query``.
        library: Import name of the backend's library.
        rounds: Timed processes of each kind.
        progress: See `time_processes`.

    Returns:
        ``python``: a process that does nothing. ``import``: one that imports the library.
        ``query``: one that runs the query. ``running``: a query in this process.
    """
    from upperson_autotune.timing import time_in_turns

    running = time_in_turns(
        {"running": partial(retriever.query, sentence)}, warmup=1, rounds=_RUNNING_ROUNDS
    )
    processes = time_processes(
        {
            "python": ("-c", "pass"),
            "import": ("-c", f"import {library}"),
            "query": (*PROGRAM, "query", sentence, *options),
        },
        rounds=rounds,
        progress=progress,
    )
    return processes | running


if __name__ == "__main__":
    _run_task(sys.argv[1])
