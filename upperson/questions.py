"""Questions made of attributes, and the ground truth for answers and evidence.

A picture's truth is its record's ``attributes``.

Shape: G pictures.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson.data.annotations import ATTRIBUTE_KINDS
from upperson.data.records import Record
from upperson_phrases import Phrase, parse
from upperson_phrases.evidence import Evidence, with_article
from upperson_rt.errors import InputError
from upperson_scores.metrics import auroc

Columns: TypeAlias = Mapping[str, NDArray[np.str_]]
"""By attribute the values of G pictures, as text."""

NOTHING = "none"  # The value where there is no such thing.

ANY = "any of them"  # In questions: every value but `NOTHING`.

SHORT_FORMS: Mapping[str, str] = {
    "clothes": "{upper_colour} {upper}",
    "person": "{gender} in {upper_colour} {upper}",
}
"""Short questions: *red coat* and *woman in red coat*."""

THINGS = ("bag", "headwear", "accessory")
"""Attributes of questions with *with a backpack*, and excluded by *without a backpack*."""

ANY_WORDS = {"bag": "bag", "headwear": "headwear"}
"""What any value of an attribute of `THINGS` is called."""

PARTS = {"gender": "gender", "upper_colour": "colour", "upper": "garment"}
"""What an answer to a short question is right or wrong in: attributes, and names for people."""

_CHILDREN = frozenset({"boy", "girl"})  # Few, with the clothes of adults.
WORDS = {"hood": "raised hood"}
"""What values are called in questions, where another word than their own."""


@dataclass(frozen=True, slots=True)
class Question:
    """A sentence and what a picture must be to answer it."""

    text: str

    wanted: Mapping[str, str]  # Values by attribute; all must hold.
    forbidden: Mapping[str, str]  # Values by attribute, or `ANY`; none may hold.


def attribute_columns(records: Sequence[Record], names: Iterable[str] = ATTRIBUTE_KINDS) -> Columns:
    """Put the attributes of G records side by side, those that all of them have.

    InputError if a record has none, or one has an attribute that means something here and another
    lacks it: an answer cannot be judged without the truth.
    """
    for record in records:
        if record.attributes is None:
            raise InputError(
                f"{record.image} has no attributes: put  attributes  into each line of "
                "annotations.jsonl; a synthetic set of before has them when it is rendered anew",
                code="attributes_missing",
                image=record.image,
            )
    columns: dict[str, NDArray[np.str_]] = {}
    for name in names:
        values = [_text(record, name) for record in records]
        lacking = [index for index, value in enumerate(values) if value is None]
        if len(lacking) == len(records):
            continue
        if lacking:
            raise InputError(
                f"{records[lacking[0]].image} lacks attribute '{name}', which other pictures have: "
                "write it, or null for no such thing",
                code="attribute_missing",
                image=records[lacking[0]].image,
                attribute=name,
            )
        columns[name] = np.array(values)
    if not columns:
        raise InputError(
            f"no attribute means anything here: known are {', '.join(ATTRIBUTE_KINDS)}",
            code="no_known_attribute",
        )
    return columns


def _text(record: Record, name: str) -> str | None:
    if record.attributes is None or name not in record.attributes:
        return None
    value = record.attributes[name]
    return NOTHING if value is None else str(value)


def short_questions(columns: Columns, form: str) -> list[Question]:
    """All questions of a form (of `SHORT_FORMS`) about such people.

    Each garment comes in every colour, also in colours without a picture, and with each gender that
    wears it. Adults only.
    """
    parts = [name for name in PARTS if f"{{{name}}}" in form]
    if not set(parts) <= columns.keys():
        return []
    colourless = [name for name in parts if name != "upper_colour"]
    worn = sorted({*rows_of(columns, colourless)})
    questions = []
    for values, colour in product(worn, _values(columns, "upper_colour")):
        wanted = dict(zip(colourless, values, strict=True)) | {"upper_colour": colour}
        if NOTHING not in wanted.values() and wanted.get("gender") not in _CHILDREN:
            questions.append(Question(form.format(**wanted), wanted, {}))
    return questions


def thing_questions(columns: Columns, name: str) -> list[Question]:
    """*a person with a backpack*, for every value of an attribute of `THINGS`."""
    return [
        Question(f"a person with {with_article(WORDS.get(value, value))}", {name: value}, {})
        for value in _values(columns, name)
    ]


def negated_questions(
    columns: Columns, name: str, *, clothed: bool = False, anything: bool = False
) -> list[Question]:
    """*a person without a backpack*, for every value of an attribute of `THINGS`.

    ``clothed`` ones are *a person in a red coat without a backpack*, for clothes that occur both
    with and without the thing; ``anything`` is *without a bag*, if the attribute has such a word.
    """
    questions = []
    values = _values(columns, name)
    if anything:
        values = [ANY] if values and name in ANY_WORDS else []
    if clothed and not {"upper_colour", "upper"} <= columns.keys():
        return []
    for value in values:
        word = ANY_WORDS[name] if anything else WORDS.get(value, value)
        without = f"without {with_article(word)}"
        if not clothed:
            questions.append(Question(f"a person {without}", {}, {name: value}))
            continue
        has_G = has_all(columns, {name: value})
        seen = {*zip(rows_of(columns, ["upper_colour", "upper"]), has_G.tolist(), strict=True)}
        for colour, upper in sorted(row for row, has in seen if has and (row, False) in seen):
            wanted = {"upper_colour": colour, "upper": upper}
            text = f"a person in {with_article(f'{colour} {upper}')} {without}"
            questions.append(Question(text, wanted, {name: value}))
    return questions


def _values(columns: Columns, name: str) -> list[str]:
    if name not in columns:
        return []
    return [str(value) for value in np.unique(columns[name]) if value != NOTHING]


def rows_of(columns: Columns, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Return some attributes of every picture."""
    return [tuple(map(str, row)) for row in zip(*(columns[name] for name in names), strict=True)]


