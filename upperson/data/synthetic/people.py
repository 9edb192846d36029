"""Who can be drawn: the attributes of a synthetic pedestrian and how they are sampled."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from upperson.data.synthetic.sampling import chance, choose

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
Upper = Literal["coat", "jacket", "t-shirt", "shirt", "hoodie", "sweater", "dress"]
Pattern = Literal["plain", "striped", "checked", "dotted", "logo"]
Sleeves = Literal["long", "short"]
Lower = Literal["jeans", "trousers", "shorts", "skirt", "none"]
Shoes = Literal["sneakers", "boots", "sandals", "leather shoes"]
Bag = Literal["none", "backpack", "handbag", "shoulder bag", "suitcase"]
Accessory = Literal["none", "umbrella", "phone", "scarf"]

FEMALE: frozenset[Gender] = frozenset({"woman", "girl"})
CHILDREN: frozenset[Gender] = frozenset({"boy", "girl"})

GENDERS: Mapping[Gender, float] = {"woman": 43, "man": 43, "girl": 7, "boy": 7}
COLOURS: Mapping[Colour, float] = {
    "black": 12,
    "white": 10,
    "gray": 8,
    "red": 15,
    "orange": 7,
    "yellow": 8,
    "green": 9,
    "blue": 10,
    "navy": 6,
    "purple": 7,
    "pink": 7,
    "brown": 7,
}
JEANS_COLOURS: Mapping[Colour, float] = {
    "blue": 50,
    "navy": 18,
    "black": 16,
    "gray": 10,
    "white": 6,
}
HAIR_COLOURS: Mapping[HairColour, float] = {
    "black": 32,
    "brown": 28,
    "blond": 20,
    "gray": 10,
    "red": 10,
}
_HAIR_STYLES: Mapping[bool, Mapping[HairStyle, float]] = {
    True: {"short": 18, "long": 42, "ponytail": 24, "bun": 16},
    False: {"short": 86, "long": 8, "ponytail": 4, "bun": 2},
}
HEADWEAR: Mapping[Headwear, float] = {"none": 62, "cap": 12, "beanie": 10, "hat": 9, "hood": 7}
_UPPERS: Mapping[bool, Mapping[Upper, float]] = {
    True: {
        "coat": 30,
        "jacket": 14,
        "t-shirt": 15,
        "shirt": 12,
        "hoodie": 10,
        "sweater": 12,
        "dress": 15,
    },
    False: {"coat": 18, "jacket": 20, "t-shirt": 20, "shirt": 16, "hoodie": 14, "sweater": 12},
}
PATTERNS: Mapping[Pattern, float] = {
    "plain": 62,
    "striped": 13,
    "checked": 10,
    "dotted": 6,
    "logo": 9,
}
_LOWERS: Mapping[bool, Mapping[Lower, float]] = {
    True: {"jeans": 34, "trousers": 30, "shorts": 13, "skirt": 23},
    False: {"jeans": 40, "trousers": 42, "shorts": 18},
}
SHOES: Mapping[Shoes, float] = {"sneakers": 40, "boots": 25, "sandals": 13, "leather shoes": 22}
BAGS: Mapping[Bag, float] = {
    "none": 28,
    "backpack": 24,
    "handbag": 18,
    "shoulder bag": 18,
    "suitcase": 12,
}
ACCESSORIES: Mapping[Accessory, float] = {"none": 66, "umbrella": 10, "phone": 11, "scarf": 13}
SKIN_TONES = 4

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


@dataclass(frozen=True, slots=True)
class Person:
    """Everything about a person that stays the same in all of their pictures.

    A colour is None exactly when the thing it belongs to is absent (a hood has the colour of the
    upper garment, a phone has none). A dress is an upper garment without a lower one. ``skin`` is
    the index of a skin tone, ``0 .. SKIN_TONES - 1``; captions never mention it.
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
    """Tells whether the attributes of a person go together (see `Person` for the rules)."""
    long_only = person.upper in {"coat", "jacket", "hoodie", "sweater"}
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
        person.pattern != "logo" or person.upper in {"t-shirt", "hoodie", "jacket", "sweater"},
        (person.bag_colour is None) == (person.bag == "none"),
        (person.accessory_colour is None) == (person.accessory in {"none", "phone"}),
        0 <= person.skin < SKIN_TONES,
    )
    return all(rules)


