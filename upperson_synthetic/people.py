"""What a synthetic person is: attributes, how often each value occurs, its colour and its words.

Both caption styles share one vocabulary, and differ in how often they use a synonym. Values of
weight 0 occur only where a site has them (`SiteThing`): no base was trained on their words.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from upperson_synthetic.sampling import chance, choose

Gender = Literal["man", "woman", "boy", "girl"]
Colour = Literal[
    "black",
    "white",
    "gray",
    "red",
    "orange",
    "yellow",
    "green",
    "blue",
    "navy",
    "purple",
    "pink",
    "brown",
]
HairColour = Literal["black", "brown", "blond", "gray", "red"]
HairStyle = Literal["short", "long", "ponytail", "bun"]
Headwear = Literal["none", "cap", "beanie", "hat", "hood"]
Upper = Literal[
    "coat",
    "jacket",
    "t-shirt",
    "shirt",
    "hoodie",
    "sweater",
    "dress",
    "steward vest",
    "porter uniform",
    "school blazer",
]
Pattern = Literal["plain", "striped", "checked", "dotted", "logo"]
Sleeves = Literal["long", "short"]
Lower = Literal["jeans", "trousers", "shorts", "skirt", "none"]
Shoes = Literal["sneakers", "boots", "sandals", "leather shoes"]
Bag = Literal["none", "backpack", "handbag", "shoulder bag", "suitcase", "tote bag"]
Accessory = Literal["none", "umbrella", "phone", "scarf"]

Rgb = tuple[int, int, int]  # Red, green and blue, each 0..255, before any camera changes them.

Words = Mapping[str, tuple[float, float]]
"""Phrases with their weights in the ``list`` and in the ``sentences`` style."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Value:
    """One value of an attribute."""

    weight: float  # How often it occurs, relative to the other values.
    words: Words  # Empty where captions have no word of its own for it.
    men: float | None = field(default=None, kw_only=True)
    """The weight among men and boys, where it is another one."""


@dataclass(frozen=True, slots=True)
class Tint(Value):
    """A value that is a colour."""

    rgb: Rgb


FEMALE: frozenset[Gender] = frozenset({"woman", "girl"})
CHILDREN: frozenset[Gender] = frozenset({"boy", "girl"})

