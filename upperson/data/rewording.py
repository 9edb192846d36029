"""Reworded captions for training, shorter or wrong, and which other people a caption describes.

Both come from the phrases that `upperson_phrases` parses; a caption without one stays as it is.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt

from upperson_phrases import Phrase, parse
from upperson_phrases.evidence import ALTERNATIVES, describe, with_article
from upperson_phrases.lexicon import COLOURS, NOUN_OF
from upperson_rt.errors import InputError

_STYLES = ("phrase", "phrase", "bare", "bare", "list", "sentence")
_PERSON_SHARE = 0.7
"""Shorter captions that say who it is, *woman in red coat*, rather than *red coat*."""

_COLOUR_WORDS = re.compile(
    rf"\b(?:{'|'.join(sorted((' '.join(words) for words in COLOURS), key=len, reverse=True))})\b",
    re.IGNORECASE,
)
_PEOPLE = re.compile(
    rf"\b(?:{'|'.join(words[0] for words in NOUN_OF if NOUN_OF[words][0] == 'person')})\b",
    re.IGNORECASE,
)
_PRONOUNS = re.compile(r"\b(?:he|she|his|her|him)\b", re.IGNORECASE)
_OTHERS = {
    "man": "woman",
    "boy": "girl",
    "male": "female",
    "gentleman": "lady",
    "guy": "lady",
    "he": "she",
    "his": "her",
    "him": "her",
}
_OTHER_PERSON = {**_OTHERS, **{other: word for word, other in reversed(_OTHERS.items())}}
"""Words for people and their counterparts of the other gender; *her* becomes *his*."""

_SAMPLE = 1000

_Edit = tuple[int, int, str]
"""Characters from and to, and what comes in their place."""


def shorter(caption: str, rng: np.random.Generator) -> str:
    """Keep a random part of a caption's phrases: *red coat*, *woman in red coat*, or more."""
    phrases = _understood(caption)
    things = [phrase for phrase in phrases if phrase.kind != "person"]
    if not things:
        return caption
    count = int(rng.integers(1, len(things) + 1))
    kept = [things[index] for index in sorted(rng.permutation(len(things))[:count])]
    person = [phrase for phrase in phrases if phrase.kind == "person"][:1]
    style = _STYLES[int(rng.integers(len(_STYLES)))]
    if rng.random() >= _PERSON_SHARE:
        person, style = [], style if count > 1 else "things"
    return describe([*person, *kept], style)


def wrong(caption: str, rng: np.random.Generator) -> str:
    """Make a caption false of its person by one change, or return it as it is.

    The change is another colour, exchanged colours, another thing of the same kind, an excluded
    thing (*without a backpack*), or a person of the other gender.
    """
    things = _understood(caption)
    for way in rng.permutation(len(_WAYS)):
        edits = _WAYS[way](caption, things, rng)
        if edits:
            return _apply(caption, edits)
    return caption


Rewording = Literal["shorten_captions", "wrong_captions"]
"""Options of a recipe that reword captions."""


