"""The words for every attribute value, and how often each caption style uses them.

Both styles share one vocabulary, because a base model whose token embeddings are frozen cannot
learn a word later. They differ in how often they use a synonym.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from upperson.data.synthetic.look import CaptionStyle
from upperson.data.synthetic.people import (
    Bag,
    Colour,
    Gender,
    HairColour,
    Headwear,
    Lower,
    Pattern,
    Shoes,
    Upper,
)
from upperson.data.synthetic.sampling import choose

#: A phrase with its weights in the ``list`` and in the ``sentences`` style.
Synonyms = Mapping[str, tuple[float, float]]

SUBJECTS: Mapping[Gender, Synonyms] = {
    "man": {"man": (14, 10), "male": (3, 3), "guy": (2, 3), "gentleman": (1, 2)},
    "woman": {"woman": (14, 10), "lady": (3, 5), "female": (3, 3)},
    "boy": {"boy": (6, 3), "young boy": (2, 3), "little boy": (2, 3)},
    "girl": {"girl": (6, 3), "young girl": (2, 3), "little girl": (2, 3)},
}
COLOURS: Mapping[Colour, Synonyms] = {
    "black": {"black": (16, 12), "jet black": (1, 2), "pitch black": (1, 2)},
    "white": {"white": (16, 12), "ivory": (1, 2), "snow white": (1, 2)},
    "gray": {"gray": (10, 5), "grey": (5, 8), "silver": (1, 2)},
    "red": {"red": (14, 9), "crimson": (2, 3), "scarlet": (2, 3)},
    "orange": {"orange": (16, 11), "bright orange": (2, 4), "tangerine": (1, 2)},
    "yellow": {"yellow": (16, 11), "bright yellow": (2, 4), "golden": (1, 2)},
    "green": {"green": (15, 10), "emerald": (1, 3), "forest green": (1, 2)},
    "blue": {"blue": (15, 10), "royal blue": (2, 3), "cobalt": (1, 2)},
    "navy": {"navy": (8, 4), "dark blue": (5, 8), "navy blue": (4, 4)},
    "purple": {"purple": (14, 10), "violet": (3, 5)},
    "pink": {"pink": (14, 10), "rose": (2, 3), "hot pink": (1, 2)},
    "brown": {"brown": (14, 10), "chocolate": (2, 3), "dark brown": (2, 4)},
}
HAIR_COLOURS: Mapping[HairColour, Synonyms] = {
    "black": {"black": (12, 8), "dark": (3, 6)},
    "brown": {"brown": (14, 10), "brunette": (2, 3)},
    "blond": {"blond": (8, 5), "blonde": (4, 7), "fair": (1, 3)},
    "gray": {"gray": (8, 5), "grey": (4, 6)},
    "red": {"red": (10, 6), "ginger": (3, 5)},
}
UPPERS: Mapping[Upper, Synonyms] = {
    "coat": {"coat": (14, 10), "overcoat": (2, 4), "long coat": (2, 4)},
    "jacket": {"jacket": (14, 10), "windbreaker": (2, 3)},
    "t-shirt": {"t-shirt": (12, 9), "tee": (3, 3), "tee shirt": (1, 3)},
    "shirt": {"shirt": (14, 9), "button up shirt": (2, 4), "collared shirt": (1, 3)},
    "hoodie": {"hoodie": (12, 9), "hooded sweatshirt": (2, 4)},
    "sweater": {"sweater": (12, 8), "pullover": (3, 4), "jumper": (1, 3)},
    "dress": {"dress": (14, 11), "gown": (1, 2), "frock": (1, 2)},
}
PATTERNS: Mapping[Pattern, Synonyms] = {
    "striped": {"striped": (8, 6), "stripy": (1, 2)},
    "checked": {"checked": (5, 3), "plaid": (4, 5), "checkered": (2, 3)},
    "dotted": {"dotted": (4, 2), "polka dot": (3, 4), "spotted": (2, 3)},
}
LOGOS: Synonyms = {"with a logo": (4, 3), "with a print": (2, 3)}
LOWERS: Mapping[Lower, Synonyms] = {
    "jeans": {"jeans": (14, 10), "denim jeans": (2, 4), "denim pants": (1, 3)},
    "trousers": {"trousers": (9, 5), "pants": (7, 9), "slacks": (1, 2)},
    "shorts": {"shorts": (12, 9), "bermuda shorts": (1, 3)},
    "skirt": {"skirt": (1, 1)},
}
SHOES: Mapping[Shoes, Synonyms] = {
    "sneakers": {"sneakers": (10, 7), "trainers": (2, 4), "running shoes": (2, 4)},
    "boots": {"boots": (12, 9), "high boots": (1, 3)},
    "sandals": {"sandals": (12, 9), "open sandals": (1, 2)},
    "leather shoes": {"leather shoes": (6, 4), "formal shoes": (3, 4), "shoes": (5, 5)},
}
BAGS: Mapping[Bag, Synonyms] = {
    "backpack": {"backpack": (13, 9), "rucksack": (2, 4)},
    "handbag": {"handbag": (11, 7), "purse": (4, 5)},
    "shoulder bag": {"shoulder bag": (9, 6), "messenger bag": (3, 4), "satchel": (1, 3)},
    "suitcase": {"suitcase": (12, 8), "rolling suitcase": (2, 4), "trolley case": (1, 2)},
}
HEADWEAR: Mapping[Headwear, Synonyms] = {
    "cap": {"cap": (9, 6), "baseball cap": (3, 5)},
    "beanie": {"beanie": (9, 6), "knit hat": (2, 4), "woolen hat": (1, 2)},
    "hat": {"hat": (10, 6), "brimmed hat": (2, 4)},
    "hood": {"raised hood": (1, 1)},
}
UMBRELLAS: Synonyms = {"umbrella": (1, 1)}
SCARVES: Synonyms = {"scarf": (12, 9), "neck scarf": (1, 2)}
PHONES: Synonyms = {"phone": (9, 5), "cell phone": (3, 4), "mobile phone": (2, 4)}
GLASSES: Synonyms = {"glasses": (10, 7), "eyeglasses": (1, 2), "spectacles": (1, 2)}
SHORT_SLEEVES: Synonyms = {"short sleeved": (3, 3), "short sleeve": (2, 3)}
LONG_SLEEVES: Synonyms = {"long sleeved": (3, 3), "long sleeve": (2, 3)}


def say(synonyms: Synonyms, style: CaptionStyle, rng: np.random.Generator) -> str:
    """Draws one phrase as often as a caption style uses it."""
    column = 0 if style == "list" else 1
    return choose(rng, {phrase: weights[column] for phrase, weights in synonyms.items()})
