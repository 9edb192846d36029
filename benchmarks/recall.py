"""How many of the people whom an alert means it finds, at one false alarm in so many visits.

Visits are drawn people whom no calibration was fitted on, with pictures of different cameras. Of
every sentence, such as *woman in red coat*, the threshold comes from visits of some sets of people
that it is not true of; counted are those of the other sets, each in its turn.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.promise import scorers
from benchmarks.report import Column, conditions, print_report, table
from benchmarks.scores import Drawn
from upperson_alerts.background import RunningMeans, Visits
from upperson_alerts.scoring import Scorer
from upperson_phrases.evidence import ALTERNATIVES
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug
from upperson_rt.gallery import Item
from upperson_scores.labelled_queries import LabelledPictures

_SETS = [*range(415, 439)]
_PARTS = ("gender", "upper_colour", "upper")

app = new_app("Measure which share of the people whom alerts mean they find.")


@app.command(cls=Command)
def recall(
    sets: Annotated[list[int], typer.Option("--set", help="Sets of people.")] = _SETS,
    tested: Annotated[int, typer.Option(min=1, help="Of them are tested at a time.")] = 3,
    people: Annotated[int, typer.Option(min=40, help="People of a set, four pictures each.")] = 300,
    among: Annotated[int, typer.Option(min=20, help="Visits with one false alarm.")] = 1000,
    debug: Debug = False,
) -> None:
    """Measure which share of the people whom alerts mean they find.

    Example: python -m benchmarks.recall --set 1 --set 2 --set 3 --tested 1 --people 100 --among 50
    """
    drawn = Drawn(people)
    sentences = [
        dict(zip(_PARTS, values, strict=True))
        for values in product(
            ("woman", "man"), ALTERNATIVES["upper"].colours, ALTERNATIVES["upper"].nouns
        )
    ]
    texts = ["{} in {} {}".format(*one.values()) for one in sentences]
    methods = dict(zip(("cosine", "log-odds"), scorers(drawn, texts), strict=True))
    parts = [drawn.pictures("street", seed) for seed in sets]
    rows: dict[str, dict[str, float]] = {}
    for name, least in (("four pictures", 4), ("one to four", 1), ("one picture", 0)):
        for method, scorer in methods.items():
            scored = [_visits(part, least, scorer) for part in parts]
            rows[f"{name}, {method}"] = _measured(scored, sentences, tested, among)
    columns = {key: Column(key) for key in next(iter(rows.values()))}
    values = conditions("recall", "torch", threads=None, batch_size=64, warmup=0)
    values |= {"rows": rows, "sets": sets, "tested": tested, "people": people, "among": among}
    print_report(values, [], [table(f"one in {among}", rows, columns)])


@dataclass(frozen=True)
class _Scored:
    scores_VS: NDArray[np.float32]
    traits: Mapping[str, NDArray[np.str_]]
    """Of V visits."""


def _visits(pictures: LabelledPictures, least: int, scorer: Scorer) -> _Scored:
    """Score a visit of each person, with so many pictures to four; one for 0."""
    rng = np.random.default_rng(0)
    chosen = []
    for person in np.unique(pictures.people_N):
        own = rng.permutation(np.flatnonzero(pictures.people_N == person))
        chosen.append(own[: rng.integers(least, 5) if least else 1])
    rows = np.concatenate(chosen)
    items = [Item(key=str(row), track=str(pictures.people_N[row])) for row in rows]
    images_ND = pictures.vectors_ND[rows].astype(np.float16).astype(np.float32)
    averaged = RunningMeans().of(items, images_ND, keep=True)
    visits = Visits.of(items, scorer.scores(images_ND, *averaged))
    traits = {name: pictures.traits[name][rows][visits.firsts] for name in _PARTS}
    return _Scored(visits.scores_VS, traits)


def _measured(
    scored: Sequence[_Scored], sentences: Sequence[Mapping[str, str]], tested: int, among: int
) -> dict[str, float]:
    """Test every set as often as the others, with the threshold of those that are not tested."""
    counts = dict.fromkeys(("wrong", "false", "right", "found", *_PARTS), 0)
    agrees = [
        {
            name: one.traits[name][:, None] == np.array([s[name] for s in sentences])
            for name in _PARTS
        }
        for one in scored
    ]
    rights = [np.logical_and.reduce([*one.values()]) for one in agrees]
    for first in range(len(scored)):
        own = [(first + number) % len(scored) for number in range(tested)]
        rest = [number for number in range(len(scored)) if number not in own]
        for column in range(len(sentences)):
            background = np.sort(
                np.concatenate([scored[n].scores_VS[~rights[n][:, column], column] for n in rest])
            )
            # As many as chance lets pass: so is p = (1 + as high) / (all + 1) at most 1 / among.
            place = max(1, (len(background) + 1) // among)
            for number in own:
                raised_V = scored[number].scores_VS[:, column] > background[-place]
                right_V = rights[number][:, column]
                counts["right"] += int(right_V.sum())
                counts["found"] += int((raised_V & right_V).sum())
                counts["wrong"] += int((~right_V).sum())
                counts["false"] += int((raised_V & ~right_V).sum())
                for name in _PARTS:
                    apart_V = raised_V & ~agrees[number][name][:, column]
                    counts[name] += int(apart_V.sum())
    return {
        "recall %": 100 * counts["found"] / max(1, counts["right"]),
        "false in 1,000": 1000 * counts["false"] / counts["wrong"],
        **{
            f"wrong {name.replace('_', ' ')} %": 100 * counts[name] / max(1, counts["false"])
            for name in _PARTS
        },
    }


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.recall")
