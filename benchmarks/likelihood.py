"""The likelihood that ONVIF tells, fitted to people of whom the truth is known, and measured.

Of each question it is the best score of each person that counts. The curve is fitted to questions
about one half of the people and measured with those about the other half; all are in the gallery.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.marks import People, Root, people_of
from benchmarks.words import scale_of
from upperson.questions import SHORT_FORMS, attribute_columns, has_all, short_questions
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import BundleOption, Debug, GalleryOption, Json
from upperson_rt.cli.output import new_table, print_result, print_table
from upperson_rt.serve.scale import LIKELY, ORDINARY, WORDS, Scale

EDGES = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
_FEW = 10
_STEPS = 50
_CURVES = {"a sentence": ("caption", "woman in red coat"), "a picture": ("picture",)}
"""Which questions each curve of `LIKELY` is fitted to; each of them counts as much."""

app = new_app("Fit and measure the likelihood of a match.")


@dataclass(frozen=True)
class _Asked:
    """Questions of one kind."""

    above_QP: NDArray[np.float64]
    """By how many deviations the best picture of each person stands above other questions."""
    right_QP: NDArray[np.bool_]
    """Whether it is the right person."""
    counts_QP: NDArray[np.bool_]
    """False of a person whose only picture is the question."""
    of_half_Q: NDArray[np.int64]
    """About which half of the people it asks."""


@app.command(cls=Command)
def likelihood(
    bundle: BundleOption,
    gallery: GalleryOption,
    root: Root,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fit the curves, and count how often each likelihood was right.

    Example: `python -m benchmarks.likelihood -b demo/bundle -g demo/gallery --root demo/people`
    """
    print_result(measured(people_of(bundle, gallery, root)), as_json, _show)


def measured(people: People) -> dict[str, Any]:
    """Return the fitted curves, those in use, and how often each said likelihood was right."""
    ordinary_SD = people.encoder.encode_texts(ORDINARY)
    scale = scale_of(people.vectors_ND, people.bundle.canaries.image_embeds, ordinary_SD)
    asked = {
        "caption": _captions(people, scale),
        "woman in red coat": _short(people, scale),
        "picture": _pictures(people, scale),
    }
    fitted = {name: _fit([asked[kind] for kind in kinds]) for name, kinds in _CURVES.items()}
    in_use = dict(zip(_CURVES, LIKELY, strict=True))
    curve_of = {kind: in_use[name] for name, kinds in _CURVES.items() for kind in kinds}
    return {
        "people": len(np.unique(people.pids_N)),
        "questions": {kind: len(questions.of_half_Q) for kind, questions in asked.items()},
        "fitted": {name: [round(value, 2) for value in curve] for name, curve in fitted.items()},
        "in use": {name: list(curve) for name, curve in in_use.items()},
        "words begin at": {
            name: {word: round(float(_likely(curve, least)), 2) for least, word in WORDS.items()}
            for name, curve in in_use.items()
        },
        "said": {kind: _counted(questions, curve_of[kind]) for kind, questions in asked.items()},
    }


def _captions(people: People, scale: Scale) -> _Asked:
    texts_QD = people.encoder.encode_texts([caption for _, caption in people.captions])
    wanted_Q = np.array([pid for pid, _ in people.captions])
    return _asked(people, scale, 0.0, texts_QD @ people.vectors_ND.T, wanted_Q)


def _short(people: People, scale: Scale) -> _Asked:
    columns = attribute_columns(people.records)
    questions = short_questions(columns, SHORT_FORMS["person"])
    right_QN = np.array([has_all(columns, question.wanted) for question in questions])
    answered = right_QN.any(axis=1)
    texts_QD = people.encoder.encode_texts([question.text for question in questions])[answered]
    first_Q = people.pids_N[right_QN[answered].argmax(axis=1)]
    scores_QN = texts_QD @ people.vectors_ND.T
    return _asked(people, scale, 0.0, scores_QN, first_Q, right_QN[answered])


def _pictures(people: People, scale: Scale) -> _Asked:
    scores_NN = people.vectors_ND @ people.vectors_ND.T
    np.fill_diagonal(scores_NN, -np.inf)  # Nobody asks for the picture that he has.
    return _asked(people, scale, 1.0, scores_NN, people.pids_N)


