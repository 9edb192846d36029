"""The RGB values behind colour names, before any camera changes them."""

from __future__ import annotations

from collections.abc import Mapping

from upperson.data.synthetic.people import Colour, HairColour

#: Red, green and blue, each 0..255.
Rgb = tuple[int, int, int]

CLOTH: Mapping[Colour, Rgb] = {
    "black": (28, 28, 30),
    "white": (240, 240, 236),
    "gray": (136, 138, 140),
    "red": (204, 24, 34),
    "orange": (244, 126, 22),
    "yellow": (246, 212, 38),
    "green": (36, 140, 62),
    "blue": (40, 104, 214),
    "navy": (26, 38, 92),
    "purple": (122, 46, 158),
    "pink": (246, 134, 180),
    "brown": (112, 68, 36),
}
#: Denim is duller and lighter than dyed cloth of the same name.
DENIM: Mapping[Colour, Rgb] = {
    "blue": (74, 112, 166),
    "navy": (38, 52, 92),
    "black": (40, 41, 46),
    "gray": (124, 128, 136),
    "white": (230, 230, 226),
}
HAIR: Mapping[HairColour, Rgb] = {
    "black": (24, 20, 20),
    "brown": (88, 54, 32),
    "blond": (222, 184, 104),
    "gray": (172, 172, 174),
    "red": (176, 74, 28),
}
SKIN: tuple[Rgb, ...] = ((244, 208, 182), (222, 172, 136), (172, 118, 82), (108, 70, 48))


def shade(colour: Rgb, factor: float) -> Rgb:
    """Darkens (``factor < 1``) or brightens (``factor > 1``) a colour, clipped to 0..255."""
    red, green, blue = colour
    return (
        min(255, max(0, round(red * factor))),
        min(255, max(0, round(green * factor))),
        min(255, max(0, round(blue * factor))),
    )


def mix(first: Rgb, second: Rgb, share: float) -> Rgb:
    """Blends two colours; ``share`` is the part of the second, 0..1."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return (red, green, blue)


def contrast(colour: Rgb, share: float = 0.5) -> Rgb:
    """Moves a colour towards black or white, whichever is further, for seams and prints."""
    bright = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 110
    return mix(colour, (18, 18, 20) if bright else (245, 245, 245), share)
