"""The words that the grammar of `upperson_phrases` knows: things, colours and small words.

A table's row is a concept with the ways to write it. Hyphens count as spaces, plurals in -s need
no entry, and what stands before a noun needs none either: *puffy* in *a puffy red coat* is part of
the phrase without being known.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "person", "upper", "lower", "shoes", "headwear", "hair", "glasses", "accessory", "carried",
    "action", "other",
]  # fmt: skip
"""What a phrase is about; ``other`` is what the grammar does not understand."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


NOUNS: Mapping[Kind, Mapping[str, str]] = {
    "person": {
        "woman": "woman, lady, female, women, ladies",
        "man": "man, male, guy, gentleman, men, dude, bloke",
        "girl": "girl",
        "boy": "boy",
        "person": "person, pedestrian, people, someone, somebody, anyone, anybody, everyone, "
        "everybody, individual, "
        "adult, child, kid, teenager, figure, toddler, human",
    },
    "upper": {
        "coat": "coat, overcoat, trench coat, raincoat, rain coat, topcoat, parka",
        "jacket": "jacket, windbreaker, bomber, anorak, suit jacket",
        "blazer": "blazer",
        "suit": "suit, tuxedo",
        "vest": "vest, waistcoat, gilet",
        "t-shirt": "t shirt, tshirt, tee, tee shirt",
        "shirt": "shirt, dress shirt, button down, button up shirt",
        "blouse": "blouse",
        "polo": "polo, polo shirt",
        "hoodie": "hoodie, hooded sweatshirt, hoody, hooded jumper",
        "sweatshirt": "sweatshirt, sweat shirt",
        "sweater": "sweater, pullover, jumper",
        "cardigan": "cardigan",
        "dress": "dress, gown, frock, sundress",
        "top": "top, tank top, halter top, tunic, tank, camisole, crop top",
        "uniform": "uniform, overalls, jumpsuit, dungarees, robe",
        "clothes": "clothes, clothing, garment, outfit",
    },
    "lower": {
        "jeans": "jeans, denim jeans, denim pants, denims, jean",
        "trousers": "trousers, pants, slacks, khakis, chinos, sweatpants, sweat pants, trouser, "
        "pant, capris, joggers, dress pants, suit pants, cargo pants, track pants, jogging pants, "
        "leather pants, dress trousers",
        "shorts": "shorts, short pants, denim shorts, jean shorts",
        "skirt": "skirt, miniskirt",
        "leggings": "leggings, tights, stockings, yoga pants",
    },
    "shoes": {
        "sneakers": "sneakers, sneaker, trainers, running shoes, tennis shoes, athletic shoes, "
        "sports shoes, gym shoes",
        "boots": "boots, boot",
        "sandals": "sandals, sandal, flip flops, slippers",
        "heels": "heels, high heels, high heeled shoes, pumps",
        "shoes": "shoes, shoe, leather shoes, formal shoes, dress shoes, loafers, flats, footwear",
        "socks": "socks, sock",
    },
    "headwear": {
        "cap": "cap, baseball cap, ball cap, visor",
        "beanie": "beanie, knit hat, woolen hat, woollen hat, knitted hat, wool hat, knit cap",
        "hat": "hat, sun hat, fedora",
        "hood": "raised hood, hood up",
        "helmet": "helmet",
        "headwear": "headwear, headgear",
        "headband": "headband, hair band, bandana, headscarf, head scarf",
    },
    "hair": {
        "hair": "hair, haired, hairs, hairstyle, haircut",
        "ponytail": "ponytail, pony tail, pigtails, pigtail",
        "bun": "hair bun, bun",
        "braid": "braid, braids",
        "bald": "bald, bald head, shaved head",
        "beard": "beard, mustache, moustache, goatee",
        "bangs": "bangs",
    },
    "glasses": {
        "sunglasses": "sunglasses, sun glasses, dark glasses",
        "glasses": "glasses, eyeglasses, spectacles, eye glasses",
    },
    "accessory": {
        "scarf": "scarf, neck scarf, scarves, shawl",
        "tie": "tie, necktie, bow tie",
        "belt": "belt",
        "gloves": "gloves, glove, mittens",
        "watch": "watch, wristwatch, wrist watch",
        "necklace": "necklace, pendant",
        "bracelet": "bracelet, wristband",
        "earrings": "earrings",
        "mask": "mask, face mask",
        "headphones": "headphones, earphones, earbuds, ear buds",
        "lanyard": "lanyard, badge, name tag, id card",
    },
    "carried": {
        "backpack": "backpack, back pack, rucksack, knapsack, book bag, bookbag, school bag",
        "handbag": "handbag, hand bag, purse, clutch, pocketbook",
        "shoulder bag": "shoulder bag, messenger bag, satchel, crossbody bag, sling bag, "
        "cross body bag",
        "suitcase": "suitcase, rolling suitcase, trolley case, trolley",
        "bag": "bag, baggage, luggage",
        "tote bag": "tote, tote bag",
        "shopping bag": "shopping bag, plastic bag, paper bag",
        "duffel bag": "duffel bag, gym bag, sports bag",
        "pouch": "pouch",
        "briefcase": "briefcase",
        "umbrella": "umbrella, parasol",
        "phone": "phone, cell phone, mobile phone, cellphone, smartphone, mobile, smart phone, "
        "telephone",
        "book": "book, notebook, magazine, newspaper",
        "bottle": "bottle, water bottle, cup, coffee cup",
        "papers": "paper, papers, folder, document",
        "box": "box, package, parcel",
        "camera": "camera",
        "laptop": "laptop, tablet",
        "stroller": "stroller, pram, baby carriage",
        "bicycle": "bicycle, bike",
        "cart": "cart, shopping cart",
        "skateboard": "skateboard, scooter",
        "dog": "dog",
    },
}
"""By kind: the plain name of a thing, and how people write it."""