GENDERS: Mapping[Gender, Value] = {
    "woman": Value(43, {"woman": (14, 10), "lady": (3, 5), "female": (3, 3)}),
    "man": Value(43, {"man": (14, 10), "male": (3, 3), "guy": (2, 3), "gentleman": (1, 2)}),
    "girl": Value(7, {"girl": (6, 3), "young girl": (2, 3), "little girl": (2, 3)}),
    "boy": Value(7, {"boy": (6, 3), "young boy": (2, 3), "little boy": (2, 3)}),
}
COLOURS: Mapping[Colour, Tint] = {
    "black": Tint(
        12, {"black": (16, 12), "jet black": (1, 2), "pitch black": (1, 2)}, (28, 28, 30)
    ),
    "white": Tint(10, {"white": (16, 12), "ivory": (1, 2), "snow white": (1, 2)}, (240, 240, 236)),
    "gray": Tint(8, {"gray": (10, 5), "grey": (5, 8), "silver": (1, 2)}, (136, 138, 140)),
    "red": Tint(15, {"red": (14, 9), "crimson": (2, 3), "scarlet": (2, 3)}, (204, 24, 34)),
    "orange": Tint(
        7, {"orange": (16, 11), "bright orange": (2, 4), "tangerine": (1, 2)}, (244, 126, 22)
    ),
    "yellow": Tint(
        8, {"yellow": (16, 11), "bright yellow": (2, 4), "golden": (1, 2)}, (246, 212, 38)
    ),
    "green": Tint(9, {"green": (15, 10), "emerald": (1, 3), "forest green": (1, 2)}, (36, 140, 62)),
    "blue": Tint(10, {"blue": (15, 10), "royal blue": (2, 3), "cobalt": (1, 2)}, (40, 104, 214)),
    "navy": Tint(6, {"navy": (8, 4), "dark blue": (5, 8), "navy blue": (4, 4)}, (26, 38, 92)),
    "purple": Tint(7, {"purple": (14, 10), "violet": (3, 5)}, (122, 46, 158)),
    "pink": Tint(7, {"pink": (14, 10), "rose": (2, 3), "hot pink": (1, 2)}, (246, 134, 180)),
    "brown": Tint(7, {"brown": (14, 10), "chocolate": (2, 3), "dark brown": (2, 4)}, (112, 68, 36)),
}
#: Denim is duller and lighter than dyed cloth of the same name; the words are those of `COLOURS`.
JEANS_COLOURS: Mapping[Colour, Tint] = {
    "blue": Tint(50, {}, (74, 112, 166)),
    "navy": Tint(18, {}, (38, 52, 92)),
    "black": Tint(16, {}, (40, 41, 46)),
    "gray": Tint(10, {}, (124, 128, 136)),
    "white": Tint(6, {}, (230, 230, 226)),
}
SKIN: tuple[Rgb, ...] = ((244, 208, 182), (222, 172, 136), (172, 118, 82), (108, 70, 48))
HAIR_COLOURS: Mapping[HairColour, Tint] = {
    "black": Tint(32, {"black": (12, 8), "dark": (3, 6)}, (24, 20, 20)),
    "brown": Tint(28, {"brown": (14, 10), "brunette": (2, 3)}, (88, 54, 32)),
    "blond": Tint(20, {"blond": (8, 5), "blonde": (4, 7), "fair": (1, 3)}, (222, 184, 104)),
    "gray": Tint(10, {"gray": (8, 5), "grey": (4, 6)}, (172, 172, 174)),
    "red": Tint(10, {"red": (10, 6), "ginger": (3, 5)}, (176, 74, 28)),
}
HAIR_STYLES: Mapping[HairStyle, Value] = {
    "short": Value(18, {}, men=86),
    "long": Value(42, {}, men=8),
    "ponytail": Value(24, {}, men=4),
    "bun": Value(16, {}, men=2),
}
GLASSES: Words = {"glasses": (10, 7), "eyeglasses": (1, 2), "spectacles": (1, 2)}
HEADWEAR: Mapping[Headwear, Value] = {
    "none": Value(62, {}),
    "cap": Value(12, {"cap": (9, 6), "baseball cap": (3, 5)}),
    "beanie": Value(10, {"beanie": (9, 6), "knit hat": (2, 4), "woolen hat": (1, 2)}),
    "hat": Value(9, {"hat": (10, 6), "brimmed hat": (2, 4)}),
    "hood": Value(7, {"raised hood": (1, 1)}),
}
UPPERS: Mapping[Upper, Value] = {
    "coat": Value(30, {"coat": (14, 10), "overcoat": (2, 4), "long coat": (2, 4)}, men=18),
    "jacket": Value(14, {"jacket": (14, 10), "windbreaker": (2, 3)}, men=20),
    "t-shirt": Value(15, {"t-shirt": (12, 9), "tee": (3, 3), "tee shirt": (1, 3)}, men=20),
    "shirt": Value(
        12, {"shirt": (14, 9), "button up shirt": (2, 4), "collared shirt": (1, 3)}, men=16
    ),
    "hoodie": Value(10, {"hoodie": (12, 9), "hooded sweatshirt": (2, 4)}, men=14),
    "sweater": Value(12, {"sweater": (12, 8), "pullover": (3, 4), "jumper": (1, 3)}),
    "dress": Value(15, {"dress": (14, 11), "gown": (1, 2), "frock": (1, 2)}, men=0),
    "steward vest": Value(0, {"steward vest": (8, 6), "marshal vest": (2, 4)}),
    "porter uniform": Value(0, {"porter uniform": (8, 6), "bellhop uniform": (2, 4)}),
    "school blazer": Value(0, {"school blazer": (8, 6), "crested blazer": (2, 4)}),
}
PATTERNS: Mapping[Pattern, Value] = {
    "plain": Value(62, {}),
    "striped": Value(13, {"striped": (8, 6), "stripy": (1, 2)}),
    "checked": Value(10, {"checked": (5, 3), "plaid": (4, 5), "checkered": (2, 3)}),
    "dotted": Value(6, {"dotted": (4, 2), "polka dot": (3, 4), "spotted": (2, 3)}),
    "logo": Value(9, {"with a logo": (4, 3), "with a print": (2, 3)}),
}
SLEEVES: Mapping[Sleeves, Words] = {
    "short": {"short sleeved": (3, 3), "short sleeve": (2, 3)},
    "long": {"long sleeved": (3, 3), "long sleeve": (2, 3)},
}
LOWERS: Mapping[Lower, Value] = {
    "jeans": Value(34, {"jeans": (14, 10), "denim jeans": (2, 4), "denim pants": (1, 3)}, men=40),
    "trousers": Value(30, {"trousers": (9, 5), "pants": (7, 9), "slacks": (1, 2)}, men=42),
    "shorts": Value(13, {"shorts": (12, 9), "bermuda shorts": (1, 3)}, men=18),
    "skirt": Value(23, {"skirt": (1, 1)}, men=0),
}
SHOES: Mapping[Shoes, Value] = {
    "sneakers": Value(40, {"sneakers": (10, 7), "trainers": (2, 4), "running shoes": (2, 4)}),
    "boots": Value(25, {"boots": (12, 9), "high boots": (1, 3)}),
    "sandals": Value(13, {"sandals": (12, 9), "open sandals": (1, 2)}),
    "leather shoes": Value(22, {"leather shoes": (6, 4), "formal shoes": (3, 4), "shoes": (5, 5)}),
}
BAGS: Mapping[Bag, Value] = {
    "none": Value(28, {}),
    "backpack": Value(24, {"backpack": (13, 9), "rucksack": (2, 4)}),
    "handbag": Value(18, {"handbag": (11, 7), "purse": (4, 5)}),
    "shoulder bag": Value(18, {"shoulder bag": (9, 6), "messenger bag": (3, 4), "satchel": (1, 3)}),
    "suitcase": Value(
        12, {"suitcase": (12, 8), "rolling suitcase": (2, 4), "trolley case": (1, 2)}
    ),
    "tote bag": Value(0, {"branded tote bag": (6, 4), "branded tote": (3, 4), "tote": (1, 2)}),
}
ACCESSORIES: Mapping[Accessory, Value] = {
    "none": Value(66, {}),
    "umbrella": Value(10, {"umbrella": (1, 1)}),
    "phone": Value(11, {"phone": (9, 5), "cell phone": (3, 4), "mobile phone": (2, 4)}),
    "scarf": Value(13, {"scarf": (12, 9), "neck scarf": (1, 2)}),
}

