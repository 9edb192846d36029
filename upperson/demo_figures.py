"""Figures of the demo: how well people of a look are found by captions and by short queries.

Shapes: Q captions, G pictures, S short queries, E embedding width. Figures are percent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from upperson.data.records import Record
from upperson.evaluate import Embeds, Numbers, pids_of
from upperson.questions import SHORT_FORMS, attribute_columns, has_all, short_questions
from upperson_phrases.evidence import EmbedTexts, Evidence
from upperson_scores.metrics import per_query_metrics
from upperson_synthetic.look import Look
from upperson_synthetic.people import TABLES

FIGURES = ("R@1", "mAP", "short_queries", "own_words")
"""Of captions R@1 and mAP; of short queries how often the first picture is right, of all of them
and of those with words of the site."""

_ADULTS = ("woman", "man")
_FORMS = {"upper": "{gender} in {colour} {words}", "bag": "{gender} with {colour} {words}"}


@dataclass(frozen=True, kw_only=True)
class Searched:
    """People that no model has met, and what is searched among them."""

    records: Sequence[Record]
    short: Mapping[str, NDArray[np.bool_]]
    """Short queries, *woman in red coat*, with the pictures [G] that are right."""
    own: Mapping[str, NDArray[np.bool_]]
    """Likewise with words of the site, *woman in orange steward vest*; a street has none."""


def searched_split(records: Sequence[Record], look: Look) -> Searched:
    """Put together what is searched: queries that some picture satisfies.

    InputError as for `attribute_columns`.
    """
    columns = attribute_columns(records)
    short, own = {}, {}
    for question in short_questions(columns, SHORT_FORMS["person"]):
        short[question.text] = has_all(columns, question.wanted)
    for thing in look.things:
        words = TABLES[thing.field][thing.value].words
        for gender, colour, text in product(_ADULTS, thing.colours, words):
            wanted = {"gender": gender, f"{thing.field}_colour": colour, thing.field: thing.value}
            query = _FORMS[thing.field].format(gender=gender, colour=colour, words=text)
            own[query] = has_all(columns, wanted)
    return Searched(
        records=records,
        short={text: right_G for text, right_G in short.items() if right_G.any()},
        own={text: right_G for text, right_G in own.items() if right_G.any()},
    )


@dataclass(frozen=True, slots=True)
class Scores:
    """What each query found, by name of `FIGURES`: 0 to 1, and a group that is resampled as one."""

    found: Mapping[str, NDArray[np.float64]]
    groups: Mapping[str, Numbers]

    def figures(self) -> dict[str, float]:
        """Return the means, in percent."""
        return {name: 100 * float(found.mean()) for name, found in self.found.items()}


def measure(split: Searched, text_QE: Embeds, image_GE: Embeds, embed_texts: EmbedTexts) -> Scores:
    """Search the pictures with captions and with short queries.

    ``text_QE`` and ``image_GE`` are the embeddings of captions and pictures in the order of the
    records.
    """
    pids_Q, pids_G = pids_of(split.records)
    captions = per_query_metrics(text_QE, image_GE, pids_Q, pids_G)
    found = {"R@1": captions.hit_at(1).astype(float), "mAP": captions.ap}
    groups = {"R@1": pids_Q, "mAP": pids_Q}
    evidence = Evidence(embed_texts)
    for name, queries in (
        ("short_queries", {**split.short, **split.own}),
        ("own_words", split.own),
    ):
        if queries:
            first_S = evidence.scores([*queries], image_GE).argmax(axis=1)
            right_SG = np.stack([*queries.values()])
            found[name] = right_SG[np.arange(len(queries)), first_S].astype(float)
            groups[name] = np.arange(len(queries))
    return Scores(found, groups)
