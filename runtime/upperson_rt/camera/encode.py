"""The thread that embeds the crops of all cameras, in batches."""

import math
import time
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.camera.frames import Crop
from upperson_rt.camera.queues import BoundedQueue, LeftBehindError, Stage
from upperson_rt.camera.settings import PipelineSettings
from upperson_rt.camera.stats import Ledger
from upperson_rt.encoder import Encoder

__all__ = ["EncodeStage", "EncodedCrops"]

EncodedCrops: TypeAlias = "tuple[list[Crop], NDArray[np.float32]]"
"""Crops and their embeddings."""

_STEP_S = 0.1


class EncodeStage(Stage):
    """Takes crops, embeds them by batches, gives the batches on.

    A batch is run when it is full, or when its first crop has waited for ``max_delay_s``. An error
    of the encoder goes to ``fail``.
    """

    def __init__(
        self,
        encoder: Encoder,
        settings: PipelineSettings,
        crops: BoundedQueue[Crop],
        batches: BoundedQueue[EncodedCrops],
        ledger: Ledger,
        fail: Callable[[BaseException], None],
    ) -> None:
        super().__init__("encode", "encoder", fail)
        self._encoder = encoder
        self._batch_size = settings.batch_size
        self._max_delay_s = settings.max_delay_s
        self._crops = crops
        self._batches = batches
        self._ledger = ledger
        self._busy_s = 0.0
        self._batch: list[Crop] = []
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
        began = time.monotonic()
        with self._calling("encoder"):
            pixels = np.stack([crop.pixels for crop in batch])
            embeds = self._encoder.encode_pixels(pixels, self._batch_size)
        self._busy_s += time.monotonic() - began
        self.count += 1
        return embeds
