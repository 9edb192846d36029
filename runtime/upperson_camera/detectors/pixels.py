"""From a frame to the input of a network, and back for boxes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_camera.source import import_cv2
from upperson_rt.errors import UsageError
from upperson_rt.printable import safe_repr

if TYPE_CHECKING:
    from upperson_rt.preprocess import PixelArray

Three: TypeAlias = tuple[float, float, float]

_GREY = 114  # What YOLO models are trained to see around a picture of another shape.
IMAGENET: tuple[Three, Three] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of its pixels as R, G, B from 0 to 1."""

_RANGES: Mapping[str, Literal[1, 255]] = {"0-1": 1, "0-255": 255}
_PROPERTIES = {
    "channels": "the order of the channels",
    "largest": "the value of white",
    "place": "how a frame is resized",
}
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
        offset: NDArray[np.float32] = np.array([self.left, self.top] * 2, np.float32)
        scale: NDArray[np.float32] = np.array([self.scale_x, self.scale_y] * 2, np.float32)
        moved: NDArray[np.float32] = (boxes - offset) / scale
        return moved


@dataclass(frozen=True, kw_only=True, slots=True)
class Pixels:
    """The pixels that a network was trained on."""

    place: Literal["centre", "corner", "stretch"]
    """A frame of another shape is padded with grey on two sides, padded below and to the right, or
    stretched."""
    channels: Literal["rgb", "bgr"] = "rgb"
    largest: Literal[1, 255] = 1
    """The value of white."""
    mean: Three = (0.0, 0.0, 0.0)
    """Subtracted, in the order of the channels and in their range."""
    std: Three = (1.0, 1.0, 1.0)
    """What is left is divided by this."""

    def __str__(self) -> str:
        name = f"0 to {self.largest}"
        if (self.mean, self.std) == IMAGENET and self.channels == "rgb":
            name = "ImageNet's mean and deviation"
        elif self.mean != (0, 0, 0) or self.std != (1, 1, 1):
            mean, std = ("/".join(f"{value:g}" for value in row) for row in (self.mean, self.std))
            name += f" less {mean} over {std}"
        return f"{self.channels.upper()}, {name}, {_PLACES[self.place]}"

    def with_input(self, text: str) -> "Pixels":
        """Return these pixels, changed by a text such as ``bgr,0-255,mean=104/117/123,stretch``.

        Raises:
            UsageError: A part of it is none of the known ones, or two parts set the same property.
        """
        changed: dict[str, Any] = {}
        for part in text.split(","):
            name, _, numbers = part.partition("=")
            value: Any = part
            if part in ("rgb", "bgr"):
                name = "channels"
            elif part in _RANGES:
                name, value = "largest", _RANGES[part]
            elif part in _PLACES:
                name = "place"
            elif name not in ("mean", "std") or (value := _three(numbers)) is None:
                message = (
                    f"--detector-input {safe_repr(part)} is not known: expected parts such as rgb, "
                    f"bgr, {', '.join((*_RANGES, *_PLACES))}, mean=104/117/123, std=1/1/1"
                )
                raise UsageError(message, code="detector_input_unknown", found=part)
            if name in changed:
                what = f"{_PROPERTIES.get(name, name)} twice, the second time with {part}"
                message = f"--detector-input sets {what}: leave one of them out"
                raise UsageError(message, code="detector_input_ambiguous", found=text)
            changed[name] = value
        if 0 in changed.get("std", ()):
            raise UsageError(
                "std of --detector-input is 0", code="detector_input_unknown", found=text
            )
        return replace(self, **changed)

    def prepare(
        self, frame: "PixelArray", size: tuple[int, int]
    ) -> tuple[NDArray[np.float32], Fit]:
        """Return a BGR frame of any size as float32 [3, H, W], and where it is in that input."""
        picture, fit = self._fit(frame, size)
        ordered = picture if self.channels == "bgr" else picture[:, :, ::-1]
        values = np.ascontiguousarray(ordered.transpose(2, 0, 1), dtype=np.float32)
        if self.largest == 1:
            values /= 255
        if self.mean != (0, 0, 0):
            values -= np.array(self.mean, np.float32)[:, None, None]
        if self.std != (1, 1, 1):
            values /= np.array(self.std, np.float32)[:, None, None]
        return values, fit

    def _fit(self, frame: "PixelArray", size: tuple[int, int]) -> tuple[NDArray[np.uint8], Fit]:
        cv2 = import_cv2()
        (height, width), (tall, wide) = frame.shape[:2], size
        if self.place == "stretch":
            picture = cv2.resize(frame, (wide, tall), interpolation=cv2.INTER_LINEAR)
            return picture, Fit(wide / width, tall / height, 0, 0)
        scale = min(tall / height, wide / width)
        across = min(wide, max(1, round(width * scale)))
        down = min(tall, max(1, round(height * scale)))
        left, top = 0, 0
        if self.place == "centre":
            left, top = (wide - across) // 2, (tall - down) // 2
        small = cv2.resize(frame, (across, down), interpolation=cv2.INTER_LINEAR)
        padded = np.full((tall, wide, 3), _GREY, np.uint8)
        padded[top : top + down, left : left + across] = small
        return padded, Fit(scale, scale, left, top)


def _three(text: str) -> Three | None:
    try:
        first, second, third = (float(number) for number in text.split("/"))
    except ValueError:
        return None
    return (first, second, third) if np.isfinite([first, second, third]).all() else None
