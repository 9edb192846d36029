"""The latest compressed packets of a camera, on disk: clips are cut from them without decoding.

Packets lie in segments, each from one key frame to the next, in files without names: what a killed
process leaves is gone. Segments that a clip still needs stay until it is written.
"""

import errno
import io
import logging
import math
import shutil
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from threading import Lock
from typing import IO, Any, NamedTuple

from upperson_camera.decoding import ERRORS_EVERY_S, import_av
from upperson_camera.queues import log_camera
from upperson_rt.printable import error_text, get_logger

_log = get_logger(__name__)

_SEGMENT_S = 1.0
"""Shortest segment, for streams of key frames only, such as MJPEG."""
_LONGEST_GOP_S = 60.0
"""A stream without a key frame for so long gives no clips until the next one."""
_JUMP_S = 10.0
"""A time stamp further from where it should be is wrong."""
_USUAL_RATE = 25.0
_BYTES_PER_S = 16 << 20
"""Most bytes for each second of a clip and eight more, with what clips still need."""
RESERVE_BYTES = 256 << 20
"""Of the disk, that clips leave free: without room for rows and crops, cameras could not go on."""
_WITHOUT_TIMES = ("jpeg_pipe", "mjpeg", "mpjpeg")
"""Kinds of streams for which FFmpeg makes up time stamps: when packets came counts."""
_FINE = Fraction(1, 90_000)
_WITH_SETS = ("h264", "hevc")
"""Codecs with parameter sets, which a camera may send anew with a key frame."""


def require_free(folder: Path, more: int = 0) -> None:
    """Raise OSError unless a disk has so many bytes more than what the gallery needs to go on."""
    if shutil.disk_usage(folder).free < RESERVE_BYTES + more:
        raise OSError(errno.ENOSPC, f"fewer than {RESERVE_BYTES >> 20} MiB of the disk are free")


class StoredPacket(NamedTuple):
    """What a segment knows of a packet besides its content."""

    number: int
    at: float
    """Seconds on the recorder's axis: for a live source when it came, for a file its time stamp."""
    dts: int
    pts: int
    duration: int
    size: int
    is_key: bool


@dataclass(eq=False)
class Run:
    """Packets without a gap, of one codec and size."""

    template: Any
    """A stream of PyAV with the parameters of the source's."""
    time_base: Any
    size: tuple[int, int]
    """Width and height, as the decoder found them."""
    extradata: bytes | None = None
    """Parameter sets that came with the packets; None for those of the template."""


