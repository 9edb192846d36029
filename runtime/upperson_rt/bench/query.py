"""What a query costs: a fresh process up to its printed table, and one in a running process."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from upperson_rt.bench.fresh_process import run_python
from upperson_rt.bundle import Bundle
from upperson_rt.gallery import Gallery
from upperson_rt.retriever import Retriever
from upperson_rt.timing import Timing, time_in_turns

__all__ = ["QueryBench", "bench_query"]

_PROGRAM = "from upperson_rt.cli import main; main()"
_KNOWS_CHILDREN = os.name == "posix"


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryBench:
    """Timings of processes that ran in turns, and of queries in one process."""

    backend: str
    version: str
    device: str
    variant: str
    items: int
    """Pictures in the gallery."""
    process: Timing
    """A fresh process that answers one query and ends."""
    imports: Timing
    """A fresh process that imports the backend's library and ends."""
    python: Timing
    """A fresh process that does nothing."""
    running: Timing
    """A query in a process that has answered one before."""

    @property
    def beyond_import_s(self) -> float:
        """What the query's process takes longer than the import: median minus median."""
        return self.process.median_s - self.imports.median_s

    @property
    def beyond_import_cpu_s(self) -> float | None:
        """The same in processor time of all threads; None where the system does not tell."""
        if not self.process.cpu_seconds:
            return None
        return self.process.median_cpu_s - self.imports.median_cpu_s


def bench_query(
    bundle: Path,
    gallery: str,
    sentence: str,
    *,
    variant: str | None = None,
    backend: str = "auto",
    device: str = "cpu",
    threads: int | None = None,
    rounds: int = 10,
    running_rounds: int = 50,
    progress: Callable[[int, int], None] | None = None,
) -> QueryBench:
    """Time ``upperson-rt query`` against the import of the library that runs the model.

    Files are in the system's cache from the second process on; what a disk takes is not measured.

    Args:
        bundle: The folder.
        gallery: Its location.
        sentence: What to ask for.
        variant: Of the bundle; None for its default.
        backend: See `open_backend`.
        device: See `open_backend`.
        threads: CPU threads; None lets the library choose.
        rounds: Processes of each kind that are timed, after one that is not.
        running_rounds: Queries timed in one process, after one that is not.
        progress: Called as ``progress(done, total)`` after each round of processes.

    Raises:
        BackendError: The backend or device is missing, or a process fails.
        InputError, UsageError, IntegrityError: As for a query.
    """
    opened = Bundle.open(bundle, variant, backend, device, threads=threads)
    encoder = opened.encoder()
    with Gallery.open(gallery, encoder.fingerprint, encoder.embed_dim) as store:
        retriever = Retriever(encoder, store)
        running = time_in_turns(
            {"running": partial(retriever.query, sentence)}, warmup=1, rounds=running_rounds
        )["running"]
        items = store.count()
    used = opened.backend("text")
    query = ["query", sentence, "-b", str(bundle), "-g", gallery, "--device", device]
    query += ["--backend", used.name, "--variant", opened.variant]
    query += [] if threads is None else ["--threads", str(threads)]
    total = rounds + 1
    commands = {
        "python": ["pass"],
        "imports": [f"import {used.name}"],
        "process": [_PROGRAM, *query],
    }
    cpu: dict[str, list[float]] = {name: [] for name in commands}

    def run(name: str) -> None:
        before = _children_cpu_s()
        _run(*commands[name])
        cpu[name].append(_children_cpu_s() - before)

    timed = time_in_turns(
        {name: partial(run, name) for name in commands},
        warmup=1,
        rounds=rounds,
        progress=None if progress is None else lambda done: progress(done, total),
    )
    processes = {
        name: Timing(seconds=timing.seconds, cpu_seconds=cpu[name][1:] if _KNOWS_CHILDREN else [])
        for name, timing in timed.items()
    }
    return QueryBench(
        backend=used.name,
        version=used.version,
        device=used.device,
        variant=opened.variant,
        items=items,
        running=running,
        **processes,
    )


def _children_cpu_s() -> float:
    times = os.times()
    return times.children_user + times.children_system


def _run(code: str, *arguments: str) -> None:
    run_python("-c", code, *arguments, called="a process")
