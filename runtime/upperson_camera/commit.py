"""The thread that saves the pictures of crops and commits their rows."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from upperson_camera.crop_folder import CropFolder, remove_unfinished
from upperson_camera.frames import CameraCrop, EncodedCrops
from upperson_camera.queues import AbandonedError, Stage, log_camera
from upperson_camera.settings import Shared
from upperson_camera.stats import Counters, Durations
from upperson_rt.errors import InputError, UppersonError
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.ingest.service import Ingest
from upperson_rt.machine import trim_heap
from upperson_rt.printable import count_of, get_logger

# --- Another process with a camera of the same name

_log = get_logger(__name__)

_CHECK_EVERY_S = 60.0
_STEP_S = 0.1
_MOST_ROWS = 2048
_MOST_BYTES = 64 << 20
"""From so many rows, or bytes of their pictures, on a commit waits no longer: see
`benchmarks.flash`."""


class OtherWriters:
    """Detects rows of our cameras that other processes added, by counting.

    With two cameras of one name, filters and retention by camera mean both. Rows that are deleted
    in the meantime hide as many of others.
    """

    def __init__(self, gallery: Gallery, counters: Counters) -> None:
        self._gallery = gallery
        self._counters = counters
        self._expected: dict[str, int] = {}
        self._checked = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it is time to check again."""
        return time.monotonic() - self._checked >= _CHECK_EVERY_S

    def count_existing(self, cameras: Iterable[str]) -> None:
        """Count the rows of cameras to which nothing was added yet."""
        for camera in set(cameras) - self._expected.keys():
            self._expected[camera] = self._gallery.count(Filter(camera=camera))

    def forget(self, cameras: Iterable[str]) -> None:
        """Count the rows of cameras again before the next commit: the added ones are unknown."""
        for camera in cameras:
            self._expected.pop(camera, None)

    def count_ours(self, items: Sequence[Item], replaced: Sequence[str]) -> None:
        """Note added rows, and the keys of those that were there before."""
        before = set(replaced)
        for item in items:
            if item.camera is not None:
                self._expected[item.camera] += item.key not in before
                self._counters.count(item.camera, "replaced", item.key in before)

    def check(self) -> None:
        """Count the rows that others added since the last check, and warn of them."""
        self._checked = time.monotonic()
        for camera, expected in self._expected.items():
            try:
                found = self._gallery.count(Filter(camera=camera))
            except UppersonError as error:  # Nothing is lost; commits fail themselves.
                _log.warning("cannot check whether others add pictures of %s: %s", camera, error)
                return
            self._expected[camera] = found
            if found > expected:
                self._counters.count(camera, "added_by_others", found - expected)
                text = (
                    "another process has added %s of a camera that is called so as well: if it is "
                    "another camera, give it another name"
                )
                added = count_of(found - expected, "picture")
                log_camera(_log, logging.WARNING, camera, "added_by_others", text, added)


# --- The thread


class CommitStage(Stage):
    """Saves the pictures of all batches that wait, then commits their rows in one transaction.

    Batches wait for ``commit_every_s``, for `_MOST_ROWS` rows, for `_MOST_BYTES`, or for the end.
    """

    def __init__(
        self, ingest: Ingest, shared: Shared, fail: Callable[[BaseException], None]
    ) -> None:
        super().__init__("commit", "gallery", fail)
        self._ingest = ingest
        self._crops_dir = ingest.gallery.crops_dir if shared.settings.save_crops else None
        self._every_s = shared.settings.commit_every_s
        self._clips = shared.clips
        self._run_name = shared.run_name
        self._batches, self._counters = shared.batches, shared.counters
        self._others = OtherWriters(ingest.gallery, shared.counters)
        self._crops: list[CameraCrop] = []
        self._folder: CropFolder | None = None
        self.latency = Durations()
        self.encode_latency = Durations()

    def start(self) -> None:
        """Remove what killed processes left unfinished, then start."""
        if self._crops_dir is not None:
            try:
                remove_unfinished(self._ingest.gallery, self._crops_dir)
            except OSError as error:
                text = f"cannot write {self._crops_dir}: {error.strerror}"
                raise InputError(text, code="file_not_writable", path=self._crops_dir) from error
            self._folder = CropFolder(self._crops_dir, self._run_name)
            self._ingest.saving = self._folder.saved
        super().start()

    def abandon(self) -> str | None:
        """Abandon a gallery or an output that does not return; return which one was stuck.

        After an output, commits continue in another thread without outputs.
        """
        if not self._abandon():
            return None
        part = self.part
        if part == "on_commit":
            self._ingest.outputs = ()
            self._go_on()
        else:
            self._counters.count_crops(self._crops, "crops_dropped.failed")
        return part

    def _run(self) -> None:
        waiting: list[EncodedCrops] = []
        since = 0.0
        try:
            while waiting or not self._batches.is_finished:
                taken = self._batches.get_all(_STEP_S)
                since = since if waiting else time.monotonic()
                waiting += taken
                if waiting and self._is_due(waiting, since):
                    self._crops = [crop for batch, _ in waiting for crop in batch]
                    self._commit(self._crops, np.concatenate([embeds for _, embeds in waiting]))
                    self._batches.done(len(waiting))
                    waiting.clear()
                if not waiting and self._others.is_due:
                    self._each_minute()
            self._each_minute()
        except AbandonedError:  # After an output the folder is the next thread's.
            raise
        except BaseException:
            self._close_folder()
            raise
        self._close_folder()

    def _is_due(self, waiting: Sequence[EncodedCrops], since: float) -> bool:
        return (
            time.monotonic() - since >= self._every_s
            or sum(len(batch) for batch, _ in waiting) >= _MOST_ROWS
            or sum(map(_bytes_of, chain.from_iterable(batch for batch, _ in waiting))) > _MOST_BYTES
            or self._batches.is_finished
        )

    def _each_minute(self) -> None:
        """Check what others added, and give back the gaps that frames leave in heaps of threads."""
        trim_heap()
        self._crops = []  # Committed: a stuck check loses nothing.
        try:
            with self._calling("gallery"):
                self._others.check()
        except AbandonedError:
            self._close_folder()
            raise

    def _commit(self, crops: list[CameraCrop], embeds: NDArray[np.float32]) -> None:
        items = [crop.item for crop in crops]
        try:
            with self._calling("gallery"):
                self._others.count_existing(crop.camera for crop in crops)
                replaced = self._ingest.commit(crops, embeds)
        except AbandonedError:
            self._close_folder()
            raise
        except BaseException:
            self._counters.count_crops(crops, "crops_dropped.failed")
            raise
        self._counters.count_crops(crops, "committed")
        if self._clips is not None:
            self._clips.put(crops)
        self._report(items, replaced, [(crop.arrived, crop.chosen) for crop in crops])

    def _report(
        self, items: list[Item], replaced: list[str], stamps: Sequence[tuple[float, float]]
    ) -> None:
        """Count committed rows, measure how long they took, and give them to the outputs."""
        now = time.monotonic()
        for arrived, chosen in stamps:
            self.latency.add(now - arrived)
            self.encode_latency.add(now - chosen)
        self._others.count_ours(items, replaced)
        if self._ingest.outputs:
            with self._calling("on_commit"):
                self._ingest.deliver(items, replaced)

    def _close_folder(self) -> None:
        if self._folder is not None:
            self._folder.close()


def _bytes_of(crop: CameraCrop) -> int:
    return sum(len(jpeg) for jpeg in (crop.jpeg, crop.frame_jpeg) if jpeg is not None)
