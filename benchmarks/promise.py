"""Whether alerts keep what they promise: days of drawn visits at sites, some of which change.

Each site has people of its own, whom no calibration was fitted on. A visit is one of them, with one
to four pictures in any order. Scores, threshold and state are the product's, without a database. An
operator confirms right alerts each evening.
"""

import json
import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.resources import files
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, TypeAlias, cast

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.report import Column, conditions, print_report, table
from benchmarks.scores import Drawn
from upperson_alerts.background import Background, Watched
from upperson_alerts.scoring import Scorer, SentenceScore
from upperson_phrases import parse
from upperson_phrases.evidence import ALTERNATIVES, Evidence
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug
from upperson_rt.gallery import Gallery, Item
from upperson_rt.score_calibration import ScoreCalibration
from upperson_rt.search.features import SentenceFeatures
from upperson_rt.strict import read_fields
from upperson_scores.labelled_queries import LabelledPictures, LabelledQuery

_LOOKS = ("night", "low-resolution", "hard")
_SEED, _START, _DAY_S = 601, 1.7e9 // 86_400 * 86_400, 86_400
_COMMIT = 50
_BUSY = np.array([0] * 6 + [2, 6, 8, 4, 3, 3, 5, 4, 3, 3, 5, 8, 6, 4, 2, 1, 1, 1], np.float64)
"""Visits by hour of the day, as shares."""
_UNLIKELY = 0.05
Counts: TypeAlias = dict[str, NDArray[np.float64]]
"""By day and sentence (D, S)."""

app = new_app("Simulate alerts at several sites, and compare false alarms with the promise.")


@app.command(cls=Command)
def promise(
    sites: Annotated[int, typer.Option(min=1, help="Sites.")] = 10,
    shifting: Annotated[int, typer.Option(min=0, max=3, help="Of them change at half-time.")] = 3,
    sentences: Annotated[int, typer.Option(min=1, max=264, help="Alerts of a site.")] = 200,
    days: Annotated[int, typer.Option(min=4, help="Days.")] = 30,
    visits: Annotated[int, typer.Option(min=50, help="Visits of a day.")] = 300,
    people: Annotated[int, typer.Option(min=40, help="People of a site.")] = 300,
    rate: Annotated[float, typer.Option(min=0.01, help="Promised false alarms a day.")] = 1.0,
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    plot: Annotated[Path | None, typer.Option(help="PNG file.")] = None,
    debug: Debug = False,
) -> None:
    """Simulate alerts at several sites, and compare false alarms with the promise.

    Example: python -m benchmarks.promise --sites 2 --shifting 1 --days 8 --plot promise.png
    """
    size = sentences, days, visits, people, rate
    looks = [*_LOOKS[:shifting], *[""] * sites][:sites]
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        futures = [pool.submit(_run, number, look, *size) for number, look in enumerate(looks)]
        found = [one.result() for one in futures]
    half = days // 2
    names = [f"site {number + 1}{look and f', {look}'}" for number, look in enumerate(looks)]
    sets = list(zip(names, looks, found, strict=True))
    rows = {name: _steady(one, rate, half if look else days) for name, look, one in sets}
    if steady := [rows[name] for name, look, _ in sets if not look]:
        means = {key: float(np.mean([one[key] for one in steady])) for key in steady[0]}
        rows["all that are steady"] = means
    shifts = {name: _shifted(one, rate, half) for name, look, one in sets if look}
    if plot is not None:
        _plot(names, looks, found, rate, plot)
    values = conditions("promise", "torch", threads=None, batch_size=64, warmup=0)
    values |= {"size": size, "rows": rows, "shifts": shifts}
    facts = [
        f"{sentences} sentences, {days} days of {visits} visits by {people} people a site, "
        f"{rate:g} false alarms a day promised; after {half} days some change",
        f"inside: so many or more false alarms have a probability of {_UNLIKELY:.0%} at least, if "
        "their mean is as promised (Poisson); by count: no more than promised at all",
    ]
    tables = [
        table(title, part, {key: Column(key) for key in next(iter(part.values()))})
        for title, part in (("before a change", rows), ("after it", shifts))
        if part
    ]
    print_report(values, facts, tables)


