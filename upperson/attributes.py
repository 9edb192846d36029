"""Measure which attributes a model recognises, by its answers to `questions`.

Every function is pure: it takes embeddings of pictures and a function that embeds sentences,
whatever either comes from.

Shapes: G pictures, N questions, Q captions, E embedding width. Shares are percent.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson.data.records import Record
from upperson.questions import (
    ANY,
    NOTHING,
    PARTS,
    SHORT_FORMS,
    THINGS,
    Columns,
    PhraseTruth,
    Question,
    attribute_columns,
    has_all,
    measure_evidence,
    negated_questions,
    rows_of,
    short_questions,
    thing_questions,
)
from upperson_phrases import Kind, parse
from upperson_phrases.evidence import EmbedTexts, Evidence, with_article
from upperson_scores.metrics import auroc

_FIRST = 10
_NEVER_MENTIONED = frozenset({"skin"})
_MENTIONED_BY: Mapping[Kind, tuple[tuple[str, str], ...]] = {
    "person": (("gender", ""),),
    "upper": (("upper", "upper_colour"),),
    "lower": (("lower", "lower_colour"),),
    "shoes": (("shoes", "shoe_colour"),),
    "headwear": (("headwear", "headwear_colour"),),
    "hair": (("", "hair_colour"),),
    "glasses": (("glasses", ""),),
    "accessory": (("accessory", "accessory_colour"),),
    "carried": (("bag", "bag_colour"), ("accessory", "accessory_colour")),
}
"""By kind of phrase the attributes that it may mention: which thing it is, and its colour."""

_CHUNK = 512


@dataclass(frozen=True, slots=True)
class Share:
    """Share of the pictures in a result that have an attribute, as a mean over questions."""

    questions: int

    top1: float
    """Of the first pictures."""

    at10: float
    """Of the first ten pictures."""

    chance: float
    """Of all pictures: what a random result has."""

    at10_most: float
    """Of the first ten at most: there may be fewer than ten such pictures."""


@dataclass(frozen=True, slots=True)
class ShortQuestions:
    """Answers to one form of short question, over those that some picture satisfies."""

    example: str
    """One of those that some picture satisfies."""

    asked: int
    present: int
    """Questions that some picture satisfies."""

    parts: Mapping[str, Share]
    """By part (`PARTS`) and for ``all`` of them at once."""

    map: float
    map_chance: float
    """Its expectation over random rankings."""

    presence_auroc: float | None
    """How often the best score of a question with a right picture is above that of one without;
    50 is chance, None if there is no question of either kind."""


@dataclass(frozen=True, slots=True)
class CaptionShare:
    """One attribute in the answers to full captions."""

    top1: float
    """How often the first picture has the described person's value."""

    chance: float
    """How often a random picture has it."""

    said: int
    """How many captions mention it, as far as `upperson_phrases` reads them."""

    said_top1: float | None
    """Of those, how often the first picture has it; None if there are none."""

    said_chance: float | None
    """Of those, how often a random picture has it."""

    r1_lost: float
    """Points of R@1 that would be won if pictures of another value were left out."""


@dataclass(frozen=True, slots=True)
class SwappedPairs:
    """*a person in a red coat and blue trousers* against the same with the colours exchanged."""

    pictures: int
    right: float
    """How often a picture's true sentence has the higher score; chance is 50."""


@dataclass(frozen=True, slots=True)
class AttributeReport:
    """What `measure_attributes` found."""

    pictures: int
    short: Mapping[str, ShortQuestions]
    """By name of the form."""

    with_thing: Mapping[str, Mapping[str, Share]]
    """*a person with a backpack*: by attribute and value, the share that has it; the mean over the
    questions of an attribute is called ``all``."""

    without_thing: Mapping[str, Mapping[str, Share]]
    """*a person without a backpack*: the share that has it nevertheless; `ANY` is *without a
    bag*, and not in the mean."""

    clothed_without: Mapping[str, Mapping[str, Share]]
    """*a person in a red coat without a backpack*: likewise."""

    clothed: Mapping[str, Share]
    """Those questions, but for *without a bag*: who ``wears it``, and who is ``all as asked``; and
    the same ``without the denial``, for *a person in a red coat*. Empty if there are none."""

    evidence: Mapping[str, PhraseTruth]
    """By attribute, as `measure_evidence` says."""

    swapped: SwappedPairs | None
    captions: Mapping[str, CaptionShare]
    r1: float
    """R@1 of the captions."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON."""
        return asdict(self)


