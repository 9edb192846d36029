"""Clauses: one attribute of a person put into words, as a caption mentions it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from upperson_rt.phrases.evidence import with_article
from upperson_synthetic.look import CaptionStyle
from upperson_synthetic.people import (
    ACCESSORIES,
    BAGS,
    COLOURS,
    GLASSES,
    HAIR_COLOURS,
    HEADWEAR,
    LOWERS,
    PATTERNS,
    SHOES,
    SLEEVES,
    UPPERS,
    Colour,
    Person,
    Words,
)
from upperson_synthetic.sampling import chance, choose

Topic = Literal[
    "upper", "lower", "shoes", "bag", "hair", "headwear", "glasses", "umbrella", "phone", "scarf"
]

Mentioned = Mapping[str, object]
"""Names of `Person`'s fields with values."""

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
#: The fields of a thing and of its colour.
_FIELDS: Mapping[Topic, tuple[str, str]] = {
    "lower": ("lower", "lower_colour"),
    "shoes": ("shoes", "shoe_colour"),
    "bag": ("bag", "bag_colour"),
    "headwear": ("headwear", "headwear_colour"),
    "glasses": ("glasses", ""),
    "umbrella": ("accessory", "accessory_colour"),
    "phone": ("accessory", "accessory_colour"),
    "scarf": ("accessory", "accessory_colour"),
}
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

    words: str
    """The noun phrase without an article, such as ``red striped coat``."""

    plural: bool
    """Whether it takes no indefinite article (jeans, shoes, hair)."""

    mentioned: Mentioned
    """What the words say."""

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
    """Draw so many attributes to mention, most salient ones most often, in random order."""
    left = {topic: weight for topic, weight in _TOPICS.items() if _has(person, topic)}
    count = min(count, len(left))
    topics: list[Topic] = []
    while len(topics) < count:
        topic = choose(rng, left)
        del left[topic]
        topics.append(topic)
    return [_clause(person, topic, style, rng) for topic in topics]


def _has(person: Person, topic: Topic) -> bool:
    if topic in {"umbrella", "phone", "scarf"}:
        return person.accessory == topic
    if topic == "glasses":
        return person.glasses
    if topic in {"bag", "lower", "headwear"}:
        return bool(getattr(person, topic) != "none")
    return True


def _clause(person: Person, topic: Topic, style: CaptionStyle, rng: np.random.Generator) -> Clause:
    if topic == "upper":
        return _upper(person, style, rng)
    if topic == "hair":
        return _hair(person, style, rng)
    words, colour, plural = _thing(person, topic)
    noun = say(words, style, rng)
    kind, colour_field = _FIELDS[topic]
    mentioned = {kind: getattr(person, kind)}
    # Now and then people do not mention a colour.
    if colour is not None and not chance(rng, 0.08):
        noun = _join_adjectives(say(COLOURS[colour].words, style, rng), noun)
        mentioned[colour_field] = colour
    return Clause(topic, noun, plural, mentioned)


def _thing(person: Person, topic: Topic) -> tuple[Words, Colour | None, bool]:
    """Return the words, the colour and whether a word is a plural."""
    if topic == "lower":
        return LOWERS[person.lower].words, person.lower_colour, person.lower != "skirt"
    if topic == "shoes":
        return SHOES[person.shoes].words, person.shoe_colour, True
    if topic == "bag":
        return BAGS[person.bag].words, person.bag_colour, False
    if topic == "headwear":
        return HEADWEAR[person.headwear].words, person.headwear_colour, False
    if topic == "glasses":
        return GLASSES, None, True
    return ACCESSORIES[person.accessory].words, person.accessory_colour, False


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
        if chance(rng, 0.7):
            return Clause(
                "hair", f"{person.hair_style} {colour} hair", plural=True, mentioned=mentioned
            )
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
