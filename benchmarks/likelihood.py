"""How often a score is right: the curves of `upperson_rt.search.calibration`, fitted and checked.

For each set of drawn people every short question, every tenth caption and every fourth picture
searches a gallery of all their pictures with the shipped base. Counted is how often each of the
first 40 hits is right, by how far its score stands above background scores.
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.report import Column, Table, conditions, print_report, table
from upperson.config import read_recipe
from upperson.data.records import read_dataset
from upperson.data.vocabulary import clip_tokenizer
from upperson.evaluate import embed_records, embed_texts, pids_of
from upperson.model.base import load_base
from upperson.model.encoder import UPPerson
from upperson.model.parts import PLAIN_CLIP
from upperson.questions import SHORT_FORMS, attribute_columns, has_all, short_questions
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug
from upperson_rt.gallery import Gallery, Item
from upperson_rt.search.calibration import BACKGROUND_SENTENCES, ScoreCalibration
from upperson_synthetic import SyntheticSpec, write_dataset

KINDS = {"sentence": 0.0, "picture": 1.0}
"""Kinds of queries, and the share of pictures in them."""
EDGES = np.round(np.arange(0, 5.01, 0.05), 2)
"""Of the bins of deviations; the outer ones take what lies beyond."""
_FIRST = 40
_LOOK = "street"

app = new_app("Fit how likely a hit is right, and check it on people who were not fitted on.")


@app.command(cls=Command)
def likelihood(
    seed: Annotated[list[int], typer.Option(help="Sets of people to fit on.")] = [311, 312, 313],  # noqa: B006
    held_out: Annotated[int, typer.Option(help="Set of people to check on.")] = 314,
    people: Annotated[int, typer.Option(min=16, help="People of a set, four pictures each.")] = 300,
    write: Annotated[Path | None, typer.Option(help="JSON file to write the curves to.")] = None,
    debug: Debug = False,
) -> None:
    """Fit how likely a hit is right, and check it on people who were not fitted on.

    The file of the runtime is written by  --write runtime/upperson_rt/search/likelihood.json

    Example: python -m benchmarks.likelihood --seed 311 --held-out 314
    """
    config = read_recipe("synthetic", {"root": "people", "epochs": 1})
    base = load_base(config.base, config.pretrained)
    image_size = config.height_px, config.width_px
    model = UPPerson(base.clip, PLAIN_CLIP, image_size, base.statistics)
    sets = [count_right(model, number, people) for number in (*seed, held_out)]
    fitted: dict[str, Any] = {}
    for kind in KINDS:
        pairs, right = (
            np.sum([one[kind][part] for one in sets[:-1]], axis=(0, 1))
            for part in ("pairs", "right")
        )
        slope, middle = fit_curve(pairs, right)
        checked = sets[-1][kind]
        tenths = {
            name: by_tenth(slope, middle, checked["pairs"][:most], checked["right"][:most])
            for name, most in (("first", 1), ("first_40", _FIRST))
        }
        fitted[kind] = {
            "slope": slope,
            "middle": middle,
            "pairs": pairs.tolist(),
            "right": right.tolist(),
            "held_out_error": {name: calibration_error(one) for name, one in tenths.items()},
            "held_out": {name: one.round(1).tolist() for name, one in tenths.items()},
        }
    on = {"look": _LOOK, "people": people, "seeds": seed, "held_out": held_out, "base": config.base}
    content = {"fitted_on": on, "bin_edges": EDGES.tolist(), **fitted}
    if write is not None:
        write.write_text(json.dumps(content) + "\n", "utf-8")
    columns = {"slope": Column("slope"), "middle": Column("middle")}
    columns |= {"first, points": Column("first"), "first 40, points": Column("first_40")}
    rows = {kind: values | values["held_out_error"] for kind, values in fitted.items()}
    result = conditions("likelihood", "torch", threads=None, batch_size=64, warmup=0) | content
    print_report(result, (), [table("a hit is right", rows, columns), *reliability(fitted)])


def reliability(fitted: dict[str, Any]) -> list[Table]:
    """Return a table a kind: hits held out by their likelihood, and how many of them are right."""
    return [
        Table(
            (f"{kind}: likelihood", "first hits", "right, %", "first 40", "right, %"),
            [
                (f"{tenth / 10:.1f} to {tenth / 10 + 0.1:.1f}", *(
                    text
                    for name in ("first", "first_40")
                    for hits, _, right in [fitted[kind]["held_out"][name][tenth]]
                    for text in (f"{hits:,.0f}", f"{100 * right / hits:.1f}" if hits else "")
                ))
                for tenth in range(10)
            ],
        )
        for kind in KINDS
    ]  # fmt: skip


def count_right(model: UPPerson, seed: int, people: int) -> dict[str, dict[str, NDArray[np.int64]]]:
    """Return by kind (40, bins) counts of hits by rank and deviation: ``pairs`` and ``right``."""
    tokenizer = clip_tokenizer()
    spec = SyntheticSpec(look=_LOOK, train_ids=0, val_ids=0, test_ids=people, seed=seed)
    with tempfile.TemporaryDirectory() as name:
        records = read_dataset("jsonl", write_dataset(Path(name, "people"), spec))["test"]
        captions_QE, images_GE = embed_records(model, tokenizer, records)
        with Gallery.open(Path(name, "gallery"), "f", model.embed_dim, create=True) as gallery:
            gallery.add([Item(key=str(row)) for row in range(len(records))], images_GE)
            background_SE = embed_texts(model, tokenizer, BACKGROUND_SENTENCES)
            calibration = ScoreCalibration(gallery, images_GE[:0], lambda: background_SE)
            calibration.refresh()
    captioned_Q, pids_G = pids_of(records)
    columns = attribute_columns(records)
    questions = short_questions(columns, SHORT_FORMS["person"])
    short_NE = embed_texts(model, tokenizer, [question.text for question in questions])
    right_NG = np.stack([has_all(columns, question.wanted) for question in questions])
    texts_NE = np.concatenate([short_NE, captions_QE[::10]])
    rights = {
        "sentence": np.concatenate([right_NG, captioned_Q[::10, None] == pids_G]),
        "picture": pids_G[::4, None] == pids_G,
    }
    scores = {"sentence": texts_NE @ images_GE.T, "picture": images_GE[::4] @ images_GE.T}
    scores["picture"][np.arange(len(pids_G[::4])), np.arange(0, len(pids_G), 4)] = -1  # Itself.
    found: dict[str, dict[str, NDArray[np.int64]]] = {}
    for kind, share in KINDS.items():
        best_NK = np.argsort(-scores[kind], axis=1)[:, :_FIRST]
        flat = np.take_along_axis(scores[kind], best_NK, axis=1).ravel()
        above = calibration.deviations(share, flat.tolist())
        assert above is not None  # The gallery has pictures.
        bins_NK = np.clip(np.digitize(above, EDGES) - 1, 0, len(EDGES) - 2).reshape(best_NK.shape)
        right_NK = np.take_along_axis(rights[kind], best_NK, axis=1)
        counts = {"pairs": np.ones_like(right_NK), "right": right_NK}
        found[kind] = {
            name: np.stack([
                np.bincount(bins_NK[:, rank], weights[:, rank], len(EDGES) - 1)
                for rank in range(best_NK.shape[1])
            ]).astype(np.int64)
            for name, weights in counts.items()
        }  # fmt: skip
    return found


def fit_curve(pairs: NDArray[np.int64], right: NDArray[np.int64]) -> tuple[float, float]:
    """Return slope and middle of the logistic curve over bins (B,), by Newton's method."""
    inputs_B2 = np.stack([(EDGES[1:] + EDGES[:-1]) / 2, np.ones(len(EDGES) - 1)], axis=1)
    weights = np.zeros(2)
    for _ in range(50):
        likely_B = 1 / (1 + np.exp(-inputs_B2 @ weights))
        gradient = inputs_B2.T @ (pairs * likely_B - right)
        curvature = (inputs_B2.T * (pairs * likely_B * (1 - likely_B))) @ inputs_B2
        weights -= np.linalg.solve(curvature + 1e-6 * np.eye(2), gradient)
    return float(weights[0]), float(-weights[1] / weights[0])


def by_tenth(
    slope: float, middle: float, pairs_KB: NDArray[np.int64], right_KB: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return (10, 3) by tenth of the likelihood: hits, those right as it says, and really right."""
    centres_B = (EDGES[1:] + EDGES[:-1]) / 2
    likely_B = 1 / (1 + np.exp(-slope * (centres_B - middle)))
    pairs_B, right_B = pairs_KB.sum(axis=0), right_KB.sum(axis=0)
    tenth_B = np.minimum((10 * likely_B).astype(int), 9)
    counts = (pairs_B, pairs_B * likely_B, right_B)
    return np.stack([np.bincount(tenth_B, one, 10) for one in counts], axis=1)


def calibration_error(tenths: NDArray[np.float64]) -> float:
    """Return by how many points the likelihood is wrong on average over hits (10, 3)."""
    return float(100 * np.abs(tenths[:, 1] - tenths[:, 2]).sum() / tenths[:, 0].sum())


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.likelihood")
