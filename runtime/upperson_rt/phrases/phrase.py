"""A phrase, and where its words are."""

from dataclasses import dataclass

from upperson_rt.phrases.lexicon import Kind

__all__ = ["ENDS", "Phrase", "Span", "Token"]

ENDS = frozenset(",.;:!?()-\u2013\u2014")
"""Marks that end a phrase."""


@dataclass(frozen=True, slots=True)
class Phrase:
    """A part of a sentence that says one thing about a person."""

    kind: Kind
    text: str
    """Words that stand alone, such as ``red coat with black buttons``."""

    start: int
    end: int
    """Where it comes from: characters of the sentence, the last one exclusive."""

    noun: str = ""
    """Plain name of the thing, such as ``coat`` for an overcoat; empty for actions and others."""

    colours: tuple[str, ...] = ()
    """Plain names of its colours."""

    pattern: str = ""
    """Plain name of its pattern, such as ``striped``."""

    negated: bool = False
    """Whether the sentence says that it must not be there."""


@dataclass(frozen=True, slots=True)
class Token:
    """A word in lower case or a mark, and its characters in the sentence."""

    word: str
    start: int
    end: int


@dataclass(slots=True)
class Span:
    """A phrase and its tokens, the last one exclusive."""

    phrase: Phrase
    first: int
    last: int
