"""`upperson-rt bench pipeline`."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from upperson_machine.description import describe_machine, machine_lines
from upperson_rt.cli.groups import OptionGroup, grouped
from upperson_rt.cli.opening import open_model
from upperson_rt.cli.options import Model, Output
from upperson_rt.cli.output import (
    backend_line,
    new_table,
    print_line,
    print_note,
    print_result,
    print_table,
    running_line,
    running_with,
    show_progress,
)
from upperson_rt.errors import IntegrityError


@dataclass(frozen=True)
class Load(OptionGroup, panel="Load"):
    """What the pipeline gets, and how it works."""

    duration: Annotated[
        float, typer.Option("--duration", min=1.0, help="How long frames are submitted.")
    ] = 120.0
    overload: Annotated[
        float,
        typer.Option(
            "--overload",
            min=0.1,
            help="People offered, in multiples of what the encoder does alone.",
        ),
    ] = 3.0
    cameras: Annotated[
        int, typer.Option("--cameras", min=1, help="Threads that submit, one a camera.")
    ] = 2
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Pictures run and committed at a time.")
    ] = 16
    drop: Annotated[
        str, typer.Option("--drop", help="What a full queue drops: oldest or newest.")
    ] = "oldest"
    vectors_only: Annotated[bool, typer.Option("--vectors-only", help="Save no pictures.")] = False


@grouped
def pipeline(*, load: Load, model: Model, output: Output) -> None:
    """Overload a camera pipeline, and check that it loses nothing uncounted.

    Frames come with known boxes, so neither video nor detector counts. The encoder is measured
    alone first. Exit code 6 if a frame or crop has no count, or an acknowledged row is gone; memory
    and speed are only reported. The gallery is a temporary one.

    Example: `upperson-rt bench pipeline -b bundle --duration 30`
    """
    from upperson_camera.bench import bench_pipeline
    from upperson_camera.queues import check_policy

    policy = check_policy(load.drop)
    opened = open_model(model)
    used = opened.backend("image")
    print_note(backend_line(opened, "image"))
    with (
        tempfile.TemporaryDirectory(prefix="upperson-bench-") as folder,
        show_progress() as progress,
    ):
        found = bench_pipeline(
            opened.encoder(),
            Path(folder),
            seconds=load.duration,
            overload=load.overload,
            cameras=load.cameras,
            batch_size=load.batch_size,
            drop=policy,
            save_crops=not load.vectors_only,
            progress=progress,
        )
    result = {
        "benchmark": "pipeline",
        "bundle": str(model.bundle),
        **running_with(opened.variant, used),
        "threads": model.threads,
        "machine": describe_machine(),
        "batch_size": load.batch_size,
        "drop": policy,
        "pictures_saved": not load.vectors_only,
        **found,
    }
    print_result(result, output.as_json, _show_pipeline)
    if problems := found["problems"]:
        text = f"the pipeline broke its promises: {'; '.join(problems)}"
        raise IntegrityError(text, code="promise_broken", problems=problems)


def _show_pipeline(found: dict[str, Any]) -> None:
    print_line(*machine_lines(found["machine"], found["threads"]).splitlines())
    height, width = found["frame"]
    print_line(
        f"{running_line(found)}; {found['cameras']} cameras, {width} x {height}, "
        f"{found['people_per_frame']} people a frame, batch {found['batch_size']}, drop "
        f"{found['drop']}, {found['seconds']:.1f} s; memory and the encoder's work count after "
        f"{found['warm_share']:.0%} of the time"
    )
    memory, rss = "not measured", found["rss_bytes"]
    if rss is not None:
        memory = f"{rss['min'] / 1e6:.0f} to {rss['max'] / 1e6:.0f} MB"
        if rss["growth"] is not None:
            memory += f", {rss['growth'] / 1e6:+.1f} MB from first to last fifth"
    submit, frames, crops = found["submit_ms"], found["frames"], found["crops"]
    table = new_table("measured", "value")
    for name, value in {
        "encoder alone": f"{found['capacity_per_s']:.1f} people/s",
        "offered": f"{found['offered_per_s']:.1f} people/s, "
        f"{found['offered_to_capacity']:.2f} times that",
        "committed": f"{found['committed_per_s']:.1f} people/s",
        "encoder busy": f"{found['encoder_busy_share']:.1%}",
        "memory": memory,
        "submit": f"p50 {submit['p50']:.2f} ms, p99 {submit['p99']:.2f} ms, max "
        f"{submit['max']:.1f} ms",
        "frames": f"{frames['submitted']} = {frames['processed']} processed + "
        f"{_dropped(frames['dropped'])}",
        "people": f"{crops['detections']} = {crops['committed']} committed + "
        f"{_dropped(crops['dropped'])}",
        "acknowledged": f"{found['acknowledged']}, found again: {found['rows']}",
        "finishing": f"{found['drain_s']:.1f} s after the last frame",
        "promises": "; ".join(found["problems"]) or "all kept",
    }.items():
        table.add_row(name, value)
    print_table(table)


def _dropped(counts: dict[str, int]) -> str:
    reasons = ", ".join(f"{number} {name}" for name, number in counts.items())
    return f"{sum(counts.values())} dropped ({reasons or 'none'})"
