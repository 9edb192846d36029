"""Is the evidence of a phrase right? What `Evidence` says, held against the truth of pictures.

Shapes: G pictures, E embedding width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson.questions import NOTHING, WORDS, Columns, has_all, rows_of
from upperson_rt.phrases import Phrase, parse
from upperson_rt.phrases.evidence import Evidence

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
    """How well the evidence of some phrases tells pictures apart, in percent; 50 is chance."""

    example: str
    phrases: int

    auroc: float
    """How often a picture of which a phrase is true has more evidence than one of which it is not:
    the mean over phrases."""

    least: float
    """The lowest of them."""


def measure_evidence(
    columns: Columns, image_GE: NDArray[np.float32], evidence: Evidence
) -> dict[str, PhraseTruth]:
    """Weigh every phrase that the attributes of some pictures make.

    Args:
        columns: The truth.
        image_GE: Unit-length embeddings of the pictures.
        evidence: Of the same model.

    Returns:
        By attribute: a thing (``upper``: *coat*), and its colour (``upper_colour``: *red coat*,
        among all pictures). What nobody has, or everybody, is left out.
    """
    found = {}
    for thing in _THINGS:
        colour = _COLOUR_OF.get(thing)
        for names in ((thing,), *(((colour, thing),) if colour else ())):
            truth = _truth(names, columns, image_GE, evidence)
            if truth is not None:
                found[names[0]] = truth
    return found


def _truth(
    names: Sequence[str],
    columns: Columns,
    image_GE: NDArray[np.float32],
    evidence: Evidence,
) -> PhraseTruth | None:
    if not set(names) <= columns.keys():
        return None
    phrases: list[Phrase] = []
    aurocs: list[float] = []
    for values in sorted({*rows_of(columns, names)}):
        phrase = _phrase(values)
        right_G = has_all(columns, dict(zip(names, values, strict=True)))
        if phrase is None or right_G.all():
            continue
        evidence_G = evidence.of(phrase, image_GE)
        found = auroc(evidence_G[right_G], evidence_G[~right_G])
        assert found is not None, "somebody has it, and somebody has not"
        phrases.append(phrase)
        aurocs.append(found)
    if not phrases:
        return None
    return PhraseTruth(
        example=phrases[len(phrases) // 2].text,
        phrases=len(phrases),
        auroc=float(np.mean(aurocs)),
        least=min(aurocs),
    )


def _phrase(values: Sequence[str]) -> Phrase | None:
    """Return what says a thing, with its colour before it; None if the grammar reads otherwise."""
    if NOTHING in values:
        return None
    phrases = parse(" ".join(WORDS.get(value, value) for value in values)).phrases
    return phrases[0] if len(phrases) == 1 and phrases[0].noun else None


def auroc(positive: NDArray[np.floating[Any]], negative: NDArray[np.floating[Any]]) -> float | None:
    """Return how often a positive is above a negative, in percent; ties count half.

    None if there are none of either.
    """
    if not len(positive) or not len(negative):
        return None
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left")
    not_above = np.searchsorted(ordered, positive, side="right")
    return 100.0 * float(((below + not_above) / (2 * len(ordered))).mean())
