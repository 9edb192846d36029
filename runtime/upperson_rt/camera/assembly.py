"""Puts together what belongs to one camera: intake, worker, and a capture if it has a source."""

import threading
from collections.abc import Callable

from upperson_rt.camera.capture import Capture, CaptureRules, Opener
from upperson_rt.camera.crops import CropMaker
from upperson_rt.camera.detectors import Detector
from upperson_rt.camera.frames import Crop
from upperson_rt.camera.intake import CameraIntake
from upperson_rt.camera.ledger import Ledger
from upperson_rt.camera.queues import BoundedQueue, DropPolicy
from upperson_rt.camera.selection import QualityRules
from upperson_rt.camera.source import Source
from upperson_rt.camera.worker import CameraWorker
from upperson_rt.encoder import Encoder
from upperson_rt.errors import UsageError

__all__ = ["CameraAssembly"]


class CameraAssembly:
    """What all cameras of a pipeline have in common."""

    def __init__(
        self,
        encoder: Encoder,
        run_name: str,
        *,
        every_s: float,
        min_views: int,
        lost_after_s: float,
        quality: QualityRules,
        jpeg_quality: int | None,
        frame_queue: int,
        capture_rules: CaptureRules,
        opener: Opener,
        ledger: Ledger,
        give: Callable[[Crop, DropPolicy], None],
    ) -> None:
        """Take the settings, see `Pipeline`.

        Args:
            encoder: Knows the size that the image tower wants.
            run_name: Begins the names of tracks.
            every_s: Seconds between two crops of a track.
            min_views: Frames that a track must be seen in.
            lost_after_s: When a track ends.
            quality: What views must have.
            jpeg_quality: 1 to 100; None makes no pictures.
            frame_queue: Frames of a camera that may wait.
            capture_rules: How patient to be with live sources.
            opener: Opens sources.
            ledger: Counts for all cameras.
            give: Takes the crops on.

        Raises:
            UsageError: A number is out of range.
        """
        if not (every_s >= 0 and lost_after_s > 0) or min_views < 1:  # NaN is refused, too.
            raise UsageError(
                "every_s must be at least 0, lost_after_s above 0, min_views at least 1"
            )
        if jpeg_quality is not None and not 1 <= jpeg_quality <= 100:
            raise UsageError(f"jpeg_quality must be 1 to 100, got {jpeg_quality}")
        if frame_queue < 1:
            raise UsageError(f"frame_queue must be at least 1, got {frame_queue}")
        self._encoder = encoder
        self._run_name = run_name
        self._every_s = every_s
        self._min_views = min_views
        self._lost_after_s = lost_after_s
        self._quality = quality
        self._jpeg_quality = jpeg_quality
        self._frame_queue = frame_queue
        self._capture_rules = capture_rules
        self._opener = opener
        self._ledger = ledger
        self._give = give
        self._detector_locks: dict[int, threading.Lock] = {}

    def make(
        self,
        name: str,
        source: Source | None,
        detector: Detector | None,
        policy: DropPolicy,
        start_time: float | None,
        realtime: bool,
    ) -> CameraIntake:
        """Return a camera that has not started; see `Pipeline.add_camera`."""
        maker = CropMaker(
            self._encoder,
            name,
            None if source is None else source.shown,
            is_file=source is not None and not source.is_live,
            jpeg_quality=self._jpeg_quality,
        )
        worker = CameraWorker(
            camera=name,
            run=self._run_name,
            frames=BoundedQueue(self._frame_queue),
            detector=detector,
            detector_lock=self._detector_locks.setdefault(id(detector), threading.Lock()),
            quality=self._quality,
            every_s=self._every_s,
            min_views=self._min_views,
            lost_after_s=self._lost_after_s,
            maker=maker,
            give=lambda crop: self._give(crop, policy),
            count=lambda what, number: self._ledger.count(name, what, number),
        )
        camera = CameraIntake(name, worker, policy, self._ledger)
        if source is not None:
            camera.capture = Capture(
                name,
                source,
                self._capture_rules,
                self._opener,
                camera.receive,
                lambda what: self._ledger.count(name, what),
                start_time,
                realtime,
            )
        return camera
