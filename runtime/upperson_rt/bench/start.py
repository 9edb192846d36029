"""What a fresh process costs: until both towers are ready, and until a question is answered.

This is what such a process imports: nothing heavy before its clock runs.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upperson_rt.bench.processes import call_in_fresh_process, resident_bytes, time_processes

if TYPE_CHECKING:
    from upperson_rt.retriever import Retriever
    from upperson_rt.timing import Timing

__all__ = ["PROGRAM", "Startup", "measure_startup", "time_query"]

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
    """What a backend says it computes floats in; None if it does not say."""
    start_s: float
    """From the first import until both towers are loaded and their canaries have passed."""
    peak_rss_bytes: int | None
    """Most memory the process ever had resident; None where the system does not tell."""
    canary_min_cosine: float
    """The worst of both towers' canaries."""


def measure_startup(
    bundle: Path,
    variant: str,
    backend: str,
    device: str,
    threads: int | None,
    trust: Path | None = None,
) -> Startup:
    """Start a variant of a bundle on a backend, in a process of its own; see `Bundle.open`.

    Raises:
        BackendError: The backend or device is missing, the graph does not load, or the process
            dies.
        IntegrityError: A file was changed, or it does not compute what it should.
    """
    where = (str(bundle), variant, backend, device, threads, trust and str(trust))
    return Startup(**call_in_fresh_process(_start, *where))


def _start(
    bundle: str, variant: str, backend: str, device: str, threads: int | None, trust: str | None
) -> dict[str, Any]:
    started = time.perf_counter()
    from upperson_rt.bundle import Bundle

    opened = Bundle.open(bundle, variant, backend, device, threads=threads, trust=trust)
    worst = min(check.min_cosine for check in opened.check_canaries())
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
        sentence: What to ask for.
        options: Of ``upperson-rt query``.
        library: Import name of the backend's library.
        rounds: Timed processes of each kind.
        progress: See `time_processes`.

    Returns:
        ``python``: a process that does nothing. ``import``: one that imports the library.
        ``query``: one that answers and ends. ``running``: a query in this process.

    Raises:
        BackendError: A process ended with an error.
    """
    from upperson_rt.timing import time_in_turns

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
