"""`upperson-rt bench towers`."""

from json import dumps
from typing import Annotated, Any

import typer

from upperson_rt.cli.options import (
    BundleOption,
    Debug,
    Json,
    Threads,
    default_bundle,
    read_batch_sizes,
)
from upperson_rt.cli.output import new_table, print_json, print_note, print_table, print_warning

__all__ = ["towers"]


def towers(
    bundle: BundleOption = default_bundle,
    variant: Annotated[
        list[str] | None,
        typer.Option("--variant", help="Variant to run; may be given again.", show_default="all"),
    ] = None,
    backend: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            help="onnxruntime, openvino or tensorrt; may be given again.",
            show_default="all that are installed",
        ),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", help="cpu, cuda, cuda:N, gpu or npu. Never replaced.")
    ] = "cpu",
    batch: Annotated[
        str, typer.Option("--batch", help="Batch sizes, with commas between them.")
    ] = "1,8,32",
    threads: Threads = None,
    seconds: Annotated[
        float,
        typer.Option(
            "--seconds",
            min=0.0,
            help="Timed seconds of each variant, backend and batch; at least 3 runs.",
        ),
    ] = 2.0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time every variant of a bundle on every backend, in turns.

    Start-up and memory are those of a fresh process that checks the bundle and loads both towers.
    What fails a check is listed and not timed. Captions have 20 to 30 tokens; padded ones fill the
    model's context. CPU time counts all threads of this process and nothing else.

    Example: `upperson-rt bench towers -b bundle --threads 1 --batch 1,8`
    """
    from rich.console import Console
    from rich.text import Text

    from upperson_rt.bench.towers import LEAST_RUNS, WARMUP, bench_bundle
    from upperson_rt.machine import describe_machine

    console = Console(stderr=True)
    with console.status("starting") as status:
        if not console.is_terminal:
            status.stop()
        found = bench_bundle(
            bundle,
            variants=variant or (),
            backends=backend or (),
            device=device,
            threads=threads,
            batch_sizes=read_batch_sizes(batch),
            seconds=seconds,
            progress=lambda work, done, total: (
                status.update(Text(f"{work} ({done}/{total})"))
                if console.is_terminal
                else print_note(f"{work}: {done}/{total}")
            ),
        )
    for name, reason in found.refused.items():
        print_warning(f"{name} is not measured: {reason}")
    result = {
        "benchmark": "bundle",
        "bundle": str(bundle),
        "machine": describe_machine(),
        "threads": threads,
        "warmup": WARMUP,
        "least_runs": LEAST_RUNS,
        "seconds": seconds,
        **found.as_dict(),
    }
    if json:
        print_json(result)
    else:
        _print_result(result)


def _print_result(result: dict[str, Any]) -> None:
    """Print what ran on what, the tables, and the whole result as one line of JSON."""
    machine = result["machine"]
    sets = machine["instruction_sets"] or {}
    typer.echo(
        f"{machine['cpu']}, {result['threads'] or 'default'} threads, "
        f"{machine['cpus_available']} CPUs, load {machine['load_average']}; "
        + ", ".join(f"{name} {'yes' if found else 'no'}" for name, found in sets.items())
    )
    typer.echo(
        f"upperson-rt {machine['upperson']}, Python {machine['python']}, {machine['system']}; "
        f"{result['warmup']} warm-up run, then in turns for {result['seconds']:g} s each and at "
        f"least {result['least_runs']} runs; speed is relative to {result['baseline']}"
    )
    right = ("start s", "peak MB", "canaries")
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
    typer.echo("")
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
    typer.echo(dumps(result, separators=(",", ":")))
