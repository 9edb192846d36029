"""Towers and training on the NVIDIA GPU of this machine, into a page with the card's name.

Not part of a plain ``make bench``: it needs a GPU. What is not installed is left out, and said so.
"""

import datetime
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks import gpu_libraries
from benchmarks.gpu_towers import measure_tower
from benchmarks.gpu_training import PRECISIONS, measure_training, write_people
from benchmarks.random_model import (
    BaseOption,
    HeightOption,
    ModelSpec,
    WidthOption,
    random_base,
    random_model,
    tower_inputs,
)
from benchmarks.tower_graphs import write_graphs
from benchmarks.towers import CALIBRATION_SAMPLES, block_weights
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug, Json
from upperson_rt.cli.output import (
    new_table,
    print_note,
    print_result,
    print_table,
    show_progress,
)
from upperson_rt.doctor import kernel_driver
from upperson_rt.errors import BackendError, UppersonError, UsageError
from upperson_rt.machine import describe_machine, machine_lines
from upperson_rt.tensorrt.cuda import Cuda, probe_cuda_driver
from upperson_rt.towers import TOWERS

DOCS = Path(__file__).parents[1] / "docs"

BATCHES = (1, 8, 32)

_PACKAGES = (
    "torch", "onnxruntime-gpu", "tensorrt", "tensorrt-cu12", "tensorrt-cu13", "open_clip_torch",
)  # fmt: skip

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
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Time towers and training on the NVIDIA GPU of this machine; write `docs/gpu-<card>.md`.

    A model with random weights is folded and exported. torch, ONNX Runtime and TensorRT embed the
    same people and captions in turns, from and to the host's memory, and must agree; trtexec runs
    the engines alone. Shares are of the fastest matrix product of a block's shapes on this card, in
    the same float type. Then a training run and its step alone are timed in every precision.

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
    print_result(result, as_json, _show)
    page = output / f"gpu-{slug(result['card']['name'])}.md"
    page.write_text(markdown(result), "utf-8")
    print_note(f"wrote {page}")


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
    model = random_model(spec, random_base(spec)).eval()
    inputs = tower_inputs(replace(spec, batch_size=max(2, *batches)))
    samples = tower_inputs(replace(spec, batch_size=CALIBRATION_SAMPLES, seed=spec.seed + 1))
    towers: dict[str, Any] = {}
    training: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, show_progress() as progress:
        folder = Path(name)
        graphs = write_graphs(
            model, samples, folder, variants=("fp16", "int8-fp16"),
            threads=torch.get_num_threads(), progress=progress,
        )  # fmt: skip
        for kind in TOWERS:
            weights = block_weights(getattr(model, kind).blocks)
            towers[kind], left_out = measure_tower(
                kind,
                graphs[kind],
                [inputs[kind][:size] for size in batches],
                [(weight.shape[1], weight.shape[0]) for weight in weights],
                device=device,
                missing=missing,
                longest=model.text.context_length,
                rounds=rounds,
                warmup=warmup,
                progress=progress,
            )
            skipped |= left_out
        progress("rendering people", 0, 1)
        config = write_people(spec, steps + warmup, folder)
        for done, precision in enumerate(PRECISIONS):
            progress("training", done, len(PRECISIONS))
            try:
                training[precision] = measure_training(
                    replace(config, precision=precision, workers=workers), spec,
                    folder / f"run-{precision}", device=device, warmup=warmup,
                )  # fmt: skip
            except (UppersonError, torch.OutOfMemoryError) as error:
                skipped[f"training in {precision}"] = str(error)
    return {
        "benchmark": "gpu",
        "date": datetime.date.today().isoformat(),
        "card": asdict(Cuda().gpu) | {"driver_release": kernel_driver()},
        "machine": describe_machine(*_PACKAGES) | {"gpus": list(probe_cuda_driver().devices)},
        "spec": asdict(spec)
        | {"tokens": inputs["text"].shape[1], "rounds": rounds, "warmup": warmup},
        "towers": towers,
        "training": training,
        "skipped": skipped,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """What is printed and written alike."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(result: dict[str, Any]) -> list[Table]:
    """Return the tables of a result: one of each tower and batch, and one of training."""
    found = [
        Table(
            title=f"{kind} tower, batch {batch}",
            columns=(
                "", "p50 ms", "p90 ms", "p99 ms", "items/s", "host ms", "CPU ms", "of the peak",
                "lowest cosine",
            ),
            rows=[
                (
                    name,
                    *(_number(row[key], 3) for key in ("p50_ms", "p90_ms", "p99_ms")),
                    _number(row.get("items_per_s"), 0),
                    _number(row["host_ms"], 3),
                    _number(row.get("cpu_ms"), 3),
                    f"{100 * row['share']:.1f} %",
                    _number(row.get("min_cosine"), 6),
                )
                for name, row in contenders.items()
            ],
        )
        for kind, tower in result["towers"].items()
        for batch, contenders in tower["batches"].items()
    ]  # fmt: skip
    training = Table(
        title=f"training, {result['spec']['batch_size']} pairs a step",
        columns=("", "pictures/s", "ms a step alone", "of the time in the step", "peak memory"),
        rows=[
            (
                precision,
                _number(row["images_per_s"], 0),
                _number(row["step_ms"], 1),
                f"{100 * row['share_in_step']:.0f} %",
                ""
                if row["peak_memory_bytes"] is None
                else f"{row['peak_memory_bytes'] / 1e9:.2f} GB",
            )
            for precision, row in result["training"].items()
        ],
    )
    return [*found, training]


def facts(result: dict[str, Any]) -> list[str]:
    """Return what the tables were measured on and with, a line each."""
    card, spec = result["card"], result["spec"]
    peaks = result["towers"]["image"]["peak_flops"].items()
    return [
        f"{card['name']}, compute capability {card['compute_capability']}, "
        f"{card['multiprocessors']} multiprocessors, driver "
        f"{card['driver_release'] or 'unknown'} (CUDA {card['driver']})",
        *machine_lines(result["machine"], None).splitlines(),
        f"{spec['base']} at {spec['height_px']}x{spec['width_px']}, random weights, captions of "
        f"{spec['tokens']} tokens; {spec['warmup']} + {spec['rounds']} rounds in turns",
        "peak of matrix products: "
        + ", ".join(f"{name} {flops / 1e12:.1f} TFLOP/s" for name, flops in peaks),
        *(f"skipped: {what}: {reason}" for what, reason in result["skipped"].items()),
    ]


def markdown(result: dict[str, Any]) -> str:
    """Return the page of a card."""
    lines = [
        f"# {result['card']['name']}",
        "",
        f"`{result['command']}`, {result['date']}. How to read it:",
        "[benchmarks](benchmarks.md#on-a-gpu).",
        "",
        *(f"- {line}" for line in facts(result)),
    ]
    for table in tables(result):
        lines += ["", f"## {table.title}", "", _row(table.columns)]
        lines += ["|" + "---|" * len(table.columns), *map(_row, table.rows)]
    return "\n".join(lines) + "\n"


def slug(name: str) -> str:
    """Return a card's name as part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _show(result: dict[str, Any]) -> None:
    for line in facts(result):
        typer.echo(line)
    for table in tables(result):
        typer.echo(f"\n{table.title}")
        shown = new_table(*table.columns, right=tuple(table.columns[1:]))
        for row in table.rows:
            shown.add_row(*row)
        print_table(shown)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.gpu")
