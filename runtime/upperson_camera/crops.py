"""From the detections of a track to crops, the best one of every few seconds, and embeddings."""

import datetime
import hashlib
import math
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from upperson_camera.frames import CameraCrop, Detection
from upperson_camera.queues import AbandonedError, Stage
from upperson_camera.recorder import Cut, Recorder
from upperson_camera.settings import CameraSettings, PipelineSettings, Shared
from upperson_camera.source import import_cv2
from upperson_camera.tracker import VIEW_S
from upperson_rt.errors import InputError
from upperson_rt.gallery import Item
from upperson_rt.gallery.crops import name_with_hash
from upperson_rt.ingest.service import Ingest

_SHARPNESS_HEIGHT_PX = 128
_LONGEST_NAME = 60
_WINDOW = 0.25
"""Share of ``every_s`` to wait for a better detection. If it were longer, a person who passes
quickly would be gone before a second crop may be taken."""
_SAME_TIME_S = 1e-6
"""Less is the rounding of sums of frame times."""


def sharpness(image: NDArray[np.uint8]) -> float:
    """Return the variance of the Laplacian of a BGR picture, comparable between sizes."""
    cv2 = import_cv2()
    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    height, width = grey.shape
    if height > _SHARPNESS_HEIGHT_PX:
        size = (max(1, round(width * _SHARPNESS_HEIGHT_PX / height)), _SHARPNESS_HEIGHT_PX)
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    return float(cv2.Laplacian(grey, cv2.CV_64F).var())


@dataclass(slots=True)
class _Window:
    opened: float
    """Time of the first detection that is as whole as the best one."""
    best: Detection | None = None
    seen: float = 0.0
    """Time of ``best``."""
    next: float = -math.inf
    """Time from which the next one may be taken."""
    sightings: int = 0
    """Frames that count for ``min_views``, and the time of the last one."""
    sighted: float = -math.inf


class Selection:
    """Selects the best detection of every track, at most one every ``every_s``.

    A window opens with a track's first detection that passes the quality rules, closes a quarter of
    ``every_s`` later, and its best detection is selected. While all are cut off at the border, it
    stays open for ``every_s``. The next window opens ``every_s`` after the selected detection at
    the earliest. The end of a track closes its window early. A track that was detected in fewer
    than ``min_views`` frames, each `VIEW_S` after the one before, gives nothing, and neither does
    one while ``is_doubtful``, which is called with its name and whether it has ended.
    """

    def __init__(
        self,
        settings: PipelineSettings,
        drop: Callable[[str], None],
        is_doubtful: Callable[[str, bool], bool] = lambda track, at_end: False,
    ) -> None:
        self.every_s = settings.every_s
        self.min_views = settings.min_views
        self._drop = drop
        self._is_doubtful = is_doubtful
        self._windows: dict[str, _Window] = {}

    @property
    def has_tracks(self) -> bool:
        """Whether there is a track that has not ended."""
        return bool(self._windows)

    def saw(self, track: str, clock: float) -> bool:
        """Count a frame of a track; return whether it was the ``min_views``-th."""
        window = self._windows.setdefault(track, _Window(clock))
        if clock - window.sighted < VIEW_S:
            return False
        window.sightings, window.sighted = window.sightings + 1, clock
        return window.sightings == self.min_views

    def offer(self, detection: Detection, clock: float) -> bool:
        """Consider a detection, after `saw` for its track; return whether it is the best now."""
        window = self._windows[detection.track]
        if clock < window.next - _SAME_TIME_S:
            self._drop("too_soon")
            return False
        best = window.best
        if best is None or best.at_border > detection.at_border:
            window.opened = clock
        if best is None or detection.rank > best.rank:
            window.best, window.seen = detection, clock
        if best is not None:
            self._drop("not_best")
        return window.best is detection

    def due(self, clock: float) -> list[Detection]:
        """Return the selected detections of windows that are over."""
        return self._taken(
            window
            for window in self._windows.values()
            if window.best is not None
            and clock - window.opened >= self._window_s(window.best) - _SAME_TIME_S
        )

    def end(self, track: str) -> Detection | None:
        """Forget a track; return its last selected detection, if any."""
        window = self._windows.pop(track, None)
        detection = None if window is None else self._take(window)
        if window is None or detection is None:
            return None
        if window.sightings < self.min_views:
            self._drop("seen_once")
            return None
        if self._is_doubtful(track, True):
            self._drop("never_moved")
            return None
        return detection

    def end_all(self) -> list[Detection]:
        """Forget all tracks; return their last selected detections."""
        found = map(self.end, list(self._windows))
        return [detection for detection in found if detection is not None]

    def flush(self) -> list[Detection]:
        """Close the windows of all tracks with enough frames; the tracks go on."""
        return self._taken(self._windows.values())

    def _taken(self, windows: Iterable[_Window]) -> list[Detection]:
        found = [
            self._take(window)
            for window in windows
            if window.best is not None
            and window.sightings >= self.min_views
            and not self._is_doubtful(window.best.track, False)
        ]
        return [detection for detection in found if detection is not None]

    def _window_s(self, best: Detection) -> float:
        return self.every_s if best.at_border else _WINDOW * self.every_s

    def _take(self, window: _Window) -> Detection | None:
        detection, window.best = window.best, None
        if detection is not None:
            window.next = window.seen + self.every_s
        return detection


