"""Starting against bare ONNX Runtime: fresh processes from their start to their end, in turns."""

from typing import Annotated, Any

import typer

from upperson_rt.bench.processes import PROGRAM, time_processes
from upperson_rt.bundle import read_manifest
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import BundleOption, Debug, GalleryOption, Json
from upperson_rt.cli.output import new_table, print_result, print_table, show_progress
from upperson_rt.errors import UsageError
from upperson_rt.machine import describe_machine, machine_lines
from upperson_rt.strict import suggestion
from upperson_rt.towers import TOWERS

GOAL_S = 1.0
"""What a query in a fresh process may take beyond the import of ONNX Runtime."""

NOTHING = "a process that does nothing"
IMPORT = "import onnxruntime"
BARE = "onnxruntime loads both towers"
READY = "upperson-rt verifies and loads both towers"
QUERY = "upperson-rt query, to its printed table"

_BARE = (
    "import sys, onnxruntime; "
    "[onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider']) "
    "for path in sys.argv[1:]]"
)
_READY = (
    "import sys; from upperson_rt.bundle import Bundle; "
    "Bundle.open(sys.argv[1], sys.argv[2], 'onnxruntime').check_canaries()"
)

app = new_app("Time starting against bare ONNX Runtime.")


@app.command(cls=Command)
def startup(
    bundle: BundleOption,
    gallery: GalleryOption,
    variant: Annotated[str, typer.Option("--variant", help="Of the bundle.")] = "int8",
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Timed processes of each kind, in turns.")
    ] = 10,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time fresh processes that verify and load a bundle, or answer a query, against ONNX Runtime.

    The bare one makes sessions of the same two files and checks nothing. The processes run in
    turns, after one of each that is not timed; files are in the system's cache by then.

    Example: `python -m benchmarks.startup -b demo/bundle -g demo/gallery`
    """
    variants = read_manifest(bundle).variants
    if variant not in variants:
        raise UsageError(
            f"bundle {bundle} has no variant '{variant}', {suggestion(variant, variants)}"
        )
    files = [str(bundle / variants[variant].file(tower).file) for tower in TOWERS]
    query = ["query", "woman in red coat", "-b", str(bundle), "-g", gallery]
    with show_progress() as progress:
        timings = time_processes(
            {
                NOTHING: ("-c", "pass"),
                IMPORT: ("-c", "import onnxruntime"),
                BARE: ("-c", _BARE, *files),
                READY: ("-c", _READY, str(bundle), variant),
                QUERY: (*PROGRAM, *query, "--variant", variant, "--backend", "onnxruntime"),
            },
            rounds=rounds,
            progress=progress,
        )
    beyond_s = timings[QUERY].median_s - timings[IMPORT].median_s
    result = {
        "benchmark": "startup",
        "bundle": str(bundle),
        "gallery": gallery,
        "variant": variant,
        "machine": describe_machine("onnxruntime"),
        "processes": {
            name: timing.as_dict() | {"ratio": timing.median_s / timings[BARE].median_s}
            for name, timing in timings.items()
        },
        "beyond_import_s": beyond_s,
        "goal_s": GOAL_S,
        "goal_met": beyond_s <= GOAL_S,
    }
    print_result(result, as_json, _show)


def _show(result: dict[str, Any]) -> None:
    typer.echo(machine_lines(result["machine"], None))
    typer.echo("fresh processes in turns, after one of each that is not timed")
    columns = ("runs", "p50 ms", "p90 ms", "p99 ms", "CPU ms", "against bare")
    table = new_table(f"process, {result['variant']}", *columns, right=columns)
    for name, timing in result["processes"].items():
        milliseconds = (timing[key] for key in ("p50_ms", "p90_ms", "p99_ms", "cpu_ms"))
        table.add_row(
            name,
            str(timing["runs"]),
            *("not measured" if value is None else f"{value:.1f}" for value in milliseconds),
            f"{timing['ratio']:.2f}x",
        )
    print_table(table)
    typer.echo(
        f"a query takes {result['beyond_import_s']:.2f} s beyond the import; the goal of "
        f"{result['goal_s']:g} s is {'met' if result['goal_met'] else 'missed'}"
    )


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.startup")
