"""Boxes of people in a picture, clipped and cleaned."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError
from upperson_rt.printable import one_line

__all__ = ["MOST_BOXES", "Boxes", "clean_boxes"]

MOST_BOXES = 256
"""More boxes in one frame are a detector gone wrong: the best ones are kept, the rest counted."""


_MOST_ROWS = 1_000_000
"""Not even a network's raw output has as many."""


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
    """Clip boxes to a frame of that size, and leave out what is not in it.

    Args:
        given: N rows of x0, y0, x1, y1 and perhaps a score, in pixels; anything numpy can read,
            None or an empty list for nobody.
        width: Of the frame.
        height: Of the frame.

    Raises:
        InputError: Not such rows.
    """
    try:
        found = np.asarray([] if given is None else given)
        if found.dtype.kind in "cmM":  # They would become numbers of another meaning.
            raise TypeError(f"found {found.dtype}")
        array = found.astype(np.float64, copy=False)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(
            f"boxes must be rows of x0, y0, x1, y1[, score]: {one_line(error)}"
        ) from error
    if array.size == 0:
        array = array.reshape(0, 4)
    if array.ndim != 2 or array.shape[1] not in (4, 5):
        raise InputError(
            f"boxes must be rows of x0, y0, x1, y1[, score], found an array of shape {array.shape}"
        )
    if len(array) > _MOST_ROWS:
        raise InputError(f"a frame has at most {_MOST_ROWS} boxes, found {len(array)} rows")
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
