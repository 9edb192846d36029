"""The thread that saves the pictures of crops and commits their rows, and leaves no half behind."""

import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from upperson_camera.crops import EncodedCrops
from upperson_camera.frames import CameraCrop
from upperson_camera.queues import BoundedQueue, LeftBehindError, Stage
from upperson_camera.settings import PipelineSettings
from upperson_camera.stats import Durations, Ledger
from upperson_rt.errors import InputError, UppersonError
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.ingest.crop_folder import CropFolder, remove_left_behind
from upperson_rt.ingest.service import Ingest
from upperson_rt.printable import count_of, get_logger

__all__ = [
    "CommitStage",
    "OtherWriters",
]

# --- Notices that another process adds pictures of a camera of the same name, as a second box may

_LOOK_EVERY_S = 60.0


class OtherWriters:
    """Compares what a gallery holds of our cameras with what we have added to it.

    Two boxes whose cameras have one name mix up what they see: filters and retention by camera
    then mean both. What is deleted in the meantime hides as many pictures of others.
    """

    def __init__(self, gallery: Gallery, ledger: Ledger) -> None:
        self._gallery = gallery
        self._ledger = ledger
        self._expected: dict[str, int] = {}
        self._looked = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the last look was a while ago."""
        return time.monotonic() - self._looked >= _LOOK_EVERY_S

    def know(self, cameras: Iterable[str]) -> None:
        """Count what is there of cameras whose first pictures are about to be added."""
        for camera in set(cameras) - self._expected.keys():
            self._expected[camera] = self._gallery.count(Filter(camera=camera))

    def count_ours(self, items: Sequence[Item], replaced: Sequence[str]) -> None:
        """Take what was added into account, and the keys of it that were there before."""
        before = set(replaced)
        for item in items:
            if item.camera is not None:
                self._expected[item.camera] += item.key not in before
                self._ledger.count(item.camera, "replaced", item.key in before)

    def look(self) -> None:
        """Count, and warn of, what others have added since the last look."""
        self._looked = time.monotonic()
        for camera, expected in self._expected.items():
            try:
                found = self._gallery.count(Filter(camera=camera))
            except UppersonError as error:  # Nothing is lost by it, and commits will tell.
                _log.warning("cannot tell whether others add pictures of %s: %s", camera, error)
                return
            self._expected[camera] = found
            if found > expected:
                self._ledger.count(camera, "added_by_others", found - expected)
                _log.warning(
                    "another process has added %s of a camera that is called %s as well: if it is "
                    "another camera, give it another name",
                    count_of(found - expected, "picture"),
                    camera,
                    extra={"event": "added_by_others", "camera": camera},
                )


# --- The thread that saves the pictures of crops and commits their rows, and leaves no half behind

_log = get_logger(__name__)


_STEP_S = 0.1


class CommitStage(Stage):
    """Saves the pictures of all batches that wait, then commits their rows in one transaction."""

    def __init__(
        self,
        ingest: Ingest,
        settings: PipelineSettings,
        run_name: str,
        batches: BoundedQueue[EncodedCrops],
        ledger: Ledger,
        fail: Callable[[BaseException], None],
    ) -> None:
        super().__init__("commit", "gallery", fail)
        self._ingest = ingest
        self._crops_dir = ingest.gallery.crops_dir if settings.save_crops else None
        self._run_name = run_name
        self._batches = batches
        self._ledger = ledger
        self._others = OtherWriters(ingest.gallery, ledger)
        self._crops: list[CameraCrop] = []
        self.latency = Durations()
        self.encode_latency = Durations()

    def start(self) -> None:
        """Clear up after processes that were killed, then begin to work.

        Raises:
            InputError: The folder of pictures cannot be written to.
        """
        if self._crops_dir is not None:
            try:
                remove_left_behind(self._ingest.gallery, self._crops_dir)
            except OSError as error:
                raise InputError(f"cannot write {self._crops_dir}: {error.strerror}") from error
            self._ingest.folder = CropFolder(self._crops_dir, self._run_name)
        super().start()

    def leave(self) -> str | None:
        """Leave behind a gallery or a callback that does not return; return which one hung.

        After a callback the commits go on in another thread, and nobody is told of them.
        """
        if not self._leave():
            return None
        part = self.part
        if part == "on_commit":
            self._ingest.outputs = ()
            self._go_on()
        else:
            self._ledger.count_crops(self._crops, "crops.dropped.failed")
        return part

    def _run(self) -> None:
        try:
            while not self._batches.is_finished:
                taken = self._batches.get_all(_STEP_S)
                if taken:
                    self._crops = [crop for batch, _ in taken for crop in batch]
                    self._commit(self._crops, np.concatenate([embeds for _, embeds in taken]))
                    self._batches.done(len(taken))
                if self._others.is_due:
                    self._look_at_others()
            self._look_at_others()
        except LeftBehindError:
            raise
        except BaseException:
            self._close_folder()
            raise
        self._close_folder()

    def _look_at_others(self) -> None:
        self._crops = []  # Committed: a look that hangs takes nothing along.
        try:
            with self._calling("gallery"):
                self._others.look()
        except LeftBehindError:
            self._close_folder()
            raise

    def _commit(self, crops: list[CameraCrop], embeds: NDArray[np.float32]) -> None:
        items = [crop.item for crop in crops]
        try:
            with self._calling("gallery"):
                self._others.know(crop.camera for crop in crops)
                replaced = self._ingest.commit(crops, embeds)
        except LeftBehindError:
            self._close_folder()  # After a callback it is the next thread's.
            raise
        except BaseException:
            self._ledger.count_crops(crops, "crops.dropped.failed")
            raise
        now = time.monotonic()
        for crop in crops:
            self.latency.add(now - crop.arrived)
            self.encode_latency.add(now - crop.chosen)
        self._others.count_ours(items, replaced)
        self._ledger.count_crops(crops, "committed")
        if self._ingest.outputs:
            with self._calling("on_commit"):
                self._ingest.deliver(crops, replaced)

    def _close_folder(self) -> None:
        if self._ingest.folder is not None:
            self._ingest.folder.close()
