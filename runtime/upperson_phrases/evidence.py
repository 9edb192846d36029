"""Phrase evidence: the probability that a phrase is true of a picture, from the two towers alone.

A cosine says nothing by itself. Here a phrase competes against what could stand in its place: a red
coat against coats of other colours and other red garments, a backpack against other bags and none.
Its share of the softmax over them is its evidence, 0 to 1.

Shapes: N pictures, D dimensions, T texts.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_phrases.grammar import ParsedSentence, parse_query
from upperson_phrases.lexicon import KINDS_OF, Kind, Phrase

EmbedTexts: TypeAlias = Callable[[Sequence[str]], NDArray[np.float32]]
"""Embeds T sentences as rows of unit length (T, D)."""

# --- Sentences made of phrases: other ways to say the same

MOST_PARAPHRASES = 16

_DYES = ("black", "white", "gray", "red", "orange", "yellow", "green", "blue", "navy", "purple",
         "pink", "brown")  # fmt: skip
_HAIR_DYES = ("black", "brown", "blond", "gray", "red")


@dataclass(frozen=True, slots=True)
class Alternatives:
    """What could stand in the place of a phrase."""

    nouns: tuple[str, ...] = ()
    colours: tuple[str, ...] = ()

    optional: bool = True
    """Whether people may have none of them."""


ALTERNATIVES: Mapping[Kind, Alternatives] = {
    "person": Alternatives(("woman", "man", "girl", "boy"), optional=False),
    "upper": Alternatives(
        ("coat", "jacket", "t-shirt", "shirt", "hoodie", "sweater", "dress"), _DYES, False
    ),
    "lower": Alternatives(("jeans", "trousers", "shorts", "skirt"), _DYES, False),
    "shoes": Alternatives(("sneakers", "boots", "sandals", "shoes"), _DYES, False),
    "headwear": Alternatives(("cap", "beanie", "hat"), _DYES),
    "hair": Alternatives(("short hair", "long hair", "ponytail", "bun"), _HAIR_DYES, False),
    "carried": Alternatives(("backpack", "handbag", "shoulder bag", "suitcase"), _DYES),
}
"""By kind, the usual ones."""


_STYLES = ("phrase", "list", "sentence", "there")
_NO_PLURAL = ("ss", "us", "is")
_UNCOUNTED = frozenset({"hair", "luggage", "baggage", "headwear", "headgear", "footwear", "bald"})


def with_article(words: str) -> str:
    """Put *a* or *an* before a noun phrase, unless it is a plural or *hair*."""
    head = words.lower().split(" with ")[0].split(" tied ")[0].split(" in a ")[0].split()[-1]
    plural = head.endswith("s") and not head.endswith(_NO_PLURAL)
    if plural or head in _UNCOUNTED or not words[0].isalpha():
        return words
    return f"{'an' if words[0].lower() in 'aeiou' else 'a'} {words}"


def say_thing(phrase: Phrase) -> str:
    """Return how a phrase follows a person: *in a red coat*, *with short hair*, *walking*."""
    if phrase.kind in ("action", "other"):
        return phrase.text
    if phrase.kind in ("carried", "hair", "glasses", "accessory"):
        return f"with {with_article(phrase.text)}"
    return f"in {with_article(phrase.text)}"


def describe(phrases: Sequence[Phrase], style: str = "phrase") -> str:
    """Put phrases into one description of a person, or of a *person* if none is among them.

    Styles are ``phrase`` (*a woman in a red coat*), ``bare`` (*woman in red coat*), ``list``
    (*woman, red coat*), ``things`` (*red coat*), ``sentence`` (*The woman is wearing a red coat.*)
    and ``there`` (*There is a woman wearing ...*).
    """
    person = next((phrase.text for phrase in phrases if phrase.kind == "person"), "person")
    things = [phrase for phrase in phrases if phrase.kind != "person"]
    if style in ("list", "things"):
        return ", ".join([person] * (style == "list") + [phrase.text for phrase in things])
    name = str if style == "bare" else with_article
    worn = [name(p.text) for p in things if say_thing(p).startswith("in ")]
    had = [name(p.text) for p in things if say_thing(p).startswith("with ")]
    rest = [p.text for p in things if p.kind in ("action", "other")]
    if style == "sentence":
        parts = [f"is wearing {_and(worn)}"] if worn else []
        parts += [f"has {_and(had)}"] if had else []
        parts += [f"is {text}" for text in rest]
        return f"The {person} {_and(parts)}." if parts else f"The {person}."
    parts = [f"{'wearing' if style == 'there' else 'in'} {_and(worn)}"] if worn else []
    parts += [f"with {_and(had)}"] if had else []
    text = " ".join([name(person), *parts, *rest])
    return f"There is {text}." if style == "there" else text


def paraphrases(parsed: ParsedSentence, count: int) -> list[str]:
    """Return up to ``count`` different wordings, the sentence itself (without exclusions) first."""
    wanted = [phrase for phrase in parsed.phrases if not phrase.negated]
    found = {parsed.wanted: None}
    if parsed.understood:
        person = [phrase for phrase in wanted if phrase.kind == "person"]
        things = [phrase for phrase in wanted if phrase.kind != "person"]
        for order, style in product(_orders(things), _STYLES):
            if len(found) >= count:
                break
            found[describe([*person, *order], style)] = None
    return list(found)


def _orders(things: Sequence[Phrase]) -> list[list[Phrase]]:
    turned = [[*things[turn:], *things[:turn]] for turn in range(min(2, len(things)))]
    return [*turned, *([*reversed(order)] for order in turned)] if things else [[]]


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


# --- What speaks for a phrase in a picture, from the two towers alone


MOST_EXCLUDED = 0.36
"""How much of its score, a cosine, a picture can lose at most for what a sentence excludes."""

_UNHEARD = 0.1
"""Evidence that costs nothing, as there is some of a backpack in most pictures. Not of a red one,
which has twelve times as many competitors."""

_TURN = 0.5
"""How much of what an excluded thing adds to *a person* is taken from what the sentence wants."""

_TEMPERATURE = 0.02
"""Of the softmax: the one that models are trained with, ``upperson/losses.py``."""

_MOST_TEXTS = 4096  # Kept: 2 MB at 128 dimensions, and every contrast of every kind.
_MOST_CONTRASTS = 256  # Of them, as matrices: 8 MB at 128 dimensions. Alerts have many phrases.

_PLAIN = "a person"


_RARE = frozenset({"girl", "boy"})
"""Competitors of a fifth of the weight, as there are fewer of them."""
_ALONE = frozenset({"umbrella", "phone", "book", "bottle", "papers", "box", "camera", "laptop",
                    "stroller", "bicycle", "cart", "skateboard", "dog"})  # fmt: skip
"""Carried beside a bag, not in its place."""


_Contrast: TypeAlias = list[tuple[str, float, bool]]
"""Texts that a phrase competes in, their weights, and whether it is true of them."""
_Embedded: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]
"""Texts of a contrast (T, D), the logarithms of their weights, and 1 for those that agree (T,)."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The phrases of a sentence, and the evidence for each in every hit."""

    parsed: ParsedSentence
    phrases: tuple[Phrase, ...]
    """Those that were weighed, P of them: all but a *person* of whom no more is said."""

    evidence_HP: NDArray[np.float32]
    """(H, P) for H hits, 0 to 1; high for a negated phrase means that what must not be there is.
    NaN for a hit that has left the gallery."""


