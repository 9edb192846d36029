"""How reliable likelihoods and verdicts are, on drawn people who were never fitted on.

The shipped base is calibrated on some sets of people and checked on others: present and absent
people, larger and smaller galleries, and cameras that the calibration has not seen. Also: what is
found first by score, and by likelihood.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.report import Column, conditions, print_report, table
from upperson.cli.exportable import labelled_files
from upperson.config import read_recipe
from upperson.data.records import read_dataset
from upperson.data.vocabulary import clip_tokenizer
from upperson.evaluate import embed_records, embed_texts
from upperson.model.base import load_base
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP
from upperson_phrases import parse
from upperson_phrases.evidence import Evidence
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug
from upperson_rt.score_calibration import ScoreCalibration
from upperson_rt.search.features import CANDIDATES, COMPARED, SentenceFeatures
from upperson_rt.search.shift import LEAST
from upperson_rt.search.verdict import judge_sentence
from upperson_scores.fitting import (
    Block,
    Judgement,
    Prior,
    blocks_of,
    calibration_error,
    fit_score_calibration,
    judge_all,
    make_block,
    reliability,
    search_block,
)
from upperson_scores.labelled_queries import KINDS, TRAITS, LabelledPictures
from upperson_synthetic import SyntheticSpec, write_dataset

_SHIFTED = ("night", "low-resolution", "hard")
_SIZES = (20, 50)
_CROPS = 500
_DRAWS = 200
_FEW = (50, 300)
"""People of small fits: as many as the demo has, and a site may have."""
_LARGE = 5
"""Sets of people that are searched together in the fit: likelihoods of larger galleries than those
of a fit are too low."""
_FIT = [*range(331, 339)]
_CHECK = [*range(393, 405), *range(439, 451)]

app = new_app("Calibrate scores of drawn people, and check them on people never fitted on.")


@app.command(cls=Command)
def scores(
    fit: Annotated[list[int], typer.Option(help="Sets of people to fit on.")] = _FIT,
    check: Annotated[list[int], typer.Option(help="Sets of people to check on.")] = _CHECK,
    people: Annotated[int, typer.Option(min=40, help="People of a set, four pictures each.")] = 300,
    large: Annotated[
        list[int] | None, typer.Option(help="Sets to check that are searched together.")
    ] = None,
    write: Annotated[
        Path | None, typer.Option(help="JSON file to write the calibration to.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file of reliability diagrams.")] = None,
    debug: Debug = False,
) -> None:
    """Calibrate scores of drawn people, and check them on people never fitted on.

    What fits start from is written by  --write runtime/upperson_scores/prior.json

    Example: python -m benchmarks.scores --fit 331 --fit 332 --check 311 --people 100
    """
    drawn = Drawn(people)
    fitted = [drawn.pictures("street", seed) for seed in fit]
    calibration = fit_score_calibration(
        _of_all_sizes(fitted), drawn.embed_texts, drawn.base, f"street, seeds {fit}", prior=None
    )
    if write is not None:
        write.write_text(calibration.to_json(), "utf-8")
    evidence = Evidence(drawn.embed_texts)
    sets = [drawn.pictures("street", seed) for seed in check]
    usual = {"these sets": _blocks(sets)} | {
        f"{people * count} people": _large(sets, fitted, count)
        for count in large or sorted({min(_LARGE, len(sets)), len(sets)})
    }
    smaller = {f"{size} people": _blocks([_first(one, size) for one in sets]) for size in _SIZES}
    found = _judged(usual | smaller, evidence, calibration)
    rows = _rows(found, calibration)
    # As an export does that has few people: near what was fitted on many.
    for count in _FEW:
        few = fit_score_calibration(
            blocks_of(_first(fitted[0], count), np.random.default_rng(0)),
            drawn.embed_texts,
            drawn.base,
            f"street, {count} people",
            Prior(picture=calibration.picture, answer=calibration.answer),
        )
        judged = _judged(usual, evidence, few)
        rows |= _rows({f"fitted on {count}, {name}": one for name, one in judged.items()}, few)
    farthest = {
        look: [
            calibration.reference.distance(group)
            for seed in check[:_LARGE]
            for group in _groups(drawn.pictures(look, seed))
        ]
        for look in ("street", *_SHIFTED)
    }
    limit = calibration.reference.threshold
    shifts = {
        look: {"groups": len(own), "unlike": sum(one > limit for one in own), "nearest": min(own),
               "farthest": max(own)}
        for look, own in farthest.items()
    }  # fmt: skip
    if plot is not None:
        _plot(found["these sets"], farthest, limit, plot)
    answers = {
        "queries": Column("queries", "{:,}"),
        "AUROC": Column("auroc"),
        "error": Column("error"),
        "of chance": Column("chance"),
        "too high": Column("too_high", "{:+.1f}"),
        "wrong nobody": Column("wrong_nobody"),
        "caught": Column("caught_nobody"),
    }
    pictures = {
        "error": Column("error"),
        "of the first": Column("first_error"),
        "of chance": Column("chance"),
        "expected": Column("expected", "{:,}"),
        "right": Column("right", "{:,}"),
    }
    groups = {
        "groups": Column("groups", "{}"),
        "unlike": Column("unlike", "{}"),
        "nearest": Column("nearest"),
        "farthest": Column("farthest"),
    }
    values = conditions("scores", "torch", threads=None, batch_size=64, warmup=0)
    orders = {
        f"{name}, {kind}": row
        for name, blocks in usual.items()
        for kind, row in _orders(blocks, evidence, calibration).items()
    }
    order = {
        "sentences": Column("queries", "{:,}"),
        "R@1 by score": Column("r1_score"),
        "by likelihood": Column("r1_likelihood"),
        "at least": Column("r1_from", "{:+.1f}"),
        "at most": Column("r1_to", "{:+.1f}"),
        "mAP by score": Column("map_score"),
        "mAP by likelihood": Column("map_likelihood"),
        "error of the first": Column("first_error"),
    }
    values |= {"rows": rows, "shifts": shifts, "limit": limit, "fit": fit, "check": check}
    values |= {"nobody_below": calibration.nobody_below, "people": people, "orders": orders}
    print_report(
        values,
        (),
        [
            table("answers", {k: v for k, v in rows.items() if v["kind"] != "pictures"}, answers),
            table("pictures", {k: v for k, v in rows.items() if v["kind"] == "pictures"}, pictures),
            table("order", orders, order),
            table(f"cameras, limit {limit:.2f}", shifts, groups),
        ],
    )


def _rows(
    found: dict[str, list[Judgement]], calibration: ScoreCalibration
) -> dict[str, dict[str, Any]]:
    return {
        f"{name}, {kind}": figures | {"kind": kind} | _by_chance(judged, kind)
        for name, judged in found.items()
        for kind, figures in reliability(judged, calibration.nobody_below).items()
    }


def _by_chance(judged: list[Judgement], kind: str) -> dict[str, float]:
    """Return the error that exact likelihoods of so few queries have, and by how much they exceed.

    Of answers, or of first pictures; in points.
    """
    is_first = kind == "pictures"
    own = [one for one in judged if is_first or kind in ("all", one.kind)]
    likely = np.array([one.likely_N[0] if is_first else one.answer for one in own])
    right = np.array([one.right_N[0] if is_first else one.is_present for one in own])
    rng = np.random.default_rng(0)
    drawn = [calibration_error(likely, rng.random(len(own)) < likely) for _ in range(_DRAWS)]
    return {"chance": float(np.mean(drawn)), "too_high": 100 * float((likely - right).mean())}


class Drawn:
    """Drawn people, embedded by the shipped base."""

    def __init__(self, people: int) -> None:
        config = read_recipe("synthetic", {"root": "people", "epochs": 1})
        base = load_base(config.base, config.pretrained)
        size = config.height_px, config.width_px
        self.base = config.base
        self._people = people
        self._model = UPPerson(base.clip, PLAIN_CLIP, size, base.statistics)
        self._tokenizer = clip_tokenizer()
        self._texts: dict[str, NDArray[np.float32]] = {}

    def embed_texts(self, texts: "list[str] | tuple[str, ...] | Any") -> NDArray[np.float32]:
        """Return (T, D) embeddings; each text is embedded once."""
        new = [text for text in dict.fromkeys(texts) if text not in self._texts]
        if new:
            embeds_TD = embed_texts(self._model, self._tokenizer, new, batch_size=256)
            self._texts |= dict(zip(new, embeds_TD, strict=True))
        return np.stack([self._texts[text] for text in texts])

    def pictures(self, look: str, seed: int) -> LabelledPictures:
        """Draw a set of people as a look shows them."""
        spec = SyntheticSpec(look=look, train_ids=0, val_ids=self._people, test_ids=0, seed=seed)
        with tempfile.TemporaryDirectory() as name:
            root = write_dataset(Path(name, "people"), spec)
            splits = read_dataset("jsonl", root)
            _, images_GD = embed_records(self._model, self._tokenizer, splits["val"])
        files = labelled_files(splits, root)
        assert files is not None  # The split has people.
        return files.embedded(images_GD)


def _blocks(sets: list[LabelledPictures]) -> list[Block]:
    """Make queries about each set; people of the next one are absent from it."""
    return [
        make_block(own, sets[(number + 1) % len(sets)], np.random.default_rng(number))
        for number, own in enumerate(sets)
    ]


def _large(
    sets: list[LabelledPictures], outside: list[LabelledPictures], count: int
) -> list[Block]:
    """Make queries about each set in a gallery of several; people ``outside`` are absent from it.

    Queries about the whole gallery would have few short sentences without a match.
    """
    found = []
    for number, own in enumerate(sets):
        absent = outside[number % len(outside)]
        there = [one for one in [*sets[number:], *sets[:number]] if one is not absent][:count]
        queries = make_block(own, absent, np.random.default_rng(number)).queries
        found.append(Block(galleries=[_together(there)], queries=queries))
    return found


def _of_all_sizes(sets: list[LabelledPictures]) -> list[Block]:
    """Return `_blocks` that have the larger galleries as well."""
    large = _large(sets, [*sets[1:], sets[0]], _LARGE)
    return [
        replace(one, galleries=[*one.galleries, *more.galleries])
        for one, more in zip(_blocks(sets), large, strict=True)
    ]


def _judged(
    blocks: Mapping[str, list[Block]], evidence: Evidence, calibration: ScoreCalibration
) -> dict[str, list[Judgement]]:
    """Judge all queries in the first gallery of each block."""
    found: dict[str, list[Judgement]] = {}
    for name, own in blocks.items():
        whole = [replace(one, galleries=one.galleries[:1]) for one in own]
        judged = (judge_all(search_block(one, evidence), calibration) for one in whole)
        found[name] = [one for some in judged for one in some]
    return found


def _orders(
    blocks: list[Block], evidence: Evidence, calibration: ScoreCalibration
) -> dict[str, dict[str, float]]:
    """Return R@1 and mAP of sentences with a match, by score and by likelihood, of each kind.

    The interval of the difference of R@1 is from a bootstrap over people, or over sentences that
    several people may match. The error is that of the likelihood of the first picture that users
    see, also for sentences without a match.
    """
    found: dict[str, list[tuple[int, NDArray[np.float64]]]] = {}
    shown: dict[str, list[tuple[float, bool]]] = {}
    for number, block in enumerate(blocks):
        gallery = block.galleries[0]
        vectors_QD = evidence.texts([parse(one.sentence).wanted for one in block.queries])
        for row, (query, vector_D) in enumerate(zip(block.queries, vectors_QD, strict=True)):
            right_N = query.right(gallery)
            by_score = np.argsort(-(gallery.vectors_ND @ vector_D), kind="stable")
            best = by_score[:CANDIDATES]
            features = SentenceFeatures(parse(query.sentence), vector_D, evidence)
            pool_ND = gallery.vectors_ND[best]
            own = pool_ND, pool_ND
            likely_N, answer = judge_sentence(calibration, features, *own, COMPARED, len(right_N))
            by_likelihood = by_score.copy()
            by_likelihood[:CANDIDATES] = best[np.argsort(-likely_N, kind="stable")]
            first = min(float(likely_N.max()), answer), bool(right_N[by_likelihood[0]])
            for kind in ("all", query.kind):
                shown.setdefault(kind, []).append(first)
            if not right_N.any():
                continue
            figures = [_figures(right_N[order]) for order in (by_score, by_likelihood)]
            group = row if query.person is None else -1 - query.person
            one = number * 1_000_000 + group, np.array(figures)
            for kind in ("all", query.kind):
                found.setdefault(kind, []).append(one)
    return {
        kind: _compared(*zip(*found[kind], strict=True)) | _error_of_first(shown[kind])
        for kind in sorted(found)
    }


def _error_of_first(shown: list[tuple[float, bool]]) -> dict[str, float]:
    likely, right = (np.array(column) for column in zip(*shown, strict=True))
    return {"first_error": calibration_error(likely, right)}


def _figures(right_N: NDArray[np.bool_]) -> tuple[float, float]:
    """Return R@1 and average precision of pictures in their order, in percent."""
    places = np.flatnonzero(right_N)
    return 100.0 * right_N[0], float(100 * (np.arange(1, len(places) + 1) / (places + 1)).mean())


def _compared(groups: Sequence[int], figures: Sequence[NDArray[np.float64]]) -> dict[str, float]:
    figures_Q22 = np.stack(figures)
    means = figures_Q22.mean(axis=0)
    _, group_Q = np.unique(groups, return_inverse=True)
    count = int(group_Q.max()) + 1
    gained_G = np.bincount(group_Q, figures_Q22[:, 1, 0] - figures_Q22[:, 0, 0], count)
    size_G = np.bincount(group_Q, minlength=count)
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=_DRAWS)
    low, high = np.quantile((draws @ gained_G) / (draws @ size_G), [0.025, 0.975])
    return {
        "queries": len(groups),
        "r1_score": means[0, 0],
        "r1_likelihood": means[1, 0],
        "r1_from": float(low),
        "r1_to": float(high),
        "map_score": means[0, 1],
        "map_likelihood": means[1, 1],
    }


def _first(pictures: LabelledPictures, people: int) -> LabelledPictures:
    numbers = np.unique(pictures.people_N)[:people]
    return pictures.of(np.flatnonzero(np.isin(pictures.people_N, numbers)))


def _together(sets: list[LabelledPictures]) -> LabelledPictures:
    most = max(int(one.people_N.max()) for one in sets) + 1
    return LabelledPictures(
        vectors_ND=np.concatenate([one.vectors_ND for one in sets]),
        people_N=np.concatenate([one.people_N + most * i for i, one in enumerate(sets)]),
        cameras_N=np.concatenate([one.cameras_N for one in sets]),
        captions=[captions for one in sets for captions in one.captions],
        traits={name: np.concatenate([one.traits[name] for one in sets]) for name in TRAITS},
    )


def _groups(pictures: LabelledPictures) -> list[NDArray[np.float32]]:
    """Return 500 pictures of all cameras, and as many of each camera as are compared at least."""
    by_camera = [pictures.cameras_N == camera for camera in np.unique(pictures.cameras_N)]
    return [
        pictures.vectors_ND[:_CROPS],
        *(pictures.vectors_ND[is_own][:LEAST] for is_own in by_camera),
    ]


def _plot(
    judged: list[Judgement], farthest: dict[str, list[float]], limit: float, file: Path
) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    answers, pictures, cameras = figure.subplots(1, 3)
    kinds = {"all": judged} | {kind: [j for j in judged if j.kind == kind] for kind in KINDS}
    for name, own in kinds.items():
        likely = np.array([one.answer for one in own])
        _draw(answers, likely, np.array([one.is_present for one in own]), name)
    likely = np.concatenate([one.likely_N for one in judged])
    _draw(pictures, likely, np.concatenate([one.right_N for one in judged]), "of 40 pictures")
    first = np.array([one.likely_N[0] for one in judged])
    _draw(pictures, first, np.array([one.right_N[0] for one in judged]), "of the first picture")
    for axes, title in ((answers, "some picture matches"), (pictures, "a picture matches")):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
        axes.set(title=title, xlabel="likelihood", ylabel="share that is right")
        axes.legend()
    for row, distances in enumerate(farthest.values()):
        cameras.plot(distances, [row] * len(distances), "o", alpha=0.5)
    cameras.axvline(limit, color="red", linewidth=1)
    cameras.set(title="cameras: distance, and its limit", xlabel="squared distance")
    cameras.set_yticks(range(len(farthest)), list(farthest))
    figure.savefig(file, dpi=100)


def _draw(axes: Any, likely: NDArray[np.float64], right: NDArray[np.bool_], name: str) -> None:
    tenth = np.minimum((10 * likely).astype(int), 9)
    there = [number for number in range(10) if (tenth == number).sum() >= 5]
    means = [float(likely[tenth == number].mean()) for number in there]
    axes.plot(means, [float(right[tenth == number].mean()) for number in there], "o-", label=name)


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.scores")
