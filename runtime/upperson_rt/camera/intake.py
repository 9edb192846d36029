"""Where the frames of a camera come in, from its capture or from anybody's loop."""

import threading
import time as time_module
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.camera.boxes import Boxes, clean_boxes
from upperson_rt.camera.capture import Capture
from upperson_rt.camera.clock import SteadyClock, check_unix_time
from upperson_rt.camera.frames import Frame
from upperson_rt.camera.ledger import Ledger
from upperson_rt.camera.queues import DropPolicy
from upperson_rt.camera.worker import CameraWorker
from upperson_rt.errors import InputError, UsageError

__all__ = ["CameraIntake"]


class CameraIntake:
    """Numbers and times the frames of one camera, and puts them in line for its worker."""

    def __init__(self, name: str, worker: CameraWorker, policy: DropPolicy, ledger: Ledger) -> None:
        self.name = name
        self.worker = worker
        self.policy = policy
        self.capture: Capture | None = None
        """Set for a camera that reads its own source."""
        self._ledger = ledger
        self._clock = SteadyClock()
        self._count = 0
        self._lock = threading.Lock()  # Numbers and times must rise in the order of the queue.

    def start(self) -> None:
        """Start its threads."""
        self.worker.start()
        if self.capture is not None:
            self.capture.start()

    @property
    def state(self) -> str:
        """As in `CameraStats`."""
        if self.worker.error is not None:
            return "failed"
        if self.capture is not None:
            return self.capture.state
        if self.worker.is_alive:
            return "running"
        return "stopped" if self.worker.frames.closed else "waiting"

    @property
    def error(self) -> str | None:
        """Why it failed, or was lost last."""
        if self.worker.error is not None:
            return self.worker.error
        return None if self.capture is None else self.capture.error

    def receive(self, image: NDArray[np.generic] | None, unix_time: float, clock: float) -> None:
        """Take a frame from the capture; one that is no picture counts as empty."""
        if self.worker.error is not None and self.capture is not None:
            self.capture.stop()
        self._enter(_as_bgr(image), unix_time, clock, time_module.monotonic(), None, None)

    def submit(
        self,
        frame: NDArray[np.uint8],
        boxes: Any,
        time: float | None,
        tracks: Sequence[str | int] | None,
        rgb: bool,
    ) -> bool:
        """Take a frame from outside; see `Pipeline.submit`."""
        now = time_module.monotonic()
        if self.capture is not None:
            raise UsageError(f"camera {self.name} reads its own source")
        if not isinstance(frame, np.ndarray):
            raise InputError(f"a frame must be uint8 [H, W, 3], found {type(frame).__name__}")
        if frame.dtype != np.uint8 or frame.ndim != 3 or (frame.size and frame.shape[2] != 3):
            raise InputError(
                f"a frame must be uint8 [H, W, 3], found {frame.dtype} {list(frame.shape)}"
            )
        check_unix_time(time)
        if boxes is None and not self.worker.has_detector:
            raise UsageError(
                f"camera {self.name} has no detector: pass boxes with each frame, or a detector "
                "to add_camera"
            )
        names = None if tracks is None else tuple(map(str, tracks))
        if names is not None and (boxes is None or len(names) != len(boxes)):
            raise InputError(f"{len(names)} tracks need as many boxes")
        height, width = frame.shape[:2]
        cleaned = None if boxes is None else clean_boxes(boxes, width, height)
        copy = frame[:, :, ::-1].copy() if rgb else frame.copy()
        if time is None:
            return self._enter(copy, time_module.time(), now, now, cleaned, names)
        return self._enter(copy, time, time, now, cleaned, names)

    def _enter(
        self,
        image: NDArray[np.uint8],
        unix_time: float,
        clock: float,
        now: float,
        boxes: Boxes | None,
        tracks: tuple[str, ...] | None,
    ) -> bool:
        with self._lock:
            self._ledger.count(self.name, "frames.read")
            steady, index = self._clock.advance(clock, now), self._count
            self._count += 1
            if not image.size:
                self._ledger.count(self.name, "frames.dropped.empty")
                return False
            frame = Frame(
                image=image,
                index=index,
                time=unix_time,
                clock=steady,
                arrived=now,
                boxes=boxes,
                tracks=tracks,
            )
            dropped = self.worker.frames.put(frame, self.policy)
        if dropped is not None:
            reason = "stopped" if self.worker.frames.closed else "queue_full"
            self._ledger.count(self.name, f"frames.dropped.{reason}")
        return dropped is not frame


def _as_bgr(image: NDArray[np.generic] | None) -> NDArray[np.uint8]:
    """Return BGR [H, W, 3] of what OpenCV may give; without pixels if it is no picture.

    Infrared and depth cameras have one channel or 16 bits, GStreamer may give a fourth channel.
    """
    if image is None or image.dtype not in (np.uint8, np.uint16) or image.ndim not in (2, 3):
        return np.zeros((0, 0, 3), np.uint8)
    upper = np.right_shift(image, 8) if image.dtype == np.uint16 else image
    pixels: NDArray[np.uint8] = upper.astype(np.uint8, copy=False)
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=2)
    if pixels.shape[2] in (3, 4):
        return np.ascontiguousarray(pixels[:, :, :3])
    return np.zeros((0, 0, 3), np.uint8)
