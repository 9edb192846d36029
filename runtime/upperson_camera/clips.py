"""The thread that saves the whole frame of each committed crop, and a clip around it.

Clips are the camera's own packets in MP4, or Matroska for codecs that browsers do not play.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from datetime import datetime, timezone
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

from upperson_camera.decoding import import_av
from upperson_camera.frames import CameraCrop
from upperson_camera.queues import AbandonedError, BoundedQueue, Stage
from upperson_camera.recorder import Cut
from upperson_camera.stats import Counters
from upperson_rt.errors import InputError
from upperson_rt.files import make_folder, put_in_place, scratch_folder
from upperson_rt.gallery.clips import MARGIN_S, all_clips, clip_name, clips_dir
from upperson_rt.printable import count_of, error_text, get_logger

_log = get_logger(__name__)

_STEP_S = 0.1
_SWEEP_S = 60.0
"""Between two looks at the age and the size of all files."""
_DAY_S = 86_400.0
_MOST_WAITING = 512
_MOST_RECENT = 4096
"""Crops that are remembered: they may be deleted while a clip of that time is written."""
_HEADER_BYTES = 64 << 10
"""More than what a clip takes besides its packets."""
_PLAYED = ("h264", "hevc", "vp9", "av1")
"""Codecs that browsers may play, in MP4."""


class _Saved(NamedTuple):
    """A committed crop."""

    camera: str
    crop: str
    time: float


def write_clip(cut: Cut, path: Path, moment: float) -> tuple[float, float]:
    """Write the packets of a cut as a video, without decoding them.

    Args:
        cut: The packets; more may come meanwhile.
        path: The file; its ending says which kind.
        moment: Unix time of the packet that the cut is around.

    Returns:
        Unix time of its begin and its end.

    Raises:
        OSError: The disk is full, or FFmpeg refuses.
        ValueError: The kind of file cannot hold the codec.
    """
    av = import_av()
    run, first = cut.segments[0].run, cut.first
    begin, last = moment - (cut.at - first.at), first
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as file:
        at = datetime.fromtimestamp(begin, timezone.utc)
        file.metadata["creation_time"] = at.isoformat(timespec="microseconds")
        stream: Any = file.add_stream_from_template(run.template, opaque=True)
        context = stream.codec_context
        context.width, context.height = run.size
        if run.extradata is not None:
            context.extradata = run.extradata
        for segment in cut.segments:
            for one, content in segment.contents():
                if one.number < first.number or one.at > cut.until:
                    continue
                packet = av.Packet(content)
                packet.dts, packet.pts = one.dts - first.dts, one.pts - first.dts
                packet.duration, packet.is_keyframe = one.duration, one.is_key
                packet.time_base, packet.stream = run.time_base, stream
                file.mux(packet)
                last = one
    return begin, moment + (last.at - cut.at)


class ClipStage(Stage):
    """Saves frames at once and clips when they are complete; keeps age and size of all bounded.

    A disk that is full or slow costs clips, which are counted, and nothing else.
    """

    def __init__(self, crops_dir: Path, counters: Counters, days: float, most_bytes: int) -> None:
        super().__init__("clips", "clips", self._failed)
        self._crops_dir, self._folder = crops_dir, clips_dir(crops_dir)
        self._counters = counters
        self._days, self._most_bytes = days, most_bytes
        self._waiting: BoundedQueue[CameraCrop] = BoundedQueue(_MOST_WAITING)
        self._cuts: list[tuple[_Saved, Cut]] = []
        self._recent: deque[_Saved] = deque(maxlen=_MOST_RECENT)
        self._total = 0
        """Bytes of all files, as far as this process knows."""
        self._stack = ExitStack()
        self._ending = Event()
        self._warned = False
        self._scratch: Path | None = None

    @property
    def scratch(self) -> Path:
        """A folder on the same disk for what is not finished."""
        assert self._scratch is not None
        return self._scratch

    def start(self) -> None:
        """Remove what killed processes left unfinished, then start, unless that was done before.

        Raises:
            InputError: The folder cannot be written to.
        """
        if self._scratch is None:
            self._scratch = self._stack.enter_context(scratch_folder(self._folder / "unfinished"))
            super().start()

    def put(self, crops: Sequence[CameraCrop]) -> None:
        """Take committed crops; returns at once."""
        if self._scratch is None:
            return
        for crop in crops:
            if self._waiting.put(crop, "newest") is not None and crop.cut is not None:
                self._counters.count(crop.camera, "clips_dropped.queue_full")

    def end(self, patience_s: float) -> None:
        """Write what there is, and end; a disk that does not answer for so long is abandoned."""
        began = time.monotonic()
        self._ending.set()
        while self.is_alive:
            if self.call_s(began) > patience_s and self._abandon():
                text = "the disk of %s does not answer: clips are left out"
                _log.error(text, self._folder, extra={"event": "clips_lost"})
                return
            self.join(_STEP_S)
        self._stack.close()

    def _run(self) -> None:
        swept = float("-inf")
        while True:
            is_ending = self._ending.is_set()
            if time.monotonic() - swept >= _SWEEP_S:
                self._careful(None, self._sweep)
                swept = time.monotonic()
            for crop in self._waiting.get_all(_STEP_S):
                self._take(crop)
            waiting, self._cuts = self._cuts, []
            for saved, cut in waiting:
                if cut.is_complete or is_ending:
                    self._careful(saved.camera, self._save_clip, saved, cut)
                else:
                    self._cuts.append((saved, cut))
            if is_ending and not len(self._waiting) and not self._cuts:
                break

    def _take(self, crop: CameraCrop) -> None:
        if crop.item.crop is None or crop.item.time is None:
            return
        saved = _Saved(crop.camera, crop.item.crop, crop.item.time)
        self._recent.append(saved)
        if crop.frame_jpeg is not None:
            self._careful(crop.camera, self._save_frame, saved, crop.frame_jpeg)
        if isinstance(crop.cut, Cut):
            self._cuts.append((saved, crop.cut))
        elif crop.cut is not None:
            self._counters.count(crop.camera, f"clips_dropped.{crop.cut}")

    def _careful(self, camera: str | None, save: Callable[..., None], *values: Any) -> None:
        """Call a function that writes; whatever it raises costs a clip, and is logged once."""
        try:
            with self._calling("clips"):
                save(*values)
        except AbandonedError:
            raise
        except Exception as error:  # FFmpeg's are of many kinds.
            if camera is not None:
                reason = "disk" if isinstance(error, OSError | InputError) else "not_written"
                self._counters.count(camera, f"clips_dropped.{reason}")
            if not self._warned:
                text = "frames and clips cannot be saved in %s: %s"
                given = self._folder, error_text(error)
                _log.warning(text, *given, extra={"event": "clips_lost"})
            self._warned = True
        else:
            self._warned = camera is None and self._warned

    def _save_frame(self, saved: _Saved, jpeg: bytes) -> None:
        self._make_room(len(jpeg))
        temporary = self.scratch / "frame.jpg"
        temporary.write_bytes(jpeg)
        self._place(saved, temporary, saved.time, None, "whole_frames")

    def _save_clip(self, saved: _Saved, cut: Cut) -> None:
        if not self._make_room(cut.size + _HEADER_BYTES):
            self._counters.count(saved.camera, "clips_dropped.too_large")
            return
        codec = cut.segments[0].run.template.codec_context.name
        temporary = self.scratch / f"clip{'.mp4' if codec in _PLAYED else '.mkv'}"
        begin, end = write_clip(cut, temporary, saved.time)
        self._place(saved, temporary, begin, end, "clips")

    def _place(
        self, saved: _Saved, temporary: Path, begin: float, end: float | None, counter: str
    ) -> None:
        """Give a finished file its name, unless somebody in it was deleted meanwhile."""
        path = self._folder / clip_name(saved.crop, temporary.suffix, begin, end)
        size = temporary.stat().st_size
        make_folder(path.parent)
        put_in_place(temporary, path)
        # After the rename: a deletion removes crops first, and looks for clips then.
        last = begin if end is None else end
        for other in self._recent:
            is_in = (
                other.camera == saved.camera and begin - MARGIN_S <= other.time <= last + MARGIN_S
            )
            if is_in and not (self._crops_dir / other.crop).exists():
                path.unlink(missing_ok=True)
                self._counters.count(saved.camera, "clips_dropped.deleted")
                return
        self._total += size
        self._counters.count(saved.camera, counter)

    def _make_room(self, more: int) -> bool:
        """Remove the oldest files where so many bytes more would be too many."""
        if self._total + more > self._most_bytes:
            self._sweep(more)
        return self._total + more <= self._most_bytes

    def _sweep(self, more: int = 0) -> None:
        """Remove files that are too old, and the oldest ones where all are too large."""
        there = []
        for file in all_clips(self._crops_dir):
            with suppress(FileNotFoundError):
                found = file.path.stat()
                there.append((found.st_mtime, found.st_size, file.path))
        total, count = sum(size for _, size, _ in there), len(there)
        for changed, size, path in sorted(there):
            if total + more <= self._most_bytes and changed >= time.time() - self._days * _DAY_S:
                break
            path.unlink(missing_ok=True)
            total, count = total - size, count - 1
        self._total = total
        if removed := len(there) - count:
            text = "removed %s: too old, or too many bytes"
            event = {"event": "clips_removed", "files": removed}
            _log.info(
                text, count_of(removed, "old frame or clip", "old frames and clips"), extra=event
            )

    def _failed(self, error: BaseException) -> None:
        text = "no more frames and clips are saved: %s"
        _log.error(text, error_text(error), extra={"event": "clips_lost"})
