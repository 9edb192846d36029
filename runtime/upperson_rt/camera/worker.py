"""The thread of a camera: detects, tracks and chooses."""

import logging
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from upperson_rt.camera.boxes import Boxes, clean_boxes
from upperson_rt.camera.crops import CropMaker
from upperson_rt.camera.detectors import BoxesFile, Detector
from upperson_rt.camera.frames import Crop, Frame, View
from upperson_rt.camera.queues import BoundedQueue
from upperson_rt.camera.selection import QualityRules, Selection, sharpness
from upperson_rt.camera.tracker import Tracker

__all__ = ["CameraWorker"]

_log = logging.getLogger(__name__)

_STEP_S = 0.1
_MOST_ERRORS = 25
"""Frames in a row on which a detector may fail before its camera is given up."""


class CameraWorker:
    """Takes the frames of one camera from its queue and gives crops away."""

    def __init__(
        self,
        camera: str,
        run: str,
        frames: BoundedQueue[Frame],
        detector: Detector | None,
        detector_lock: threading.Lock,
        quality: QualityRules,
        every_s: float,
        min_views: int,
        lost_after_s: float,
        maker: CropMaker,
        give: Callable[[Crop], None],
        count: Callable[[str, int], None],
    ) -> None:
        """Put a worker together; `start` begins.

        Args:
            camera: Name of the camera.
            run: Unique to this run of the program; begins the names of its tracks.
            frames: Closed when no more will come.
            detector: For frames that come without boxes.
            detector_lock: Held while the detector works; cameras with one detector share it.
            quality: What views must have.
            every_s: Seconds between two crops of a track.
            min_views: Frames a track must be seen in.
            lost_after_s: When a track ends.
            maker: Turns views into crops.
            give: Takes a crop on; may block.
            count: Counts under a name.
        """
        self.camera = camera
        self.frames = frames
        self.error: str | None = None
        self._run_name = run
        self._detector = detector
        self._detector_lock = detector_lock
        self._quality = quality
        self._lost_after_s = lost_after_s
        self._maker = maker
        self._give = give
        self._count = count
        self._tracker = Tracker(lost_after_s)
        self._given_tracks: dict[str, float] = {}
        self._selection = Selection(every_s, min_views, self._drop)
        self._idle_s = max(every_s, lost_after_s)
        self._errors = 0
        self._counted_tracks = 0
        self._flush_wanted = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"camera {camera}", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the end of the thread, after the queue was closed."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    def flush(self) -> None:
        """Have the best views so far chosen as soon as no frame waits."""
        self._flush_wanted.set()

    @property
    def has_detector(self) -> bool:
        """Whether frames may come without boxes."""
        return self._detector is not None

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def is_idle(self) -> bool:
        """Whether no frame waits and no flush is to be done."""
        return self.frames.is_idle and not self._flush_wanted.is_set()

    def _run(self) -> None:
        last = time.monotonic()
        while True:
            frame = self.frames.get(_STEP_S)
            if frame is None:
                if self.frames.is_finished:
                    break
                if self._flush_wanted.is_set() or time.monotonic() - last > self._idle_s:
                    self._choose(self._selection.flush())
                    self._flush_wanted.clear()
                continue
            last = time.monotonic()
            try:
                self._work(frame)
            except Exception as error:  # Whatever it is: the other cameras go on.
                self._give_up(f"{type(error).__name__}: {error}")
            finally:
                self.frames.done()
        self._choose(self._selection.end_all())
        self._flush_wanted.clear()

    def _work(self, frame: Frame) -> None:
        if self.error is not None:
            self._count("frames.dropped.camera_failed", 1)
            return
        try:
            boxes = self._boxes(frame)
        except Exception as error:  # A detector is anybody's code; its camera alone suffers.
            self._detector_failed(error)
            return
        self._errors = 0
        self._count("frames.processed", 1)
        if frame.tracks is None:
            height, width = frame.image.shape[:2]
            numbers, gone = self._tracker.update(boxes.edges, frame.clock, (width, height))
            names = [f"{self._run_name}-{number}" for number in numbers]
            ended = [f"{self._run_name}-{number}" for number in gone]
            self._count("tracks", self._tracker.count - self._counted_tracks)
            self._counted_tracks = self._tracker.count
        else:
            names = [f"{self._run_name}-{frame.tracks[row]}" for row in boxes.rows]
            ended = self._follow_given(names, frame.clock)
        self._choose([view for track in ended if (view := self._selection.end(track)) is not None])
        for name, edges, score in zip(names, boxes.edges, boxes.scores, strict=True):
            self._selection.saw(name, frame.clock)
            self._consider(frame, name, edges.tolist(), float(score))
        self._choose(self._selection.due(frame.clock))

    def _boxes(self, frame: Frame) -> Boxes:
        height, width = frame.image.shape[:2]
        if frame.boxes is not None:
            boxes = frame.boxes
        else:
            assert self._detector is not None  # Checked where the frame came in.
            if isinstance(self._detector, BoxesFile):
                given = self._detector.boxes_at(frame.index)
            else:
                with self._detector_lock:
                    given = self._detector(frame.image)
            boxes = clean_boxes(given, width, height)
        self._count("crops.offered", len(boxes.edges) + sum(boxes.dropped.values()))
        for reason, number in boxes.dropped.items():
            self._count(f"crops.dropped.{reason}", number)
        return boxes

    def _consider(self, frame: Frame, track: str, edges: list[int], score: float) -> None:
        x0, y0, x1, y1 = edges
        problem = self._quality.size_problem(y1 - y0, x1 - x0)
        if problem is None:
            image = frame.image[y0:y1, x0:x1]
            height, width = frame.image.shape[:2]
            at_border = x0 <= 1 or y0 <= 1 or x1 >= width - 1 or y1 >= height - 1
            sharp = sharpness(image)
            problem = self._quality.problem(sharp, at_border)
        if problem is not None:
            self._drop(problem)
            return
        self._selection.offer(
            View(
                image=image.copy(),
                box=(x0, y0, x1, y1),
                score=None if np.isnan(score) else score,
                sharpness=sharp,
                at_border=at_border,
                track=track,
                index=frame.index,
                time=frame.time,
                arrived=frame.arrived,
            ),
            frame.clock,
        )

    def _choose(self, views: Sequence[View]) -> None:
        for view in views:
            try:
                crop = self._maker.make(view, time.monotonic())
            except Exception as error:  # One picture that cannot be made must not cost the others.
                _log.warning(
                    "camera %s: frame %d gives no picture: %s: %s",
                    self.camera,
                    view.index,
                    type(error).__name__,
                    error,
                    extra={"camera": self.camera, "event": "bad_crop"},
                )
                self._drop("unusable")
                continue
            self._give(crop)

    def _follow_given(self, names: list[str], clock: float) -> list[str]:
        new = sum(name not in self._given_tracks for name in names)
        self._count("tracks", new)
        self._given_tracks.update(dict.fromkeys(names, clock))
        ended = [n for n, seen in self._given_tracks.items() if clock - seen > self._lost_after_s]
        for name in ended:
            del self._given_tracks[name]
        return ended

    def _drop(self, reason: str) -> None:
        self._count(f"crops.dropped.{reason}", 1)

    def _detector_failed(self, error: Exception) -> None:
        self._errors += 1
        self._count("frames.dropped.detector_error", 1)
        problem = f"{type(error).__name__}: {error}"
        if self._errors == 1:
            _log.error(
                "camera %s: the detector fails: %s",
                self.camera,
                problem,
                extra={"camera": self.camera, "event": "detector_error"},
            )
        if self._errors >= _MOST_ERRORS:
            self._give_up(f"the detector failed on {self._errors} frames in a row: {problem}")

    def _give_up(self, problem: str) -> None:
        self.error = problem
        _log.error(
            "camera %s is given up: %s",
            self.camera,
            problem,
            extra={"camera": self.camera, "event": "failed"},
        )
