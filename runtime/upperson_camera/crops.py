"""From the views of a track to crops, the best one of every few seconds, and their embeddings."""

import datetime
import hashlib
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_camera.frames import CameraCrop, View
from upperson_camera.queues import BoundedQueue, LeftBehindError, Stage
from upperson_camera.settings import CameraSettings, PipelineSettings
from upperson_camera.source import import_cv2
from upperson_camera.stats import Ledger
from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError
from upperson_rt.gallery import Item
from upperson_rt.gallery.crops import name_with_hash
from upperson_rt.ingest.service import Ingest

__all__ = [
    "CropMaker",
    "EncodeStage",
    "EncodedCrops",
    "Selection",
    "safe_folder_name",
    "sharpness",
]

_SHARPNESS_HEIGHT_PX = 128
_LONGEST_NAME = 60
_LOOK = 0.25
"""Share of ``every_s`` for which a better view is waited for; longer, and whoever passes quickly is
gone before a second picture may be taken."""
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
    """When the first view came that is as whole as the best one."""
    best: View | None = None
    seen: float = 0.0
    """When ``best`` was."""
    next: float = -math.inf
    """When the next one may be taken."""
    sightings: int = 0


class Selection:
    """Keeps the best view of every track, and gives one away every so often.

    A window opens with the first view of a track that passes, closes a quarter of ``every_s``
    later, and the best view in it is chosen. As long as all are cut off, it stays open for
    ``every_s``. The next window opens no sooner than ``every_s`` after the chosen view, so that no
    two pictures of a track are closer. A track that ends closes its window early. A track that was
    seen in fewer than ``min_views`` frames gives nothing.
    """

    def __init__(self, settings: PipelineSettings, drop: Callable[[str], None]) -> None:
        """Start without tracks.

        Args:
            settings: Tell ``every_s`` and ``min_views``.
            drop: Told the reason for every view that is given up: ``not_best``, ``too_soon``,
                ``seen_once``.
        """
        self.every_s = settings.every_s
        self.min_views = settings.min_views
        self._drop = drop
        self._windows: dict[str, _Window] = {}

    def saw(self, track: str, clock: float) -> bool:
        """Note that a track is in this frame, whether its view is usable or not.

        Returns:
            Whether it has been seen often enough now, and had not before.
        """
        window = self._windows.setdefault(track, _Window(clock))
        window.sightings += 1
        return window.sightings == self.min_views

    def offer(self, view: View, clock: float) -> None:
        """Consider a view of a track that was `saw`."""
        window = self._windows[view.track]
        if clock < window.next - _SAME_TIME_S:
            self._drop("too_soon")
            return
        best = window.best
        if best is None or best.at_border > view.at_border:
            window.opened = clock
        if best is None or view.rank > best.rank:
            window.best, window.seen = view, clock
        if best is not None:
            self._drop("not_best")

    def due(self, clock: float) -> list[View]:
        """Return the views whose windows are over."""
        return [
            view
            for window in self._windows.values()
            if window.sightings >= self.min_views
            and window.best is not None
            and clock - window.opened >= self._look_s(window.best) - _SAME_TIME_S
            and (view := self._take(window)) is not None
        ]

    def end(self, track: str) -> View | None:
        """Forget a track; return its last view, if there is one and it was seen often enough."""
        window = self._windows.pop(track, None)
        view = None if window is None else self._take(window)
        if window is not None and view is not None and window.sightings < self.min_views:
            self._drop("seen_once")
            return None
        return view

    def end_all(self) -> list[View]:
        """Forget all tracks; return their last views."""
        return [view for track in list(self._windows) if (view := self.end(track)) is not None]

    def flush(self) -> list[View]:
        """Close all windows of tracks that were seen often enough; the tracks go on."""
        return [
            view
            for window in self._windows.values()
            if window.sightings >= self.min_views and (view := self._take(window)) is not None
        ]

    def _look_s(self, best: View) -> float:
        return self.every_s if best.at_border else _LOOK * self.every_s

    def _take(self, window: _Window) -> View | None:
        view, window.best = window.best, None
        if view is not None:
            window.next = window.seen + self.every_s
        return view


