"""Sentences that differ from a sentence in one word: *woman in blue coat* of *woman in red coat*.

A picture that matches a sentence scores higher for it than for these.
"""

import re

from upperson_phrases.evidence import ALTERNATIVES
from upperson_phrases.grammar import ParsedSentence
from upperson_phrases.lexicon import KINDS_OF, Phrase


def one_word_changes(parsed: ParsedSentence) -> list[str]:
    """Return `ParsedSentence.read_as` with another person, garment or colour, each change once."""
    text = parsed.read_as
    changed: dict[str, None] = {}
    for phrase in parsed.understood:
        words = text[phrase.start : phrase.end]
        for old, news in _exchanges(phrase):
            for new in news:
                other, count = re.subn(rf"\b{re.escape(old)}\b", new, words, count=1)
                if count and new != old:
                    changed[text[: phrase.start] + other + text[phrase.end :]] = None
    return list(changed)


def _exchanges(phrase: Phrase) -> list[tuple[str, tuple[str, ...]]]:
    """Return the words of a phrase that have alternatives, with these."""
    kind = ALTERNATIVES.get(phrase.kind)
    if kind is None:
        return []
    found = [(colour, kind.colours) for colour in phrase.colours]
    # *Coat* in the place of *clothes* would say no less.
    is_one = phrase.noun not in KINDS_OF and (phrase.kind != "person" or phrase.noun in kind.nouns)
    if phrase.noun and is_one:
        found.append((phrase.noun, kind.nouns))
    return found
