"""Augmentation in batches where the model is, against torchvision's a picture at a time: R@1.

Runs of one seed have the same people, the same start and the same batches; what chance does to
their pictures is drawn from one distribution in two ways.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import typer
from torch import Tensor

from benchmarks.loader import literal_augmentation
from benchmarks.runs import (
    Epochs,
    Output,
    People,
    Seeds,
    Size,
    TestPeople,
    Views,
    difference,
    finished_run,
    kept_runs,
    people_in,
    size_line,
)
from upperson.data import batches
from upperson.data.transforms import PixelStatistics, prepare_pixels
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug, Json, Threads
from upperson_rt.cli.output import new_table, print_result, print_table, show_progress
from upperson_rt.machine import describe_machine, machine_lines

LITERAL = "torchvision, a picture at a time"
OURS = "ours, in batches"
NONE = "none"
CONTENDERS = (LITERAL, OURS, NONE)

app = new_app("Compare R@1 after augmentation in batches and a picture at a time.")


@app.command(cls=Command)
def augmentation(
    people: People = 200,
    test_people: TestPeople = 200,
    views: Views = 3,
    epochs: Epochs = 4,
    seeds: Seeds = 5,
    output: Output = None,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train with pictures augmented in batches, a picture at a time, and not at all.

    The interval is Student's, of the differences to torchvision over the seeds.

    Example: `python -m benchmarks.augmentation --seeds 5 --output augmentation`
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    size = Size(people=people, test_people=test_people, views=views, epochs=epochs)
    with kept_runs(output, "augmentation") as folder:
        found = measure(folder, size, seeds)
    result = {
        "benchmark": "augmentation",
        "size": asdict(size) | {"seeds": seeds},
        "machine": describe_machine("torch", "torchvision"),
        "threads": torch.get_num_threads(),
        "test_r1": found,
        "against_torchvision": {
            name: difference(found[LITERAL], values) for name, values in found.items()
        },
    }
    print_result(result, as_json, _show)


def measure(folder: Path, size: Size, seeds: int) -> dict[str, list[float]]:
    """Return R@1 on the test split by contender and seed; finished runs are read."""
    root = str(people_in(folder, size).absolute())
    cells = [(seed, name) for seed in range(1, seeds + 1) for name in CONTENDERS]
    found: dict[str, list[float]] = {}
    with show_progress() as progress:
        for number, (seed, name) in enumerate(cells):
            progress(f"{name}, seed {seed}", number, len(cells))
            settings = {"root": root, "epochs": size.epochs, "seed": seed, "augment": name != NONE}
            prepare = one_at_a_time if name == LITERAL else prepare_pixels
            with patch.object(batches, "prepare_pixels", prepare):
                results = finished_run(folder / "runs" / f"{name}, seed {seed}", settings)
            found.setdefault(name, []).append(results["test"]["R@1"])
    return found


def one_at_a_time(
    pixels_NHW3: Tensor, moves_N7: Tensor | None, statistics: PixelStatistics
) -> Tensor:
    """Augment and normalise as `prepare_pixels`, but as torchvision draws it, not as was drawn."""
    if moves_N7 is None:
        return prepare_pixels(pixels_NHW3, None, statistics)
    height, width = pixels_NHW3.shape[1:3]
    augment = literal_augmentation((height, width), statistics)
    return torch.stack([augment(pixels.permute(2, 0, 1)) for pixels in pixels_NHW3])


def _show(result: dict[str, Any]) -> None:
    size = result["size"]
    typer.echo(machine_lines(result["machine"], result["threads"]))
    typer.echo(size_line(size))
    columns = ("R@1", "difference", "half of 95 %")
    table = new_table("augmentation", *columns, right=columns)
    for name, cell in result["against_torchvision"].items():
        values = (f"{cell['difference']:+.2f}", f"{cell['half_interval']:.2f}")
        table.add_row(name, f"{cell['mean']:.2f}", *(("", "") if name == LITERAL else values))
    print_table(table)


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.augmentation")
