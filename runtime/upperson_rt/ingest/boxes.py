"""Boxes of people in a picture, clipped and cleaned, and what a crop must have to be embedded."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from upperson_rt.arguments import check_choice, check_fields
from upperson_rt.errors import InputError, UsageError
from upperson_rt.printable import one_line

MOST_BOXES = 256
"""Of more boxes in a frame, those with the highest scores are kept, the rest counted."""


_MOST_ROWS = 1_000_000
"""More than a network's raw output has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Boxes:
    """Boxes inside a frame."""

    edges: NDArray[np.int64]
    """(N, 4): x0, y0, x1, y1 in pixels, the last two exclusive; at least one pixel each."""
    scores: NDArray[np.float64]
    """(N,); NaN where the detector gave none."""
    rows: NDArray[np.intp]
    """(N,) positions among the boxes that were given."""
    dropped: dict[str, int]
    """How many were left out, by reason: ``empty``, ``outside``, ``duplicate``, ``too_many``."""


def clean_boxes(given: Any, width: int, height: int) -> Boxes:
    """Clip boxes to a frame of that size in pixels, and leave out what is not in it.

    ``given`` has N rows of x0, y0, x1, y1 and perhaps a score: anything numpy can read, or None.
    """
    try:
        found = np.asarray([] if given is None else given)
        if found.dtype.kind in "cmM":  # Complex numbers and times.
            raise TypeError(f"found {found.dtype}")
        array = found.astype(np.float64, copy=False)
    except (TypeError, ValueError, OverflowError) as error:
        message = f"boxes must be rows of x0, y0, x1, y1[, score]: {one_line(error)}"
        raise InputError(message, code="boxes_malformed") from error
    if array.size == 0:
        array = array.reshape(0, 4)
    if array.ndim != 2 or array.shape[1] not in (4, 5):
        shape = f"an array of shape {array.shape}"
        message = f"boxes must be rows of x0, y0, x1, y1[, score], found {shape}"
        raise InputError(message, code="boxes_malformed")
    if len(array) > _MOST_ROWS:
        message = f"a frame has at most {_MOST_ROWS} boxes, found {len(array)} rows"
        raise InputError(message, code="too_many_boxes")
    scores = array[:, 4] if array.shape[1] == 5 else np.full(len(array), np.nan)
    scores = np.where(np.isfinite(scores), scores, np.nan)
    x0, y0, x1, y1 = array[:, :4].T
    with np.errstate(invalid="ignore"):
        # Comparisons with NaN are False, so a box that is not finite counts as empty, too.
        real = np.isfinite(array[:, :4]).all(axis=1) & (x1 > x0) & (y1 > y0)
        inside = real & (x0 < width) & (y0 < height) & (x1 > 0) & (y1 > 0)
    rows = np.flatnonzero(inside)
    limits = np.array([width, height, width, height], dtype=np.float64)
    edges = np.clip(np.round(array[rows, :4]), 0, limits).astype(np.int64)
    solid = (edges[:, 2] > edges[:, 0]) & (edges[:, 3] > edges[:, 1])
    rows, edges = rows[solid], edges[solid]
    _, first = np.unique(edges, axis=0, return_index=True)
    dropped = {
        "empty": int((~real).sum() + (~solid).sum()),
        "outside": int((real & ~inside).sum()),
        "duplicate": len(rows) - len(first),
        "too_many": max(0, len(first) - MOST_BOXES),
    }
    first.sort()
    rows, edges = rows[first], edges[first]
    if len(rows) > MOST_BOXES:
        best = np.argsort(-np.nan_to_num(scores[rows], nan=0.0), kind="stable")[:MOST_BOXES]
        rows, edges = rows[np.sort(best)], edges[np.sort(best)]
    return Boxes(
        edges=edges,
        scores=scores[rows],
        rows=rows,
        dropped={reason: count for reason, count in dropped.items() if count},
    )


BorderRule: TypeAlias = Literal["keep", "last", "drop"]
"""Views that touch the border: like others, only if there is no other, or never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRules:
    """What a view must have to be embedded."""

    min_height_px: int = 64
    min_width_px: int = 24
    min_sharpness: float = 20.0
    """Variance of the Laplacian of the grey view, scaled down to 128 pixels of height."""
    border: BorderRule = "last"

    def __post_init__(self) -> None:
        check_fields(self)
        if min(self.min_height_px, self.min_width_px, self.min_sharpness) < 0:
            raise UsageError("smallest height, width and sharpness must not be negative")
        check_choice(self.border, "border", get_args(BorderRule))

    def size_problem(self, height_px: int, width_px: int) -> str | None:
        """Return why a box is not looked at any further, or None."""
        small = height_px < self.min_height_px or width_px < self.min_width_px
        return "too_small" if small else None

    @property
    def smallest(self) -> str:
        """The size below which a box counts as too small, in words."""
        return f"lower than {self.min_height_px} or narrower than {self.min_width_px} pixels"

    def problem(self, sharpness: float, at_border: bool) -> str | None:
        """Return why a view is not used, or None."""
        if at_border and self.border == "drop":
            return "at_border"
        return "blurred" if sharpness < self.min_sharpness else None
