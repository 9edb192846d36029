"""Excluded phrases: *without a hat or a bag*, *no glasses*, *not wearing ...*."""

import re
from collections.abc import Sequence
from dataclasses import replace

from upperson_phrases.lexicon import BODY_PLACES, EXCLUDING, POSSESSION_WORDS, Span, Token

ARTICLES = frozenset({"a", "an", "any"})
_VERBS = frozenset(
    {"is", "are", "was", "were", "has", "have", "wears", "wear", "carries", "holds", "does", "do"}
)
_FINITE = _VERBS | {"he", "she", "who", "that"}
_LEADS = _FINITE | {"with", "in", "and", "but", "wearing", "carrying", "having"}


def without_cuts(sentence: str, cuts: Sequence[tuple[int, int]]) -> str:
    """Return a sentence without some of its characters, tidied up; it may be empty."""
    ends = [0, *(end for _, end in cuts)]
    starts = [*(start for start, _ in cuts), len(sentence)]
    left = " ".join("".join(sentence[i:j] for i, j in zip(ends, starts, strict=True)).split())
    left = re.sub(r"\s+([,.;])", r"\1", left)
    left = re.sub(r"[,;](?:\s*[,;])*(?=\s*(?:[.!?]|$))|([,;])(?:\s*[,;])+", r"\1", left)
    left = re.sub(r"([.!?])(?:\s*[.,!?])+", r"\1", left).strip(" ,;")
    left = re.sub(r"^(?:and|but|or)\s+", "", left)
    left = re.sub(r"(?:\s+(?:and|or|but|with|is|who|wearing))+(\s*[.!?]?)$", r"\1", left)
    return left if re.search(r"\w", left) else ""


class Exclusions:
    """Marks the phrases of a sentence that it excludes, and finds what to cut for the rest."""

    def __init__(self, tokens: Sequence[Token], spans: Sequence[Span]) -> None:
        self._tokens = tokens
        self._words = [token.word for token in tokens]
        self._starting = {span.first: span for span in spans}
        self._inside = {at for span in spans for at in range(span.first, span.last)}

    def cuts(self) -> list[tuple[int, int]]:
        """Mark the excluded phrases; return the characters, from and to, to cut for the rest."""
        cuts = []
        at = 0
        while at < len(self._words):
            end = at + 1
            span = self._starting.get(at)
            if span is not None and span.phrase.negated:  # *A coat that is not red*.
                end = span.last
                cuts.append(self._cut(at, end))
            elif self._words[at] in EXCLUDING and at not in self._inside:
                end = self._reach(at)
                if end > at + 1:
                    cuts.append(self._cut(at, end))
            at = end
        return cuts

    def _reach(self, cue: int) -> int:
        """Exclude the things after an excluding word; return where the last of them ends."""
        at = end = cue + 1
        any_yet = False
        while at < len(self._words):
            span, word = self._starting.get(at), self._words[at]
            leads_on = self._words[at - 1] in ("or", "nor", "and", *ARTICLES)
            is_person = span is not None and span.phrase.kind == "person"
            if any_yet and span is not None and (at == end or (is_person and not leads_on)):
                break  # *No hat red coat*, *no hat woman*.
            if span is not None and span.phrase.noun not in ("", "person"):
                span.phrase = replace(span.phrase, negated=not span.phrase.negated)
                any_yet, at = True, self._after_place(span.last)
                end = at
            elif span is not None or at in self._inside:
                break
            elif self._joins(at) if any_yet else word in POSSESSION_WORDS:
                at += 1
            else:
                break
        return end

    def _joins(self, at: int) -> bool:
        """Whether a word leads on from one excluded thing to the next."""
        word, before = self._words[at], self._words[at - 1]
        return (
            word in ("or", "nor")
            or before in ("or", "nor")
            or (word == "and" and self._bare_thing(at + 1))
            or (word == "," and self._goes_on(at + 1))
            or (word in ARTICLES and before in ("and", ","))
        )

    def _bare_thing(self, at: int) -> bool:
        at += self._words[at : at + 1] != [] and self._words[at] in ARTICLES
        span = self._starting.get(at)
        return span is not None and bool(span.phrase.noun) and not span.phrase.colours

    def _goes_on(self, at: int) -> bool:
        """Whether a comma leads to another excluded thing: *without hat, bag or glasses*."""
        if at < len(self._words) and self._words[at] in ("or", "nor"):
            return True
        at += at < len(self._words) and self._words[at] in ARTICLES
        span = self._starting.get(at)
        if span is None or span.phrase.colours or span.last >= len(self._words):
            return False
        return self._words[span.last] in ("or", "nor")

    def _after_place(self, at: int) -> int:
        if self._words[at : at + 1] in (["on"], ["in"], ["over"], ["around"]):
            end, words = at + 1, BODY_PLACES | {"her", "his", "the"}
            while end < len(self._words) and self._words[end] in words:
                end += 1
            return end if self._words[end - 1] in BODY_PLACES else at
        return at

    def _cut(self, cue: int, end: int) -> tuple[int, int]:
        first, rest = cue, self._words[end : end + 2]
        # *With no hat and blue jeans* becomes *with blue jeans*, and *isn't wearing a hat and has a
        # bag* becomes *has a bag*.
        leads_on = self._words[cue - 1 : cue] in (["with"], ["in"], ["wearing"], ["wears"])
        joined = len(rest) == 2 and rest[0] in ("and", "but") and (leads_on or rest[1] in _FINITE)
        while first > 0 and self._words[first - 1] in (_VERBS if joined else _LEADS):
            first -= 1
        last = end if joined else end - 1
        return self._tokens[first].start, self._tokens[last].end
