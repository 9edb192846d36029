"""Towers and training on the NVIDIA GPU of this machine, into a page with the card's name.

Not part of a plain ``make bench``: it needs a GPU. What is not installed is left out, and said so.
"""

import datetime
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import gpu_libraries
from benchmarks.contenders import FOLDED, gpu_contenders
from benchmarks.gpu_training import PRECISIONS, measure_training, write_people
from benchmarks.random_model import BaseOption, HeightOption, ModelSpec, WidthOption
from benchmarks.report import Column, Table, conditions, print_report, table
from benchmarks.towers import COLUMNS, measure_towers
from upperson_doctor.diagnosis import kernel_driver
from upperson_machine.description import machine_lines
from upperson_machine.nvidia import probe_cuda_driver
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug
from upperson_rt.cli.output import print_note, show_progress
from upperson_rt.errors import BackendError, UppersonError, UsageError
from upperson_rt.files import write_atomically
from upperson_tensorrt.cuda import Cuda

DOCS = Path(__file__).parents[1] / "docs/dev"

BATCHES = (1, 8, 32)

_PACKAGES = (
    "torch", "onnxruntime-gpu", "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "open_clip_torch",
)  # fmt: skip

_TRAINING = {
    "pictures/s": Column("images_per_s", "{:.0f}"),
    "ms a step alone": Column("step_ms", "{:.1f}"),
    "of the time in the step": Column("share_in_step", "{:.0%}"),
    "peak memory, GB": Column("peak_memory_bytes", "{:.2f}", 1e-9),
}

app = new_app("Time towers and training on the NVIDIA GPU of this machine.")


@app.command(cls=Command)
def gpu(
    base: BaseOption = ModelSpec.base,
    height: HeightOption = ModelSpec.height_px,
    width: WidthOption = ModelSpec.width_px,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size of towers, repeatable: 1, 8, 32.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of every contender.")] = 100,
    warmup: Annotated[int, typer.Option(min=4, help="Runs before them, not timed.")] = 10,
    pairs: Annotated[int, typer.Option(min=2, help="Pairs in a training step.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Timed training steps.")] = 30,
    workers: Annotated[int, typer.Option(min=0, help="Processes that load pictures.")] = 8,
    output: Annotated[Path, typer.Option(help="Folder of the page.")] = DOCS,
    check: Annotated[bool, typer.Option("--check", help="Only say what is there.")] = False,
    debug: Debug = False,
) -> None:
    """Time towers and training on the NVIDIA GPU of this machine; write `docs/dev/gpu-<card>.md`.

    A model with random weights is folded and exported. torch, ONNX Runtime and TensorRT embed the
    same people and captions in turns, from and to the host's memory, and must agree; trtexec runs
    the engines alone. Then a training run and its step alone are timed in every precision.

    Without a GPU it ends with exit code 5; what is not installed is left out with a reason.

    Example: `python -m benchmarks.gpu --batch 1 --batch 8`
    """
    missing = require_gpu()
    if check:
        for library, reason in missing.items():
            typer.echo(f"{library}: {f'skipped: {reason}' if reason else 'is there'}")
        return
    if missing["torch"]:
        raise BackendError(f"{missing['torch']}: torch is what all others are compared with")
    if not output.is_dir():
        raise UsageError(f"--output {output} is no folder: make it, or name another")
    spec = ModelSpec(base=base, height_px=height, width_px=width, batch_size=pairs)
    result = measure(
        spec, tuple(sorted(set(batch or BATCHES))), missing, device="cuda", rounds=rounds,
        warmup=warmup, steps=steps, workers=workers,
    )  # fmt: skip
    result["command"] = shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]])
    page = output / f"gpu-{slug(result['card']['name'])}.md"
    write_atomically(page, markdown(result))
    print_note(f"wrote {page}")
    print_report(result, facts(result), tables(result))


