"""`upperson-rt bench ...`."""

from dataclasses import dataclass
from typing import Annotated, Any

import typer

from upperson_machine.description import describe_machine, machine_lines
from upperson_rt.cli.app import Command, new_app
from upperson_rt.cli.groups import OptionGroup, grouped, option
from upperson_rt.cli.opening import open_retriever
from upperson_rt.cli.options import (
    Bundle,
    Model,
    Output,
    Place,
    Searched,
    read_batch_sizes,
)
from upperson_rt.cli.output import (
    new_table,
    print_line,
    print_result,
    print_table,
    print_warning,
    running_line,
    running_with,
    show_progress,
)

app = new_app("Time models and queries on this machine.")


@dataclass(frozen=True)
class Contenders(OptionGroup, panel="Contenders"):
    """What is timed: every variant on every backend."""

    variant: list[str] | None = option(
        None, "Variant to run; may be given again.", show_default="all"
    )
    backend: list[str] | None = option(
        None,
        "onnxruntime, openvino or tensorrt; may be given again.",
        show_default="all that are installed",
    )
    device: str = option("cpu", "cpu, cuda, cuda:N, gpu or npu. Never replaced.")
    batch_size: str = option("1,8,32", "Batch sizes, with commas between them.")
    duration: float = option(
        2.0, "Timed seconds of each variant, backend and batch; at least 3 runs.", min=0.0
    )


@app.command(cls=Command)
@grouped
def towers(*, timed: Bundle, contenders: Contenders, output: Output) -> None:
    """Time every variant of a bundle on every backend, in turns.

    Start-up and memory are those of a fresh process that checks the bundle and loads both towers.
    What fails a check is listed and not timed. Captions have 20 to 30 tokens; padded ones fill the
    model's context. CPU time counts all threads of this process and nothing else.

    Example: `upperson-rt bench towers -b bundle --threads 1 --batch-size 1,8`
    """
    from upperson_bench.towers import LEAST_RUNS, WARMUP, bench_bundle

    with show_progress() as progress:
        found = bench_bundle(
            timed.bundle,
            trust=timed.trust,
            variants=contenders.variant or (),
            backends=contenders.backend or (),
            device=contenders.device,
            threads=timed.threads,
            batch_sizes=read_batch_sizes(contenders.batch_size),
            seconds=contenders.duration,
            progress=progress,
        )
    for name, reason in found.refused.items():
        print_warning(f"{name} is not measured: {reason}")
    result = {
        "benchmark": "bundle",
        "bundle": str(timed.bundle),
        "machine": describe_machine(),
        "threads": timed.threads,
        "warmup": WARMUP,
        "least_runs": LEAST_RUNS,
        "seconds": contenders.duration,
        **found.as_dict(),
    }
    print_result(result, output.as_json, _show_towers)


def _show_towers(result: dict[str, Any]) -> None:
    print_line(*machine_lines(result["machine"], result["threads"]).splitlines())
    print_line(
        f"{result['warmup']} warm-up run, then in turns for {result['seconds']:g} s each and at "
        f"least {result['least_runs']} runs; speed is relative to {result['baseline']}"
    )
    right = ("start s", "peak MB", "golden samples")
    table = new_table("contender", "library", "device", "floats", *right, right=right)
    for name, contender in result["contenders"].items():
        peak = contender["peak_rss_bytes"]
        table.add_row(
            name,
            contender["version"],
            contender["device"],
            contender["float_type"] or "",
            f"{contender['start_s']:.2f}",
            "not measured" if peak is None else f"{peak / 1e6:.0f}",
            f"{contender['canary_min_cosine']:.6f}",
        )
    print_table(table)
    print_line("")
    columns = ("p50 ms", "p90 ms", "p99 ms", "items/s", "CPU ms", "speed")
    table = new_table("input", "shape", "contender", *columns, right=columns)
    for case in result["cases"]:
        for name, timing in case["timings"].items():
            table.add_row(
                case["inputs"],
                "x".join(map(str, case["shape"])),
                name,
                f"{timing['p50_ms']:.2f}",
                f"{timing['p90_ms']:.2f}",
                f"{timing['p99_ms']:.2f}",
                f"{timing['items_per_s']:.1f}",
                f"{timing['cpu_ms']:.2f}",
                f"{timing['speedup']:.2f}x",
            )
    print_table(table)


@app.command(cls=Command)
@grouped
def query(
    sentence: Annotated[
        str, typer.Argument(metavar="SENTENCE", help="Query.")
    ] = "woman in red coat",
    *,
    model: Model,
    place: Place,
    output: Output,
    rounds: Annotated[
        int, typer.Option("--rounds", min=1, help="Timed processes of each kind, in turns.")
    ] = 10,
) -> None:
    """Time a query in a fresh process against the import of the library that runs the model.

    The processes run in turns, after one of each that is not timed; files are in the system's
    cache by then. A query in a running process is timed 50 times.

    Example: `upperson-rt bench query -b bundle -g gallery --rounds 20`
    """
    from upperson_bench.processes import time_query

    opening = open_retriever(model, Searched(gallery=place.gallery), "text")
    with opening as (opened, used, retriever), show_progress() as progress:
        options = ["-b", str(model.bundle), "-g", place.gallery, "--device", model.device]
        options += ["--backend", used.name, "--variant", opened.variant]
        options += [] if model.threads is None else ["--threads", str(model.threads)]
        options += [] if model.trust is None else ["--trust", str(model.trust)]
        timings = time_query(
            retriever, sentence, options, used.name, rounds=rounds, progress=progress
        )
        items = retriever.gallery.count()
    cold, imports = timings["query"], timings["import"]
    result = {
        "benchmark": "query",
        "bundle": str(model.bundle),
        "gallery": place.gallery,
        "items": items,
        **running_with(opened.variant, used),
        "threads": model.threads,
        "machine": describe_machine(),
        "timings": {name: timing.as_dict() for name, timing in timings.items()},
        "beyond_import_s": cold.median_s - imports.median_s,
        "beyond_import_cpu_s": cold.median_cpu_s - imports.median_cpu_s
        if cold.cpu_seconds
        else None,
    }
    print_result(result, output.as_json, _show_query)


def _show_query(result: dict[str, Any]) -> None:
    print_line(*machine_lines(result["machine"], result["threads"]).splitlines())
    print_line(f"{running_line(result)}; {result['items']} pictures")
    columns = ("runs", "p50 ms", "p90 ms", "p99 ms", "CPU ms")
    table = new_table("what", *columns, right=columns)
    for name, what in {
        "python": "a process that does nothing",
        "import": f"a process that imports {result['backend']}",
        "query": "upperson-rt query, from start to end",
        "running": "a query in a running process",
    }.items():
        timing = result["timings"][name]
        milliseconds = (timing[key] for key in ("p50_ms", "p90_ms", "p99_ms", "cpu_ms"))
        table.add_row(
            what,
            str(timing["runs"]),
            *("not measured" if value is None else f"{value:.1f}" for value in milliseconds),
        )
    print_table(table)
    cpu_s = result["beyond_import_cpu_s"]
    cpu = "" if cpu_s is None else f" ({cpu_s:.2f} s of processor time)"
    print_line(f"beyond the import: {result['beyond_import_s']:.2f} s{cpu}")
