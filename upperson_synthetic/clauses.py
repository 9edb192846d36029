"""Clauses: one attribute of a person put into words, as a caption mentions it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from upperson_phrases.evidence import with_article
from upperson_synthetic.look import CaptionStyle
from upperson_synthetic.people import (
    COLOURS,
    GLASSES,
    HAIR_COLOURS,
    PATTERNS,
    SLEEVES,
    TABLES,
    UPPERS,
    Person,
    Words,
)
from upperson_synthetic.sampling import chance, choose

Topic = Literal[
    "upper", "lower", "shoes", "bag", "headwear", "hair", "glasses", "scarf", "umbrella", "phone"
]
"""In the order of captions that are lists."""

Mentioned = Mapping[str, object]  # Names of `Person`'s fields with values.

_TOPICS: Mapping[Topic, float] = {
    "upper": 40,
    "lower": 22,
    "shoes": 13,
    "bag": 16,
    "hair": 11,
    "headwear": 12,
    "glasses": 6,
    "umbrella": 12,
    "phone": 9,
    "scarf": 10,
}
_ACCESSORIES: frozenset[Topic] = frozenset({"umbrella", "phone", "scarf"})
_CARRIED: frozenset[Topic] = frozenset({"bag", "umbrella", "phone"})
_PAIRS: frozenset[Topic] = frozenset({"shoes", "glasses"})
_SIZES = frozenset({"long", "high", "open"})


def say(words: Words, style: CaptionStyle, rng: np.random.Generator) -> str:
    """Draw one phrase as often as a caption style uses it."""
    column = 0 if style == "list" else 1
    return choose(rng, {phrase: weights[column] for phrase, weights in words.items()})


@dataclass(frozen=True, slots=True)
class Clause:
    """One attribute put into words."""

    topic: Topic

    words: str  # The noun phrase without an article, such as ``red striped coat``.
    plural: bool  # Whether it takes no indefinite article (jeans, shoes, hair).
    mentioned: Mentioned  # What the words say.

    @property
    def carried(self) -> bool:
        """Whether one carries it rather than wears it."""
        return self.topic in _CARRIED

    @property
    def worn(self) -> bool:
        """Whether a person wears it."""
        return not self.carried and self.topic != "hair"

    @property
    def paired(self) -> bool:
        """Whether *a pair of* may come before it."""
        return self.topic in _PAIRS or (self.topic == "lower" and self.plural)

    def with_article(self) -> str:
        """Return the noun phrase with *a* or *an* where one belongs."""
        return self.words if self.plural else with_article(self.words)


def sample_clauses(
    person: Person, style: CaptionStyle, count: int, rng: np.random.Generator
) -> list[Clause]:
    """Draw so many attributes to mention, the most salient ones most often, in random order."""
    left = {topic: weight for topic, weight in _TOPICS.items() if _has(person, topic)}
    count = min(count, len(left))
    topics: list[Topic] = []
    while len(topics) < count:
        topic = choose(rng, left)
        del left[topic]
        topics.append(topic)
    return [_clause(person, topic, style, rng) for topic in topics]


def _has(person: Person, topic: Topic) -> bool:
    if topic in _ACCESSORIES:
        return person.accessory == topic
    if topic == "glasses":
        return person.glasses
    return topic == "hair" or bool(getattr(person, topic) != "none")


def _clause(person: Person, topic: Topic, style: CaptionStyle, rng: np.random.Generator) -> Clause:
    if topic == "upper":
        return _upper(person, style, rng)
    if topic == "hair":
        return _hair(person, style, rng)
    field: str = "accessory" if topic in _ACCESSORIES else topic
    value = getattr(person, field)
    noun = say(GLASSES if topic == "glasses" else TABLES[field][value].words, style, rng)
    mentioned: dict[str, object] = {field: value}
    colour_field = "shoe_colour" if topic == "shoes" else f"{field}_colour"
    colour = getattr(person, colour_field, None)  # Glasses have none.
    # Now and then people do not mention a colour.
    if colour is not None and not chance(rng, 0.08):
        noun = _join_adjectives(say(COLOURS[colour].words, style, rng), noun)
        mentioned[colour_field] = colour
    plural = topic in _PAIRS or (topic == "lower" and value != "skirt")
    return Clause(topic, noun, plural, mentioned)


def _join_adjectives(adjectives: str, noun: str) -> str:
    # English puts size before colour: a long black coat, not a black long coat.
    size, _, rest = noun.partition(" ")
    if size in _SIZES:
        return " ".join(filter(None, (size, adjectives, rest)))
    return f"{adjectives} {noun}" if adjectives else noun


def _upper(person: Person, style: CaptionStyle, rng: np.random.Generator) -> Clause:
    words = []
    mentioned: dict[str, object] = {"upper": person.upper}
    if person.pattern == "plain" and chance(rng, 0.06):
        words.append("plain")
        mentioned["pattern"] = person.pattern
    if chance(rng, 0.94):
        words.append(say(COLOURS[person.upper_colour].words, style, rng))
        mentioned["upper_colour"] = person.upper_colour
    if person.pattern not in {"plain", "logo"} and chance(rng, 0.75):
        words.append(say(PATTERNS[person.pattern].words, style, rng))
        mentioned["pattern"] = person.pattern
    # Sleeves are worth a word only where both lengths occur.
    if person.upper in {"shirt", "dress"} and chance(rng, 0.3):
        words.append(say(SLEEVES[person.sleeves], style, rng))
        mentioned["sleeves"] = person.sleeves
    words = [_join_adjectives(" ".join(words), say(UPPERS[person.upper].words, style, rng))]
    if person.pattern == "logo" and chance(rng, 0.6):
        words.append(say(PATTERNS["logo"].words, style, rng))
        mentioned["pattern"] = person.pattern
    return Clause("upper", " ".join(words), plural=False, mentioned=mentioned)


def _hair(person: Person, style: CaptionStyle, rng: np.random.Generator) -> Clause:
    colour = say(HAIR_COLOURS[person.hair_colour].words, style, rng)
    mentioned = {"hair_style": person.hair_style, "hair_colour": person.hair_colour}
    if person.hair_style in {"short", "long"}:
        words = f"{person.hair_style} {colour} hair"
        if not chance(rng, 0.7):
            alone = chance(rng, 0.3)
            del mentioned["hair_colour" if alone else "hair_style"]
            words = f"{person.hair_style if alone else colour} hair"
        return Clause("hair", words, plural=True, mentioned=mentioned)
    if chance(rng, 0.5):
        words = f"{colour} {person.hair_style}"
        return Clause("hair", words, plural=False, mentioned=mentioned)
    tied = "tied in" if chance(rng, 0.4) else "in"
    words = f"{colour} hair {tied} a {person.hair_style}"
    return Clause("hair", words, plural=True, mentioned=mentioned)
