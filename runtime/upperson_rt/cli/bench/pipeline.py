"""`upperson-rt bench pipeline`."""

import tempfile
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer

from upperson_rt.cli.options import (
    BackendOption,
    BundleOption,
    Debug,
    DeviceOption,
    Json,
    Threads,
    VariantOption,
    default_bundle,
)
from upperson_rt.cli.output import backend_line, new_table, print_json, print_note, print_table

__all__ = ["pipeline"]


def pipeline(
    bundle: BundleOption = default_bundle,
    seconds: Annotated[
        float, typer.Option("--seconds", min=1.0, help="How long frames are submitted.")
    ] = 120.0,
    overload: Annotated[
        float,
        typer.Option("--overload", min=0.1, help="People offered, in multiples of the encoder's."),
    ] = 3.0,
    cameras: Annotated[
        int, typer.Option("--cameras", min=1, help="Threads that submit, one a camera.")
    ] = 2,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Pictures run and committed at a time.")
    ] = 16,
    drop: Annotated[
        str, typer.Option("--drop", help="What gives way: oldest or newest.")
    ] = "oldest",
    vectors_only: Annotated[bool, typer.Option("--vectors-only", help="Save no pictures.")] = False,
    variant: VariantOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "cpu",
    threads: Threads = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Overload a camera pipeline, and see what gives way.

    Frames come with known boxes, so neither video nor detector counts. The encoder is measured
    alone first. Exit code 6 if a frame or crop has no count, or an acknowledged row is gone; memory
    and speed are only reported. The gallery is a temporary one.

    Example: `upperson-rt bench pipeline -b bundle --seconds 30`
    """
    from rich.console import Console
    from rich.text import Text

    from upperson_rt.bench.pipeline import bench_pipeline, raise_problems
    from upperson_rt.bundle import Bundle
    from upperson_rt.camera.queues import check_policy
    from upperson_rt.machine import describe_machine

    policy = check_policy(drop)
    opened = Bundle.open(bundle, variant, backend, device, threads=threads)
    running = opened.backend("image")
    print_note(backend_line(running.name, running.version, running.device, backend))
    console = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory(prefix="upperson-bench-") as folder,
        console.status("starting") as status,
    ):
        if not console.is_terminal:
            status.stop()
        found = bench_pipeline(
            opened.encoder(),
            Path(folder),
            seconds=seconds,
            overload=overload,
            cameras=cameras,
            batch_size=batch_size,
            drop=policy,
            save_crops=not vectors_only,
            progress=lambda work, done, total: status.update(
                Text(f"{work}: {done:.0f} of {total:.0f} s")
            ),
        )
    result = {
        "benchmark": "pipeline",
        "bundle": str(bundle),
        "variant": opened.variant,
        "backend": running.name,
        "version": running.version,
        "device": running.device,
        "threads": threads,
        "machine": describe_machine(),
        "batch_size": batch_size,
        "drop": drop,
        "pictures_saved": not vectors_only,
        **found.as_dict(),
    }
    if json:
        print_json(result)
    else:
        _print_result(result)
    raise_problems(found)


def _print_result(result: dict[str, Any]) -> None:
    """Print what ran on what, a table, and the whole result as one line of JSON."""
    machine, rss = result["machine"], result["rss_bytes"]
    typer.echo(
        f"{machine['cpu']}, {result['threads'] or 'default'} threads, {machine['cpus_available']} "
        f"CPUs, load {machine['load_average']:.2f}; {result['variant']} on {result['backend']} "
        f"{result['version']}, {result['device']}"
        if machine["load_average"] is not None
        else f"{machine['cpu']}; {result['variant']} on {result['backend']}"
    )
    typer.echo(
        f"{result['cameras']} cameras, {result['frame'][1]} x {result['frame'][0]}, "
        f"{result['people_per_frame']} people a frame, batch {result['batch_size']}, drop "
        f"{result['drop']}, {result['seconds']:.1f} s; memory and the encoder's work count after "
        f"{result['warm_share']:.0%} of the time"
    )
    frames, crops = result["frames"], result["crops"]
    memory = "not measured"
    if rss is not None:
        memory = f"{rss['min'] / 1e6:.0f} to {rss['max'] / 1e6:.0f} MB"
        if rss["growth"] is not None:
            memory += f", {rss['growth'] / 1e6:+.1f} MB from first to last fifth"
    submit = result["submit_ms"]
    table = new_table("measured", "value")
    for name, value in {
        "encoder alone": f"{result['capacity_per_s']:.1f} people/s",
        "offered": f"{result['offered_per_s']:.1f} people/s, "
        f"{result['offered_to_capacity']:.2f} times that",
        "committed": f"{result['committed_per_s']:.1f} people/s",
        "encoder busy": f"{result['encoder_busy_share']:.1%}",
        "memory": memory,
        "submit": f"p50 {submit['p50']:.2f} ms, p99 {submit['p99']:.2f} ms, max "
        f"{submit['max']:.1f} ms",
        "frames": f"{frames['submitted']} = {frames['processed']} processed + "
        f"{sum(frames['dropped'].values())} dropped ({_reasons(frames['dropped'])})",
        "people": f"{crops['detections']} = {crops['committed']} committed + "
        f"{sum(crops['dropped'].values())} dropped ({_reasons(crops['dropped'])})",
        "acknowledged": f"{result['acknowledged']}, found again: {result['rows']}",
        "finishing": f"{result['drain_s']:.1f} s after the last frame",
        "promises": "; ".join(result["problems"]) or "all kept",
    }.items():
        table.add_row(name, value)
    print_table(table)
    typer.echo(dumps(result, separators=(",", ":")))


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {name}" for name, number in counts.items()) or "none"
