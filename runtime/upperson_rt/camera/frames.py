"""What travels through a pipeline: frames with their times and boxes, views of people, crops."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.arguments import is_finite
from upperson_rt.errors import InputError
from upperson_rt.gallery import Item
from upperson_rt.printable import one_line, shown

__all__ = [
    "MOST_BOXES",
    "Boxes",
    "Crop",
    "Frame",
    "SteadyClock",
    "View",
    "as_bgr",
    "check_unix_time",
    "clean_boxes",
]

MOST_BOXES = 256
"""More boxes in one frame are a detector gone wrong: the best ones are kept, the rest counted."""

_MOST_ROWS = 1_000_000
"""Not even a network's raw output has as many."""

_LATEST_S = 1e11
"""The year 5138; unix times in milliseconds are beyond."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Frame:
    """One picture of a camera."""

    image: NDArray[np.uint8]
    """BGR [H, W, 3]."""
    index: int
    """Number in its camera, from 0."""
    time: float
    """When it was taken, unix seconds."""
    clock: float
    """The same on the camera's `SteadyClock`."""
    arrived: float
    """When it came into the pipeline, on `time.monotonic`."""
    boxes: Boxes | None = None
    """Boxes found elsewhere; None lets the camera's detector look."""
    tracks: tuple[str, ...] | None = None
    """Names of tracks found elsewhere, one a box."""


@dataclass(frozen=True, kw_only=True, slots=True)
class View:
    """A person in one frame."""

    image: NDArray[np.uint8]
    """BGR [h, w, 3], the person only; its own memory."""
    box: tuple[int, int, int, int]
    score: float | None
    """The detector's."""
    sharpness: float
    at_border: bool
    track: str
    index: int
    """Number of the frame; a view must not keep the frame itself in memory."""
    time: float
    arrived: float

    @property
    def rank(self) -> tuple[bool, float]:
        """Orders the views of a track, the best one last.

        A view that is cut off loses against any that is not. Otherwise sharpness and height both
        count, each up to where more adds little.
        """
        height = min(1.0, self.image.shape[0] / 256)
        return (not self.at_border, height * self.sharpness / (self.sharpness + 100.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop:
    """A view that was chosen to be embedded, ready for the image tower."""

    item: Item
    camera: str
    pixels: NDArray[np.uint8]
    """RGB [H, W, 3] of the model's size."""
    jpeg: bytes | None
    """The picture to save as ``item.crop``, or None."""
    arrived: float
    """When its frame came into the pipeline, on `time.monotonic`."""
    chosen: float
    """When it was chosen, on `time.monotonic`."""


def as_bgr(image: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Return BGR [H, W, 3] of what a source may give; without pixels if it is no picture.

    Infrared and depth cameras have one channel or 16 bits, GStreamer may give a fourth channel.
    """
    nothing = np.zeros((0, 0, 3), np.uint8)
    if image.dtype not in (np.uint8, np.uint16) or image.ndim not in (2, 3):
        return nothing
    upper = np.right_shift(image, 8) if image.dtype == np.uint16 else image
    pixels: NDArray[np.uint8] = upper.astype(np.uint8, copy=False)
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=2)
    if pixels.shape[2] in (3, 4):
        return np.ascontiguousarray(pixels[:, :, :3])
    return nothing


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


def check_unix_time(given: float | None) -> None:
    """Raise InputError if the time of a picture is none in unix seconds; None is no time."""
    if given is not None and not (is_finite(given) and 0 <= given < _LATEST_S):
        raise InputError(
            f"a time must be finite and in unix seconds, not milliseconds, such as "
            f"{time.time():.0f}; found {shown(given)}"
        )


class SteadyClock:
    """Seconds since the first frame of a camera; never decrease.

    Wall clocks are set back by time servers, and files can have broken time stamps. Where the given
    time does not go forward, the time that really passed is taken instead.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._given: float | None = None
        self._arrived = 0.0

    def advance(self, given: float, arrived: float) -> float:
        """Return the steady time of a frame: ``given`` on any clock, ``arrived`` on monotonic."""
        if self._given is not None:
            step = given - self._given
            self._seconds += step if step > 0 else max(0.0, arrived - self._arrived)
        self._given, self._arrived = given, arrived
        return self._seconds
