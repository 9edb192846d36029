"""The trial of a detector on one picture, which shows a wrong layout at once.

Without a picture of the user's, three figures are drawn. They are no photograph: a network that
finds them where they are gets its pixels right; one that finds none may be right all the same.
"""

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from upperson_camera.drawn_people import draw_figures, figures_found, overlaps
from upperson_rt.checks import Check, fail_from_error, ok, warning
from upperson_rt.errors import InputError, UppersonError
from upperson_rt.files import write_atomically
from upperson_rt.ingest.boxes import QualityRules, clean_boxes
from upperson_rt.ingest.detector import Detector, open_detector, plugin_boundary
from upperson_rt.preprocess import load_image
from upperson_rt.printable import count_of, error_text

_MOST_SHOWN = 8
_FOUND, _TOO_SMALL, _WANTED = (226, 48, 48), (130, 130, 130), (40, 140, 70)


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
    def too_small(self) -> list[bool]:
        """Boxes that `index`, and `watch` by default, leave out for their size."""
        size_problem = QualityRules().size_problem
        return [
            size_problem(y1 - y0, x1 - x0) is not None for x0, y0, x1, y1 in self.boxes.tolist()
        ]

    @property
    def figures_found(self) -> int:
        """Drawn figures that share half of their area with a box of about their size."""
        if self.figures is None:
            return 0
        return figures_found(self.figures, self.boxes)

    @property
    def boxes_elsewhere(self) -> int:
        """Boxes that overlap no drawn figure by more than a small part."""
        if self.figures is None or not len(self.boxes):
            return 0
        return int((overlaps(self.boxes, self.figures) < 0.2).all(axis=1).sum())


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
    pixels: str | None = None,
) -> list[Check]:
    """Load a detector, run it on a picture, and report what it found."""
    try:
        detector = open_detector(name, layout, person, min_score, pixels=pixels)
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
    if small := sum(trial.too_small):
        found += f"; {small} too small to be stored: {QualityRules().smallest}"
    where = "" if sheet is None else f"; drawn in {sheet}"
    scores = [None if np.isnan(score) else score for score in trial.scores.tolist()]
    facts: dict[str, Any] = {"boxes": trial.boxes.tolist(), "scores": scores}
    facts |= {"too_small": trial.too_small, "figures": None}
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
    if has_layout and not right:
        advice = "try  --image FILE  with people on it; if it misses them, too, name another "
        advice += "--detector-layout, -input or -class"
        return Check("people", "fail", detail, advice, InputError.exit_code, facts=facts)
    problem = (
        "boxes lie where no figure is" if boxes else "networks may not take figures for people"
    )
    advice = f"{problem}: try  --image FILE  with people on it"
    if boxes and has_layout:
        advice += ", or another --detector-layout"
    return warning("people", detail, advice, **facts)


def draw_boxes(trial: Trial) -> Image.Image:
    """Return the picture with a box for each person found, and green ones for drawn figures.

    Boxes are red, and grey where they are too small to be stored.
    """
    image = Image.fromarray(trial.image)
    draw = ImageDraw.Draw(image)
    width = max(2, round(max(image.size) / 400))
    font = ImageFont.load_default(size=max(12, round(max(image.size) / 60)))
    for x0, y0, x1, y1 in () if trial.figures is None else trial.figures.tolist():
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=_WANTED, width=max(1, width // 2))
    rows = zip(trial.boxes.tolist(), trial.scores.tolist(), trial.too_small, strict=True)
    for (x0, y0, x1, y1), score, is_small in rows:
        colour = _TOO_SMALL if is_small else _FOUND
        draw.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour, width=width)
        label = "person" if np.isnan(score) else f"{score:.2f}"
        area = draw.textbbox((x0 + width, y0 + width), label, font=font)
        draw.rectangle((area[0] - 2, area[1] - 2, area[2] + 2, area[3] + 2), fill=colour)
        draw.text((x0 + width, y0 + width), label, font=font, fill=(255, 255, 255))
    return image