def _queries(count: int) -> list[LabelledQuery]:
    """Return sentences with a person and a garment in a colour."""
    found = []
    for part, kind in ALTERNATIVES.items():
        for values in product(("woman", "man"), kind.colours, kind.nouns):
            if part in ("upper", "lower"):
                wanted = dict(zip(("gender", f"{part}_colour", part), values, strict=True))
                text = "{} in {} {}".format(*values)
                found.append(LabelledQuery(kind="short", sentence=text, wanted=wanted))
    return [found[row] for row in np.random.default_rng(0).permutation(len(found))[:count]]


def _run(
    number: int, look: str, sentences: int, days: int, visits: int, people: int, rate: float
) -> Counts:
    """Simulate a site."""
    drawn, rng = Drawn(people), np.random.default_rng(number)
    before = drawn.pictures("street", _SEED + number)
    after = drawn.pictures(look, _SEED + number) if look else before
    queries = _queries(sentences)
    background = Background(
        {str(row): Watched(rate=rate, cameras=None) for row in range(sentences)},
        scorers(drawn, [one.sentence for one in queries])[1].scores,
        0,
    )
    rows: dict[int, tuple[Item, NDArray[np.float32]]] = {}
    read = SimpleNamespace(get=lambda ids: {id_: rows[id_] for id_ in ids if id_ in rows})
    confirmed = [set[int]() for _ in queries]
    names = "ready", "right", "found", "false", "all", "said"
    counts = {name: np.zeros((days, sentences)) for name in names}
    for day in range(days):
        pictures = before if day < days // 2 else after
        right_NS = np.stack([one.right(pictures) for one in queries], axis=1)
        today = [
            _visit(pictures, f"{day}-{one}", _START + _DAY_S * day + second, rng)
            for one, second in enumerate(_seconds(rng.poisson(visits), rng))
        ]
        for first in range(0, len(today), _COMMIT):
            some = today[first : first + _COMMIT]
            items = [item for own, _ in some for item in own]
            chosen = np.concatenate([own for _, own in some])
            images_ND = pictures.vectors_ND[chosen].astype(np.float16).astype(np.float32)
            background.follow(cast(Gallery, read), max(rows, default=0))
            ready_S = [one.is_ready for one in background.standings().values()]
            compared = background.compare(items, images_ND)
            decision = background.decide(compared)
            rows = dict(enumerate(zip(items, images_ND, strict=True), max(rows, default=0) + 1))
            right_VS = right_NS[[own[0] for _, own in some]]
            raised_VS = decision.raised_VS & ~decision.uncalibrated_S
            counts["ready"][day] += np.array(ready_S) * len(some) / visits
            counts["right"][day] += (right_VS & ready_S).sum(axis=0)
            counts["found"][day] += (raised_VS & right_VS).sum(axis=0)
            counts["false"][day] += (raised_VS & ~right_VS).sum(axis=0)
            counts["all"][day] += (decision.raised_VS & ~right_VS).sum(axis=0)
            counts["said"][day] += decision.uncalibrated_S
            for row, column in np.argwhere(raised_VS & right_VS).tolist():
                confirmed[column].add(compared.visits.ids[row])
        for column, own in enumerate(confirmed):
            background.confirm(str(column), frozenset(own))
    return counts


def scorers(drawn: Drawn, sentences: Sequence[str]) -> tuple[Scorer, Scorer]:
    """Return the score without a calibration, and with the shipped one."""
    shipped = json.loads(files("upperson_scores").joinpath("prior.json").read_text("utf-8"))
    evidence, texts_SD = Evidence(drawn.embed_texts), drawn.embed_texts(sentences)
    plain = [SentenceScore(texts_TD=one_D[None]) for one_D in texts_SD]
    full = [
        replace(one, features=(SentenceFeatures(parse(text), one.texts_TD[0], evidence),))
        for one, text in zip(plain, sentences, strict=True)
    ]
    calibration = read_fields(ScoreCalibration, shipped, "prior.json")
    return Scorer(plain, evidence, None), Scorer(full, evidence, calibration)