def differing_fields(first: Person, second: Person) -> tuple[str, ...]:
    """Names the attributes in which two people differ, in the order of the fields."""
    return tuple(
        field.name
        for field in dataclasses.fields(Person)
        if getattr(first, field.name) != getattr(second, field.name)
    )


def sample_people(
    count: int,
    rng: np.random.Generator,
    distractors: float = 0.3,
    exclude: Collection[Person] = (),
) -> list[Person]:
    """Samples people of whom no two can be told by the same full description.

    Args:
        count: How many people to sample.
        rng: The random generator.
        distractors: The share, in ``[0, 1)``, made as a copy of another sampled person with
            exactly one attribute changed.
        exclude: People (of other splits) whose descriptions must not occur again.

    Returns:
        A list of ``count`` people in random order.

    Raises:
        ValueError: If ``count`` is negative or ``distractors`` is outside ``[0, 1)``.
    """
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    if not 0 <= distractors < 1:
        raise ValueError(f"distractors must be in [0, 1), got {distractors}")
    originals = min(count, max(1, count - round(count * distractors)))
    seen = {_description(person) for person in exclude}
    people: list[Person] = []
    while len(people) < originals:
        person = _sample_person(rng)
        if _description(person) not in seen:
            seen.add(_description(person))
            people.append(person)
    while len(people) < count:
        # Groups of two to four look-alikes: one original and one to three variants of it.
        original = people[int(rng.integers(originals))]
        for _ in range(min(int(rng.integers(1, 4)), count - len(people))):
            variant = _vary(original, rng)
            if is_consistent(variant) and _description(variant) not in seen:
                seen.add(_description(variant))
                people.append(variant)
    return [people[index] for index in rng.permutation(count)]


def _description(person: Person) -> Person:
    # Skin is never in a caption, so two people who differ in it alone count as equal.
    return dataclasses.replace(person, skin=0)


def _colour(rng: np.random.Generator, table: Mapping[Colour, float] = COLOURS) -> Colour:
    return choose(rng, table)


def _sample_person(rng: np.random.Generator) -> Person:
    while True:
        gender = choose(rng, GENDERS)
        female = gender in FEMALE
        upper = choose(rng, _UPPERS[female])
        headwear = choose(rng, HEADWEAR)
        lower: Lower = "none" if upper == "dress" else choose(rng, _LOWERS[female])
        bag = choose(rng, BAGS)
        accessory = choose(rng, ACCESSORIES)
        short = upper == "t-shirt" or (upper in {"shirt", "dress"} and chance(rng, 0.4))
        lower_colours = JEANS_COLOURS if lower == "jeans" else COLOURS
        person = Person(
            gender=gender,
            hair_colour=choose(rng, HAIR_COLOURS),
            hair_style=choose(rng, _HAIR_STYLES[female]),
            headwear=headwear,
            headwear_colour=None if headwear in {"none", "hood"} else _colour(rng),
            glasses=chance(rng, 0.25),
            upper=upper,
            upper_colour=choose(rng, COLOURS),
            pattern=choose(rng, PATTERNS),
            sleeves="short" if short else "long",
            lower=lower,
            lower_colour=None if lower == "none" else _colour(rng, lower_colours),
            shoes=choose(rng, SHOES),
            shoe_colour=choose(rng, COLOURS),
            bag=bag,
            bag_colour=None if bag == "none" else _colour(rng),
            accessory=accessory,
            accessory_colour=None if accessory in {"none", "phone"} else _colour(rng),
            skin=int(rng.integers(SKIN_TONES)),
        )
        if is_consistent(person):
            return person


def _vary(person: Person, rng: np.random.Generator) -> Person:
    field = choose(rng, VARIANT_FIELDS)
    change: dict[str, Any] = {}
    if field == "glasses":
        change[field] = not person.glasses
    elif getattr(person, field) not in {None, "none"}:
        tables: dict[str, Mapping[Any, float]] = {
            "bag": BAGS,
            "gender": GENDERS,
            "hair_colour": HAIR_COLOURS,
            "hair_style": _HAIR_STYLES[person.is_female],
            "lower": _LOWERS[person.is_female],
            "pattern": PATTERNS,
            "shoes": SHOES,
            "upper": _UPPERS[person.is_female],
        }
        change[field] = choose(rng, tables.get(field, COLOURS))
    return dataclasses.replace(person, **change)
