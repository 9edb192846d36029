"""`upperson-rt bench query`."""

from json import dumps
from typing import TYPE_CHECKING, Annotated, Any

import typer

from upperson_rt.cli.options import (
    BackendOption,
    BundleOption,
    Debug,
    DeviceOption,
    GalleryOption,
    Json,
    Threads,
    VariantOption,
    default_bundle,
    default_gallery,
)
from upperson_rt.cli.output import new_table, print_json, print_note, print_table

if TYPE_CHECKING:
    from upperson_rt.timing import Timing

__all__ = ["GOAL_S", "query"]

GOAL_S = 1.0
"""What a query in a fresh process may take beyond the import of the backend's library."""


def query(
    sentence: Annotated[
        str, typer.Argument(metavar="SENTENCE", help="What to ask for.")
    ] = "woman in red coat",
    bundle: BundleOption = default_bundle,
    gallery: GalleryOption = default_gallery,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Timed processes of each kind, in turns.")
    ] = 10,
    variant: VariantOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "cpu",
    threads: Threads = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time a query in a fresh process against the import of the library that runs the model.

    The processes run in turns, after one of each that is not timed; files are in the system's
    cache by then. A query in a running process is timed 50 times.

    Example: `upperson-rt bench query -b bundle -g gallery --rounds 20`
    """
    from upperson_rt.bench.query import bench_query
    from upperson_rt.machine import describe_machine

    found = bench_query(
        bundle,
        gallery,
        sentence,
        variant=variant,
        backend=backend,
        device=device,
        threads=threads,
        rounds=rounds,
        progress=lambda done, total: print_note(f"processes: {done}/{total} rounds"),
    )
    timings = {
        "python": (found.python, "a process that does nothing"),
        "import": (found.imports, f"a process that imports {found.backend}"),
        "query": (found.process, "upperson-rt query, from start to end"),
        "running": (found.running, "a query in a running process"),
    }
    result = {
        "benchmark": "query",
        "bundle": str(bundle),
        "variant": found.variant,
        "gallery": gallery,
        "items": found.items,
        "backend": found.backend,
        "version": found.version,
        "device": found.device,
        "threads": threads,
        "machine": describe_machine(),
        "timings": {name: _as_dict(timing) for name, (timing, _) in timings.items()},
        "beyond_import_s": found.beyond_import_s,
        "beyond_import_cpu_s": found.beyond_import_cpu_s,
        "goal_s": GOAL_S,
        "goal_met": found.beyond_import_s <= GOAL_S,
    }
    if json:
        print_json(result)
        return
    machine = describe_machine()
    typer.echo(
        f"{machine['cpu']}, {threads or 'default'} threads, {machine['cpus_available']} CPUs, load "
        f"{machine['load_average']}; {found.backend} {found.version} on {found.device}, variant "
        f"{found.variant}, {found.items} pictures"
    )
    columns = ("runs", "p50 ms", "p90 ms", "p99 ms", "CPU ms")
    table = new_table("what", *columns, right=columns)
    for timing, what in timings.values():
        values = _as_dict(timing)
        milliseconds = (
            "not measured" if values[name] is None else f"{values[name]:.1f}"
            for name in ("p50_ms", "p90_ms", "p99_ms", "cpu_ms")
        )
        table.add_row(what, str(values["runs"]), *milliseconds)
    print_table(table)
    cpu_s = found.beyond_import_cpu_s
    cpu = "" if cpu_s is None else f" ({cpu_s:.2f} s of processor time)"
    typer.echo(
        f"beyond the import: {found.beyond_import_s:.2f} s{cpu}; the goal of {GOAL_S:g} s is "
        f"{'met' if result['goal_met'] else 'missed'}"
    )
    typer.echo(dumps(result, separators=(",", ":")))


def _as_dict(timing: "Timing") -> dict[str, Any]:
    """Return the milliseconds of a query; CPU time is None where it was not measured."""
    return {
        "runs": len(timing.seconds),
        **{f"p{n}_ms": 1000 * timing.percentile_s(n) for n in (50, 90, 99)},
        "cpu_ms": 1000 * timing.median_cpu_s if timing.cpu_seconds else None,
    }
