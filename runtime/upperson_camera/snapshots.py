"""The newest frame of a camera for the console, at most once a minute, with its zones and masks."""

import logging
import time
from pathlib import Path

from upperson_camera.frames import Frame
from upperson_camera.queues import log_camera
from upperson_camera.regions import Regions
from upperson_camera.source import import_cv2
from upperson_rt.errors import UppersonError
from upperson_rt.gallery.snapshots import Snapshot, remove_snapshot, write_snapshot
from upperson_rt.printable import error_text, get_logger

_log = get_logger(__name__)

EVERY_S = 60.0
_LONGEST_SIDE_PX = 1280
_JPEG_QUALITY = 80


class SnapshotWriter:
    """Writes the snapshots of one camera. What cannot be written is logged, and no more."""

    def __init__(self, camera: str, folder: Path, wanted: bool | None) -> None:
        """Write nothing yet; ``wanted`` None means while there are zones or masks."""
        self._camera, self._folder, self._wanted = camera, folder, wanted
        self._last: tuple[float, Regions] | None = None
        """When it was written, and with which zones and masks."""
        self._may_be_there = True
        self._has_failed = False

    def update(self, frame: Frame, regions: Regions) -> None:
        """Write a frame if the last one is a minute old, or zones or masks have changed."""
        wanted = self._wanted
        if wanted is None:
            wanted = bool(regions.zones or regions.masks)
        now = time.monotonic()
        if not wanted:
            self.remove()
        elif self._last is None or now - self._last[0] >= EVERY_S or self._last[1] != regions:
            self._last, self._may_be_there = (now, regions), True
            try:
                self._write(frame, regions)
                self._has_failed = False
            except Exception as error:  # OpenCV and disks raise anything; pictures go on.
                self._log(error)

    def remove(self) -> None:
        """Remove what was written, at first also by an earlier run."""
        if not self._may_be_there:
            return
        self._last, self._may_be_there = None, False
        try:
            remove_snapshot(self._folder, self._camera)
        except (OSError, UppersonError) as error:
            self._log(error)

    def _write(self, frame: Frame, regions: Regions) -> None:
        cv2, image = import_cv2(), frame.image
        height, width = image.shape[:2]
        if (share := _LONGEST_SIDE_PX / max(height, width)) < 1:
            size = max(1, round(width * share)), max(1, round(height * share))
            image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        ok, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
        if not ok:
            raise UppersonError(f"{width} x {height} pixels cannot be written as JPEG")
        snapshot = Snapshot(
            camera=self._camera,
            time=frame.time,
            width=width,
            height=height,
            zones=regions.zones,  # type: ignore[arg-type]  # Checked, they are tuples.
            masks=regions.masks,  # type: ignore[arg-type]
        )
        write_snapshot(self._folder, snapshot, bytes(jpeg))

    def _log(self, error: Exception) -> None:
        if not self._has_failed:  # Once, until it works again.
            text = "its picture for the console cannot be kept: %s"
            event = "snapshot_failed"
            log_camera(_log, logging.WARNING, self._camera, event, text, error_text(error))
        self._has_failed = True