def safe_folder_name(camera: str) -> str:
    """Return a name for a camera's folder that any file system takes, unique to the camera."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", camera)[:_LONGEST_NAME]
    if plain == camera:
        return plain
    # Two cameras must not share a folder only because their names differ in what was replaced.
    return f"{plain}-{hashlib.sha256(camera.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


class CropMaker:
    """Makes crops of the detections of one camera."""

    def __init__(
        self, camera: CameraSettings, shared: Shared, recorder: Recorder | None = None
    ) -> None:
        self._recorder = recorder
        self._wants_clips = bool(camera.saves_frames and camera.own.clip_s)
        self._camera = camera.name
        self._folder = safe_folder_name(camera.name)
        self._source = None if camera.source is None else camera.source.shown
        self._is_file = camera.is_file
        settings = shared.settings
        self._jpeg_quality = settings.jpeg_quality if settings.save_crops else None
        self._encoder = shared.encoder

    def make(self, detection: Detection, now: float) -> CameraCrop:
        """Return the crop of a detection.

        The key of a file's crop is the same in every run, so that a second run replaces the rows of
        the first. The key of a live camera's crop begins with its track, which is unique to a run.
        """
        box = ",".join(map(str, detection.box))
        stamp = datetime.datetime.fromtimestamp(detection.time, datetime.timezone.utc)
        if self._is_file:
            place = f"{self._source}#frame={detection.index}"
            key = f"{self._camera}|{place}|{box}"
        else:
            moment = stamp.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            place = f"{self._source or self._camera}#time={moment}"
            key = f"{self._camera}|{detection.track}|{detection.index}|{box}"
        name, jpeg = None, None
        if self._jpeg_quality is not None:
            jpeg = self.jpeg(detection.image)
            local = stamp.astimezone()
            unique = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:12]
            stem = f"{local:%H%M%S}-{local.microsecond // 1000:03d}-{unique}"
            name = f"{self._folder}/{local:%Y-%m-%d}/{name_with_hash(stem, jpeg)}"
        attributes = {"frame": detection.index, "sharpness": round(detection.sharpness, 1)}
        if detection.score is not None:
            attributes["score"] = round(detection.score, 4)
        return CameraCrop(
            item=Item(
                key=key,
                source=place,
                camera=self._camera,
                time=detection.time,
                track=detection.track,
                box=detection.box,
                attributes=attributes,
                crop=name,
            ),
            camera=self._camera,
            pixels=self._encoder.prepare_image(np.ascontiguousarray(detection.image[:, :, ::-1])),
            jpeg=jpeg,
            arrived=detection.arrived,
            chosen=now,
            frame_jpeg=None if detection.whole is None else detection.whole.jpeg,
            cut=self._cut(detection),
        )

    def _cut(self, detection: Detection) -> Cut | str | None:
        """Return the packets around a detection, or why there are none."""
        if detection.whole is None or not self._wants_clips:
            return None
        if self._recorder is None:
            return "no_packets"
        return self._recorder.cut(detection.whole.packet)

    def jpeg(self, image: NDArray[np.uint8]) -> bytes:
        """Return a BGR picture as JPEG in the camera's quality."""
        cv2 = import_cv2()
        assert self._jpeg_quality is not None  # Asked for where pictures are saved.
        try:
            ok, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, self._jpeg_quality])
        except cv2.error:
            ok = False
        if not ok:
            height, width = image.shape[:2]
            raise InputError(f"{width} x {height} pixels cannot be written as JPEG")
        return bytes(data)


# --- The thread that embeds the crops of all cameras, in batches

_STEP_S = 0.1


class EncodeStage(Stage):
    """Embeds crops in batches: full ones, or those whose first crop has waited ``max_delay_s``.

    An error of the encoder goes to ``fail``.
    """

    def __init__(
        self, ingest: Ingest, shared: Shared, fail: Callable[[BaseException], None]
    ) -> None:
        super().__init__("encode", "encoder", fail)
        self._ingest = ingest
        self._batch_size = shared.settings.batch_size
        self._max_delay_s = shared.settings.max_delay_s
        self._crops, self._batches = shared.crops, shared.batches
        self._counters = shared.counters
        self._busy_s = 0.0
        self._batch: list[CameraCrop] = []
        self.count = 0
        """Batches so far."""

    @property
    def busy_s(self) -> float:
        """Seconds for which the encoder has worked so far."""
        return self._busy_s + self.call_s(-math.inf)

    def abandon(self) -> str | None:
        """Abandon an encoder that does not return, and its batch; return what was stuck."""
        if not self._abandon():
            return None
        self._counters.count_crops(self._batch, "crops_dropped.failed")
        return self.part

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            if not batch:
                continue
            self._batch = batch
            try:
                embeds = self._embed(batch)
            except AbandonedError:
                raise
            except BaseException:
                self._counters.count_crops(batch, "crops_dropped.failed")
                raise
            self._counters.count_crops(batch, "embedded")
            # Rows may wait for minutes: what was embedded needs no pixels any more.
            batch = [replace(crop, pixels=np.empty((0, 0, 3), np.uint8)) for crop in batch]
            if self._batches.put((batch, embeds), "block") is not None:
                self._counters.count_crops(batch, "crops_dropped.failed")  # The gallery has failed.
            self._crops.done(len(batch))

    def _next(self) -> list[CameraCrop] | None:
        """Return the next batch; an empty one if there is nothing yet, None at the end."""
        first = self._crops.get(_STEP_S)
        if first is None:
            return None if self._crops.is_finished else []
        batch, until = [first], time.monotonic() + self._max_delay_s
        while len(batch) < self._batch_size:
            crop = self._crops.get(max(0.0, until - time.monotonic()))
            if crop is None:
                break
            batch.append(crop)
        return batch

    def _embed(self, batch: list[CameraCrop]) -> NDArray[np.float32]:
        began = time.monotonic()
        with self._calling("encoder"):
            embeds = self._ingest.embed(batch)
        self._busy_s += time.monotonic() - began
        self.count += 1
        return embeds