def measure_attributes(
    records: Sequence[Record],
    text_QE: NDArray[np.float32],
    image_GE: NDArray[np.float32],
    embed_texts: EmbedTexts,
) -> AttributeReport:
    """Rank the pictures for all questions that their attributes allow, and compare.

    ``text_QE`` and ``image_GE`` are unit-length embeddings of all captions and of the pictures, in
    the order of records. InputError as for `attribute_columns`.
    """
    columns = attribute_columns(records)
    evidence = Evidence(embed_texts)

    def scores(questions: Sequence[Question]) -> NDArray[np.float32]:
        return evidence.scores([question.text for question in questions], image_GE)

    def shares(
        make: Callable[[str], list[Question]], *, forbidden: bool
    ) -> dict[str, dict[str, Share]]:
        found: dict[str, dict[str, Share]] = {}
        for name in THINGS:
            by_value: dict[str, list[Question]] = {}
            for question in make(name):
                value = (question.forbidden if forbidden else question.wanted)[name]
                by_value.setdefault(value, []).append(question)
            has_NG, order_NG = [], []
            for value, questions in by_value.items():
                has_G = has_all(columns, {name: value})
                answers = np.tile(has_G, (len(questions), 1)), _order(scores(questions))
                found.setdefault(name, {})[value] = _share(*answers)
                if value != ANY:
                    has_NG.append(answers[0])
                    order_NG.append(answers[1])
            if has_NG:
                found[name]["all"] = _share(np.concatenate(has_NG), np.concatenate(order_NG))
        return found

    def excluding(name: str, clothed: bool) -> list[Question]:
        return [
            question
            for anything in (False, True)
            for question in negated_questions(columns, name, clothed=clothed, anything=anything)
        ]

    r1, captions = _measure_captions(records, text_QE, image_GE, columns)
    return AttributeReport(
        pictures=len(image_GE),
        short=_short_by_form(columns, image_GE, evidence),
        with_thing=shares(lambda name: thing_questions(columns, name), forbidden=False),
        without_thing=shares(lambda name: excluding(name, clothed=False), forbidden=True),
        clothed_without=shares(lambda name: excluding(name, clothed=True), forbidden=True),
        clothed=_measure_clothed(columns, image_GE, evidence),
        evidence=measure_evidence(columns, image_GE, evidence),
        swapped=_measure_swapped(image_GE, columns, embed_texts),
        captions=captions,
        r1=r1,
    )


def _short_by_form(
    columns: Columns, image_GE: NDArray[np.float32], evidence: Evidence
) -> dict[str, ShortQuestions]:
    found = {}
    for name, form in SHORT_FORMS.items():
        questions = short_questions(columns, form)
        if any(has_all(columns, question.wanted).any() for question in questions):
            scores_NG = evidence.scores([question.text for question in questions], image_GE)
            found[name] = _measure_short(questions, columns, scores_NG)
    return found


def _order(scores_NG: NDArray[np.float32]) -> NDArray[np.int64]:
    """Rank pictures [N, G]; equal scores keep the order of the pictures."""
    return np.argsort(-scores_NG, axis=1, kind="stable")


def _share(has_NG: NDArray[np.bool_], order_NG: NDArray[np.int64]) -> Share:
    first = np.take_along_axis(has_NG, order_NG[:, :_FIRST], axis=1)
    there = np.minimum(has_NG.sum(axis=1), first.shape[1])
    return Share(
        questions=len(has_NG),
        top1=_percent(first[:, 0]),
        at10=_percent(first),
        chance=_percent(has_NG),
        at10_most=_percent(there / first.shape[1]),
    )


def _percent(values: NDArray[Any]) -> float:
    return 100.0 * float(values.mean())


def _measure_clothed(
    columns: Columns, image_GE: NDArray[np.float32], evidence: Evidence
) -> dict[str, Share]:
    """Measure *a person in a red coat* with and without an excluded phrase."""
    questions = [q for name in THINGS for q in negated_questions(columns, name, clothed=True)]
    if not questions:
        return {}
    wears_NG = np.stack([has_all(columns, question.wanted) for question in questions])
    has_NG = np.stack([has_all(columns, question.forbidden) for question in questions])
    sentences = [question.text for question in questions]
    found = {}
    for suffix in ("", " without the denial"):
        order_NG = _order(evidence.scores(sentences, image_GE))
        found[f"wears it{suffix}"] = _share(wears_NG, order_NG)
        found[f"all as asked{suffix}"] = _share(wears_NG & ~has_NG, order_NG)
        sentences = [parse(sentence).wanted for sentence in sentences]
    return found