PERSON_PLURALS: Mapping[str, str] = {
    "women": "woman", "womans": "woman", "womens": "woman", "ladies": "lady", "females": "female",
    "men": "man", "guys": "guy", "males": "male", "gentlemen": "gentleman", "girls": "girl",
    "boys": "boy", "people": "person", "persons": "person", "pedestrians": "pedestrian",
    "adults": "adult", "children": "child", "kids": "kid", "teenagers": "teenager",
    "individuals": "individual",
}  # fmt: skip
"""Several people, and one of them."""

KINDS_OF: Mapping[str, tuple[str, ...]] = {
    "bag": ("backpack", "handbag", "shoulder bag", "suitcase", "briefcase", "tote bag",
            "shopping bag", "duffel bag", "pouch"),
    "headwear": ("cap", "beanie", "hat", "hood", "helmet"),
    "clothes": ("coat", "jacket", "blazer", "suit", "vest", "t-shirt", "shirt", "blouse", "polo",
                "hoodie", "sweatshirt", "sweater", "cardigan", "dress", "top", "uniform"),
}  # fmt: skip
"""Plain names of things that are one of several: who has a backpack has a bag. Clothes are those of
the upper body, which show most of a person's colour."""

_COLOUR_WORDS: Mapping[str, str] = {
    "black": "black, jet black, pitch black",
    "white": "white, ivory, snow white, off white",
    "gray": "gray, grey, silver, charcoal, dark gray, dark grey, light gray, light grey",
    "red": "red, crimson, scarlet, maroon, burgundy, dark red, bright red",
    "orange": "orange, bright orange, tangerine",
    "yellow": "yellow, bright yellow, golden, gold, mustard",
    "green": "green, emerald, forest green, olive, lime, dark green, light green, mint, neon green",
    "blue": "blue, royal blue, cobalt, light blue, sky blue, turquoise, teal, aqua, bright blue",
    "navy": "navy, dark blue, navy blue",
    "purple": "purple, violet, lavender, lilac, dark purple",
    "pink": "pink, rose, hot pink, magenta, coral, light pink",
    "brown": "brown, chocolate, dark brown, tan, light brown, camel",
    "beige": "beige, cream, khaki, khaki colored",
    "blond": "blond, blonde, fair",
    "ginger": "ginger, auburn",
    "dark": "dark, dark colored, dark coloured, brunette",
    "light": "light, light colored, light coloured, pale",
}

_PATTERN_WORDS: Mapping[str, str] = {
    "plain": "plain, solid",
    "striped": "striped, stripy, stripes, pinstriped, stripe",
    "checked": "checked, plaid, checkered, chequered, checked, tartan, flannel",
    "dotted": "dotted, polka dot, spotted, polka dots, polka dotted",
    "floral": "floral, flowered, flower",
    "camouflage": "camouflage, camo",
    "logo": "logo, print, printed, graphic, picture, emblem, lettering, letters, writing",
}

_MODIFIERS = _words(
    """long short sleeve sleeved sleeveless high low open tight loose denim leather wool woolen
    knit cotton fur puffy heavy thick thin big large small little bright pale dark light colored
    coloured multicolored multicolor colorful button collared hooded zipped unbuttoned young old
    older elderly middle aged tall slim thin heavyset chubby asian caucasian curly straight wavy
    shoulder length knee ankle medium cropped skinny baggy blue plain solid formal casual"""
)
"""Words besides colours and patterns that only ever describe a noun: *and* between two of them
does not end a phrase."""