def require_phrases(captions: Sequence[str], option: Rewording) -> str:
    """Refuse an option that rewords captions where it could reword none of them.

    Returns a line about the captions that stay as they are, if those are more than half.
    """
    sample = captions[:: max(1, len(captions) // _SAMPLE)]
    if option == "shorten_captions":
        needed = "in which the grammar reads a thing, such as 'red coat'"
        usable = sum(
            any(phrase.kind != "person" for phrase in _understood(caption)) for caption in sample
        )
    else:
        needed = "of which the grammar can say something wrong, such as 'woman in red coat'"
        usable = sum(wrong(caption, np.random.default_rng(0)) != caption for caption in sample)
    if not usable:
        raise InputError(
            f"{option} needs captions {needed}; of {len(sample)} captions it finds none: they must "
            f"be English and say what people wear or carry, or switch {option} off",
            code="captions_not_readable",
            option=option,
            sample=len(sample),
        )
    if 2 * usable >= len(sample):
        return ""
    return (
        f"{option} leaves most captions as they are: only {usable} of {len(sample)} are captions "
        f"{needed}"
    )


def _understood(caption: str) -> list[Phrase]:
    return [phrase for phrase in parse(caption).understood if phrase.kind != "action"]


def _recolour(caption: str, things: Sequence[Phrase], rng: np.random.Generator) -> list[_Edit]:
    coloured = [phrase for phrase in things if phrase.colours]
    if not coloured:
        return []
    phrase = coloured[int(rng.integers(len(coloured)))]
    words = _colour_in(caption, phrase)
    dyes = ALTERNATIVES[phrase.kind].colours if phrase.kind in ALTERNATIVES else ()
    others = [dye for dye in dyes if dye not in phrase.colours]
    if words is None or not others:
        return []
    return [(*words.span(), others[int(rng.integers(len(others)))])]


def _exchange(caption: str, things: Sequence[Phrase], rng: np.random.Generator) -> list[_Edit]:
    plain = [phrase for phrase in things if len(phrase.colours) == 1 and phrase.kind != "hair"]
    order = rng.permutation(len(plain))
    for one, other in pairwise(order):
        words = _colour_in(caption, plain[one]), _colour_in(caption, plain[other])
        if words[0] and words[1] and plain[one].colours != plain[other].colours:
            return [(*words[0].span(), words[1][0]), (*words[1].span(), words[0][0])]
    return []


def _replace(caption: str, things: Sequence[Phrase], rng: np.random.Generator) -> list[_Edit]:
    # *A man ... her bag* and *a boy ... the woman* would give themselves away.
    people = not _PRONOUNS.search(caption) and len(_PEOPLE.findall(caption)) == 1
    known = [
        phrase
        for phrase in things
        if phrase.kind in ALTERNATIVES
        and phrase.noun in ALTERNATIVES[phrase.kind].nouns
        and (people or phrase.kind != "person")
    ]
    for index in rng.permutation(len(known)):
        phrase = known[index]
        found = re.search(
            rf"\b{re.escape(phrase.noun)}\b", caption[phrase.start : phrase.end], re.IGNORECASE
        )
        if found:
            # *A skirt* and *jeans* would need other words around them.
            others = [
                noun
                for noun in ALTERNATIVES[phrase.kind].nouns
                if noun != phrase.noun and _is_plural(noun) == _is_plural(phrase.noun)
            ]
            if not others:
                continue
            other = others[int(rng.integers(len(others)))]
            return [(phrase.start + found.start(), phrase.start + found.end(), other)]
    return []


def _is_plural(noun: str) -> bool:
    return with_article(noun) == noun


def _deny(caption: str, things: Sequence[Phrase], rng: np.random.Generator) -> list[_Edit]:
    named = [phrase for phrase in things if phrase.kind not in ("person", "hair")]
    if not named:
        return []
    phrase = named[int(rng.integers(len(named)))]
    before = re.search(
        r"(?:\b(with|in|wearing)\s+)?(?:\ban?\s+)?$", caption[: phrase.start], re.IGNORECASE
    )
    if before is None:
        return []
    if not before[1]:
        return [(before.start(), phrase.start, "no ")]
    found = caption[phrase.start : phrase.end]
    return [(before.start(), phrase.end, f"without {with_article(found)}")]


def _regender(caption: str, things: Sequence[Phrase], rng: np.random.Generator) -> list[_Edit]:
    people = [*_PEOPLE.finditer(caption)]
    if not people or any(found[0].lower() not in _OTHER_PERSON for found in people):
        return []
    return [
        (*found.span(), other.capitalize() if found[0][0].isupper() else other)
        for found in [*people, *_PRONOUNS.finditer(caption)]
        for other in [_OTHER_PERSON[found[0].lower()]]
    ]


_Way = Callable[[str, Sequence[Phrase], np.random.Generator], list[_Edit]]
_WAYS: tuple[_Way, ...] = (_recolour, _exchange, _replace, _deny, _regender)


def _colour_in(caption: str, phrase: Phrase) -> re.Match[str] | None:
    return _COLOUR_WORDS.search(caption, phrase.start, phrase.end)


def _apply(caption: str, edits: Sequence[_Edit]) -> str:
    for start, end, text in sorted(edits, reverse=True):
        head, tail = caption[:start], caption[end:]
        article = re.search(r"\b(an?)\s+$", head)
        if article:
            right = "an" if text[:1].lower() in "aeiou" else "a"
            head = f"{head[: article.start()]}{right} "
        caption = f"{head}{text}{tail}"
    return caption


# --- Which people a caption describes, by the attributes that captions mention
#
# *Red coat* describes every person in a red coat. Without this, all of them but the caption's own
# person would count as wrong in a batch.
#
# Shapes: N captions of a batch, P pairs of a data set, I identities, K facts.

Fact = tuple[str, ...]
"""One attribute that a phrase mentions, such as a coat, or that this coat is red."""


class CaptionAttributes:
    """The attributes that the captions of a data set mention, as columns of a table.

    A caption describes a person whose own captions mention everything it mentions. A caption with
    any other attribute, or one that the grammar does not understand, describes only its own person.
    ``labels_P`` are the identities of the captions, from 0.
    """

    def __init__(self, captions: Sequence[str], labels_P: npt.NDArray[np.int64]) -> None:
        facts = [[*_facts(parse(caption).phrases)] for caption in captions]
        first_label: dict[Fact, int] = {}
        shared: set[Fact] = set()
        for label, each in zip(labels_P.tolist(), facts, strict=True):
            shared.update(fact for fact in each if first_label.setdefault(fact, label) != label)
        self._column = {fact: number for number, fact in enumerate(sorted(shared))}
        known_IK = np.zeros((int(labels_P.max(initial=-1)) + 1, self.width), dtype=bool)
        for label, each in zip(labels_P, facts, strict=True):
            known_IK[label, [self._column[fact] for fact in each if fact in shared]] = True
        # Loader processes get a copy: a bit for each fact.
        self._known = np.packbits(known_IK, axis=1)

    @property
    def width(self) -> int:
        """Columns K: facts about several people, and a last one for facts about a single person."""
        return len(self._column) + 1

    def mentioned_by(self, captions: Sequence[str]) -> npt.NDArray[np.bool_]:
        """Return the facts that captions mention, [N, K]."""
        mentioned_NK = np.zeros((len(captions), self.width), dtype=bool)
        for row_K, caption in zip(mentioned_NK, captions, strict=True):
            phrases = parse(caption).phrases
            understood = all(phrase.kind != "other" for phrase in phrases)
            facts = [*_facts(phrases)] if understood else []
            row_K[[self._column.get(fact, -1) for fact in facts] or [-1]] = True
        return mentioned_NK

    def known_of(self, labels_N: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Return the facts that any caption of some people mentions, [N, K]."""
        known = np.unpackbits(self._known[labels_N], axis=1, count=self.width)
        return known.astype(bool)


def _facts(phrases: Iterable[Phrase]) -> Iterator[Fact]:
    for phrase in phrases:
        if phrase.kind in {"action", "other"} or phrase.noun == "person":
            continue  # Actions pass, and each of them is a person.
        # A hair style has no name of its own: it counts as written.
        name = phrase.text.lower() if phrase.kind == "hair" else phrase.noun
        thing = (phrase.kind, name, "excluded" if phrase.negated else "")
        yield thing
        for colour in phrase.colours:
            yield (*thing, colour)
        if phrase.pattern:
            yield (*thing, phrase.pattern)