#: The fields a distractor may change, one at a time, with how often each is chosen. A field that
#: makes an object appear or vanish is left out, because the object's colour would change too.
VARIANT_FIELDS: Mapping[str, float] = {
    "upper_colour": 16,
    "lower_colour": 16,
    "shoe_colour": 14,
    "bag_colour": 12,
    "bag": 10,
    "headwear_colour": 7,
    "accessory_colour": 5,
    "hair_colour": 8,
    "hair_style": 6,
    "glasses": 4,
    "pattern": 8,
    "shoes": 6,
    "lower": 5,
    "upper": 5,
    "gender": 5,
}
#: What is hard to see is what look-alikes teach, so they differ in it more often.
_LOOK_ALIKE_FIELDS = {**VARIANT_FIELDS, "upper": 24, "lower": 12, "bag": 16}
TABLES: Mapping[str, Mapping[Any, Value]] = {
    "accessory": ACCESSORIES,
    "bag": BAGS,
    "gender": GENDERS,
    "hair_colour": HAIR_COLOURS,
    "hair_style": HAIR_STYLES,
    "headwear": HEADWEAR,
    "lower": LOWERS,
    "pattern": PATTERNS,
    "shoes": SHOES,
    "upper": UPPERS,
}
"""Fields that vary in kind; the others are colours."""
_STAFF_WEAR: frozenset[Upper] = frozenset({"steward vest", "porter uniform", "school blazer"})