DETAILS: frozenset[str] = _words(
    """button buttons zipper zip logo print stripe stripes dot dots spots collar letter letters
    lettering design sleeve sleeves trim pattern lining strap straps pocket pockets writing graphic
    picture image emblem number numbers word words text hood lace laces sole soles toe toes tip
    tips heel brim band buckle handle handles flower flowers line lines checks squares patch
    patches accents highlights cuffs hem belt front back sides side bottom waist fur logo words
    rolled piping lapels"""
)
"""What a garment or bag is made of: *with black buttons* belongs to the coat before it."""

_DETERMINERS = "a an the his her their its this that these those some any both another one two pair"
_PREPOSITIONS = """of in on at with over under by for from to into onto up down along across near
    behind beside around against towards toward through about as off out inside outside while
    between below above underneath beneath featuring without"""
_PRONOUNS = "he she they it him them who which whose there we you i himself herself"
_CONJUNCTIONS = "and or but also nor plus & / then"
_VERBS = """is are was be being been wearing wears wear worn has have having had dressed dresses
    dressing carrying carries carry carried holding holds hold held pulling pulls pull pulled
    sporting sports clad using uses use used seen looks look appears appear seems seem does do
    did dons don't shows showing shown got gets get slung draped hanging hangs tied tucked put
    pushing pushes push wrapped matching paired isn't aren't doesn't hasn't wasn't don keeps could
    may might would will includes including consists clothed outfitted attired doing rests
    resting going goes s"""
_ADVERBS = """very really quite slightly mostly all only just not no never neither too so
    visible possibly probably maybe apparently currently with lacks lacking minus nothing none yet
    however together well partially somewhat what"""
_PLACES = """left right hand hands arm arms shoulder shoulders back head neck feet foot legs leg
    body wrist waist side face eyes ear ears chest front upper lower half middle top bottom"""

SMALL_WORDS: frozenset[str] = _words(
    " ".join((_DETERMINERS, _PREPOSITIONS, _PRONOUNS, _CONJUNCTIONS, _VERBS, _ADVERBS))
)
"""Words that end a noun phrase and say nothing by themselves."""

BODY_PLACES: frozenset[str] = _words(_PLACES)
"""Where things are worn and carried: *over her left shoulder*."""

ACTIONS: frozenset[str] = _words(
    """walk walks walking walked stand standing stands run runs running rides riding sits sitting
    moves moving looking faces facing crosses crossing strolls strolling jogs jogging texts texting
    waits waiting leans leaning bends bending crouches crouching turns turning heads heading steps
    stepping climbs climbing talks talking strides striding passing smiles smiling plays playing
    listening strolled hurrying"""
)

EXCLUDING: frozenset[str] = _words(
    """without no lacks lacking minus neither nor sans not isn't aren't doesn't hasn't never don't
    didn't wasn't isnt doesnt"""
)
"""Words that exclude the things after them."""

POSSESSION_WORDS: frozenset[str] = _words(
    """wearing wear wears worn carrying carry carries carried holding hold holds held having have
    has had using use pulling pull pulls sporting dressed with in on got talking appear appears
    appearing seem seems to be being any a an the also either"""
)
"""What may stand between an excluding word and the thing: not *appear to be wearing a* hat."""


def _written(table: Mapping[str, str]) -> Iterable[tuple[tuple[str, ...], str]]:
    for name, ways in table.items():
        for way in ways.split(","):
            yield tuple(way.split()), name


NOUN_OF: Mapping[tuple[str, ...], tuple[Kind, str]] = {
    words: (kind, name) for kind, table in NOUNS.items() for words, name in _written(table)
}
"""Words of a noun, to its kind and plain name."""

COLOURS: Mapping[tuple[str, ...], str] = dict(_written(_COLOUR_WORDS))
"""Words of a colour, to its plain name."""

PATTERNS: Mapping[tuple[str, ...], str] = dict(_written(_PATTERN_WORDS))
"""Words of a pattern, to its plain name."""

MODIFIERS: frozenset[str] = _MODIFIERS | {
    word for table in (COLOURS, PATTERNS) for words in table for word in words
}


def singulars(word: str) -> list[str]:
    """Return what a word that ends in -s may be in the singular, the likelier first."""
    endings = ["s"] if word.endswith("s") else []
    if word.endswith(("sses", "shes", "ches", "xes", "oes")):
        endings.append("es")
    return [word.removesuffix(ending) for ending in endings]


def noun_of(words: tuple[str, ...]) -> tuple[Kind, str] | None:
    """Return the kind and plain name of a noun, whose last word may be in the plural."""
    ways = (words, *((*words[:-1], one) for one in singulars(words[-1])))
    return next((NOUN_OF[way] for way in ways if way in NOUN_OF), None)


# --- A phrase, and where its words are

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
