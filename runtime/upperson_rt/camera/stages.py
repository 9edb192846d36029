"""The two threads that all cameras share: one embeds crops in batches, one commits them."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.camera.crops import CropFolder
from upperson_rt.camera.frames import Crop
from upperson_rt.camera.ledger import Durations, Ledger
from upperson_rt.camera.queues import BoundedQueue
from upperson_rt.camera.unfinished import remove_left_behind
from upperson_rt.encoder import Encoder
from upperson_rt.gallery import Gallery, Item

__all__ = ["Batch", "CommitStage", "EncodeStage"]

Batch: TypeAlias = "tuple[list[Crop], NDArray[np.float32]]"

_STEP_S = 0.1


class _Stage:
    """A thread that works until its input is finished; an error is handed to ``fail``."""

    def __init__(self, name: str, ledger: Ledger, fail: Callable[[BaseException], None]) -> None:
        self._ledger = ledger
        self._fail = fail
        self._thread = threading.Thread(target=self._guarded, name=name, daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def join(self) -> None:
        """Wait until the input was closed and all of it is dealt with."""
        if self._thread.ident is not None:
            self._thread.join()

    def _guarded(self) -> None:
        try:
            self._run()
        except BaseException as error:
            self._fail(error)

    def _run(self) -> None:
        raise NotImplementedError

    def _count(self, crops: Sequence[Crop], name: str) -> None:
        for crop in crops:
            self._ledger.count(crop.camera, name)


class EncodeStage(_Stage):
    """Takes crops, embeds them by batches, gives the batches on.

    A batch is run when it is full, or when its first crop has waited for ``max_delay_s``.
    """

    def __init__(
        self,
        encoder: Encoder,
        crops: BoundedQueue[Crop],
        batches: BoundedQueue[Batch],
        batch_size: int,
        max_delay_s: float,
        ledger: Ledger,
        fail: Callable[[BaseException], None],
    ) -> None:
        """Put the stage together."""
        super().__init__("encode", ledger, fail)
        self._encoder = encoder
        self._crops = crops
        self._batches = batches
        self._batch_size = batch_size
        self._max_delay_s = max_delay_s
        self._busy_s = 0.0
        self._since: float | None = None
        self.count = 0
        """Batches so far."""

    @property
    def busy_s(self) -> float:
        """Seconds in which the encoder worked, up to now."""
        since = self._since
        return self._busy_s + (0.0 if since is None else time.monotonic() - since)

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            if not batch:
                continue
            try:
                embeds = self._embed(batch)
            except BaseException:
                self._count(batch, "crops.dropped.failed")
                raise
            self._count(batch, "embedded")
            if self._batches.put((batch, embeds), "block") is not None:
                self._count(batch, "crops.dropped.failed")  # The gallery has failed.
            self._crops.done(len(batch))

    def _next(self) -> list[Crop] | None:
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

    def _embed(self, batch: list[Crop]) -> NDArray[np.float32]:
        self._since = time.monotonic()
        try:
            pixels = np.stack([crop.pixels for crop in batch])
            return self._encoder.encode_pixels(pixels, self._batch_size)
        finally:
            since, self._since = self._since, None
            self._busy_s += time.monotonic() - since
            self.count += 1


class CommitStage(_Stage):
    """Saves the pictures of all batches that wait, then commits their rows in one transaction."""

    def __init__(
        self,
        gallery: Gallery,
        variant: str,
        crops_dir: Path | None,
        run_name: str,
        batches: BoundedQueue[Batch],
        ledger: Ledger,
        fail: Callable[[BaseException], None],
        on_commit: Callable[[Sequence[Item]], None] | None,
    ) -> None:
        """Put the stage together."""
        super().__init__("commit", ledger, fail)
        self._gallery = gallery
        self._variant = variant
        self._crops_dir = crops_dir
        self._run_name = run_name
        self._folder: CropFolder | None = None
        self._batches = batches
        self._on_commit = on_commit
        self.latency = Durations()
        self.encode_latency = Durations()

    def start(self) -> None:
        """Clear up after processes that were killed, then begin to work.

        Raises:
            InputError: The folder of pictures cannot be written to.
        """
        if self._crops_dir is not None:
            remove_left_behind(self._gallery, self._crops_dir)
            self._folder = CropFolder(self._crops_dir, self._run_name)
        super().start()

    def _run(self) -> None:
        try:
            while not self._batches.is_finished:
                taken = self._batches.get_all(_STEP_S)
                if taken:
                    crops = [crop for batch, _ in taken for crop in batch]
                    self._commit(crops, np.concatenate([embeds for _, embeds in taken]))
                    self._batches.done(len(taken))
        finally:
            if self._folder is not None:
                self._folder.close()

    def _commit(self, crops: list[Crop], embeds: NDArray[np.float32]) -> None:
        items = [crop.item for crop in crops]
        try:
            with nullcontext() if self._folder is None else self._folder.saved(crops):
                self._gallery.add(items, embeds, self._variant)
        except BaseException:
            self._count(crops, "crops.dropped.failed")
            raise
        now = time.monotonic()
        for crop in crops:
            self.latency.add(now - crop.arrived)
            self.encode_latency.add(now - crop.chosen)
        self._count(crops, "committed")
        if self._on_commit is not None:
            self._on_commit(items)
