"""Sentences made of phrases: other ways to say the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from upperson_rt.phrases.grammar import ParsedSentence
from upperson_rt.phrases.lexicon import Kind
from upperson_rt.phrases.phrase import Phrase

__all__ = [
    "ALTERNATIVES",
    "MOST_PARAPHRASES",
    "Alternatives",
    "describe",
    "paraphrases",
    "say_thing",
    "with_article",
]

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
_UNCOUNTED = frozenset({"hair", "luggage", "footwear", "bald"})


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
    """Put phrases into one description of a person.

    Args:
        phrases: At least one; a person among them is the subject, or else *person* is.
        style: ``phrase`` (*a woman in a red coat*), ``bare`` (*woman in red coat*), ``list``
            (*woman, red coat*), ``things`` (*red coat*), ``sentence`` (*The woman is wearing a red
            coat.*) or ``there`` (*There is a woman wearing ...*).
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
    """Say the same in other words, by the grammar alone.

    Args:
        parsed: What to say; what it denies is left out.
        count: Wordings at most, 1 to `MOST_PARAPHRASES`.

    Returns:
        The sentence itself (without what it denies) and up to ``count - 1`` others, no two alike.
        Just the sentence if nothing in it was understood.
    """
    asked = [phrase for phrase in parsed.phrases if not phrase.negated]
    found = {parsed.wanted: None}
    if parsed.understood:
        person = [phrase for phrase in asked if phrase.kind == "person"]
        things = [phrase for phrase in asked if phrase.kind != "person"]
        for order, style in product(_orders(things), _STYLES):
            if len(found) >= count:
                break
            found[describe([*person, *order], style)] = None
    return list(found)


def _orders(things: Sequence[Phrase]) -> list[list[Phrase]]:
    """Return up to four orders, the sentence's own first."""
    turned = [[*things[turn:], *things[:turn]] for turn in range(min(2, len(things)))]
    return [*turned, *([*reversed(order)] for order in turned)] if things else [[]]


def _and(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
