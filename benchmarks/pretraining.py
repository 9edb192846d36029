"""Trained parts that start from other people's pictures: R@1 on people of one's own.

The base knows cameras drawn anew each time, other people are filmed indoors, one's own on a street.
Nobody is in two of the sets. Runs of one seed and one number of people of one's own differ in their
start alone.
"""

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.runs import Output, TestPeople, finished_run, kept_runs, r1_of, small_base
from upperson.data.synthetic import SyntheticSpec, write_dataset
from upperson.run import load_run
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug, Json, Threads
from upperson_rt.cli.output import new_table, print_result, print_table, show_progress
from upperson_rt.files import write_atomically
from upperson_rt.machine import describe_machine, machine_lines

FRESH, PRETRAINED = "fresh", "from other people"
OWN = {50: 12, 500: 3}
"""People of one's own, to the passes over their pairs."""

app = new_app("Measure what pre-training on other people is worth.")


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the sets are."""

    others: int
    """People to pre-train on, indoors."""

    epochs: int
    """Passes over their pairs."""

    test_people: int
    views: int


@app.command(cls=Command)
def pretraining(
    others: Annotated[int, typer.Option(min=2, help="People to pre-train on.")] = 300,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over their pairs.")] = 3,
    test_people: TestPeople = 100,
    views: Annotated[int, typer.Option(min=1, help="Pictures of each, a caption a picture.")] = 2,
    seeds: Annotated[int, typer.Option(min=2, help="Runs of each kind.")] = 5,
    output: Output = None,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fine-tune on 0, 50 and 500 street people, with and without pre-training on others indoors.

    Example: `python -m benchmarks.pretraining --seeds 5 --output pretraining`
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    size = Size(others=others, epochs=epochs, test_people=test_people, views=views)
    with kept_runs(output, "pretraining") as folder:
        found = measure(folder, size, seeds)
    result = {
        "benchmark": "pretraining",
        "size": asdict(size) | {"own": OWN, "seeds": seeds},
        "machine": describe_machine("torch", "open_clip_torch"),
        "threads": torch.get_num_threads(),
        "test_r1": found,
    }
    print_result(result, as_json, _show)


def measure(folder: Path, size: Size, seeds: int) -> dict[str, dict[str, list[float]]]:
    """Return R@1 on street people by number of one's own, start and seed; finished runs are read.

    Without people of one's own and without pre-training it is the base's, the same for all seeds.
    """
    others = _people(folder / "others", "indoor", size, size.others, 0, seed=1)
    own = {
        count: _people(folder / f"own_{count}", "street", size, count, size.test_people, seed=0)
        for count in OWN
    }
    test = own[max(OWN)]
    steps = list(_runs(folder, others, own, size, seeds))
    found: dict[str, dict[str, list[float]]] = {
        "0": {FRESH: [_zero_shot(folder, test)], PRETRAINED: []}
    }
    with show_progress() as progress:
        for number, (count, start, run, settings) in enumerate(steps):
            progress(f"{count} people, {start}", number, len(steps))
            results = finished_run(run, settings)
            r1 = results["test"]["R@1"] if count else _measured(run, test)
            found.setdefault(str(count), {}).setdefault(start, []).append(r1)
    return found


def _runs(
    folder: Path, others: Path, own: dict[int, Path], size: Size, seeds: int
) -> Iterator[tuple[int, str, Path, dict[str, Any]]]:
    """Yield people of one's own, start, folder and settings of every run, seed by seed."""
    for seed in range(1, seeds + 1):
        runs = folder / f"seed_{seed}"
        before = runs / "others"
        settings = {"seed": seed, "epochs": size.epochs, "root": str(others.absolute())}
        yield 0, PRETRAINED, before, settings
        for count, epochs in OWN.items():
            settings = {"seed": seed, "epochs": epochs, "root": str(own[count].absolute())}
            yield count, FRESH, runs / f"fresh_{count}", settings
            started = {**settings, "init_from": str(before.absolute())}
            yield count, PRETRAINED, runs / f"pretrained_{count}", started


def _people(folder: Path, look: str, size: Size, train_ids: int, test: int, seed: int) -> Path:
    spec = SyntheticSpec(
        look=look, train_ids=train_ids, val_ids=0, test_ids=test, views=size.views,
        captions_per_image=1, seed=seed,
    )  # fmt: skip
    return write_dataset(folder, spec)


def _zero_shot(folder: Path, people: Path) -> float:
    """Return R@1 of the base on the test split."""
    file = folder / "zero_shot.json"
    if not file.is_file():
        write_atomically(file, json.dumps(r1_of(small_base()[1], people)))
    return float(json.loads(file.read_text("utf-8")))


def _measured(run: Path, people: Path) -> float:
    """Return R@1 of a run on the test split of other people than it was trained on."""
    file = run / "on_street.json"
    if not file.is_file():
        write_atomically(file, json.dumps(r1_of(load_run(run).model, people)))
    return float(json.loads(file.read_text("utf-8")))


def _show(result: dict[str, Any]) -> None:
    size = result["size"]
    typer.echo(machine_lines(result["machine"], result["threads"]))
    typer.echo(
        f"R@1 on {size['test_people']} unseen street people, mean and standard deviation over "
        f"{size['seeds']} seeds; {size['views']} pictures of each, a caption a picture; other "
        f"people: {size['others']}, {size['epochs']} epochs"
    )
    table = new_table("people of one's own", FRESH, PRETRAINED, right=(FRESH, PRETRAINED))
    for count, starts in result["test_r1"].items():
        table.add_row(count, _cell(starts[FRESH]), _cell(starts[PRETRAINED]))
    print_table(table)


def _cell(values: list[float]) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.2f} ±{statistics.stdev(values):.2f}" if len(values) > 1 else f"{mean:.2f}"


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.pretraining")