def safe_folder_name(camera: str) -> str:
    """Return a name for a camera's folder that any file system takes; differs for each camera."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", camera)[:_LONGEST_NAME]
    if plain == camera:
        return plain
    # Two cameras must not share a folder only because their names differ in what was replaced.
    return f"{plain}-{hashlib.sha256(camera.encode('utf-8', 'surrogatepass')).hexdigest()[:8]}"


class CropMaker:
    """Turns the views of one camera into crops."""

    def __init__(
        self, camera: CameraSettings, settings: PipelineSettings, encoder: Encoder
    ) -> None:
        self._camera = camera.name
        self._folder = safe_folder_name(camera.name)
        self._source = None if camera.source is None else camera.source.shown
        self._is_file = camera.is_file
        self._jpeg_quality = settings.jpeg_quality if settings.save_crops else None
        self._encoder = encoder

    def make(self, view: View, now: float) -> CameraCrop:
        """Return the crop of a view.

        A frame of a file has the same key each time the file is read, so that a second run replaces
        the rows of the first one. Frames of live cameras have keys of their own track.

        Raises:
            InputError: The view cannot be encoded as JPEG.
        """
        box = ",".join(map(str, view.box))
        stamp = datetime.datetime.fromtimestamp(view.time, datetime.timezone.utc)
        if self._is_file:
            place = f"{self._source}#frame={view.index}"
            key = f"{self._camera}|{place}|{box}"
        else:
            moment = stamp.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            place = f"{self._source or self._camera}#time={moment}"
            key = f"{self._camera}|{view.track}|{view.index}|{box}"
        name, jpeg = None, None
        if self._jpeg_quality is not None:
            jpeg = self._jpeg(view, self._jpeg_quality)
            local = stamp.astimezone()
            unique = hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:12]
            stem = f"{local:%H%M%S}-{local.microsecond // 1000:03d}-{unique}"
            name = f"{self._folder}/{local:%Y-%m-%d}/{name_with_hash(stem, jpeg)}"
        attributes = {"frame": view.index, "sharpness": round(view.sharpness, 1)}
        if view.score is not None:
            attributes["score"] = round(view.score, 4)
        return CameraCrop(
            item=Item(
                key=key,
                source=place,
                camera=self._camera,
                time=view.time,
                track=view.track,
                box=view.box,
                attributes=attributes,
                crop=name,
            ),
            camera=self._camera,
            pixels=self._encoder.prepare_image(np.ascontiguousarray(view.image[:, :, ::-1])),
            jpeg=jpeg,
            arrived=view.arrived,
            chosen=now,
        )

    def _jpeg(self, view: View, quality: int) -> bytes:
        cv2 = import_cv2()
        try:
            ok, data = cv2.imencode(".jpg", view.image, [cv2.IMWRITE_JPEG_QUALITY, quality])
        except cv2.error:
            ok = False
        if not ok:
            height, width = view.image.shape[:2]
            raise InputError(f"{width} x {height} pixels cannot be written as JPEG")
        return bytes(data)


# --- The thread that embeds the crops of all cameras, in batches

EncodedCrops: TypeAlias = "tuple[list[CameraCrop], NDArray[np.float32]]"
"""Crops and their embeddings."""

_STEP_S = 0.1


class EncodeStage(Stage):
    """Takes crops, embeds them by batches, gives the batches on.

    A batch is run when it is full, or when its first crop has waited for ``max_delay_s``. An error
    of the encoder goes to ``fail``.
    """

    def __init__(
        self,
        ingest: Ingest,
        settings: PipelineSettings,
        crops: BoundedQueue[CameraCrop],
        batches: BoundedQueue[EncodedCrops],
        ledger: Ledger,
        fail: Callable[[BaseException], None],
    ) -> None:
        super().__init__("encode", "encoder", fail)
        self._ingest = ingest
        self._batch_size = settings.batch_size
        self._max_delay_s = settings.max_delay_s
        self._crops = crops
        self._batches = batches
        self._ledger = ledger
        self._busy_s = 0.0
        self._batch: list[CameraCrop] = []
        self.count = 0
        """Batches so far."""

    @property
    def busy_s(self) -> float:
        """Seconds in which the encoder worked, up to now."""
        return self._busy_s + self.call_s(-math.inf)

    def leave(self) -> str | None:
        """Leave behind an encoder that does not return, and its batch; return what hung."""
        if not self._leave():
            return None
        self._ledger.count_crops(self._batch, "crops.dropped.failed")
        return self.part

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            if not batch:
                continue
            self._batch = batch
            try:
                embeds = self._embed(batch)
            except LeftBehindError:
                raise
            except BaseException:
                self._ledger.count_crops(batch, "crops.dropped.failed")
                raise
            self._ledger.count_crops(batch, "embedded")
            if self._batches.put((batch, embeds), "block") is not None:
                self._ledger.count_crops(batch, "crops.dropped.failed")  # The gallery has failed.
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
