"""The thread that saves the whole frame of each committed crop, and a clip around it.

Clips are the camera's own packets in MP4, or Matroska for codecs that browsers do not play.
"""

import errno
import math
import os
import shutil
import time
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import numpy as np

from upperson_camera.decoding import ERRORS_EVERY_S, import_av
from upperson_camera.frames import CameraCrop
from upperson_camera.queues import AbandonedError, BoundedQueue, Stage
from upperson_camera.recorder import RESERVE_BYTES, Cut, Segment, StoredPacket, require_free
from upperson_camera.stats import Counters
from upperson_rt.errors import InputError
from upperson_rt.files import make_folder, put_in_place, require_no_links, scratch_folder
from upperson_rt.gallery.clips import AFTER_S, BEFORE_S, all_clips, clip_name, clips_dir
from upperson_rt.printable import count_of, error_text, get_logger

_log = get_logger(__name__)

_STEP_S = 0.1
_SWEEP_S = 60.0
"""Between two looks at the age and the size of all files."""
_DAY_S = 86_400.0
_SPARE = 0.1
"""Of the size limit, removed beyond what is needed: the next files need no look at all others."""
_MOST_WAITING = 128
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


@dataclass(eq=False)
class _Group:
    """Crops of a camera at about the same time: they have one clip."""

    camera: str
    crops: list[_Saved]
    cuts: list[Cut]
    written: tuple[Path, float, float] | None = None
    """File, begin and end."""

    def takes(self, camera: str, cut: Cut) -> bool:
        """Whether the clip is also one of another cut: it will be, or it covers it already."""
        first = self.cuts[0]
        if camera != self.camera or cut.run is not first.run:
            return False
        if self.written is None:
            return abs(cut.at - first.at) <= 2 * (cut.until - cut.at)
        is_in = _first(self.cuts).number <= cut.first.number and cut.until <= _until(self.cuts)
        return is_in and self.written[0].exists()


def _first(cuts: Sequence[Cut]) -> StoredPacket:
    return min((cut.first for cut in cuts), key=lambda packet: packet.number)


def _until(cuts: Sequence[Cut]) -> float:
    return max(cut.until for cut in cuts)


def _segments(cuts: Sequence[Cut]) -> list[Segment]:
    """Return the segments of cuts in their order."""
    return sorted(
        {segment for cut in cuts for segment in cut.segments},
        key=lambda segment: segment.packets[0].number,
    )


def write_clip(cuts: Sequence[Cut], path: Path, moment: float) -> tuple[float, float]:
    """Write the packets of cuts as one video, without decoding them.

    Args:
        cuts: One or more of one run, that overlap.
        path: The file; its ending says which kind.
        moment: Unix time of the packet that the first cut is around.

    Returns:
        Unix time of its begin and its end.

    Raises:
        OSError: The disk is full, or FFmpeg refuses.
        ValueError: The kind of file cannot hold the codec.
    """
    av = import_av()
    run, first, until = cuts[0].run, _first(cuts), _until(cuts)
    begin, last = moment - (cuts[0].at - first.at), first
    options = {"movflags": "faststart"} if path.suffix == ".mp4" else {}
    with av.open(str(path), "w", options=options) as file:
        at = datetime.fromtimestamp(begin, timezone.utc)
        file.metadata["creation_time"] = at.isoformat(timespec="microseconds")
        stream: Any = file.add_stream_from_template(run.template, opaque=True)
        context = stream.codec_context
        context.width, context.height = run.size
        if run.extradata is not None:
            context.extradata = run.extradata
        for segment in _segments(cuts):
            for one, content in segment.contents():
                if one.number < first.number or one.at > until:
                    continue
                packet = av.Packet(content)
                packet.dts, packet.pts = one.dts - first.dts, one.pts - first.dts
                packet.duration, packet.is_keyframe = one.duration, one.is_key
                packet.time_base, packet.stream = run.time_base, stream
                file.mux(packet)
                last = one
    return begin, moment + (last.at - cuts[0].at)