@dataclass(frozen=True, slots=True)
class SiteThing:
    """A garment or bag of one site, which people elsewhere do not have."""

    field: Literal["upper", "bag"]
    value: str  # A key of `UPPERS` or `BAGS` whose weight is 0.
    share: float  # Of the people who have it, 0..1.
    colours: tuple[Colour, ...]  # In which it is made, each as often.


@dataclass(frozen=True, slots=True)
class Person:
    """Everything about a person that stays the same in all of their pictures.

    A colour is None exactly when the thing it belongs to is absent (a hood has the colour of the
    upper garment, a phone has none). A dress is an upper garment without a lower one. ``skin`` is
    an index into `SKIN`; captions never mention it.
    """

    gender: Gender
    hair_colour: HairColour
    hair_style: HairStyle
    headwear: Headwear
    headwear_colour: Colour | None
    glasses: bool
    upper: Upper
    upper_colour: Colour
    pattern: Pattern
    sleeves: Sleeves
    lower: Lower
    lower_colour: Colour | None
    shoes: Shoes
    shoe_colour: Colour
    bag: Bag
    bag_colour: Colour | None
    accessory: Accessory
    accessory_colour: Colour | None
    skin: int

    @property
    def is_female(self) -> bool:
        """Whether captions say *she*."""
        return self.gender in FEMALE

    @property
    def is_child(self) -> bool:
        """Whether the body is drawn with a child's proportions."""
        return self.gender in CHILDREN


def is_consistent(person: Person) -> bool:
    """Whether the attributes of a person go together; `Person` states the rules."""
    long_only = person.upper in {"coat", "jacket", "hoodie", "sweater", *_STAFF_WEAR}
    rules = (
        (person.headwear_colour is None) == (person.headwear in {"none", "hood"}),
        person.headwear != "hood" or person.upper in {"hoodie", "coat", "jacket"},
        (person.lower == "none") == (person.upper == "dress"),
        (person.lower_colour is None) == (person.lower == "none"),
        person.is_female or (person.upper != "dress" and person.lower != "skirt"),
        person.lower != "jeans" or person.lower_colour in JEANS_COLOURS,
        person.upper != "t-shirt" or person.sleeves == "short",
        not long_only or person.sleeves == "long",
        person.upper != "coat" or person.pattern in {"plain", "checked"},
        person.upper not in _STAFF_WEAR or person.pattern == "plain",
        person.pattern != "logo" or person.upper in {"t-shirt", "hoodie", "jacket", "sweater"},
        (person.bag_colour is None) == (person.bag == "none"),
        (person.accessory_colour is None) == (person.accessory in {"none", "phone"}),
        0 <= person.skin < len(SKIN),
    )
    return all(rules)


def sample_people(
    count: int, rng: np.random.Generator, distractors: float = 0.3, exclude: Collection[Person] = ()
) -> list[Person]:
    """Sample people with different full descriptions, in random order.

    ``distractors`` is the share, in ``[0, 1)``, made as a copy of another sampled person with one
    attribute changed. The descriptions of ``exclude`` (people of other splits) do not occur again.
    """
    if count < 0 or not 0 <= distractors < 1:
        raise ValueError(f"expected count >= 0 and 0 <= distractors < 1: {count}, {distractors}")
    originals = min(count, max(1, count - round(count * distractors)))
    seen = {_description(person) for person in exclude}
    people: list[Person] = []

    def add_new(person: Person) -> None:
        if _description(person) not in seen:
            seen.add(_description(person))
            people.append(person)

    while len(people) < originals:
        add_new(_sample_person(rng))
    while len(people) < count:
        # Groups of two to four look-alikes: one original and one to three variants of it.
        original = people[int(rng.integers(originals))]
        for _ in range(min(int(rng.integers(1, 4)), count - len(people))):
            variant = _vary(original, rng, VARIANT_FIELDS)
            if is_consistent(variant):
                add_new(variant)
    return [people[index] for index in rng.permutation(count)]


def sample_look_alikes(count: int, rng: np.random.Generator, gender: float = 24) -> list[Person]:
    """Sample pairs of people who differ in one attribute: the first with the second, and so on.

    ``count`` is even; ``gender`` is how often a pair differs in that, beside the other attributes
    (154 together).
    """
    weights = {**_LOOK_ALIKE_FIELDS, "gender": gender}
    people: list[Person] = []
    while len(people) < count:
        person = variant = _sample_person(rng)
        while variant == person or not is_consistent(variant):
            variant = _vary(person, rng, weights)
        people += [person, variant]
    return people


