"""Corrections of misspelt words, from the words that the grammar knows."""

import re
from collections.abc import Mapping

from upperson_phrases.lexicon import (
    ACTIONS,
    BODY_PLACES,
    DETAILS,
    EXCLUDING,
    MODIFIERS,
    NOUN_OF,
    SMALL_WORDS,
    singulars,
)

WORDS = (
    {word for words in NOUN_OF for word in words}
    | (ACTIONS | BODY_PLACES | DETAILS | EXCLUDING | MODIFIERS | SMALL_WORDS)
)  # fmt: skip
_DESCRIBING = sorted(word for word in WORDS - SMALL_WORDS if len(word) > 2)
_LONGEST = 2 + max(map(len, _DESCRIBING))
_SHORT = 8
"""Up to this many letters one edit is allowed, in longer words two."""
_RIGHT = {
    "anklet", "biker", "crutch", "crutches", "plait", "plaits", "skateboarder", "smock", "trans",
    "witch",
}  # fmt: skip
"""Words that the grammar does not know, near others that it knows."""


def correction(word: str) -> str | None:
    """Return the known word that a misspelt one stands for, or None if none is near.

    An edit inserts, removes or replaces a letter, or swaps two neighbours, which is the likeliest;
    words of three letters may only have two swapped. The first letter must be right, or swapped
    with the second: other near words are seldom meant.
    """
    word = word.lower()
    written_ways = [word, *singulars(word)]
    if not 3 <= len(word) <= _LONGEST or not (WORDS | _RIGHT).isdisjoint(written_ways):
        return None
    from rapidfuzz import process  # Only here: most queries have no such word.
    from rapidfuzz.distance import OSA

    for written in written_ways:  # *Jackts* is far from every singular.
        most = 1 if len(written) <= _SHORT else 2
        near = process.extract(
            written, _DESCRIBING, scorer=OSA.distance, score_cutoff=most, limit=None
        )
        likely = (
            (edits, sorted(found) != sorted(written), found)
            for found, edits, _ in near
            if found[0] in written[:2]
        )
        best = min(likely, default=None)
        if best is not None and (len(word) > 3 or not best[1]):
            return str(best[2])
    return None


def with_corrections(sentence: str, meant: Mapping[str, str]) -> str:
    """Return a sentence with misspelt words (any case) replaced by what they mean."""
    lowered = {word.lower(): near for word, near in meant.items()}
    return re.sub(r"[^\W\d_]+", lambda word: lowered.get(word[0].lower(), word[0]), sentence)
