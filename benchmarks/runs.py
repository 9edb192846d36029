"""Runs of the demo's recipe that benchmarks compare: made in a folder, read again when finished."""

import json
import math
import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from upperson.config import read_config, read_recipe
from upperson.data.records import read_dataset
from upperson.data.synthetic import SyntheticSpec, write_dataset
from upperson.data.vocabulary import clip_tokenizer
from upperson.evaluate import evaluate
from upperson.losses import TEMPERATURE
from upperson.model.base import SMALL, Base, load_base
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP
from upperson.observer import Observer
from upperson.run import CONFIG, RESULTS
from upperson.train import train
from upperson_rt.errors import InputError
from upperson_rt.files import scratch_folder

_STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""0.975 quantiles for 1 to 9 degrees of freedom."""


People = Annotated[int, typer.Option(min=2, help="People to train on.")]
TestPeople = Annotated[int, typer.Option(min=2, help="People to measure on.")]
Views = Annotated[int, typer.Option(min=1, help="Pictures of each, two captions a picture.")]
Epochs = Annotated[int, typer.Option(min=1, help="Passes over the pairs.")]
Seeds = Annotated[int, typer.Option(min=2, max=10, help="Runs of each kind.")]
Output = Annotated[
    Path | None, typer.Option(help="Keep the runs here, and go on with those that are there.")
]


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a run is, and what it is measured on."""

    people: int
    test_people: int
    views: int
    epochs: int


def people_in(folder: Path, size: Size) -> Path:
    """Render the people, or find them there."""
    spec = SyntheticSpec(
        look="street",
        train_ids=size.people,
        val_ids=0,
        test_ids=size.test_people,
        views=size.views,
    )
    return write_dataset(folder / "people", spec)


def size_line(size: Mapping[str, int]) -> str:
    """Return what runs of a `Size` and their seeds are measured on, as a line above a table."""
    return (
        f"R@1 on {size['test_people']} unseen people; {size['people']} people x {size['views']} "
        f"views, {size['epochs']} epochs, {size['seeds']} seeds"
    )


@contextmanager
def kept_runs(output: Path | None, name: str) -> Iterator[Path]:
    """Give the folder that keeps the runs, or one that goes at the end."""
    if output is not None:
        yield output
    else:
        with scratch_folder(Path(f"{name}.building")) as folder:
            yield folder


_TEACHING = {"lr": 3e-4, "warmup_epochs": 1, "temperature": TEMPERATURE}
"""The demo's recipe changes its base as little as it can; here runs shall differ."""


def finished_run(run: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Train a run unless it is finished, and return what is in its results.json.

    Args:
        run: Its folder.
        settings: What is other than in the demo's recipe, and than ``_TEACHING``.

    Raises:
        InputError: The folder has a run with other settings.
    """
    config = read_recipe("synthetic", _TEACHING | settings)
    made = read_config(run / CONFIG) if (run / CONFIG).is_file() else config
    if made != config:
        raise InputError(f"{run} was made with other options: pass another folder with  --output")
    if not (run / RESULTS).is_file():
        train(config, run, Observer(), device="cpu", resume=(run / CONFIG).is_file())
    found: dict[str, Any] = json.loads((run / RESULTS).read_text("utf-8"))
    return found


def small_base(weights: Path | None = None) -> tuple[Base, UPPerson]:
    """Return the small base, and the model it is without trained parts, for the recipe's crops."""
    image_size = (192, 64)
    base = load_base(SMALL, None if weights is None else str(weights), image_size)
    return base, UPPerson(base.clip, PLAIN_CLIP, image_size, base.statistics).eval()


def r1_of(model: UPPerson, people: Path) -> float:
    """Return R@1 of a model on the test split of a data set."""
    records = read_dataset("jsonl", people)["test"]
    return evaluate(model, clip_tokenizer(model.text.context_length), records).r1


def difference(first: list[float], values: list[float]) -> dict[str, float]:
    """Return the mean of R@1, and of its difference to the first's of the same seeds.

    With it comes half of Student's 95 % interval.
    """
    differences = [value - base for value, base in zip(values, first, strict=True)]
    half = _STUDENT_T[len(values) - 2] * statistics.stdev(differences) / math.sqrt(len(values))
    return {
        "mean": statistics.fmean(values),
        "difference": statistics.fmean(differences),
        "half_interval": half,
    }
