"""Corrections of misspelt words, from the words that the grammar knows."""

import re
from collections.abc import Mapping

from rapidfuzz import process
from rapidfuzz.distance import OSA

from upperson_rt.phrases.lexicon import (
    ACTIONS,
    BODY_PLACES,
    DETAILS,
    EXCLUDING,
    MODIFIERS,
    NOUN_OF,
    SMALL_WORDS,
)

WORDS = (
    {word for words in NOUN_OF for word in words}
    | (ACTIONS | BODY_PLACES | DETAILS | EXCLUDING | MODIFIERS | SMALL_WORDS)
)  # fmt: skip
_DESCRIBING = sorted(word for word in WORDS - SMALL_WORDS if len(word) > 2)
_SHORT = 6
"""Up to this many letters one edit is allowed, in longer words two."""


def correction(word: str) -> str | None:
    """Return the known word that a misspelt one stands for, or None if none is near.

    An edit inserts, removes or replaces a letter, or swaps two neighbours. The first letter must be
    right, or swapped with the second: other near words are seldom meant.
    """
    word = word.lower()
    singulars = word.removesuffix("s"), word.removesuffix("es")
    if len(word) < 3 or not WORDS.isdisjoint((word, *singulars)):
        return None
    most = 1 if len(word) <= _SHORT else 2
    near = process.extract(word, _DESCRIBING, scorer=OSA.distance, score_cutoff=most, limit=None)
    likely = (found for found in near if found[0][0] in word[:2])
    best = min(likely, key=lambda found: found[1], default=None)
    if best is None:  # *Jackts* is far from every singular.
        return correction(word[:-1]) if word.endswith("s") else None
    return str(best[0])


def with_corrections(sentence: str, meant: Mapping[str, str]) -> str:
    """Return a sentence with misspelt words (any case) replaced by what they mean."""
    lowered = {word.lower(): near for word, near in meant.items()}
    return re.sub(r"[^\W\d_]+", lambda word: lowered.get(word[0].lower(), word[0]), sentence)
