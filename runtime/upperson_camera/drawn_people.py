"""The built-in test picture: three drawn people on a street, whose boxes are known.

It is no photograph. HOG, SSDLite and NanoDet each find at least one of them;
networks that get their pixels in another way find none as a rule.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

_SIZE = 960, 540
_FIGURES = ((180, 500, 400, 0), (470, 470, 300, 1), (760, 520, 440, 2))
"""Middle, feet and height in pixels, and the clothes."""
FIGURES = len(_FIGURES)
_CLOTHES = (
    ((176, 48, 52), (52, 58, 78), (70, 46, 34), (224, 180, 152)),
    ((48, 110, 82), (146, 132, 112), (34, 30, 30), (152, 104, 76)),
    ((226, 196, 84), (38, 48, 92), (120, 82, 48), (236, 196, 170)),
)
"""Coat, trousers, hair, skin."""


def draw_figures() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw three people on a street: RGB [540, 960, 3], and (3, 4) boxes around them."""
    width, height = _SIZE
    rows = np.linspace(0, 1, height)[:, None, None]
    wall, ground = np.array([198, 202, 206.0]), np.array([128, 128, 126.0])
    shade = np.where(rows < 0.62, wall - 40 * rows, ground + 40 * (rows - 0.62))
    noise = np.random.default_rng(0).normal(0, 5, (height, width, 1))
    pixels = np.clip(np.broadcast_to(shade, (height, width, 3)) + noise, 0, 255)
    image = Image.fromarray(pixels.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for x in range(60, width, 240):  # Windows, so that not every upright thing is a person.
        draw.rectangle((x, 40, x + 90, 170), fill=(96, 108, 120), outline=(230, 230, 228), width=5)
    boxes = []
    for middle, feet, tall, clothes in _FIGURES:
        boxes.append(_draw_figure(draw, middle, feet, tall, _CLOTHES[clothes]))
    softened = image.filter(ImageFilter.GaussianBlur(0.8))
    return np.array(softened, dtype=np.uint8), np.array(boxes, np.int64)


def _draw_figure(
    draw: ImageDraw.ImageDraw,
    middle: int,
    feet: int,
    tall: int,
    colours: Sequence[tuple[int, int, int]],
) -> tuple[int, int, int, int]:
    """Draw one that stands, from the front; return its box."""
    coat, trousers, hair, skin = colours

    def at(x: float, y: float) -> tuple[float, float]:
        """Place a point: shares of the height, from the middle and from the top."""
        return middle + x * tall, feet - tall + y * tall

    def shape(points: Sequence[tuple[float, float]], colour: tuple[int, int, int]) -> None:
        draw.polygon([at(x, y) for x, y in points], fill=colour)

    def oval(x0: float, y0: float, x1: float, y1: float, colour: tuple[int, int, int]) -> None:
        draw.ellipse((*at(x0, y0), *at(x1, y1)), fill=colour)

    dark = tuple(round(0.72 * value) for value in coat)
    oval(-0.17, 0.975, 0.17, 1.015, (88, 88, 88))  # The shadow on the ground.
    for side in (-1, 1):
        shape([(0.01 * side, 0.5), (0.095 * side, 0.5), (0.085 * side, 0.95), (0.03 * side, 0.95)],
              trousers)  # fmt: skip
        oval(0.06 * side - 0.04, 0.94, 0.06 * side + 0.04, 0.995, (40, 36, 34))
        shape([(0.1 * side, 0.2), (0.135 * side, 0.23), (0.155 * side, 0.5), (0.115 * side, 0.5)],
              (dark[0], dark[1], dark[2]))  # fmt: skip
        oval(0.135 * side - 0.023, 0.49, 0.135 * side + 0.023, 0.535, skin)
    shape([(-0.12, 0.2), (-0.05, 0.165), (0.05, 0.165), (0.12, 0.2), (0.105, 0.4), (0.115, 0.56),
           (-0.115, 0.56), (-0.105, 0.4)], coat)  # fmt: skip
    shape([(-0.028, 0.12), (0.028, 0.12), (0.035, 0.18), (-0.035, 0.18)], skin)
    oval(-0.062, 0.0, 0.062, 0.12, hair)
    oval(-0.05, 0.028, 0.05, 0.142, skin)
    (left, top), (right, bottom) = at(-0.16, 0), at(0.16, 1)
    return round(left), round(top), round(right), round(bottom)


def figures_found(figures: NDArray[Any], boxes: NDArray[Any]) -> int:
    """Count the figures (N, 4) that share half of their area with a box (M, 4) of their size."""
    return int((overlaps(figures, boxes) >= 0.5).any(axis=1).sum())


def overlaps(one: NDArray[Any], other: NDArray[Any]) -> NDArray[np.float64]:
    """Return (N, M) intersections over unions of (N, 4) and (M, 4) boxes."""
    first = np.maximum(one[:, None, :2], other[None, :, :2])
    last = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.prod(np.maximum(0, last - first), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (one, other)]
    return np.asarray(shared / (areas[0][:, None] + areas[1][None] - shared), np.float64)
