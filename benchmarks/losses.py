"""Losses under captions of somebody else, and on a base with a low logit scale: R@1 after training.

Every run trains the demo's recipe on synthetic people and is measured on people it never saw. Runs
of one seed have the same people, the same wrong captions, the same start and the same batches.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from safetensors.torch import save_file

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
    r1_of,
    size_line,
    small_base,
)
from upperson.data.batches import pad_ids, tokenize
from upperson.data.records import Record, read_dataset
from upperson.data.transforms import evaluation_transform
from upperson.data.vocabulary import clip_tokenizer
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug, Json, Threads
from upperson_rt.cli.output import new_table, print_result, print_table, show_progress
from upperson_rt.errors import UsageError
from upperson_rt.files import scratch_folder
from upperson_rt.machine import describe_machine, machine_lines
from upperson_rt.preprocess import prepare_image

SDM = "sdm"
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    SDM: {},
    "asdm": {"loss": "asdm"},
    "tal": {"loss": "tal"},
    "sdm, noisy left out": {"leave_out_noisy": True},
    "tal, noisy left out": {"loss": "tal", "leave_out_noisy": True},
}
NOISE_PERCENT = (0, 20, 50)
ON_SPREAD_BASE = (SDM, "asdm", "tal")
SPREAD = "spread base"

app = new_app("Compare losses under wrong captions.")


@app.command(cls=Command)
def losses(
    people: People = 200,
    test_people: TestPeople = 200,
    views: Views = 3,
    epochs: Epochs = 4,
    seeds: Seeds = 3,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Small base to train over, from upperson pretrain-small.",
            show_default="the shipped one",
        ),
    ] = None,
    output: Output = None,
    threads: Threads = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Train with every loss at 0, 20 and 50 % captions of somebody else, and on a spread base.

    The spread base is the small one with the mean of its features taken away, so that cosines are
    as far apart as in a CLIP that was trained with a low logit scale. The interval is Student's, of
    the differences to SDM over the seeds. "none" is the base, frozen.

    Example: `python -m benchmarks.losses --seeds 3 --output losses`
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    if weights is not None and not weights.is_file():
        raise UsageError(
            f"--weights wants a file from  upperson pretrain-small, found no {weights}"
        )
    size = Size(people=people, test_people=test_people, views=views, epochs=epochs)
    with kept_runs(output, "losses") as folder:
        found = measure(folder, size, seeds, weights)
        bases = {name: _base_of(folder, name, weights) for name in found}
        r1 = {base: r1_of(small_base(base)[1], folder / "people") for base in {*bases.values()}}
    result = {
        "benchmark": "losses",
        "size": asdict(size) | {"seeds": seeds},
        "machine": describe_machine("torch", "open_clip_torch"),
        "threads": torch.get_num_threads(),
        "frozen_r1": {name: r1[base] for name, base in bases.items()},
        "test_r1": found,
        "against_sdm": {
            condition: {name: difference(runs[SDM], values) for name, values in runs.items()}
            for condition, runs in found.items()
        },
    }
    print_result(result, as_json, _show)


def measure(
    folder: Path, size: Size, seeds: int, weights: Path | None = None
) -> dict[str, dict[str, list[float]]]:
    """Return R@1 on the test split by condition, variant and seed; finished runs are read."""
    cells = list(_cells(seeds))
    found: dict[str, dict[str, list[float]]] = {}
    with show_progress() as progress:
        for number, (seed, condition, variant) in enumerate(cells):
            progress(f"{condition}, {variant}, seed {seed}", number, len(cells))
            run = folder / "runs" / f"{condition}, {variant}, seed {seed}"
            settings = _settings(folder, size, seed, condition, variant, weights)
            results = finished_run(run, settings)
            found.setdefault(condition, {}).setdefault(variant, []).append(results["test"]["R@1"])
    return found


def _settings(
    folder: Path, size: Size, seed: int, condition: str, variant: str, weights: Path | None
) -> dict[str, Any]:
    """Return what is other than in the recipe; the people are rendered, or found."""
    noise = 0 if condition == SPREAD else int(condition.split()[0])
    people = wrong_captions(people_in(folder, size), noise, seed)
    base = _base_of(folder, condition, weights)
    own = {} if base is None else {"pretrained": str(base.absolute())}
    shared = {
        "root": str(people.absolute()),
        "epochs": size.epochs,
        "warmup_epochs": min(1, size.epochs - 1),  # Noisy pairs are left out after it.
        "seed": seed,
    }
    return {**shared, **VARIANTS[variant], **own}


def _base_of(folder: Path, condition: str, weights: Path | None) -> Path | None:
    return spread_base(folder, weights) if condition == SPREAD else weights


def _cells(seeds: int) -> Iterator[tuple[int, str, str]]:
    """Yield seed, condition and variant; whole comparisons come first."""
    for seed in range(1, seeds + 1):
        for percent in NOISE_PERCENT:
            for variant in VARIANTS:
                yield seed, f"{percent} %", variant
        for variant in ON_SPREAD_BASE:
            yield seed, SPREAD, variant


def wrong_captions(people: Path, percent: int, seed: int) -> Path:
    """Copy a data set with this share of its training captions handed on, each to somebody else."""
    root = people.with_name(f"{people.name}-{percent}-{seed}")
    if percent == 0 or root.is_dir():
        return root if percent else people
    with scratch_folder(people.with_name("copying")) as copy:
        shutil.copytree(people, copy, dirs_exist_ok=True)
        file = copy / "annotations.jsonl"
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        training = [line for line in lines if line["split"] == "train"]
        count = len(training) * percent // 100
        rng = np.random.default_rng([seed, percent])
        chosen = [training[index] for index in rng.permutation(len(training))[:count]]
        # Sorted by person and moved on by a person's worth: nobody gets a caption of their own.
        chosen.sort(key=lambda line: int(line["pid"]))
        most = max(sum(line["pid"] == other["pid"] for other in chosen) for line in chosen)
        texts = [line["caption"] for line in chosen]
        for line, text in zip(chosen, texts[most:] + texts[:most], strict=True):
            line["caption"] = text
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
        copy.rename(root)
    return root


@torch.inference_mode()
def spread_base(folder: Path, weights: Path | None = None) -> Path:
    """Write a small base with the mean of its features on the people taken away, or find it."""
    file = folder / "spread.safetensors"
    if file.is_file():
        return file
    base, model = small_base(weights)
    records: list[Record] = read_dataset("jsonl", folder / "people")["train"][:200]
    transform = evaluation_transform(base.statistics)
    pixels = [
        torch.from_numpy(prepare_image(record.image, *model.image_size)) for record in records
    ]
    images_NE = model.image(torch.stack([transform(x.permute(2, 0, 1)) for x in pixels]))
    tokenizer = clip_tokenizer(model.text.context_length)
    texts_NE = model.text(pad_ids(tokenize(tokenizer, [r.captions[0] for r in records])))
    for norm, projection, features_NE in (
        (base.clip.visual.ln_post, base.clip.visual.proj, images_NE),
        (base.clip.ln_final, base.clip.text_projection, texts_NE),
    ):
        shift = torch.linalg.lstsq(projection.T, -features_NE.mean(0)[:, None]).solution
        norm.bias.data += shift[:, 0]
    save_file(base.clip.state_dict(), file)
    return file


def _show(result: dict[str, Any]) -> None:
    size = result["size"]
    typer.echo(machine_lines(result["machine"], result["threads"]))
    typer.echo(
        f"{size_line(size)}; in brackets the difference to sdm and half its 95 % interval over the "
        "seeds"
    )
    conditions = tuple(result["against_sdm"])
    table = new_table("loss", *conditions, right=conditions)
    table.add_row("none", *(f"{r1:.2f}" for r1 in result["frozen_r1"].values()))
    for name in VARIANTS:
        cells = [runs.get(name) for runs in result["against_sdm"].values()]
        table.add_row(name, *(_cell(name, cell) for cell in cells))
    print_table(table)


def _cell(name: str, cell: dict[str, float] | None) -> str:
    if cell is None:
        return ""
    if name == SDM:
        return f"{cell['mean']:.2f}"
    return f"{cell['mean']:.2f} ({cell['difference']:+.2f} ±{cell['half_interval']:.2f})"


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.losses")