def _asked(
    people: People,
    scale: Scale,
    share: float,
    scores_QN: NDArray[np.float32],
    about_Q: NDArray[np.int64],
    right_QN: NDArray[np.bool_] | None = None,
) -> _Asked:
    """Take the best picture of each person; right is whoever it is about, or what is given."""
    pids_P = np.unique(people.pids_N)
    of_P = [np.flatnonzero(people.pids_N == pid) for pid in pids_P]
    best_QP = np.stack([scores_QN[:, own].max(axis=1) for own in of_P], axis=1)
    right_QP = about_Q[:, None] == pids_P[None]
    if right_QN is not None:
        right_QP = np.stack([right_QN[:, own].any(axis=1) for own in of_P], axis=1)
    counts_QP = np.isfinite(best_QP)
    above = scale.deviations(share, np.where(counts_QP, best_QP, 0.0).ravel().tolist())
    assert above is not None
    half_of = {int(pid): place % 2 for place, pid in enumerate(pids_P)}
    halves_Q = np.array([half_of[int(pid)] for pid in about_Q])
    return _Asked(above.reshape(best_QP.shape), right_QP, counts_QP, halves_Q)


def _fit(kinds: list[_Asked]) -> tuple[float, float]:
    """Return slope and middle of the most likely logistic curve over the questions of one half."""
    above, right, weight = [], [], []
    for one in kinds:
        mine = one.counts_QP & (one.of_half_Q == 0)[:, None]
        above.append(one.above_QP[mine])
        right.append(one.right_QP[mine])
        weight.append(np.full(len(above[-1]), 1 / len(above[-1])))
    x_N, y_N, w_N = np.concatenate(above), np.concatenate(right), np.concatenate(weight)
    inputs_N2 = np.stack([x_N, np.ones_like(x_N)], axis=1)
    curve_2 = np.array([1.0, -float(np.quantile(x_N, 0.99))])
    for _ in range(_STEPS):  # Newton's method; the likelihood has one summit.
        likely_N = 1 / (1 + np.exp(-np.clip(inputs_N2 @ curve_2, -50, 50)))
        uphill_2 = inputs_N2.T @ (w_N * (y_N - likely_N))
        bend_22 = (inputs_N2 * (w_N * likely_N * (1 - likely_N))[:, None]).T @ inputs_N2
        curve_2 = curve_2 + np.linalg.solve(bend_22, uphill_2)
    slope, offset = curve_2.tolist()
    return slope, -offset / slope


def _likely(curve: tuple[float, float], above: Any) -> Any:
    """Return what a curve says of so many deviations, of one number or an array."""
    slope, middle = curve
    return 1 / (1 + np.exp(-slope * (above - middle)))


def _counted(asked: _Asked, curve: tuple[float, float]) -> list[dict[str, Any]]:
    """Return of each range of likelihoods how many were said about the other half, and right."""
    mine = asked.counts_QP & (asked.of_half_Q == 1)[:, None]
    said_N = _likely(curve, asked.above_QP[mine])
    right_N = asked.right_QP[mine]
    place_N = np.clip(np.searchsorted(EDGES, said_N, side="right") - 1, 0, len(EDGES) - 2)
    return [
        {
            "from": EDGES[place],
            "to": EDGES[place + 1],
            "said": int((place_N == place).sum()),
            "right": int(right_N[place_N == place].sum()),
        }
        for place in range(len(EDGES) - 1)
    ]


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table: a range, and of each kind how many were said and right."""
    rows = []
    for place, (low, high) in enumerate(pairwise(EDGES)):
        found = [said[place] for said in result["said"].values()]
        cells = [cell for one in found for cell in (f"{one['said']:,}", _percent(one))]
        rows.append([f"{low} to {high}", *cells])
    return rows


def _percent(found: dict[str, Any]) -> str:
    """Return how many were right; of a few nothing can be said."""
    if found["said"] < _FEW:
        return ""
    percent = 100 * found["right"] / found["said"]
    return f"{percent:.0f} %" if percent >= 1 else f"{percent:.1f} %"


def _show(result: dict[str, Any]) -> None:
    table = new_table("curve", "slope and middle fitted", "in use", "words begin at")
    for name, curve in result["fitted"].items():
        begin = ", ".join(f"{word} {at}" for word, at in result["words begin at"][name].items())
        table.add_row(name, str(curve), str(result["in use"][name]), begin)
    print_table(table)
    table = new_table("said", *(name for kind in result["said"] for name in (kind, "were right")))
    for row in rows_of(result):
        table.add_row(*row)
    print_table(table)


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.likelihood")
