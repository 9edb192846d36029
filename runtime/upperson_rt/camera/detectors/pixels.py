"""How a frame becomes the input of a network, and boxes in that input boxes in the frame again."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from upperson_rt.camera.source import import_cv2

__all__ = ["Fit", "Pixels"]

_GREY = 114  # What YOLO models are trained to see around a picture of another shape.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels as R, G, B from 0 to 1."""

_PLACES = {
    "centre": "grey on two sides",
    "corner": "grey to the right and below",
    "stretch": "stretched",
}


@dataclass(frozen=True, slots=True)
class Fit:
    """Where a frame lies in the input: scaled, then moved."""

    scale_x: float
    scale_y: float
    left: int
    top: int

    def to_frame(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (N, 4) corners in pixels of the frame for corners in pixels of the input."""
        offset = np.array([self.left, self.top, self.left, self.top], np.float32)
        scale = np.array([self.scale_x, self.scale_y, self.scale_x, self.scale_y], np.float32)
        moved: NDArray[np.float32] = (boxes - offset) / scale
        return moved


@dataclass(frozen=True, kw_only=True, slots=True)
class Pixels:
    """What a network was trained to see."""

    place: Literal["centre", "corner", "stretch"]
    """A picture of another shape keeps its own and lies in the middle or at the top left, with grey
    around it, or loses it."""
    channels: Literal["rgb", "bgr"] = "rgb"
    largest: Literal[1, 255] = 1
    """What white is."""
    imagenet: bool = False
    """Less ImageNet's mean, over its standard deviation."""

    def __str__(self) -> str:
        name = "ImageNet's mean and deviation" if self.imagenet else f"0 to {self.largest}"
        return f"{self.channels.upper()}, {name}, {_PLACES[self.place]}"

    def prepare(
        self, frame: NDArray[np.uint8], size: tuple[int, int]
    ) -> tuple[NDArray[np.float32], Fit]:
        """Fit a frame into the input.

        Args:
            frame: uint8 BGR [h, w, 3] of any size.
            size: Height and width of the input.

        Returns:
            float32 [3, H, W], and where the frame is in it.
        """
        picture, fit = self._fit(frame, size)
        ordered = picture if self.channels == "bgr" else picture[:, :, ::-1]
        values = np.ascontiguousarray(ordered.transpose(2, 0, 1), dtype=np.float32)
        if self.largest == 1:
            values /= 255
        if self.imagenet:
            values -= np.array(_MEAN, np.float32)[:, None, None]
            values /= np.array(_STD, np.float32)[:, None, None]
        return values, fit

    def _fit(
        self, frame: NDArray[np.uint8], size: tuple[int, int]
    ) -> tuple[NDArray[np.uint8], Fit]:
        cv2 = import_cv2()
        (height, width), (tall, wide) = frame.shape[:2], size
        if self.place == "stretch":
            picture = cv2.resize(frame, (wide, tall), interpolation=cv2.INTER_LINEAR)
            return picture, Fit(wide / width, tall / height, 0, 0)
        scale = min(tall / height, wide / width)
        inner = (
            min(wide, max(1, round(width * scale))),
            min(tall, max(1, round(height * scale))),
        )
        left, top = 0, 0
        if self.place == "centre":
            left, top = (wide - inner[0]) // 2, (tall - inner[1]) // 2
        padded = np.full((tall, wide, 3), _GREY, np.uint8)
        padded[top : top + inner[1], left : left + inner[0]] = cv2.resize(
            frame, inner, interpolation=cv2.INTER_LINEAR
        )
        return padded, Fit(scale, scale, left, top)
