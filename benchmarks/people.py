"""How many captioned people a site needs: what its adapter gains from 25 to 300 of them.

The recipe is `site`, with as many steps whatever the number of people. The test people are others,
and no recipe or camera was chosen on any of them.
"""

import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure

from benchmarks.report import Column, conditions, print_report, table
from upperson.cli.demo_run import gains
from upperson.config import TrainConfig, read_recipe
from upperson.data.records import read_dataset
from upperson.data.vocabulary import clip_tokenizer
from upperson.demo_figures import Scores, Searched, measure, searched_split
from upperson.evaluate import embed_records, embed_texts
from upperson.model.base import SMALL, load_base
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP
from upperson.observer import Observer
from upperson.run import load_run
from upperson.train import train
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.files import write_atomically
from upperson_synthetic import SyntheticSpec, write_dataset
from upperson_synthetic.look import SITES, TARGET, Look

app = new_app("Measure what a site's adapter gains from a few captioned people.")

_ANNOTATIONS = "annotations.jsonl"

_SEED = 91
"""Of the first site."""

_REHEARSED = 64
"""People of the street, as in the demo."""


@app.command(cls=Command)
def people_needed(
    people: Annotated[
        list[int] | None, typer.Option("--people", min=8, help="People to train on; repeatable.")
    ] = None,
    test_people: Annotated[int, typer.Option("--test-people", min=10, help="Unseen people.")] = 300,
    passes: Annotated[
        int | None, typer.Option("--passes", min=1, help="Over all people; fewer are seen oftener.")
    ] = None,
    picture: Annotated[Path | None, typer.Option("--picture", help="PNG to draw into.")] = None,
) -> None:
    """Train an adapter for each site from some people each, and measure its gain.

    Example: python -m benchmarks.people --picture docs/images/few-people.png
    """
    counts = sorted(people or [25, 50, 100, 300])
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        street = SyntheticSpec(
            look=TARGET.name, train_ids=_REHEARSED, val_ids=0, test_ids=1, views=4, seed=_SEED
        )
        rehearse = write_dataset(Path(place) / TARGET.name, street)
        for seed, look in enumerate(SITES, _SEED):
            folder = Path(place) / look.name
            rows |= dict(_gains(look, seed, counts, test_people, passes, rehearse, folder))
    result = conditions("people", "torch", threads=None, batch_size=48, warmup=0)
    result |= {"test_people": test_people, "rows": rows}
    columns = {
        f"{name}{suffix}": Column(f"{name} {key}", "{:+.1f}")
        for name in ("R@1", "own_words")
        for suffix, key in (("", "points"), (" from", "low"), (" to", "high"))
    }
    if picture is not None:
        write_atomically(picture, _drawn(rows, counts))
    facts = [f"points over the frozen base on {test_people} unseen people, 95 % intervals"]
    print_report(result, facts, [table("captioned people", rows, columns)])


def _gains(
    look: Look,
    seed: int,
    counts: list[int],
    test_people: int,
    passes: int | None,
    rehearse: Path,
    folder: Path,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Give the gains from each number of people: the first ones of the same people."""
    largest = _rendered(look, seed, counts[-1], test_people, folder / str(counts[-1]))
    split = searched_split(read_dataset("jsonl", largest)["test"], look)
    config = read_recipe("site", {"root": str(largest), "rehearse": str(rehearse)})
    base = load_base(SMALL, None)
    size = (config.height_px, config.width_px)
    before = _scores(UPPerson(base.clip, PLAIN_CLIP, size, base.statistics).eval(), split)
    for count in counts:
        root = largest if count == counts[-1] else _first(largest, count, folder / str(count))
        steps = (passes or config.epochs) * (counts[-1] + _REHEARSED)
        epochs = round(steps / (count + _REHEARSED))
        run = folder / f"run{count}"
        train(_config(config, root, epochs), run, Observer())
        after = _scores(load_run(run).model, split)
        row: dict[str, Any] = {"people": count, "epochs": epochs}
        gained = gains(after, before)
        for name in ("R@1", "own_words"):
            row |= {f"{name} {key}": value for key, value in gained[name].items()}
        yield f"{look.name}, {count}", row


def _config(config: TrainConfig, root: Path, epochs: int) -> TrainConfig:
    return replace(config, root=str(root), epochs=epochs, eval_every=epochs)


def _rendered(look: Look, seed: int, count: int, test_people: int, folder: Path) -> Path:
    spec = SyntheticSpec(
        look=look.name, train_ids=count, val_ids=0, test_ids=test_people, views=4, seed=seed
    )
    return write_dataset(folder, spec)


def _first(root: Path, count: int, folder: Path) -> Path:
    """Copy a data set with the first people of its training split alone."""
    shutil.copytree(root, folder, copy_function=os.link)
    lines = [json.loads(line) for line in (root / _ANNOTATIONS).read_text("utf-8").splitlines()]
    kept = list(dict.fromkeys(line["pid"] for line in lines if line["split"] == "train"))[:count]
    lines = [line for line in lines if line["split"] != "train" or line["pid"] in kept]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(folder / _ANNOTATIONS, text)
    return folder


def _scores(model: UPPerson, split: Searched) -> Scores:
    tokenizer = clip_tokenizer()
    embeds = embed_records(model, tokenizer, split.records)
    return measure(split, *embeds, partial(embed_texts, model, tokenizer))


def _drawn(rows: dict[str, dict[str, Any]], counts: list[int]) -> bytes:
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for look in SITES:
        found = [rows[f"{look.name}, {count}"] for count in counts]
        points = [row["R@1 points"] for row in found]
        spread = [
            [row["R@1 points"] - row["R@1 low"] for row in found],
            [row["R@1 high"] - row["R@1 points"] for row in found],
        ]
        axes.errorbar(counts, points, spread, fmt="o-", capsize=3, label=look.name)
    axes.axhline(0, color="#888", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts], minor=False)
    axes.minorticks_off()
    axes.set(xlabel="captioned people of the site", ylabel="points of R@1 over the frozen base")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.people")