def require_gpu() -> dict[str, str]:
    """Return what is missing beside the GPU itself, by library; nothing of what is there.

    Raises:
        BackendError: There is no GPU.
    """
    if reason := gpu_libraries.missing_gpu():
        raise BackendError(
            f"this needs an NVIDIA GPU: {reason}; on a CPU run  make bench NAME=towers"
        )
    return {library: missing() for library, missing in gpu_libraries.LIBRARIES.items()}


def measure(
    spec: ModelSpec,
    batches: Sequence[int],
    missing: dict[str, str],
    *,
    device: str,
    rounds: int,
    warmup: int,
    steps: int,
    workers: int,
) -> dict[str, Any]:
    """Measure towers, then training; return plain values."""
    skipped = {library: reason for library, reason in missing.items() if reason}
    training: dict[str, Any] = {}
    result = conditions("gpu", *_PACKAGES, threads=None, batch_size=spec.batch_size, warmup=warmup)
    with tempfile.TemporaryDirectory() as name, show_progress() as progress:
        towers, shapes = measure_towers(
            spec,
            batches,
            ("fp16", "int8-fp16"),
            lambda kind, graphs, rows, model, folder: gpu_contenders(
                kind, graphs, rows, device=device, missing=missing,
                longest=model.text.context_length, folder=folder,
            ),
            reference=FOLDED,
            skipped=skipped,
            rounds=rounds,
            warmup=warmup,
            progress=progress,
        )  # fmt: skip
        progress("rendering people", 0, 1)
        config = write_people(spec, steps + warmup, Path(name))
        for done, precision in enumerate(PRECISIONS):
            progress("training", done, len(PRECISIONS))
            try:
                training[precision] = measure_training(
                    replace(config, precision=precision, workers=workers), spec,
                    Path(name) / f"run-{precision}", device=device, warmup=warmup,
                )  # fmt: skip
            except (UppersonError, torch.OutOfMemoryError) as error:
                skipped[f"training in {precision}"] = str(error)
    return result | {
        "date": datetime.date.today().isoformat(),
        "card": asdict(Cuda().gpu) | {"driver_release": kernel_driver()},
        "gpus": list(probe_cuda_driver().devices),
        "spec": asdict(spec) | shapes,
        "rounds": rounds,
        "towers": towers,
        "training": training,
        "skipped": skipped,
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """Return the tables of a result: one of each tower and batch, and one of training."""
    host = {"host ms": Column("host_ms", "{:.3f}")}
    found = [
        table(f"{kind} tower, batch {batch}", rows, COLUMNS | host)
        for kind, tower in result["towers"].items()
        for batch, rows in tower["batches"].items()
    ]
    title = f"training, {result['batch_size']} pairs a step"
    return [*found, table(title, result["training"], _TRAINING)]


def facts(result: dict[str, Any]) -> list[str]:
    """Return what the tables were measured on and with, a line each."""
    card, spec = result["card"], result["spec"]
    return [
        f"{card['name']}, compute capability {card['compute_capability']}, "
        f"{card['multiprocessors']} multiprocessors, driver "
        f"{card['driver_release'] or 'unknown'} (CUDA {card['driver']})",
        f"{spec['base']} at {spec['height_px']}x{spec['width_px']}, random weights, captions of "
        f"{spec['tokens']} tokens; {result['warmup']} + {result['rounds']} rounds in turns",
        *(f"skipped: {what}: {reason}" for what, reason in result["skipped"].items()),
    ]


def markdown(result: dict[str, Any]) -> str:
    """Return the page of a card."""
    machine = machine_lines(result["machine"], None).splitlines()
    lines = [
        f"# {result['card']['name']}",
        "",
        f"`{result['command']}`, {result['date']}. How to read it:",
        "[benchmarks](benchmarks.md#on-a-gpu).",
        "",
        *(f"- {line}" for line in (*machine, *facts(result))),
    ]
    for (title, *columns), rows in tables(result):
        lines += ["", f"## {title}", "", _row(("", *columns)), "|" + "---|" * (1 + len(columns))]
        lines += map(_row, rows)
    return "\n".join(lines) + "\n"


def slug(name: str) -> str:
    """Return a card's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.gpu")