class ClipStage(Stage):
    """Saves frames at once and clips when they are complete; keeps age and size of all bounded.

    Crops of a camera at about the same time share a clip: each has a name for it (a hard link).
    A disk that is full or slow costs clips, which are counted, and nothing else.
    """

    def __init__(self, crops_dir: Path, counters: Counters, days: float, most_bytes: int) -> None:
        super().__init__("clips", "clips", self._failed)
        self._crops_dir, self._folder = crops_dir, clips_dir(crops_dir)
        self._counters = counters
        self._days, self._most_bytes = days, most_bytes
        self._waiting: BoundedQueue[CameraCrop] = BoundedQueue(_MOST_WAITING)
        self._groups: list[_Group] = []
        """Those that are not complete, and the one of each camera that was written last."""
        self._recent: deque[_Saved] = deque(maxlen=_MOST_RECENT)
        self._total = 0
        """Bytes of all files, as far as this process knows."""
        self._stack = ExitStack()
        self._ending = Event()
        self._logged = float("-inf")
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
                self._careful([], self._sweep)
                swept = time.monotonic()
            for crop in self._waiting.get_all(_STEP_S):
                self._take(crop)
            for group in [one for one in self._groups if one.written is None]:
                if is_ending or all(cut.is_complete for cut in group.cuts):
                    self._groups = [
                        one
                        for one in self._groups
                        if one.written is None or one.camera != group.camera
                    ]
                    self._careful(group.crops, self._save_clip, group)
                    if group.written is None:
                        self._groups.remove(group)
            if is_ending and not len(self._waiting):
                break

    def _take(self, crop: CameraCrop) -> None:
        if crop.item.crop is None or crop.item.time is None:
            return
        saved = _Saved(crop.camera, crop.item.crop, crop.item.time)
        self._recent.append(saved)
        if crop.frame_jpeg is not None:
            self._careful([saved], self._save_frame, saved, crop.frame_jpeg)
        cut = crop.cut
        if not isinstance(cut, Cut):
            if cut is not None:
                self._counters.count(crop.camera, f"clips_dropped.{cut}")
            return
        group = next((one for one in self._groups if one.takes(crop.camera, cut)), None)
        if group is None:
            self._groups.append(_Group(crop.camera, [saved], [cut]))
        elif group.written is None:
            group.crops.append(saved)
            group.cuts.append(cut)
        else:
            self._careful([saved], self._share, group.written, saved)

    def _careful(
        self, crops: Sequence[_Saved], save: Callable[..., object], *values: object
    ) -> None:
        """Call a function that writes; what it raises costs clips, and is logged once a minute."""
        try:
            with self._calling("clips"):
                save(*values)
        except AbandonedError:
            raise
        except Exception as error:  # FFmpeg's are of many kinds.
            reason = "disk" if isinstance(error, OSError | InputError) else "not_written"
            for saved in crops:
                self._counters.count(saved.camera, f"clips_dropped.{reason}")
            if time.monotonic() - self._logged >= ERRORS_EVERY_S:
                self._logged = time.monotonic()
                text = "frames and clips cannot be saved in %s: %s"
                given = self._folder, error_text(error)
                _log.warning(text, *given, extra={"event": "clips_lost"})

    def _save_frame(self, saved: _Saved, jpeg: bytes) -> None:
        self._make_room(len(jpeg))
        temporary = self.scratch / "frame.jpg"
        temporary.write_bytes(jpeg)
        self._place([saved], temporary, saved.time, None)

    def _save_clip(self, group: _Group) -> None:
        size = sum(segment.size for segment in _segments(group.cuts))
        self._make_room(size + _HEADER_BYTES)
        codec = group.cuts[0].run.template.codec_context.name
        temporary = self.scratch / f"clip{'.mp4' if codec in _PLAYED else '.mkv'}"
        begin, end = write_clip(group.cuts, temporary, group.crops[0].time)
        if (path := self._place(group.crops, temporary, begin, end)) is not None:
            group.written = path, begin, end
        for cut in group.cuts:
            cut.segments = []

    def _share(self, written: tuple[Path, float, float], saved: _Saved) -> None:
        path, begin, end = written
        link = self.scratch / f"link{path.suffix}"
        self._link(path, link)
        self._place([saved], link, begin, end)

    def _link(self, path: Path, other: Path) -> None:
        """Give a clip another name; a copy where the file system has no hard links."""
        other.unlink(missing_ok=True)
        try:
            os.link(path, other)
        except OSError:
            self._make_room(path.stat().st_size)
            shutil.copyfile(path, other)

    def _place(
        self, crops: Sequence[_Saved], temporary: Path, begin: float, end: float | None
    ) -> Path | None:
        """Give a finished file its names, unless a person in it was deleted meanwhile."""
        name, last = temporary.suffix, begin if end is None else end
        paths = [self._folder / clip_name(saved.crop, name, begin, end) for saved in crops]
        for path in paths:
            link = temporary
            if path is not paths[0]:
                link = self.scratch / f"link{name}"
                self._link(paths[0], link)
            found = link.stat()
            require_no_links(self._folder.parent, str(path.parent.relative_to(self._folder.parent)))
            make_folder(path.parent)
            put_in_place(link, path)
            self._total += found.st_size if found.st_nlink == 1 else 0
        # After the rename: a deletion removes crops first, and looks for clips then.
        camera = crops[0].camera
        for other in self._recent:
            is_in = other.camera == camera and begin - AFTER_S <= other.time <= last + BEFORE_S
            if is_in and not (self._crops_dir / other.crop).exists():
                for path in paths:
                    path.unlink(missing_ok=True)
                self._counters.count(camera, "clips_dropped.deleted", len(crops))
                return None
        self._counters.count(camera, "whole_frames" if end is None else "clips", len(crops))
        return paths[0]

    def _make_room(self, more: int) -> None:
        """Remove the oldest files for so many bytes more; raises OSError if that is not enough."""
        with suppress(OSError):
            if self._total + more <= self._most_bytes:
                require_free(self._folder, more)
                return
        self._sweep(more)
        if self._total + more > self._most_bytes:
            raise OSError(errno.ENOSPC, f"it alone has more than {self._most_bytes} bytes")
        require_free(self._folder, more)

    def _sweep(self, more: int = 0) -> None:
        """Remove files that are too old, and the oldest ones for so many bytes more.

        If that needs any, it goes on to leave `_SPARE` of the limit as well.
        """
        found_times, found_sizes = array("d"), array("d")
        linked: set[tuple[int, int]] = set()
        for _, found in self._files():
            if found.st_nlink > 1:
                if (place := (found.st_dev, found.st_ino)) in linked:
                    continue
                linked.add(place)
            found_times.append(found.st_mtime)
            found_sizes.append(found.st_size)
        times, sizes = np.asarray(found_times), np.asarray(found_sizes)
        free = shutil.disk_usage(self._folder).free
        short = max(sizes.sum() - self._most_bytes, RESERVE_BYTES - free) + more
        until = math.nextafter(time.time() - self._days * _DAY_S, 0)
        if short > 0 and len(times):
            order = np.argsort(times)
            freed = np.cumsum(sizes[order])
            last = np.searchsorted(freed, short + round(self._most_bytes * _SPARE))
            until = max(until, times[order[min(last, len(order) - 1)]])
        if removed := int((times <= until).sum()):
            for path, found in self._files():
                if found.st_mtime <= until:
                    path.unlink(missing_ok=True)
        self._total = int(sizes[times > until].sum())
        if removed:
            text = "removed %s: too old, or too many bytes"
            event = {"event": "clips_removed", "files": removed}
            given = count_of(removed, "old frame or clip", "old frames and clips")
            _log.info(text, given, extra=event)

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Yield all frames and clips, one at a time: as a list they take 1.5 kB a picture."""
        for file in all_clips(self._crops_dir):
            with suppress(FileNotFoundError):
                yield file.path, file.path.stat()

    def _failed(self, error: BaseException) -> None:
        text = "no more frames and clips are saved: %s"
        _log.error(text, error_text(error), extra={"event": "clips_lost"})
