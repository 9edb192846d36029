"""The threads between the encoder and a gallery on a server, with a buffer on disk between them.

One writes batches into the buffer, which takes no longer while the server is away. The other one
sends the rows from there to the gallery, in their order, until it has them.
"""

import threading
import time
from collections.abc import Callable
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from upperson_camera.commit import CommitStage
from upperson_camera.disk_buffer import BufferedRow, DiskBuffer
from upperson_camera.frames import CameraCrop
from upperson_camera.late_gallery import LateGallery
from upperson_camera.queues import AbandonedError, Stage
from upperson_camera.settings import Shared
from upperson_rt.errors import BackendError, UsageError
from upperson_rt.ingest.service import Ingest
from upperson_rt.printable import count_of, get_logger

_log = get_logger(__name__)

_STEP_S = 0.1
_MOST_ROWS = 256
"""Rows sent at a time."""
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 5.0
_LATE_S = 5.0
"""A gallery that takes nothing for so long is away."""
_REPEAT_S = 60.0


class SendStage(CommitStage):
    """Sends rows from the buffer to the gallery, and again while it is away.

    What it may have stored before an error is sent again: the keys make that harmless.
    """

    def __init__(
        self,
        ingest: Ingest,
        shared: Shared,
        fail: Callable[[BaseException], None],
        buffer: DiskBuffer,
    ) -> None:
        super().__init__(ingest, shared, fail)
        if shared.settings.commit_every_s:
            text = "commits wait for galleries in folders only: leave out commit_every_s"
            raise UsageError(text, code="commits_not_batched")
        self._buffer = buffer
        self._end_within_s = shared.settings.end_within_s
        self._ending = threading.Event()
        self._is_busy = False
        self._error = "it does not answer"
        self._waits_since: float | None = None
        self._late: LateGallery | None = None
        if isinstance(ingest.gallery, LateGallery):
            self._late, self._error = ingest.gallery, ingest.gallery.problem
            self._waits_since = time.monotonic()
        self.recovered = 0
        """Rows of earlier runs so far."""

    def end(self) -> None:
        """Send what waits, and end; if the gallery is away, end in ``end_within_s``."""
        self._buffer.finish()
        self._ending.set()

    @property
    def is_idle(self) -> bool:
        """Whether no row waits or is worked on."""
        return not len(self._buffer) and not self._is_busy

    @property
    def away(self) -> str | None:
        """Why the gallery has taken nothing since it was last called; None if it has."""
        return None if self._waits_since is None else self._error

    @property
    def problem(self) -> str | None:
        """Why the gallery has taken nothing for some seconds; None if all is well."""
        since = self._waits_since
        return None if since is None or time.monotonic() - since < _LATE_S else self.away

    def _run(self) -> None:
        pause_s, progress = _FIRST_PAUSE_S, time.monotonic()
        while True:
            self._is_busy = True
            with self._calling("buffer"):
                rows = self._buffer.first(_MOST_ROWS)
            if not rows:
                self._is_busy = False
                if self._buffer.is_finished:
                    break
            if not rows and self._late is None:
                with self._calling("buffer"):
                    self._buffer.wait(_STEP_S)
                if self._others.is_due:
                    self._each_minute()
                continue
            try:
                self._open()
                if rows:
                    self._send(rows)
                pause_s, progress = _FIRST_PAUSE_S, time.monotonic()
            except BackendError as error:
                self._error = str(error)
                self._others.forget({row.item.camera for row in rows if row.item.camera})
                if not self._buffer.is_finished:
                    progress = time.monotonic()
                elif time.monotonic() - progress > self._end_within_s:
                    return
                if self._ending.wait(pause_s):
                    time.sleep(_STEP_S)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        self._each_minute()

    def _open(self) -> None:
        """Open a gallery whose server was away at the start, also if no row waits for it."""
        if self._late is not None:
            with self._calling("gallery"):
                self._late.open()
            self._late = self._waits_since = None

    def _send(self, waiting: list[BufferedRow]) -> None:
        """Send the first rows that are of one variant, which is what a gallery takes at a time."""
        variant = waiting[0].variant
        rows = list(takewhile(lambda row: row.variant == variant, waiting))
        items = [row.item for row in rows]
        vectors_ND = np.stack([row.vector_D for row in rows])
        self._waits_since = self._waits_since or time.monotonic()
        with self._calling("gallery"):
            self._others.count_existing(item.camera for item in items if item.camera)
            replaced = self._ingest.gallery.add(items, vectors_ND, variant)
        self._waits_since = None
        with self._calling("buffer"):
            self._buffer.remove(rows)
        own = [row for row in rows if row.is_own]
        for row in own:
            self._counters.count(str(row.item.camera), "committed")
        self.recovered += len(rows) - len(own)
        self._report(items, replaced, [row.stamps for row in own])


class BufferStage(Stage):
    """Writes all batches that wait into the buffer, and logs how many rows wait there."""

    def __init__(
        self,
        shared: Shared,
        fail: Callable[[BaseException], None],
        buffer: DiskBuffer,
        sender: SendStage,
    ) -> None:
        super().__init__("buffer", "buffer", fail)
        self._batches, self._counters = shared.batches, shared.counters
        self._variant = shared.encoder.variant
        self._buffer, self._sender = buffer, sender
        self._crops: list[CameraCrop] = []
        self._logged: float | None = None
        self._was_full = False

    def abandon(self) -> str | None:
        """Abandon a disk that does not return; return what was stuck."""
        if not self._abandon():
            return None
        self._counters.count_crops(self._crops, "crops_dropped.failed")
        return self.part

    def _run(self) -> None:
        while not self._batches.is_finished:
            taken = self._batches.get_all(_STEP_S)
            if taken:
                self._crops = [crop for batch, _ in taken for crop in batch]
                self._put(np.concatenate([embeds for _, embeds in taken]))
                self._batches.done(len(taken))
            self._log_state()

    def _put(self, embeds_ND: NDArray[np.float32]) -> None:
        items = [crop.item for crop in self._crops]
        stamps = [(crop.arrived, crop.chosen) for crop in self._crops]
        try:
            with self._calling("buffer"):
                self._buffer.put(items, embeds_ND, self._variant, stamps)
        except AbandonedError:
            raise
        except BaseException:
            self._counters.count_crops(self._crops, "crops_dropped.failed")
            raise

    def _log_state(self) -> None:
        problem, now = self._sender.problem, time.monotonic()
        waiting = len(self._buffer)
        wait = f"{count_of(waiting, 'crop waits', 'crops wait')} on disk in {self._buffer.path}"
        if problem is not None and (self._logged is None or now - self._logged >= _REPEAT_S):
            self._logged = now
            text, event = f"the gallery takes no rows ({problem}): {wait}", "gallery_away"
            _log.warning("%s", text, extra={"event": event, "waiting": waiting})
        if problem is None and self._logged is not None:
            self._logged = None
            text, event = f"the gallery takes rows again: {wait}", "gallery_back"
            _log.warning("%s", text, extra={"event": event, "waiting": waiting})
        if self._buffer.is_full and not self._was_full:
            text = f"the buffer is full, cameras accept no more crops for now: {wait}"
            _log.warning("%s", text, extra={"event": "buffer_full", "waiting": waiting})
        self._was_full = self._buffer.is_full
