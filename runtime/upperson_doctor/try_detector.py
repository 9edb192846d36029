"""The trial of a detector on one picture, which shows a wrong layout at once.

Without a picture of the user's, three figures are drawn. They are no photograph: a network that
finds them where they are gets its pixels right; one that finds none may be right all the same.
"""

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from upperson_rt.checks import Check, fail_from_error, ok, warning
from upperson_rt.errors import InputError, UppersonError
from upperson_rt.files import write_atomically
from upperson_rt.ingest.boxes import clean_boxes
from upperson_rt.ingest.detector import Detector, open_detector, plugin_boundary
from upperson_rt.preprocess import load_image
from upperson_rt.printable import count_of, error_text

_SIZE = 960, 540
_FIGURES = ((180, 500, 400, 0), (470, 470, 300, 1), (760, 520, 440, 2))
"""Middle, feet and height in pixels, and the clothes."""
_CLOTHES = (
    ((176, 48, 52), (52, 58, 78), (70, 46, 34), (224, 180, 152)),
    ((48, 110, 82), (146, 132, 112), (34, 30, 30), (152, 104, 76)),
    ((226, 196, 84), (38, 48, 92), (120, 82, 48), (236, 196, 170)),
)
"""Coat, trousers, hair, skin."""
_MOST_SHOWN = 8
_FOUND, _WANTED = (226, 48, 48), (40, 140, 70)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a detector found in one picture."""

    image: NDArray[np.uint8]
    """RGB [H, W, 3]."""
    boxes: NDArray[np.int64]
    """(N, 4) x0, y0, x1, y1 in its pixels, inside it."""
    scores: NDArray[np.float64]
    """(N,); NaN where the detector gives none."""
    figures: NDArray[np.int64] | None
    """(3, 4) where figures were drawn; None for a picture of the user's."""

    @property
    def figures_found(self) -> int:
        """Drawn figures that share half of their area with a box of about their size."""
        if self.figures is None:
            return 0
        return int((_overlaps(self.figures, self.boxes) >= 0.5).any(axis=1).sum())

    @property
    def boxes_elsewhere(self) -> int:
        """Boxes that hardly touch any drawn figure."""
        if self.figures is None or not len(self.boxes):
            return 0
        return int((_overlaps(self.boxes, self.figures) < 0.2).all(axis=1).sum())


def try_on(detector: Detector, picture: str | os.PathLike[str] | None = None) -> Trial:
    """Run a detector on a picture, or on drawn figures."""
    if picture is None:
        image, figures = draw_figures()
    else:
        image, figures = load_image(picture), None
    height, width = image.shape[:2]
    found = clean_boxes(detector(np.ascontiguousarray(image[:, :, ::-1])), width, height)
    return Trial(image=image, boxes=found.edges, scores=found.scores, figures=figures)


def check_detector(
    name: str,
    layout: str | None = None,
    person: str | None = None,
    min_score: float | None = None,
    picture: Path | None = None,
    sheet: Path | None = None,
) -> list[Check]:
    """Load a detector, run it on a picture, and report what it found."""
    try:
        detector = open_detector(name, layout, person, min_score)
    except UppersonError as error:
        return [fail_from_error("detector", error)]
    own_facts: Mapping[str, Any] = getattr(detector, "facts", {})
    facts = {"detector": name, **own_facts}
    detail = str(detector) if own_facts else f"{name}, {type(detector).__name__}"
    checks = [ok("detector", detail, **facts)]
    try:
        with plugin_boundary(_failed):
            trial = try_on(detector, picture)
        if sheet is not None:
            buffer = io.BytesIO()
            draw_boxes(trial).save(buffer, format="PNG", optimize=True)
            write_atomically(sheet, buffer.getvalue())
    except UppersonError as error:
        return [*checks, fail_from_error("people", error)]
    return [*checks, _what_was_found(trial, picture, sheet, "layout" in facts)]


def _failed(error: BaseException) -> UppersonError:
    if isinstance(error, UppersonError):
        return error
    return InputError(f"the detector fails: {error_text(error)}")


def _what_was_found(
    trial: Trial, picture: Path | None, sheet: Path | None, has_layout: bool
) -> Check:
    boxes = [
        f"({x0}, {y0}, {x1}, {y1})" + ("" if np.isnan(score) else f" {score:.2f}")
        for (x0, y0, x1, y1), score in zip(trial.boxes.tolist(), trial.scores.tolist(), strict=True)
    ]
    found = count_of(len(boxes), "box", "boxes")
    if boxes:
        found += f": {'; '.join(boxes[:_MOST_SHOWN])}"
    if len(boxes) > _MOST_SHOWN:
        found += f" and {len(boxes) - _MOST_SHOWN} more"
    where = "" if sheet is None else f"; drawn in {sheet}"
    scores = [None if np.isnan(score) else score for score in trial.scores.tolist()]
    facts: dict[str, Any] = {"boxes": trial.boxes.tolist(), "scores": scores, "figures": None}
    if trial.figures is None:
        advice = "check the boxes: --sheet FILE.png  draws them" if sheet is None else ""
        if not boxes:
            other = "name another --detector-layout, -class or -score"
            advice = f"if there are people, {other if has_layout else 'it misses them'}"
        detail = f"in {picture} {found}{where}"
        return Check("people", "ok" if boxes else "warn", detail, advice, facts=facts)
    right, elsewhere = trial.figures_found, trial.boxes_elsewhere
    facts["figures"] = right
    detail = f"{right} of {len(trial.figures)} drawn figures found, {found}{where}"
    if right and not elsewhere:
        return ok("people", detail, **facts)
    problem = (
        "boxes lie where no figure is" if boxes else "networks may not take figures for people"
    )
    advice = f"{problem}: try  --picture FILE  with people on it"
    if boxes and has_layout:
        advice += ", or another --detector-layout"
    return warning("people", detail, advice, **facts)


def draw_boxes(trial: Trial) -> Image.Image:
    """Return the picture with a red box for each person found, and green ones for drawn figures."""
    image = Image.fromarray(trial.image)
    draw = ImageDraw.Draw(image)
    width = max(2, round(max(image.size) / 400))
    font = ImageFont.load_default(size=max(12, round(max(image.size) / 60)))
    for x0, y0, x1, y1 in () if trial.figures is None else trial.figures.tolist():
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=_WANTED, width=max(1, width // 2))
    for (x0, y0, x1, y1), score in zip(trial.boxes.tolist(), trial.scores.tolist(), strict=True):
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=_FOUND, width=width)
        label = "person" if np.isnan(score) else f"{score:.2f}"
        area = draw.textbbox((x0 + width, y0 + width), label, font=font)
        draw.rectangle((area[0] - 2, area[1] - 2, area[2] + 2, area[3] + 2), fill=_FOUND)
        draw.text((x0 + width, y0 + width), label, font=font, fill=(255, 255, 255))
    return image


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


def _overlaps(one: NDArray[np.int64], other: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (N, M) intersections over unions of (N, 4) and (M, 4) boxes."""
    first = np.maximum(one[:, None, :2], other[None, :, :2])
    last = np.minimum(one[:, None, 2:], other[None, :, 2:])
    shared = np.prod(np.maximum(0, last - first), axis=2)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=1) for boxes in (one, other)]
    return np.asarray(shared / (areas[0][:, None] + areas[1][None] - shared), np.float64)
