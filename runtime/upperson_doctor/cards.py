"""Test cards: does a model distinguish red from blue and striped from plain, on drawn people.

Golden samples show that a model computes what it computed before. They say nothing of a model that
never worked, such as one with random weights. The cards are for that alone: they are too easy to
show a small loss of accuracy, such as that of GELU in place of QuickGELU.
"""

from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from upperson_rt.checks import Check, fail_from_error, ok, warning
from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError, UppersonError

_COLOURS = {
    "red": (200, 30, 35),
    "blue": (35, 60, 190),
    "green": (30, 140, 60),
    "yellow": (235, 205, 40),
    "white": (240, 240, 240),
    "black": (20, 20, 20),
    "orange": (235, 130, 30),
    "purple": (120, 50, 150),
}
_STRIPED = ("red", "blue", "green", "black")
_MOST_BY_CHANCE = 0.001
_WIDTH, _HEIGHT = 128, 384
_FIX = "check the name and the weights of its base, then export it again"


def check_cards(encoder: Encoder) -> Check:
    """Check that a model distinguishes colours and stripes; sentences are English."""
    try:
        chance = _colours_by_chance(encoder)
        striped = _stripes_right(encoder)
    except UppersonError as error:
        return fail_from_error("test cards", error)
    facts = {"p_value": round(chance, 6), "stripes_right": striped, "stripes": len(_STRIPED)}
    p_value = f"p = {chance:.2g}"
    if chance > _MOST_BY_CHANCE:
        found = f"the model does not distinguish the colours of drawn coats ({p_value})"
        return Check("test cards", "fail", found, _FIX, InputError.exit_code, facts)
    if 2 * striped <= len(_STRIPED):
        found = f"it distinguishes colours, but stripes in {striped} of {len(_STRIPED)} only"
        return warning("test cards", found, _FIX, **facts)
    of_all = f"{striped} of {len(_STRIPED)}"
    found = f"colours of drawn coats are distinguished ({p_value}), striped from plain in {of_all}"
    return ok("test cards", found, **facts)


def _colours_by_chance(encoder: Encoder) -> float:
    """Return how probable such scores are where sentences and pictures have nothing in common.

    That is the share of all ways to assign the sentences to the pictures that score no lower than
    the right one: an exact permutation test.
    """
    pictures = [_draw(rgb) for rgb in _COLOURS.values()]
    sentences = [f"a person in a {name} coat" for name in _COLOURS]
    scores_CC = encoder.encode_texts(sentences) @ encoder.encode_images(pictures).T
    orders = np.array([*permutations(range(len(_COLOURS)))])
    totals = scores_CC[np.arange(len(_COLOURS)), orders].sum(axis=1)
    return float((totals >= np.trace(scores_CC) - 1e-6).mean())


def _stripes_right(encoder: Encoder) -> int:
    """Return for how many colours the sentences fit the striped and the plain coat as they should.

    The sum of both right scores is compared with the sum of both wrong ones, so that a coat or a
    sentence that always scores high decides nothing.
    """
    pictures = [_draw(_COLOURS[name], striped) for name in _STRIPED for striped in (False, True)]
    sentences = [
        f"a person in a {kind} {name} shirt" for name in _STRIPED for kind in ("plain", "striped")
    ]
    texts_SD, images_SD = encoder.encode_texts(sentences), encoder.encode_images(pictures)
    right = 0
    for row in range(0, len(sentences), 2):
        (a, b), (c, d) = texts_SD[row : row + 2] @ images_SD[row : row + 2].T
        right += bool(a + d > b + c)
    return right


def _draw(coat: tuple[int, int, int], striped: bool = False) -> NDArray[np.uint8]:
    """Draw a person who stands, from the front: RGB [384, 128, 3]."""
    image = Image.new("RGB", (_WIDTH, _HEIGHT), (150, 150, 148))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 300, _WIDTH, _HEIGHT), fill=(118, 118, 116))
    for left in (42, 68):
        draw.rectangle((left, 190, left + 18, 360), fill=(70, 75, 90))
    draw.rectangle((24, 92, 104, 190), fill=coat)
    draw.rectangle((36, 90, 92, 210), fill=coat)
    for top in range(96, 200, 22) if striped else ():
        draw.rectangle((24, top, 104, top + 9), fill=(240, 240, 240))
    draw.ellipse((48, 40, 80, 84), fill=(224, 180, 150))
    draw.pieslice((46, 34, 82, 80), 180, 360, fill=(60, 40, 30))
    return np.array(image, np.uint8)
