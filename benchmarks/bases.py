"""Bases of every kind at their real sizes: what training, export and search take, and how faithful.

Weights are random. Each step is the user's command in a process of its own.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.random_bases import move_trained, write_weights
from upperson.data.synthetic import SyntheticSpec, write_dataset
from upperson_rt.bench.processes import PROGRAM, call_in_fresh_process, child_environment, said_last
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug, Json
from upperson_rt.cli.output import new_table, print_result, print_table, show_progress
from upperson_rt.errors import BackendError
from upperson_rt.files import write_atomically
from upperson_rt.machine import describe_machine, machine_lines
from upperson_rt.printable import one_line

BASES = ("ViT-B-16-SigLIP2-256", "MobileCLIP2-B", "TinyCLIP-ViT-39M-16-Text-19M")
"""No CLS and a vocabulary of its own, a tower of timm, and one that open_clip does not name."""

_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "TinyCLIP-ViT-39M-16-Text-19M": {
        "model_cfg": {
            "embed_dim": 512,
            "quick_gelu": False,
            "vision_cfg": {"image_size": 224, "layers": 12, "width": 512, "patch_size": 16},
            "text_cfg": {
                "context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 6
            },
        },
        "preprocess_cfg": {
            "mean": [0.48145466, 0.4578275, 0.40821073],
            "std": [0.26862954, 0.26130258, 0.27577711],
        },
    }
}  # fmt: skip

_PEOPLE = SyntheticSpec(
    look="street", train_ids=8, val_ids=0, test_ids=0, views=1, captions_per_image=1
)
_UPPERSON = ("-m", "upperson")

app = new_app("Try bases of every kind at their real sizes.")


@app.command(cls=Command)
def bases(
    base: Annotated[
        list[str] | None,
        typer.Option(help="Of open_clip; more than once for several.", show_default="all kinds"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder that keeps everything.", show_default="none")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train, export and search with bases of every kind at their real sizes.

    For each: random weights, a step of training on eight drawn people, trained tensors moved so
    that every one matters, export in fp32 and int8, parity with the unfolded model, the pictures
    indexed, a sentence answered. Peak memory is that of each command's process.

    Example: `python -m benchmarks.bases --base MobileCLIP2-B`
    """
    found: dict[str, dict[str, Any]] = {}
    with show_progress() as progress, tempfile.TemporaryDirectory() as scratch:
        folder = output or Path(scratch)
        for name in base or BASES:
            for number, (step, facts) in enumerate(steps(name, folder / name)):
                progress(f"{name}: {step}", number, len(COMMANDS))
                found.setdefault(name, {})[step] = facts
    result = {
        "benchmark": "bases",
        "machine": describe_machine("torch", "onnxruntime", "openvino"),
        "bases": found,
    }
    print_result(result, as_json, _show)


COMMANDS = ("train", "export", "parity", "index", "query")


def steps(name: str, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Run all commands with a base and yield what each took and found.

    Raises:
        BackendError: A command failed.
    """
    folder.mkdir(parents=True)
    people, run, bundle, gallery = (folder / part for part in ("people", "run", "bundle", "g"))
    write_dataset(people, _PEOPLE)
    given = name
    if name in _CONFIGURATIONS:  # A file of the user's.
        given = str(folder / f"{name}.json")
        write_atomically(Path(given), json.dumps(_CONFIGURATIONS[name]))
    weights = folder / "weights.safetensors"
    clips_vocabulary = call_in_fresh_process(write_weights, given, str(weights), str(people))
    crops = people / "images"
    took = _command(
        *_UPPERSON, "train", "--root", people, "--recipe", "cuhk-pedes", "--base", given,
        "--pretrained", weights, "--epochs", 1, "--batch-size", 8, "--set", "warmup_epochs=0",
        "--set", f"mask_captions={clips_vocabulary}", "--precision", "fp32", "--output", run,
    )  # fmt: skip
    results = json.loads((run / "results.json").read_text("utf-8"))
    yield "train", asdict(took) | {"parameters": results["parameters"]}
    call_in_fresh_process(move_trained, str(run / "adapter.safetensors"))
    took = _command(
        *_UPPERSON, "export", run, "--output", bundle, "--int8", "--no-gate", "--calib-size", 8,
        "--calib-data", crops,
    )  # fmt: skip
    report = json.loads((bundle / "report.json").read_text("utf-8"))
    variants = {
        variant: {key: row[key] for key in ("size_bytes", "latency")}
        for variant, row in report["variants"].items()
    }
    yield "export", asdict(took) | {"variants": variants}
    took = _command(
        *_UPPERSON, "parity", bundle, "--run", run, "--images", crops, "--count", 4,
        "--batch", "1,4", "--json",
    )  # fmt: skip
    yield "parity", asdict(took) | {"agreement": _agreement(json.loads(took.printed))}
    yield "index", asdict(_command(*PROGRAM, "index", "-b", bundle, "-g", gallery, crops))
    yield "query", asdict(_command(*PROGRAM, "query", "-b", bundle, "-g", gallery, "red coat"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Took:
    """What a command took; ``printed`` is its standard output."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    printed: str


def _command(*words: object) -> Took:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=errors,
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - started
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            told = said_last(errors.read())
            raise BackendError(
                f"'{' '.join(map(str, words[1:3]))}' ended with code {process.returncode}: "
                f"{one_line(told)}"
            )
        return Took(
            seconds=seconds,
            cpu_seconds=usage.ru_utime + usage.ru_stime,
            peak_bytes=usage.ru_maxrss * 1024,
            printed=out.read(),
        )


def _agreement(parity: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Return the worst of each variant, backend and tower, over batch sizes and lengths."""
    worst: dict[str, dict[str, float]] = {}
    for row in parity["comparisons"]:
        if row["to_reference"] is None or row["tower"] == "both":
            continue
        row_name = f"{row['variant']} on {row['backend']}, {row['tower']}"
        error, cosine = (row["to_reference"][key] for key in ("max_error", "min_cosine"))
        known = worst.setdefault(row_name, {"max_error": error, "min_cosine": cosine})
        known["max_error"] = max(known["max_error"], error)
        known["min_cosine"] = min(known["min_cosine"], cosine)
    return worst


def _show(result: dict[str, Any]) -> None:
    typer.echo(machine_lines(result["machine"], None))
    for name, found in result["bases"].items():
        typer.echo(f"{name}: {found['train']['parameters'] / 1e6:.1f} million parameters")
        columns = ("s", "CPU s", "peak GB")
        table = new_table("command", *columns, right=columns)
        for command in COMMANDS:
            took = found[command]
            table.add_row(
                command,
                f"{took['seconds']:.1f}",
                f"{took['cpu_seconds']:.1f}",
                f"{took['peak_bytes'] / 1e9:.2f}",
            )
        print_table(table)
        agreement = ("largest error", "lowest cosine")
        table = new_table("against the unfolded model", *agreement, right=agreement)
        for row, worst in found["parity"]["agreement"].items():
            table.add_row(row, f"{worst['max_error']:.1e}", f"{worst['min_cosine']:.6f}")
        print_table(table)
        costs = ("MB", "ms a picture", "ms a caption")
        table = new_table("variant, backend", *costs, right=costs)
        for variant, row in found["export"]["variants"].items():
            for backend, times in row["latency"].items():
                table.add_row(
                    f"{variant}, {backend}",
                    f"{row['size_bytes'] / 1e6:.0f}",
                    *(f"{times[tower]['ms_per_item']:.1f}" for tower in ("image", "text")),
                )
        print_table(table)


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.bases")