def _seconds(count: int, rng: np.random.Generator) -> list[float]:
    hours = rng.choice(24, count, p=_BUSY / _BUSY.sum()) + rng.random(count)
    return sorted((3600 * hours).tolist())


def _visit(
    pictures: LabelledPictures, name: str, time: float, rng: np.random.Generator
) -> tuple[list[Item], NDArray[np.int64]]:
    """Return one to four pictures of a person, and their rows."""
    person = rng.choice(pictures.people_N)
    own = rng.permutation(np.flatnonzero(pictures.people_N == person))
    own = own[: rng.integers(1, len(own) + 1)]
    items = [Item(key=f"{name}-{row}", camera="gate", time=time, track=name) for row in own]
    return items, own


def _steady(found: Counts, rate: float, days: int) -> dict[str, float]:
    """Return figures of a site's sentences on days on which it does not change."""
    sums = {name: own[:days].sum(axis=0) for name, own in found.items()}
    false_S, days_S = sums["false"], sums["ready"]
    likely_S = [_at_least(int(n), rate * d) for n, d in zip(false_S, days_S, strict=True)]
    return {
        "inside %": 100 * float((np.array(likely_S) >= _UNLIKELY).mean()),
        "by count %": 100 * float((false_S <= rate * days_S).mean()),
        "false a day": float(false_S.sum() / days_S.sum()),
        "highest": float((false_S / days_S).max()),
        "recall %": 100 * float(sums["found"].sum() / max(1, sums["right"].sum())),
        "said %": 100 * float((sums["said"] > 0).mean()),
    }


def _shifted(found: Counts, rate: float, half: int) -> dict[str, float]:
    """Return figures of a site's sentences from the day on which it changes."""
    above_DS = found["false"].cumsum(axis=0) > 2 * rate * found["ready"].cumsum(axis=0)
    later = {name: own[half:] for name, own in found.items()}
    said_S, first_S = later["said"].any(axis=0), (later["said"] > 0).argmax(axis=0)
    # The day on which it is said counts as before it.
    before_DS = (np.arange(len(later["false"]))[:, None] <= first_S) | ~said_S
    return {
        "said %": 100 * float(said_S.mean()),
        "days until": float(first_S[said_S].mean()),
        "false until": float((later["false"] * before_DS).sum(axis=0)[said_S].mean()),
        "most in a day": float(later["false"].max()),
        "above twice %": 100 * float(above_DS[half:].any(axis=0).mean()),
        "unsaid %": 100 * float((above_DS[half:] & before_DS).any(axis=0).mean()),
        "all a day": float(later["all"].mean()),
        "recall %": 100 * float(later["found"].sum() / max(1, later["right"].sum())),
    }


def _at_least(count: int, mean: float) -> float:
    """Return the probability that a Poisson count of this mean is at least so high."""
    return 1 - sum(math.exp(n * math.log(mean) - mean - math.lgamma(n + 1)) for n in range(count))


def _plot(
    names: Sequence[str], looks: Sequence[str], found: Sequence[Counts], rate: float, file: Path
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    sites, by_day = figure.subplots(1, 2)
    for number, (name, look, one) in enumerate(zip(names, looks, found, strict=True)):
        days = len(one["false"]) // 2 if look else len(one["false"])
        rates = one["false"][:days].sum(axis=0) / one["ready"][:days].sum(axis=0)
        sites.plot(number + 1 + np.linspace(-0.3, 0.3, len(rates)), np.sort(rates), ".")
        if look:
            (line,) = by_day.plot(one["all"].mean(axis=1), "--", linewidth=1)
            by_day.plot(one["false"].mean(axis=1), color=line.get_color(), label=name)
    sites.set(title="each sentence, before a change", xlabel="site", ylabel="false a day")
    by_day.set(title="mean of all sentences (dashed: had all been delivered)", xlabel="day")
    for axes in (sites, by_day):
        axes.axhline(rate, color="red", linewidth=1)
    if any(looks):
        by_day.set_yscale("symlog", linthresh=1)
        by_day.legend()
    figure.savefig(file, dpi=100)


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.promise")
