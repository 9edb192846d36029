"""``upperson bench``: what the package costs, measured against the paper's formulas."""

from dataclasses import asdict
from json import dumps
from typing import Annotated, Any

import typer

from upperson.cli.bench_towers import towers
from upperson.cli.extras import require_extra
from upperson_rt.cli.app import Command, new_app
from upperson_rt.cli.options import Debug, Json, Threads
from upperson_rt.cli.output import new_table, print_json, print_table

app = new_app("Measure what the package costs.")
app.command(cls=Command)(towers)


@app.callback()
def _group() -> None:
    """Measure what the package costs."""


@app.command(cls=Command)
def train(
    base: Annotated[
        str, typer.Option(help="Shapes to train: upperson-small or a ViT CLIP of open_clip.")
    ] = "ViT-B-16-quickgelu",
    height: Annotated[int, typer.Option(min=1, help="Image height, px.")] = 384,
    width: Annotated[int, typer.Option(min=1, help="Image width, px.")] = 128,
    batch_size: Annotated[int, typer.Option(min=2, help="Pairs in a step.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of every contender.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before them, not timed.")] = 1,
    threads: Threads = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time a training step on the CPU against a literal implementation of the formulas.

    Weights, images and captions of 20 to 30 tokens are random. Contenders start from equal weights,
    step in turns in one process, and must have equal losses. Peak memory is measured in a process
    of its own for each: resident memory during two steps on top of the loaded model.

    Example: `upperson bench train --steps 10 --threads 1`
    """
    require_extra("train", "the benchmark of training")
    import torch

    from upperson.bench.hardware import describe_hardware
    from upperson.bench.train import as_dict, bench_train
    from upperson.bench.training_step import StepSpec
    from upperson.cli.progress import Display

    spec = StepSpec(base=base, height_px=height, width_px=width, batch_size=batch_size)
    with Display() as display:
        found = bench_train(
            spec,
            steps=steps,
            warmup=warmup,
            threads=threads or torch.get_num_threads(),
            progress=display.update,
        )
    result = {
        "benchmark": "training step",
        "step": asdict(spec) | {"steps": steps, "warmup": warmup},
        "machine": describe_hardware(),
        "contenders": as_dict(found),
    }
    if json:
        print_json(result)
    else:
        _print_result(result)


def _print_result(result: dict[str, Any]) -> None:
    """Print what ran on what, the table, and the whole result as one line of JSON."""
    step, machine = result["step"], result["machine"]
    sets = machine["instruction_sets"] or {}
    typer.echo(
        f"training step of {step['base']} at {step['height_px']}x{step['width_px']}, "
        f"batch {step['batch_size']}; {step['warmup']} + {step['steps']} steps in turns, "
        f"the last {step['steps']} timed"
    )
    typer.echo(
        f"{machine['cpu']}, {machine['threads']} of {machine['cpus_available']} CPUs; "
        + ", ".join(f"{name} {'yes' if found else 'no'}" for name, found in sets.items())
    )
    typer.echo(
        f"torch {machine['torch']} ({machine['torch_kernels']} kernels), "
        f"open_clip {machine['open_clip']}, upperson {machine['upperson']}"
    )
    columns = (
        "s/step", "p10", "p90", "speed", "CPU s", "CPU speed", "peak extra", "memory",
        "losses differ by",
    )  # fmt: skip
    table = new_table("", *columns, right=columns)
    for name, found in result["contenders"].items():
        peak, ratio = found["peak_extra_bytes"], found["memory_ratio"]
        table.add_row(
            name,
            f"{found['median_s']:.3f}",
            f"{found['p10_s']:.3f}",
            f"{found['p90_s']:.3f}",
            f"{found['speedup']:.2f}x",
            f"{found['cpu_s']:.3f}",
            f"{found['cpu_speedup']:.2f}x",
            "not measured" if peak is None else f"{peak / 1e6:.0f} MB",
            "" if ratio is None else f"{100 * ratio:.0f} %",
            f"{found['loss_difference']:.1e}",
        )
    print_table(table)
    typer.echo(dumps(result, separators=(",", ":")))