def _measure_short(
    questions: Sequence[Question],
    columns: Columns,
    scores_NG: NDArray[np.float32],
) -> ShortQuestions:
    right_NG = np.stack([has_all(columns, question.wanted) for question in questions])
    present = np.atleast_1d(right_NG.any(axis=1))
    satisfied = [question for question, there in zip(questions, present, strict=True) if there]
    order_NG = _order(scores_NG[present])
    parts = {
        part: _share(
            np.array([columns[name] == question.wanted[name] for question in satisfied]), order_NG
        )
        for name, part in PARTS.items()
        if name in questions[0].wanted
    }
    right_NG = right_NG[present]
    hits_NG = np.take_along_axis(right_NG, order_NG, axis=1)
    precision_NG = np.cumsum(hits_NG, axis=1) / np.arange(1, hits_NG.shape[1] + 1)
    best = scores_NG.max(axis=1)
    return ShortQuestions(
        example=satisfied[len(satisfied) // 2].text,
        asked=len(questions),
        present=len(satisfied),
        parts=parts | {"all": _share(right_NG, order_NG)},
        map=_percent((precision_NG * hits_NG).sum(axis=1) / hits_NG.sum(axis=1)),
        map_chance=_percent(_expected_average_precision(right_NG)),
        presence_auroc=auroc(best[present], best[~present]),
    )


def _expected_average_precision(right_NG: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Return the expectation [N] over all rankings: 1/G (H + (R-1) (G-H) / (G-1)), H = 1+..+1/G."""
    pictures = right_NG.shape[1]
    harmonic = float((1 / np.arange(1, pictures + 1)).sum())
    rest = (right_NG.sum(axis=1) - 1) * (pictures - harmonic) / max(1, pictures - 1)
    expected: NDArray[np.float64] = (harmonic + rest) / pictures
    return expected


def _measure_captions(
    records: Sequence[Record],
    text_QE: NDArray[np.float32],
    image_GE: NDArray[np.float32],
    columns: Columns,
) -> tuple[float, dict[str, CaptionShare]]:
    pids = np.array([record.pid for record in records])
    described = np.repeat(np.arange(len(records)), [len(record.captions) for record in records])
    names = [name for name in columns if name not in _NEVER_MENTIONED]
    codes = {name: np.unique(columns[name], return_inverse=True)[1] for name in names}
    right = np.empty(len(text_QE), dtype=bool)
    shared = {name: right.copy() for name in names}
    filtered = {name: right.copy() for name in names}
    for start in range(0, len(text_QE), _CHUNK):
        rows = slice(start, start + _CHUNK)
        own = described[rows]
        scores_QG = text_QE[rows] @ image_GE.T
        top = scores_QG.argmax(axis=1)
        right[rows] = pids[top] == pids[own]
        for name, code in codes.items():
            shared[name][rows] = code[top] == code[own]
            same = code[own][:, None] == code[None, :]
            best = np.where(same, scores_QG, -np.inf).argmax(axis=1)
            filtered[name][rows] = pids[best] == pids[own]
    mentioned = _mentioned(records, columns)
    chance = {
        name: (np.bincount(code) / len(code))[code[described]] for name, code in codes.items()
    }
    r1 = _percent(right)
    return r1, {
        name: CaptionShare(
            top1=_percent(shared[name]),
            chance=_percent(chance[name]),
            said=int(mentioned[name].sum()),
            said_top1=_percent(shared[name][mentioned[name]]) if mentioned[name].any() else None,
            said_chance=_percent(chance[name][mentioned[name]]) if mentioned[name].any() else None,
            r1_lost=_percent(filtered[name]) - r1,
        )
        for name in names
    }


def _mentioned(records: Sequence[Record], columns: Columns) -> dict[str, NDArray[np.bool_]]:
    """Return which captions [Q] mention an attribute of the person they describe."""
    texts = [(row, text) for row, record in enumerate(records) for text in record.captions]
    mentioned = {name: np.zeros(len(texts), dtype=bool) for name in columns}
    for place, (row, text) in enumerate(texts):
        for phrase in parse(text).phrases:
            if phrase.negated or phrase.noun == "person":
                continue
            for thing, colour in _MENTIONED_BY.get(phrase.kind, ()):
                # Bags and some accessories are carried: the true attributes decide which this is.
                carried = phrase.kind == "carried" and thing in columns
                if carried and columns[thing][row] != phrase.noun:
                    continue
                pattern = "pattern" if phrase.kind == "upper" and phrase.pattern else ""
                for name in (thing, colour if phrase.colours else "", pattern):
                    if name in mentioned:
                        mentioned[name][place] = True
    return mentioned


def _measure_swapped(
    image_GE: NDArray[np.float32], columns: Columns, embed_texts: EmbedTexts
) -> SwappedPairs | None:
    needed = ("upper_colour", "upper", "lower_colour", "lower")
    if not set(needed) <= columns.keys():
        return None
    rows = rows_of(columns, needed)
    worn = {pair for row in rows for pair in (row[:2], row[2:])}
    pairs = list(_swaps(rows, worn))
    if not pairs:
        return None
    texts = sorted({text for _, *both in pairs for text in both})
    embeds = dict(zip(texts, list(embed_texts(texts)), strict=True))
    right = [
        float(image_GE[row] @ embeds[true]) > float(image_GE[row] @ embeds[false])
        for row, true, false in pairs
    ]
    return SwappedPairs(pictures=len(right), right=_percent(np.array(right)))


def _swaps(
    rows: Sequence[tuple[str, ...]], worn: set[tuple[str, ...]]
) -> Iterator[tuple[int, str, str]]:
    """Yield pictures with a true sentence and one whose colours are exchanged.

    Only if either thing also occurs in the other's colour: there are no pink jeans.
    """
    for row, (upper_colour, upper, lower_colour, lower) in enumerate(rows):
        exchanged = {(lower_colour, upper), (upper_colour, lower)}
        if lower != NOTHING and upper_colour != lower_colour and exchanged <= worn:
            yield (
                row,
                f"a person in {with_article(upper_colour)} {upper} and {lower_colour} {lower}",
                f"a person in {with_article(lower_colour)} {upper} and {upper_colour} {lower}",
            )
