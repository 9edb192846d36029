"""One camera: takes frames from its own source or from `Pipeline.submit`."""

import math
import threading
import time as time_module
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from upperson_camera.capture import Capture
from upperson_camera.frames import Frame, SteadyClock, SubmitResult, as_bgr, check_unix_time
from upperson_camera.queues import BoundedQueue, Stage
from upperson_camera.recorder import Recorder
from upperson_camera.regions import Regions
from upperson_camera.settings import CameraSettings, Shared
from upperson_camera.stats import CameraStats, camera_stats
from upperson_camera.worker import CameraWorker
from upperson_rt.arguments import check_list, check_name
from upperson_rt.errors import InputError, UsageError
from upperson_rt.ingest.boxes import Boxes, clean_boxes
from upperson_rt.ingest.detector import Detector
from upperson_rt.printable import shortened

if TYPE_CHECKING:
    from upperson_rt.preprocess import PixelArray

_LATE_S = 5.0
"""Longest time, usually, from a frame to the choice of its crop, besides that of the rules."""


class Camera:
    """Numbers and times the frames of one camera, and queues them for its worker."""

    def __init__(self, camera: CameraSettings, shared: Shared) -> None:
        self.name = camera.name
        self._settings = camera
        self._counters = shared.counters
        self._patience_s = shared.settings.end_within_s
        self._frames: BoundedQueue[Frame] = BoundedQueue(shared.settings.frame_queue)
        self._recorder = _new_recorder(camera, shared)
        self._worker = CameraWorker(camera, shared, self._frames, self._recorder)
        self._capture: Capture | None = None
        if camera.source is not None:
            self._capture = Capture(
                camera,
                shared.settings.capture_rules,
                self._receive,
                lambda what: self._counters.count(self.name, what),
                self._recorder,
            )
        self._clock = SteadyClock()
        self._count = 0
        self._lock = threading.Lock()  # Numbers and times must rise in the order of the queue.

    def start(self) -> None:
        """Start its threads."""
        self._worker.start()
        if self._capture is not None:
            self._capture.start()

    def stop(self, patience_s: float) -> None:
        """Ask the source to end; a file that waits for room in the queue goes on."""
        if self._capture is not None:
            self._capture.stop(patience_s)
        if self._capture is None or self._settings.drop == "block":
            self._frames.close()

    def has_ended(self, stopped: float, late: bool) -> bool:
        """Return whether the work is done, after `stop`; abandon what is stuck."""
        if self._capture is not None:
            self._capture.abandon_stuck(stopped)
            if self._capture.is_alive:
                return False
        self._frames.close()
        if late:
            dropped = len(self._frames.clear())
            self._counters.count(self.name, "frames_dropped.stopped", dropped)
            # A call that began shortly before may only be slow: it has its time, too.
            if self._worker.call_s(stopped) > self._patience_s:
                self._worker.abandon()
        return not self._worker.is_alive

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Its threads."""
        return (self._worker,) if self._capture is None else (self._worker, self._capture)

    def refuse_frames(self) -> None:
        """Let no more frames in at once; those that wait are still worked on."""
        self.stop(self._patience_s)
        self._frames.close()

    def flush(self) -> None:
        """Have the best detections so far selected as soon as no frame waits."""
        if self._worker.is_alive:
            self._worker.flush()

    @property
    def is_over(self) -> bool:
        """Whether its source has ended and is not opened again."""
        return self._capture is not None and self._capture.is_over

    @property
    def is_idle(self) -> bool:
        """Whether no frame waits or is worked on, and no flush is to be done."""
        return self._worker.is_idle or not self._worker.is_alive

    @property
    def is_alive(self) -> bool:
        """Whether a thread of it runs."""
        return any(stage.is_alive for stage in self.stages)

    @property
    def detector(self) -> Detector | None:
        """Finds people in its frames."""
        return self._settings.detector

    def set_regions(self, regions: Regions) -> None:
        """Replace its zones and masks, from the next frame on."""
        self._worker.regions = regions

    @property
    def waits(self) -> bool:
        """Whether its frames wait for room in the queue."""
        return self._settings.drop == "block"

    @property
    def frames_waiting(self) -> int:
        """Frames in the queue."""
        return len(self._frames)

    def stats(self) -> CameraStats:
        """Return what was done so far."""
        error = self._worker.error
        if error is None and self._capture is not None:
            error = self._capture.error
        return camera_stats(self._counters.of(self.name), self._state, error)

    @property
    def _state(self) -> str:
        if self._worker.error is not None:
            return "failed"
        if self._capture is not None:
            return self._capture.state
        if self._worker.is_alive:
            return "running"
        return "stopped" if self._frames.closed else "waiting"

    def submit(
        self,
        frame: "PixelArray",
        boxes: Any,
        time: float | None,
        tracks: Sequence[str | int] | None,
        rgb: bool,
        wait_s: float,
    ) -> SubmitResult:
        """Take a frame from outside; see `Pipeline.submit`."""
        now = time_module.monotonic()
        if self._capture is not None:
            text = f"camera {shortened(self.name)} reads its own source"
            raise UsageError(text, code="camera_has_source", camera=self.name)
        _check_frame(frame)
        check_unix_time(time)
        if boxes is None and self._settings.detector is None:
            text = (
                f"camera {shortened(self.name)} has no detector: pass boxes with each frame, or a "
                "detector to add_camera"
            )
            raise UsageError(text, code="detector_missing", camera=self.name)
        height, width = frame.shape[:2]
        cleaned = None if boxes is None else clean_boxes(boxes, width, height)
        names = None
        if tracks is not None:
            given = check_list(tracks, "tracks")
            names = tuple(check_name(str(name), "the name of a track") for name in given)
            if boxes is None or len(names) != len(boxes):
                text = f"{len(names)} tracks need as many boxes"
                raise InputError(text, code="tracks_without_boxes")
        copy: NDArray[np.uint8] = (frame[:, :, ::-1] if rgb else frame).astype(np.uint8, "C")
        if time is None:
            return self._enter(copy, time_module.time(), now, now, wait_s, cleaned, names)
        return self._enter(copy, float(time), float(time), now, wait_s, cleaned, names)

    def _receive(self, image: NDArray[np.generic], unix_time: float, clock: float) -> None:
        """Take a frame from the capture; one without pixels counts as empty."""
        if self._worker.error is not None and self._capture is not None:
            self._capture.stop()
        wait_s = math.inf if self.waits else 0.0
        self._enter(as_bgr(image), unix_time, clock, time_module.monotonic(), wait_s)

    def _enter(
        self,
        image: NDArray[np.uint8],
        unix_time: float,
        clock: float,
        now: float,
        wait_s: float,
        boxes: Boxes | None = None,
        tracks: tuple[str, ...] | None = None,
    ) -> SubmitResult:
        with self._lock:
            self._counters.count(self.name, "frames_read")
            steady, index = self._clock.advance(clock, now), self._count
            self._count += 1
            if not image.size:
                self._counters.count(self.name, "frames_dropped.empty")
                return SubmitResult(index=index, reason="empty")
            frame = Frame(
                image=image,
                index=index,
                time=unix_time,
                clock=steady,
                arrived=now,
                boxes=boxes,
                tracks=tracks,
                packet=0 if self._recorder is None else self._recorder.count,
            )
            dropped = self._frames.put(frame, self._settings.drop, wait_s)
        if dropped is None:
            return SubmitResult(index=index, reason=None)
        is_own = dropped is frame
        reason = "stopped" if is_own and self._frames.closed else "queue_full"
        self._counters.count(self.name, f"frames_dropped.{reason}")
        if is_own:
            return SubmitResult(index=index, reason=reason)
        return SubmitResult(index=index, reason=None, displaced=dropped.index)


def _new_recorder(camera: CameraSettings, shared: Shared) -> Recorder | None:
    clips, own = shared.clips, camera.own
    if clips is None or not camera.saves_frames or not own.clip_s:
        return None
    is_live = camera.source is not None and camera.source.is_live
    late_s = own.every_s + own.lost_after_s + _LATE_S
    return Recorder(camera.name, is_live, own.clip_s, late_s, lambda: clips.scratch)


def _check_frame(frame: object) -> None:
    found = type(frame).__name__
    if isinstance(frame, np.ndarray):
        if frame.dtype == np.uint8 and frame.ndim == 3 and (not frame.size or frame.shape[2] == 3):
            return
        found = f"{frame.dtype} {list(frame.shape)}"
    raise InputError(
        f"a frame must be uint8 [H, W, 3], found {found}", code="frame_malformed", found=found
    )
