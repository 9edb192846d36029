"""What travels through the pipeline: frames, views of people, crops."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from upperson_rt.camera.boxes import Boxes
from upperson_rt.gallery import Item

__all__ = ["Crop", "Frame", "View"]


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