def equip(
    people: Sequence[Person],
    things: Sequence[SiteThing],
    rng: np.random.Generator,
    exclude: Collection[Person] = (),
) -> list[Person]:
    """Give a share of people what a site has of its own, in their order.

    Who would then be described like another person, or like one of ``exclude``, stays as before.
    """
    seen = {_description(person) for person in [*people, *exclude]}
    equipped = []
    for person in people:
        changed = person
        for name in ("upper", "bag"):
            mark = float(rng.random())
            colour = float(rng.random())
            for thing in things:
                if thing.field == name:
                    mark -= thing.share
                    if mark < 0:
                        dye = thing.colours[int(colour * len(thing.colours))]
                        changed = _with_thing(changed, thing, dye)
                        break
        if _description(changed) in seen:
            changed = person
        seen.add(_description(changed))
        equipped.append(changed)
    return equipped


def _with_thing(person: Person, thing: SiteThing, colour: Colour) -> Person:
    change: dict[str, Any] = {thing.field: thing.value, f"{thing.field}_colour": colour}
    if thing.field == "upper":
        change |= {"pattern": "plain", "sleeves": "long"}
        if person.headwear == "hood":
            change["headwear"] = "none"
        if person.lower == "none":
            change |= {"lower": "trousers", "lower_colour": "black"}
    return dataclasses.replace(person, **change)


def _description(person: Person) -> Person:
    # Skin is never in a caption, so two people who differ in it alone count as equal.
    return dataclasses.replace(person, skin=0)


def _sample(rng: np.random.Generator, table: Mapping[T, Value], female: bool = True) -> T:
    weights = {
        value: row.weight if female or row.men is None else row.men for value, row in table.items()
    }
    return choose(rng, weights)


def _colour(rng: np.random.Generator, table: Mapping[Colour, Value] = COLOURS) -> Colour:
    return _sample(rng, table)


def _sample_person(rng: np.random.Generator) -> Person:
    while True:
        gender = _sample(rng, GENDERS)
        female = gender in FEMALE
        upper = _sample(rng, UPPERS, female)
        headwear = _sample(rng, HEADWEAR)
        lower: Lower = "none" if upper == "dress" else _sample(rng, LOWERS, female)
        bag = _sample(rng, BAGS)
        accessory = _sample(rng, ACCESSORIES)
        short = upper == "t-shirt" or (upper in {"shirt", "dress"} and chance(rng, 0.4))
        lower_colours = JEANS_COLOURS if lower == "jeans" else COLOURS
        person = Person(
            gender=gender,
            hair_colour=_sample(rng, HAIR_COLOURS),
            hair_style=_sample(rng, HAIR_STYLES, female),
            headwear=headwear,
            headwear_colour=None if headwear in {"none", "hood"} else _colour(rng),
            glasses=chance(rng, 0.25),
            upper=upper,
            upper_colour=_colour(rng),
            pattern=_sample(rng, PATTERNS),
            sleeves="short" if short else "long",
            lower=lower,
            lower_colour=None if lower == "none" else _colour(rng, lower_colours),
            shoes=_sample(rng, SHOES),
            shoe_colour=_colour(rng),
            bag=bag,
            bag_colour=None if bag == "none" else _colour(rng),
            accessory=accessory,
            accessory_colour=None if accessory in {"none", "phone"} else _colour(rng),
            skin=int(rng.integers(len(SKIN))),
        )
        if is_consistent(person):
            return person


def _vary(person: Person, rng: np.random.Generator, fields: Mapping[str, float]) -> Person:
    name = choose(rng, fields)
    change: dict[str, Any] = {}
    if name == "glasses":
        change[name] = not person.glasses
    elif getattr(person, name) not in {None, "none"}:
        change[name] = _sample(rng, TABLES.get(name, COLOURS), person.is_female)
    return dataclasses.replace(person, **change)
