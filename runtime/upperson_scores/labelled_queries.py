"""Queries with a match in a gallery, and queries without one.

Three kinds: short ones (*woman in red coat*), with two garments (near misses of one word among
them), and captions.

Shape: N pictures.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_phrases import ParsedSentence, parse
from upperson_phrases.evidence import ALTERNATIVES

Kind: TypeAlias = Literal["short", "two", "caption"]
KINDS: tuple[Kind, ...] = ("short", "two", "caption")
TRAITS = ("gender", "upper_colour", "upper", "lower_colour", "lower")
"""What short sentences and those with two garments are made of."""
_MOST = 100
"""Queries of a kind with a match, and as many without."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelledPictures:
    """Pictures of people of whom sentences are known to be true."""

    vectors_ND: NDArray[np.float32]
    """(N, D) embeddings of unit length."""
    people_N: NDArray[np.int64]
    cameras_N: NDArray[np.str_]
    """Empty where not known."""
    captions: Sequence[Sequence[str]]
    """Of each picture."""
    traits: Mapping[str, NDArray[np.str_]]
    """By name of `TRAITS` the values of N pictures; empty where not known or not worn."""

    def of(self, rows: NDArray[np.int64]) -> "LabelledPictures":
        """Return some of them."""
        return LabelledPictures(
            vectors_ND=self.vectors_ND[rows],
            people_N=self.people_N[rows],
            cameras_N=self.cameras_N[rows],
            captions=[self.captions[row] for row in rows],
            traits={name: values[rows] for name, values in self.traits.items()},
        )


@dataclass(frozen=True, kw_only=True)
class LabelledQuery:
    """A sentence, and the people who match it: those with some traits, one person, or none."""

    kind: Kind
    sentence: str
    wanted: Mapping[str, str] | None = None
    person: int | None = None

    def right(self, pictures: LabelledPictures) -> NDArray[np.bool_]:
        """Return (N,) which pictures match it."""
        found: NDArray[np.bool_]
        if self.wanted is not None:
            columns = [pictures.traits[name] == value for name, value in self.wanted.items()]
            found = np.all(columns, axis=0)
            return found
        if self.person is not None:
            found = pictures.people_N == self.person
            return found
        return np.zeros(len(pictures.people_N), np.bool_)


def traits_of(
    captions: Sequence[Sequence[str]], people_N: NDArray[np.int64]
) -> dict[str, NDArray[np.str_]]:
    """Return what captions say of each person, by name of `TRAITS`: the first value named."""
    by_person: dict[int, dict[str, str]] = {}
    for person, own in zip(people_N.tolist(), captions, strict=True):
        found = by_person.get(person, {})
        for caption in own:
            found = _named(parse(caption)) | found
        by_person[person] = found
    return {
        name: np.array([by_person[person].get(name, "") for person in people_N.tolist()], np.str_)
        for name in TRAITS
    }


def queries_about(
    inside: LabelledPictures, outside: LabelledPictures, rng: np.random.Generator
) -> list[LabelledQuery]:
    """Return sentences for a gallery; captions of people ``outside`` of it match no picture."""
    return [
        *_both(_short(inside, outside), inside, rng),
        *_both(_two(inside, rng), inside, rng),
        *_captions(inside, outside, rng),
    ]


def _named(parsed: ParsedSentence) -> dict[str, str]:
    named: dict[str, str] = {}
    for phrase in parsed.understood:
        if phrase.kind == "person" and phrase.noun in ALTERNATIVES["person"].nouns:
            named.setdefault("gender", phrase.noun)
        is_garment = phrase.kind in ("upper", "lower") and phrase.kind not in named
        if is_garment and phrase.noun and len(phrase.colours) == 1:
            named |= {phrase.kind: phrase.noun, f"{phrase.kind}_colour": phrase.colours[0]}
    return named


def _short(inside: LabelledPictures, outside: LabelledPictures) -> list[LabelledQuery]:
    """Return every garment in every colour, with each gender that wears it."""
    worn = {
        (gender, upper)
        for one in (inside, outside)
        for gender, upper in zip(one.traits["gender"], one.traits["upper"], strict=True)
        if gender in ("woman", "man") and upper
    }
    return [
        LabelledQuery(
            kind="short",
            sentence=f"{gender} in {colour} {upper}",
            wanted={"gender": gender, "upper_colour": colour, "upper": upper},
        )
        for (gender, upper), colour in product(sorted(worn), ALTERNATIVES["upper"].colours)
    ]


def _two(inside: LabelledPictures, rng: np.random.Generator) -> list[LabelledQuery]:
    """Return sentences with two garments: of each adult, and two more changed in one word."""
    own = sorted({*zip(*(inside.traits[name].tolist() for name in TRAITS), strict=True)})
    own = [values for values in own if values[0] in ("woman", "man") and all(values)]
    described = {*own}
    for values in own:
        for _ in range(2):
            place = int(rng.integers(4))
            others = _others(TRAITS[place], values[place])
            other = others[int(rng.integers(len(others)))]
            described.add((*values[:place], other, *values[place + 1 :]))
    return [
        LabelledQuery(
            kind="two",
            sentence=f"{one[0]} in {one[1]} {one[2]} and {one[3]} {one[4]}",
            wanted=dict(zip(TRAITS, one, strict=True)),
        )
        for one in sorted(described)
    ]


def _others(name: str, value: str) -> list[str]:
    if name == "gender":
        return ["man" if value == "woman" else "woman"]
    kind = ALTERNATIVES["upper" if name.startswith("upper") else "lower"]
    values = kind.colours if name.endswith("colour") else kind.nouns
    return [one for one in values if one != value]


def _captions(
    inside: LabelledPictures, outside: LabelledPictures, rng: np.random.Generator
) -> list[LabelledQuery]:
    found = []
    for pictures in (inside, outside):
        pairs = [
            (caption, person if pictures is inside else None)
            for person, own in zip(pictures.people_N.tolist(), pictures.captions, strict=True)
            for caption in own
        ]
        for row in rng.permutation(len(pairs))[:_MOST]:
            caption, person = pairs[row]
            found.append(LabelledQuery(kind="caption", sentence=caption, person=person))
    return found


def _both(
    queries: Sequence[LabelledQuery], inside: LabelledPictures, rng: np.random.Generator
) -> list[LabelledQuery]:
    """Return at most `_MOST` with a match, and as many without one."""
    mixed = [queries[row] for row in rng.permutation(len(queries))]
    is_there = [bool(one.right(inside).any()) for one in mixed]
    there = [one for one, found in zip(mixed, is_there, strict=True) if found]
    nowhere = [one for one, found in zip(mixed, is_there, strict=True) if not found]
    return there[:_MOST] + nowhere[:_MOST]