class Evidence:
    """Phrase evidence in pictures.

    Contrasts are embedded once and kept. Safe for several threads.
    """

    def __init__(self, embed_texts: EmbedTexts) -> None:
        self._embed_texts = embed_texts
        self._kept: dict[str, NDArray[np.float32]] = {}
        self._contrasts: dict[tuple[object, ...], _Embedded] = {}

    def of(self, phrase: Phrase, images_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (N,) evidence, 0 to 1, for a phrase (negated or not) in (N, D)."""
        texts_TD, log_weights_T, agrees_T = self._embedded(phrase)
        logits_NT = images_ND @ texts_TD.T / _TEMPERATURE + log_weights_T
        shares_NT = np.exp(logits_NT - logits_NT.max(axis=1, keepdims=True))
        evidence: NDArray[np.float32] = shares_NT @ agrees_T / shares_NT.sum(axis=1)
        return evidence

    def against(
        self, excluded: Sequence[Phrase], images_ND: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Return (N,) what pictures lose of their scores for what a sentence excludes."""
        heard = []
        for phrase in excluded:
            unheard = 0.0 if phrase.colours else _UNHEARD
            evidence_N = self._of_excluded(phrase, images_ND)
            heard.append(np.maximum(evidence_N - unheard, 0) / (1 - unheard))
        # The square: weak evidence must not outweigh what is wanted.
        lost_N: NDArray[np.float32] = MOST_EXCLUDED * np.square(np.max(heard, axis=0))
        return lost_N.astype(np.float32)

    def left(
        self, excluded: Sequence[Phrase], images_ND: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """Return (N,) shares of a likelihood that are left beside excluded phrases, 0 to 1."""
        left_N = np.ones(len(images_ND))
        for phrase in excluded:
            left_N *= 1 - self.of(phrase, images_ND).astype(np.float64)
        return left_N

    def _of_excluded(self, phrase: Phrase, images_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (N,) evidence: of *any bag* the mean of its own and of the likeliest kind's."""
        own_N = self.of(phrase, images_ND)
        kinds = [self.of(kind, images_ND) for kind in _kinds_of(phrase)]
        return (own_N + np.max(kinds, axis=0)) / 2 if kinds else own_N

    def away(self, embed_D: NDArray[np.float32], excluded: Sequence[Phrase]) -> NDArray[np.float32]:
        """Turn a query (D,) of unit length away from excluded phrases, to look for candidates."""
        things = [kind for phrase in excluded for kind in _kinds_of(phrase) or [phrase]]
        things_TD = self.texts([describe([thing]) for thing in things])
        more_D = things_TD.mean(axis=0) - self.texts([_PLAIN])[0]
        turned_D = embed_D - _TURN * more_D
        away_D: NDArray[np.float32] = (turned_D / np.linalg.norm(turned_D)).astype(np.float32)
        return away_D

    def scores(
        self, sentences: Sequence[str], images_ND: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Return (T, N) scores of pictures for sentences, by which `Retriever.query` ranks them."""
        parsed = [parse_query(sentence) for sentence in sentences]
        readings = [one.readings for one in parsed]
        embeds_RD = self._embed_texts([text for own in readings for text in own])
        firsts = np.cumsum([0, *map(len, readings[:-1])])
        scores_TN: NDArray[np.float32] = np.maximum.reduceat(embeds_RD @ images_ND.T, firsts)
        for row, one in enumerate(parsed):
            if one.excluded:
                scores_TN[row] -= self.against(one.excluded, images_ND)
        return scores_TN

    def _embedded(self, phrase: Phrase) -> _Embedded:
        same = phrase.kind, phrase.text, phrase.noun, phrase.colours
        if (found := self._contrasts.get(same)) is None:
            texts, weights, agrees = zip(*_contrast(phrase), strict=True)
            log_weights_T = np.log(np.array(weights, dtype=np.float32))
            found = self.texts(texts), log_weights_T, np.array(agrees, np.float32)
            kept = self._contrasts if len(self._contrasts) < _MOST_CONTRASTS else {}
            self._contrasts = kept | {same: found}
        return found

    def texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return the embeddings (T, D) of at least one text, those that are kept without a run."""
        kept = self._kept if len(self._kept) + len(texts) <= _MOST_TEXTS else {}
        new = [text for text in dict.fromkeys(texts) if text not in kept]
        if new:
            kept.update(zip(new, self._embed_texts(new), strict=True))
        self._kept = kept
        return np.stack([kept[text] for text in texts])


def _kinds_of(phrase: Phrase) -> list[Phrase]:
    """Return the usual kinds, *red backpack* and so on, of a *red bag*; none of a *backpack*."""
    if phrase.noun not in KINDS_OF:
        return []
    return [
        replace(phrase, text=" ".join([*phrase.colours, noun]), noun=noun)
        for noun in ALTERNATIVES[phrase.kind].nouns
    ]


def _contrast(phrase: Phrase) -> _Contrast:
    alone = phrase.noun in _ALONE
    kind = ALTERNATIVES.get(phrase.kind, Alternatives()) if not alone else Alternatives()
    nouns = kind.nouns
    style = _style(phrase)
    if phrase.noun and style not in (*nouns, ""):
        nouns = (*nouns, style)
    contrast: _Contrast = []
    own = describe([phrase])
    colours = kind.colours or ("",)
    for noun in nouns:
        for colour in colours:
            words = f"{colour} {noun}".strip()
            text = describe([Phrase(phrase.kind, words, 0, 0, noun)])
            is_one = style in ("", noun) or noun in KINDS_OF.get(phrase.noun, ())
            agrees = is_one and (not phrase.colours or colour in phrase.colours)
            contrast.append((text, (0.2 if noun in _RARE else 1.0) / len(colours), agrees))
    agreeing = sum(weight for _, weight, agrees in contrast if agrees)
    if own not in [text for text, _, _ in contrast]:
        contrast.append((own, agreeing or 1.0, True))
        agreeing += agreeing or 1.0
    if kind.optional:  # Of one kind among several; any bag or none has even odds.
        contrast.append((_PLAIN, agreeing if phrase.noun in KINDS_OF else 1.0, False))
    return contrast


def _style(phrase: Phrase) -> str:
    """Return the noun that a phrase competes as; empty where any of its kind will do."""
    if phrase.kind == "hair" and phrase.noun == "hair":
        words = phrase.text.lower().split()
        styles = ("ponytail", "bun", "short", "long")
        found = next((style for style in styles if style in words), "")
        return f"{found} hair" if found in ("short", "long") else found
    return phrase.noun


def weighable(parsed: ParsedSentence) -> tuple[Phrase, ...]:
    """Return the phrases that pictures differ by: *person* is true of all."""
    return tuple(phrase for phrase in parsed.phrases if phrase.noun != "person")
