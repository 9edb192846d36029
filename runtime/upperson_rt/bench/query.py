"""What a query costs: a fresh process up to its printed table, and one in a running process."""

from collections.abc import Callable, Sequence
from functools import partial

from upperson_rt.bench.processes import time_processes
from upperson_rt.retriever import Retriever
from upperson_rt.timing import Timing, time_in_turns

__all__ = ["PROGRAM", "bench_query"]

PROGRAM = ("-c", "from upperson_rt.cli import main; main()")
"""Arguments of Python that make it ``upperson-rt``."""

_RUNNING_ROUNDS = 50


def bench_query(
    retriever: Retriever,
    sentence: str,
    options: Sequence[str],
    library: str,
    *,
    rounds: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, Timing]:
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
