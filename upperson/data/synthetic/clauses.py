"""Which attributes a caption mentions, each as a noun phrase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from upperson.data.synthetic import lexicon
from upperson.data.synthetic.lexicon import say
from upperson.data.synthetic.look import CaptionStyle
from upperson.data.synthetic.people import Colour, Person
from upperson.data.synthetic.sampling import chance, choose

Topic = Literal[
    "upper", "lower", "shoes", "bag", "hair", "headwear", "glasses", "umbrella", "phone", "scarf"
]

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
_COUNTS: Mapping[CaptionStyle, Mapping[int, float]] = {
    "list": {2: 22, 3: 38, 4: 28, 5: 12},
    "sentences": {2: 8, 3: 36, 4: 36, 5: 15, 6: 5},
}
_CARRIED: frozenset[Topic] = frozenset({"bag", "umbrella", "phone"})
_SIZES = frozenset({"long", "high", "open"})
_PAIRS: frozenset[Topic] = frozenset({"shoes", "glasses"})


@dataclass(frozen=True, slots=True)
class Clause:
    """One attribute put into words.

    Attributes:
        topic: Which attribute.
        words: The noun phrase without an article, such as ``red striped coat``.
        plural: Whether it takes no indefinite article (jeans, shoes, hair).
    """

    topic: Topic
    words: str
    plural: bool

    @property
    def carried(self) -> bool:
        """Whether one carries it rather than wears it."""
        return self.topic in _CARRIED

    @property
    def paired(self) -> bool:
        """Whether *a pair of* may come before it."""
        return self.topic in _PAIRS or (self.topic == "lower" and self.plural)

    def with_article(self) -> str:
        """The noun phrase with *a* or *an* where one belongs."""
        return self.words if self.plural else with_article(self.words)


def with_article(words: str) -> str:
    """Puts *a* or *an* before a noun phrase.

    The lexicon has no silent *h* and no *u* said as in *uniform*, so the letter decides.
    """
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def sample_clauses(person: Person, style: CaptionStyle, rng: np.random.Generator) -> list[Clause]:
    """Draws 2..6 attributes to mention, most salient ones most often, in random order."""
    open_topics = {topic: weight for topic, weight in _TOPICS.items() if _has(person, topic)}
    count = min(choose(rng, _COUNTS[style]), len(open_topics))
    topics: list[Topic] = []
    while len(topics) < count:
        topic = choose(rng, open_topics)
        del open_topics[topic]
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
    def coloured(colour: Colour | None, noun: str) -> str:
        # Now and then people do not mention a colour.
        if colour is None or chance(rng, 0.08):
            return noun
        return _join_adjectives(say(lexicon.COLOURS[colour], style, rng), noun)

    if topic == "upper":
        return Clause(topic, _upper(person, style, rng), plural=False)
    if topic == "hair":
        return _hair(person, style, rng)
    if topic == "lower":
        noun = say(lexicon.LOWERS[person.lower], style, rng)
        return Clause(topic, coloured(person.lower_colour, noun), plural=person.lower != "skirt")
    if topic == "shoes":
        noun = say(lexicon.SHOES[person.shoes], style, rng)
        return Clause(topic, coloured(person.shoe_colour, noun), plural=True)
    if topic == "bag":
        noun = say(lexicon.BAGS[person.bag], style, rng)
        return Clause(topic, coloured(person.bag_colour, noun), plural=False)
    if topic == "headwear":
        noun = say(lexicon.HEADWEAR[person.headwear], style, rng)
        return Clause(topic, coloured(person.headwear_colour, noun), plural=False)
    if topic == "glasses":
        return Clause(topic, say(lexicon.GLASSES, style, rng), plural=True)
    nouns = {
        "umbrella": lexicon.UMBRELLAS,
        "scarf": lexicon.SCARVES,
        "phone": lexicon.PHONES,
    }
    noun = say(nouns[topic], style, rng)
    return Clause(topic, coloured(person.accessory_colour, noun), plural=False)


def _join_adjectives(adjectives: str, noun: str) -> str:
    # English puts size before colour: a long black coat, not a black long coat.
    size, _, rest = noun.partition(" ")
    if size in _SIZES:
        return " ".join(filter(None, (size, adjectives, rest)))
    return f"{adjectives} {noun}" if adjectives else noun


def _upper(person: Person, style: CaptionStyle, rng: np.random.Generator) -> str:
    words = []
    if person.pattern == "plain" and chance(rng, 0.06):
        words.append("plain")
    if chance(rng, 0.94):
        words.append(say(lexicon.COLOURS[person.upper_colour], style, rng))
    if person.pattern not in {"plain", "logo"} and chance(rng, 0.75):
        words.append(say(lexicon.PATTERNS[person.pattern], style, rng))
    # Sleeves are worth a word only where both lengths occur.
    if person.upper in {"shirt", "dress"} and chance(rng, 0.3):
        short = person.sleeves == "short"
        words.append(say(lexicon.SHORT_SLEEVES if short else lexicon.LONG_SLEEVES, style, rng))
    words = [_join_adjectives(" ".join(words), say(lexicon.UPPERS[person.upper], style, rng))]
    if person.pattern == "logo" and chance(rng, 0.6):
        words.append(say(lexicon.LOGOS, style, rng))
    return " ".join(words)


def _hair(person: Person, style: CaptionStyle, rng: np.random.Generator) -> Clause:
    colour = say(lexicon.HAIR_COLOURS[person.hair_colour], style, rng)
    if person.hair_style in {"short", "long"}:
        both = chance(rng, 0.7)
        if both:
            return Clause("hair", f"{person.hair_style} {colour} hair", plural=True)
        alone = person.hair_style if chance(rng, 0.3) else colour
        return Clause("hair", f"{alone} hair", plural=True)
    if chance(rng, 0.5):
        return Clause("hair", f"{colour} {person.hair_style}", plural=False)
    tied = "tied in" if chance(rng, 0.4) else "in"
    return Clause("hair", f"{colour} hair {tied} a {person.hair_style}", plural=True)
