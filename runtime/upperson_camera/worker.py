"""The thread of a camera: detects people, tracks them, and selects their best detections."""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from upperson_camera.crops import CropMaker, Selection, sharpness
from upperson_camera.detectors import BoxesFile
from upperson_camera.frames import CameraCrop, Detection, Frame, WholeFrame
from upperson_camera.motion import DetectionSchedule
from upperson_camera.queues import AbandonedError, BoundedQueue, Stage, log_camera
from upperson_camera.recorder import Recorder
from upperson_camera.settings import CameraSettings, Shared
from upperson_camera.snapshots import SnapshotWriter
from upperson_camera.still import StillTracks
from upperson_camera.tracker import new_tracker
from upperson_rt.ingest.boxes import Boxes, clean_boxes
from upperson_rt.ingest.detector import SharedDetector
from upperson_rt.printable import error_text, get_logger

_log = get_logger(__name__)

_STEP_S = 0.1
_MOST_FRAMES = 32
"""Crops that may wait for the encoder with their whole frames: those take memory."""
_MOST_ERRORS = 25
"""Frames in a row on which a detector may fail before its camera fails."""


class CameraWorker(Stage):
    """Works on the frames of one camera: detects, tracks, selects, and makes crops."""

    def __init__(
        self,
        camera: CameraSettings,
        shared: Shared,
        frames: BoundedQueue[Frame],
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(
            f"camera {camera.name}",
            "detector",
            lambda error: self._fail_camera(error_text(error), "defect"),
        )
        self.error: str | None = None
        self._camera = camera
        self._shared = shared
        self._settings = shared.settings
        self._frames = frames
        self.regions = camera.regions
        """Where people count; may change at any time."""
        self._detector: SharedDetector | None = None
        if (detector := camera.detector) is not None:
            found = SharedDetector(detector)
            self._detector = shared.detectors.setdefault(id(detector), found)
        # Submitted frames were chosen by the caller, and boxes of a file cost nothing.
        is_searched = camera.source is not None and not isinstance(detector, BoxesFile)
        self._schedule = DetectionSchedule(shared.settings, is_searched)
        self._maker = CropMaker(camera, shared, recorder)
        self._snapshots: SnapshotWriter | None = None
        if shared.snapshots is not None:
            wanted = camera.snapshot if shared.settings.save_crops else False
            self._snapshots = SnapshotWriter(camera.name, shared.snapshots, wanted)
        self._tracker = new_tracker(shared.settings.tracker, shared.settings.lost_after_s)
        self._given_tracks: dict[str, float] = {}
        self._still = StillTracks(shared.settings)
        self._clock = 0.0
        self._selection = Selection(shared.settings, self._drop, self._still.is_doubtful)
        self._idle_s = max(shared.settings.every_s, shared.settings.lost_after_s)
        self._errors = 0
        self._flush_wanted = threading.Event()

    def flush(self) -> None:
        """Have the best detections so far selected as soon as no frame waits."""
        self._flush_wanted.set()

    def abandon(self) -> None:
        """Abandon a detector that does not return; earlier detections are kept."""
        if not self._abandon():
            return
        self._count("frames_dropped.detector_stuck")
        self._fail_camera(
            f"the detector did not return within {self._settings.end_within_s:g} s of the end",
            "detector_stuck",
        )
        self._go_on()

    @property
    def is_idle(self) -> bool:
        """Whether no frame waits and no flush is to be done."""
        return self._frames.is_idle and not self._flush_wanted.is_set()

    def _run(self) -> None:
        last = time.monotonic()
        if self._snapshots is not None:
            self._snapshots.remove()  # A process that was killed left it.
        while True:
            frame = self._frames.get(_STEP_S)
            if frame is None:
                if self._frames.is_finished:
                    break
                if self._flush_wanted.is_set() or time.monotonic() - last > self._idle_s:
                    self._select(self._selection.flush())
                    self._flush_wanted.clear()
                continue
            last = time.monotonic()
            try:
                self._work(frame)
            except AbandonedError:
                raise
            except BaseException as error:  # A defect: the other cameras go on.
                self._fail_camera(error_text(error), "defect")
            finally:
                self._frames.done()
        self._select(self._selection.end_all())
        if self._snapshots is not None:
            self._snapshots.remove()
        self._flush_wanted.clear()

    def _work(self, frame: Frame) -> None:
        if self.error is not None:
            self._count("frames_dropped.camera_failed")
            return
        regions, (height, width) = self.regions, frame.image.shape[:2]
        self._clock = frame.clock
        if self._snapshots is not None:
            self._snapshots.update(frame, regions)
        if frame.boxes is None:
            reason = self._schedule.skips(frame, self._selection.has_tracks)
            if reason is not None:
                self._count(f"frames_skipped.{reason}")
                self._select(self._selection.due(frame.clock))
                return
        try:
            boxes = regions.without_masked(self._detect(frame), width, height)
        except AbandonedError:
            raise
        except BaseException as error:  # The plug-in boundary: only its camera fails.
            self._detector_failed(error)
            return
        self._errors = 0
        self._count("detections", len(boxes.edges) + sum(boxes.dropped.values()))
        for reason, number in boxes.dropped.items():
            self._count(f"crops_dropped.{reason}", number)
        self._count("frames_processed")
        given, gone = self._track(frame, boxes)
        ended = [self._selection.end(name) for name in self._still.end(gone, frame.clock)]
        self._select([detection for detection in ended if detection is not None])
        rename = frame.tracks is None
        names = self._still.update(given, boxes, frame.image, frame.clock, rename)
        in_zone = regions.in_zone(boxes, width, height)
        whole = WholeFrame(frame.image, frame.packet) if self._camera.saves_frames else None
        for name, edges, score, is_in_zone in zip(
            names, boxes.edges, boxes.scores, in_zone, strict=True
        ):
            if name is None or not is_in_zone:
                self._drop("no_track" if name is None else "outside_zone")
                continue
            if self._selection.saw(name, frame.clock):
                self._count("tracks")
            self._consider(frame, whole, name, edges.tolist(), float(score))
        self._select(self._selection.due(frame.clock))

    def _detect(self, frame: Frame) -> Boxes:
        if frame.boxes is not None:
            return frame.boxes
        height, width = frame.image.shape[:2]
        detector = self._camera.detector
        assert self._detector is not None  # Checked where the frame came in.
        with self._calling("detector"):
            if isinstance(detector, BoxesFile):
                given: Any = detector.boxes_at(frame.index)
            else:
                given = self._detector.detect(frame.image)
            return clean_boxes(given, width, height)

    def _track(self, frame: Frame, boxes: Boxes) -> tuple[Sequence[str | None], list[str]]:
        """Return the name of each box's track, None for none, and the names of ended tracks."""
        # Unique in the gallery: the part of the run is drawn at random.
        run = f"{self._camera.name}/{self._shared.run_name}"
        if frame.tracks is not None:
            names = [f"{run}-{frame.tracks[row]}" for row in boxes.rows]
            return names, self._end_given(names, frame.clock)
        numbers, gone = self._tracker.update(boxes, frame.clock, frame.image)
        names_or_none = [f"{run}-{number}" if number >= 0 else None for number in numbers]
        return names_or_none, [f"{run}-{number}" for number in gone]

    def _end_given(self, names: list[str], clock: float) -> list[str]:
        """Return the given tracks that have not been in a frame for too long."""
        self._given_tracks.update(dict.fromkeys(names, clock))
        lost_after_s = self._settings.lost_after_s
        ended = [name for name, seen in self._given_tracks.items() if clock - seen > lost_after_s]
        for name in ended:
            del self._given_tracks[name]
        return ended

    def _consider(
        self, frame: Frame, whole: WholeFrame | None, track: str, edges: list[int], score: float
    ) -> None:
        x0, y0, x1, y1 = edges
        quality = self._settings.quality
        problem = quality.size_problem(y1 - y0, x1 - x0)
        if problem is None:
            image = frame.image[y0:y1, x0:x1]
            height, width = frame.image.shape[:2]
            at_border = x0 <= 1 or y0 <= 1 or x1 >= width - 1 or y1 >= height - 1
            sharp = sharpness(image)
            problem = quality.problem(sharp, at_border)
        if problem is not None:
            self._drop(problem)
            return
        if self._still.was_written(track, frame.clock):
            self._drop("still")
            return
        is_best = self._selection.offer(
            Detection(
                image=image.copy(),
                box=(x0, y0, x1, y1),
                score=None if np.isnan(score) else score,
                sharpness=sharp,
                at_border=at_border,
                track=track,
                index=frame.index,
                time=frame.time,
                arrived=frame.arrived,
                whole=whole,
            ),
            frame.clock,
        )
        if is_best and whole is not None:
            whole.keep(self._maker.jpeg)

    def _select(self, detections: Sequence[Detection]) -> None:
        for detection in detections:
            if not self._has_room():
                self._drop("buffer_full")
                continue
            try:
                crop = self._maker.make(detection, time.monotonic())
            except Exception as error:  # One crop that cannot be made does not cost the others.
                text = "frame %d gives no picture: %s"
                values = detection.index, error_text(error)
                log_camera(_log, logging.WARNING, self._camera.name, "bad_crop", text, *values)
                self._drop("unusable")
                continue
            if crop.frame_jpeg is not None:
                crop = self._bounded(crop)
            self._count("accepted")
            self._still.wrote(detection.track, self._clock)
            crops = self._shared.crops
            dropped = crops.put(crop, self._camera.drop)
            if dropped is not None:  # Maybe a crop of another camera.
                reason = "failed" if crops.closed else "queue_full"
                self._shared.counters.count(dropped.camera, f"crops_dropped.{reason}")

    def _bounded(self, crop: CameraCrop) -> CameraCrop:
        """Return a crop without its frame where too many wait; a file waits until they do not."""
        crops = self._shared.crops
        while len(crops) >= _MOST_FRAMES and self._camera.drop == "block" and not crops.closed:
            time.sleep(_STEP_S)
        if len(crops) < _MOST_FRAMES:
            return crop
        self._count("clips_dropped.queue_full")
        return replace(crop, frame_jpeg=None, cut=None)

    def _has_room(self) -> bool:
        """Return whether crops can be accepted; a file waits until they can, or until the end."""
        buffer = self._shared.buffer
        if buffer is None:
            return True
        while buffer.is_full and self._camera.drop == "block" and not self._frames.closed:
            time.sleep(_STEP_S)
        return not buffer.is_full

    def _count(self, name: str, number: int = 1) -> None:
        self._shared.counters.count(self._camera.name, name, number)

    def _drop(self, reason: str) -> None:
        self._count(f"crops_dropped.{reason}")

    def _detector_failed(self, error: BaseException) -> None:
        self._errors += 1
        self._count("frames_dropped.detector_error")
        problem = error_text(error)
        if not isinstance(error, Exception):  # Such as SystemExit: it wants to end, so it does.
            self._fail_camera(f"the detector ended with {problem}", "detector_error")
            return
        if self._errors == 1:
            text = "the detector fails: %s"
            log_camera(_log, logging.ERROR, self._camera.name, "detector_error", text, problem)
        if self._errors >= _MOST_ERRORS:
            self._fail_camera(
                f"the detector failed on {self._errors} frames in a row: {problem}",
                "detector_error",
            )

    def _fail_camera(self, problem: str, reason: str) -> None:
        self.error = problem
        self._count(f"failures.{reason}")
        log_camera(_log, logging.ERROR, self._camera.name, "failed", "failed: %s", problem)
