"""What travels through a pipeline: frames, detections and crops."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_camera.recorder import Cut
from upperson_rt.arguments import LATEST_UNIX_S, is_finite
from upperson_rt.errors import InputError
from upperson_rt.ingest.boxes import Boxes
from upperson_rt.ingest.service import Crop
from upperson_rt.printable import safe_repr


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
    """Boxes found elsewhere; None runs the camera's detector."""
    tracks: tuple[str, ...] | None = None
    """Names of tracks found elsewhere, one a box."""
    packet: int = 0
    """The last packet that was read before it, see `Recorder.count`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmitResult:
    """What became of a submitted frame; true if it was queued."""

    index: int
    """Number of the frame in its camera, from 0."""
    reason: str | None
    """Why it was dropped: ``queue_full``, ``empty`` or ``stopped``; None if it was queued. A queued
    frame can still be dropped, which the result of the later one says, or `Pipeline.stop` at the
    end (``stopped``)."""
    displaced: int | None = None
    """Number of the earlier frame that was dropped for it (``queue_full``)."""

    def __bool__(self) -> bool:
        return self.reason is None


@dataclass(slots=True)
class WholeFrame:
    """The frame of detections, which is encoded as soon as one of them may become a crop."""

    image: NDArray[np.uint8] | None
    packet: int
    jpeg: bytes | None = None

    def keep(self, encode: Callable[[NDArray[np.uint8]], bytes]) -> None:
        """Encode the frame, once, and let go of its pixels."""
        image, self.image = self.image, None
        if image is not None:
            self.jpeg = encode(image)


@dataclass(frozen=True, kw_only=True, slots=True)
class Detection:
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
    """Number of the frame; the frame itself is not kept in memory."""
    time: float
    arrived: float
    whole: WholeFrame | None = None
    """Its frame, if frames are saved."""

    @property
    def rank(self) -> tuple[bool, float]:
        """Orders the detections of a track, the best one last.

        One that is cut off at the border comes before any that is not. Then sharpness and height
        count, each up to where more adds little.
        """
        height = min(1.0, self.image.shape[0] / 256)
        return (not self.at_border, height * self.sharpness / (self.sharpness + 100.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class CameraCrop(Crop):
    """A detection that was selected to be embedded."""

    camera: str
    arrived: float
    """When its frame came into the pipeline, on `time.monotonic`."""
    chosen: float
    """When it was selected, on `time.monotonic`."""
    frame_jpeg: bytes | None = None
    """Its whole frame, if frames are saved."""
    cut: Cut | str | None = None
    """The packets around it, or why there are none; None if no clips are wanted."""


EncodedCrops: TypeAlias = tuple[list[CameraCrop], NDArray[np.float32]]
"""Crops and their embeddings."""


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


def check_unix_time(given: float | None) -> None:
    """Raise InputError if the time of a picture is none in unix seconds; None is no time."""
    if given is not None and not (is_finite(given) and 0 <= given < LATEST_UNIX_S):
        text = (
            "a time must be finite and in unix seconds, not milliseconds, such as "
            f"{time.time():.0f}; found {safe_repr(given)}"
        )
        raise InputError(text, code="time_malformed", found=given)


class SteadyClock:
    """Seconds since the first frame of a camera; they never decrease.

    Time servers set wall clocks back, and files can have broken time stamps. If the given time does
    not go forward, the time that really passed counts instead.
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