class Segment:
    """Packets from a key frame on."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.run = run
        self.packets: list[StoredPacket] = []
        self.size = 0
        self._file: IO[bytes] = tempfile.TemporaryFile(  # noqa: SIM115 - Ends with the segment.
            dir=folder, buffering=0
        )
        weakref.finalize(self, self._file.close)
        self._lock = Lock()

    def add(self, packet: StoredPacket, content: bytes) -> None:
        """Add a packet; raises OSError if the disk is full."""
        with self._lock:
            if self._file.write(content) != len(content):
                raise OSError(errno.ENOSPC, "no space left on device")
        self.size += len(content)
        self.packets.append(packet)

    def contents(self) -> Iterator[tuple[StoredPacket, bytes]]:
        """Yield the packets that there are now."""
        packets = list(self.packets)
        with self._lock:
            self._file.seek(0)
            content = self._file.read(sum(packet.size for packet in packets))
            self._file.seek(0, io.SEEK_END)
        begin = 0
        for packet in packets:
            yield packet, content[begin : begin + packet.size]
            begin += packet.size


@dataclass(eq=False)
class Cut:
    """The packets around one of them; more come until it is complete."""

    run: Run
    segments: list[Segment]
    first: StoredPacket
    """A key frame."""
    at: float
    """Of the packet."""
    until: float
    is_complete: bool = False


class Recorder:
    """Keeps the packets of one camera, bounded in seconds and bytes; never raises into its reader.

    One thread reads at a time; any may cut.
    """

    def __init__(
        self, camera: str, is_live: bool, clip_s: float, late_s: float, folder: Callable[[], Path]
    ) -> None:
        """Keep ``clip_s`` seconds before what happened up to ``late_s`` seconds ago.

        ``folder`` returns where the files lie, once there are packets.
        """
        self.count = 0
        """Packets so far: the number of the last one."""
        self._camera, self._is_live = camera, is_live
        self._clip_s, self._keep_s = clip_s, clip_s + late_s
        self._folder = folder
        self._lock = Lock()
        self._session: _Session | None = None
        self._segments: deque[Segment] = deque()
        self._all: weakref.WeakSet[Segment] = weakref.WeakSet()
        """Those of cuts, too."""
        self._open: weakref.WeakSet[Cut] = weakref.WeakSet()
        self._missing = "no_packets"
        """Why there is no packet now."""
        self._logged = -math.inf

    def begin(self) -> "_Session":
        """Return what takes the packets of a source that was opened; earlier ones take no more."""
        with self._lock:
            self._interrupt("no_packets")
            self._session = _Session(self)
            return self._session

    def cut(self, number: int) -> Cut | str:
        """Return the packets around the one of that number, or why there are none."""
        with self._lock:
            segments = list(self._segments)
            there = [i for i, one in enumerate(segments) if one.packets[0].number <= number]
            if not there:
                return "too_late" if segments else self._missing
            last = there[-1]
            run, packets = segments[last].run, segments[last].packets
            at = next(one.at for one in reversed(packets) if one.number <= number)
            if number > packets[-1].number and (last < len(segments) - 1 or not self._goes_on):
                return self._missing  # It came after a gap.
            first = last
            while (
                segments[first].packets[0].at > at - self._clip_s
                and first > 0
                and segments[first - 1].run is run
            ):
                first -= 1
            until = at + self._clip_s
            parts = [
                one for one in segments[first:] if one.run is run and one.packets[0].at <= until
            ]
            newest = segments[-1]
            begins = [one for one in parts[0].packets if one.is_key and one.at <= at - self._clip_s]
            found = Cut(run, parts, (begins or parts[0].packets[:1])[-1], at, until)
            found.is_complete = newest.run is not run or newest.packets[-1].at >= until
            if not found.is_complete and self._goes_on:
                self._open.add(found)
            else:
                found.is_complete = True
            return found

    @property
    def _goes_on(self) -> bool:
        """Whether the next packet follows the last one."""
        session = self._session
        return session is not None and session.run is not None

    def _interrupt(self, why: str) -> None:
        """End the run: the next one begins at a key frame."""
        self._missing = why
        for cut in list(self._open):
            cut.is_complete = True
        self._open.clear()
        if self._session is not None:
            self._session.run = None

    def _put(self, session: "_Session", packet: Any) -> None:
        with self._lock:
            if session is not self._session or not packet.size:
                return
            self.count += 1
            try:
                self._keep(session, packet)
            except Exception as error:  # Whatever becomes of clips, the camera is watched.
                self._interrupt("disk" if isinstance(error, OSError) else "not_kept")
                if time.monotonic() - self._logged >= ERRORS_EVERY_S:
                    self._logged = time.monotonic()
                    text = "its packets cannot be kept, so that there are no clips for now: %s"
                    values = self._camera, "clips_lost", text, error_text(error)
                    log_camera(_log, logging.WARNING, *values)

    def _keep(self, session: "_Session", packet: Any) -> None:
        stamped, content = session.stamp(packet, self.count, self._is_live), bytes(packet)
        if stamped.is_key and session.must_begin(packet, content):
            self._interrupt("no_key_frame")
            session.begin_run(packet)
        run, segments = session.run, self._segments
        while len(segments) > 1 and segments[1].packets[0].at <= stamped.at - self._keep_s:
            segments.popleft()
        if run is None:
            if self._missing == "no_packets":
                self._missing = "no_key_frame"
            return
        context = packet.stream.codec_context
        run.size = context.width, context.height
        segment = segments[-1] if segments else None
        length_s = 0.0 if segment is None else stamped.at - segment.packets[0].at
        if segment is None or segment.run is not run or (stamped.is_key and length_s >= _SEGMENT_S):
            require_free(folder := self._folder())
            segment = Segment(run, folder)
        elif length_s > _LONGEST_GOP_S:
            self._interrupt("no_key_frame")
            return
        while self._is_full(len(content)) and segments and segments[0] is not segment:
            segments.popleft()
        if self._is_full(len(content)):
            self._interrupt("buffer_full")
            return
        segment.add(stamped, content)
        if len(segment.packets) == 1:
            segments.append(segment)
            self._all.add(segment)
        for cut in list(self._open):
            if cut.segments[-1] is not segment and stamped.at <= cut.until:
                cut.segments.append(segment)
            if stamped.at >= cut.until:
                cut.is_complete = True
                self._open.discard(cut)

    def _is_full(self, more: int) -> bool:
        most = _BYTES_PER_S * (self._clip_s + 8)
        return sum(segment.size for segment in self._all) + more > most


class _Session:
    """One connection to a source: takes its packets, and gives each a time that rises."""

    def __init__(self, recorder: Recorder) -> None:
        self.run: Run | None = None
        """None until the next key frame."""
        self.time_base = _FINE
        self._recorder = recorder
        self._template: Any = None
        self._filter: Any = None
        self._sets: bytes | None = None
        self._shift = 0
        """From the time stamps of the source to ours, in its units."""
        self._last: StoredPacket | None = None
        self._came = 0.0

    def put(self, packet: Any) -> None:
        """Keep a packet of PyAV that was decoded; in the thread that reads."""
        self._recorder._put(self, packet)

    def end(self) -> None:
        """Take no more packets: clips end here."""
        with self._recorder._lock:
            if self._recorder._session is self:
                self._recorder._interrupt("no_packets")

    def stamp(self, packet: Any, number: int, is_live: bool) -> StoredPacket:
        """Return a packet with time stamps that rise; missing ones and jumps are made good."""
        now, base, duration = time.monotonic(), packet.time_base, packet.duration or 0
        rate = float(packet.stream.average_rate or _USUAL_RATE)
        pts, given = packet.pts, packet.dts if packet.dts is not None else packet.pts
        if is_live and packet.stream.container.format.name in _WITHOUT_TIMES:
            pts, given, base, duration = None, None, _FINE, 0
        self.time_base = base
        last, at = self._last, now
        usual_s = now - self._came if is_live and last is not None else 1 / rate
        if last is None:
            dts = 0
            self._shift = -(given or 0)
        else:
            expected = last.dts + max(1, round(usual_s / base))
            dts = expected if given is None else given + self._shift
            if not 0 < (dts - last.dts) * base < usual_s + _JUMP_S:
                self._shift += expected - dts
                dts = expected
        pts = dts if pts is None else max(dts, pts + self._shift)
        if not is_live:
            at = float(dts * base)
        self._came = now
        self._last = StoredPacket(
            number, at, dts, pts, duration, packet.size, bool(packet.is_keyframe)
        )
        return self._last

    def must_begin(self, packet: Any, content: bytes) -> bool:
        """Whether a run begins with a key frame: the first one, or one of another kind or size."""
        context = packet.stream.codec_context
        earlier, self._sets = self._sets, self._parameter_sets(packet, content) or self._sets
        size = context.width, context.height
        has_changed = earlier is not None and earlier != self._sets
        return self.run is None or has_changed or self.run.size != size

    def begin_run(self, packet: Any) -> None:
        """Begin a run with a key frame."""
        av, stream = import_av(), packet.stream
        if self._template is None:
            # Of a file that is never written; the source's own stream ends with its connection.
            holder = av.open(io.BytesIO(), "w", format="matroska")
            self._template = holder.add_stream_from_template(stream, opaque=True)
        context = stream.codec_context
        size = context.width, context.height
        self.run = Run(self._template, self.time_base, size, self._sets)

    def _parameter_sets(self, packet: Any, content: bytes) -> bytes | None:
        """Return the parameter sets in a key frame, if there are any."""
        av, context = import_av(), packet.stream.codec_context
        if context.name not in _WITH_SETS or (context.extradata or b"")[:1] == b"\x01":
            return None  # Or they stand in the file's header, once.
        if self._filter is None:
            self._filter = av.bitstream.BitStreamFilterContext("extract_extradata", packet.stream)
        copy = av.Packet(content)
        copy.is_keyframe = True
        with suppress(av.FFmpegError):  # A damaged packet.
            for filtered in self._filter.filter(copy):
                if filtered.has_sidedata("new_extradata"):
                    return bytes(filtered.get_sidedata("new_extradata"))
        return None