def has_all(columns: Columns, values: Mapping[str, str]) -> NDArray[np.bool_]:
    """Return which pictures [G] have all of some values; `ANY` is every one but `NOTHING`."""
    right_G: NDArray[np.bool_] = np.logical_and.reduce(
        [
            columns[name] != NOTHING if value == ANY else columns[name] == value
            for name, value in values.items()
        ]
    )
    return right_G


# --- Phrase evidence, compared with the true attributes of pictures
#
# Shapes: G pictures, E embedding width.

_COLOUR_OF: Mapping[str, str] = {
    "upper": "upper_colour",
    "lower": "lower_colour",
    "shoes": "shoe_colour",
    "headwear": "headwear_colour",
    "bag": "bag_colour",
}
_THINGS = ("gender", *_COLOUR_OF, "accessory")


@dataclass(frozen=True, slots=True)
class PhraseTruth:
    """How well the evidence of some phrases separates pictures, in percent; 50 is chance."""

    example: str
    phrases: int

    auroc: float
    """How often a picture of which a phrase is true has more evidence than one of which it is not:
    the mean over phrases."""

    least: float  # The lowest of them.


def measure_evidence(
    columns: Columns, image_GE: NDArray[np.float32], evidence: Evidence
) -> dict[str, PhraseTruth]:
    """Measure the evidence of every phrase that the attributes of some pictures make.

    ``evidence`` is of the model that embedded the pictures, with unit length.

    Returns:
        By attribute: a thing (``upper``: *coat*), and its colour (``upper_colour``: *red coat*,
        among all pictures); ``any bag`` and ``any headwear``, ``hair_colour`` and ``glasses``.
        A phrase that is true of no picture, or of all, is left out.
    """
    found = {}
    for name, phrases_of in _phrases_by_attribute(columns).items():
        phrases: list[Phrase] = []
        aurocs: list[float] = []
        for text, values in phrases_of:
            read = parse(text).phrases
            right_G = has_all(columns, values)
            # The grammar may read the text otherwise than as one thing with its colour before it.
            if len(read) != 1 or not read[0].noun or right_G.all() or not right_G.any():
                continue
            evidence_G = evidence.of(read[0], image_GE)
            share = auroc(evidence_G[right_G], evidence_G[~right_G])
            assert share is not None, "it is true of some pictures and not of others"
            phrases.append(read[0])
            aurocs.append(share)
        if phrases:
            example = phrases[len(phrases) // 2].text
            mean = float(np.mean(aurocs))
            found[name] = PhraseTruth(example, len(phrases), mean, min(aurocs))
    return found


def _phrases_by_attribute(columns: Columns) -> dict[str, list[tuple[str, dict[str, str]]]]:
    """Return phrases and the values that make them true, by what they are about."""
    phrases_of: dict[str, list[tuple[str, dict[str, str]]]] = {}
    for thing in _THINGS:
        colour = _COLOUR_OF.get(thing)
        for names in ((thing,), *(((colour, thing),) if colour else ())):
            if not set(names) <= columns.keys():
                continue
            for values in sorted({*rows_of(columns, names)}):
                if NOTHING not in values:
                    text = " ".join(WORDS.get(value, value) for value in values)
                    row = dict(zip(names, values, strict=True))
                    phrases_of.setdefault(names[0], []).append((text, row))
        if thing in ANY_WORDS and thing in columns:
            phrases_of[f"any {thing}"] = [(ANY_WORDS[thing], {thing: ANY})]
    phrases_of["hair_colour"] = [
        (f"{value} hair", {"hair_colour": value}) for value in _values(columns, "hair_colour")
    ]
    if "glasses" in columns:
        phrases_of["glasses"] = [("glasses", {"glasses": str(True)})]
    return phrases_of
