"""What becomes of a decoded frame: a picture in BGR, deinterlaced and upright; and by which device.

FFmpeg's libraries by PyAV, as in `stream`.
"""

import functools
import logging
import time
from contextlib import suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_camera.source import import_extra
from upperson_rt.errors import UsageError
from upperson_rt.printable import get_logger, one_line, safe_repr

_log = get_logger(__name__)

HWACCELS = ("none", "auto")
"""What `Source.hwaccel` may be besides the names of FFmpeg's devices, such as ``cuda``."""

ERRORS_EVERY_S = 60.0
"""Between two lines about what a decoder reports."""
_DEINTERLACER = "mode=send_frame:parity=auto:deint={}"
"""One picture a frame: the first field, with lines between its own ones interpolated."""


def import_av() -> Any:
    """Return PyAV; FFmpeg's errors can be captured, unless the program has PyAV log them."""
    av = import_extra("av", "av", "camera", "reading a video or a network stream")
    if av.logging.get_level() is None:
        av.logging.set_level(av.logging.ERROR)
        av.logging.set_skip_repeated(False)  # It mixes up threads.
        logger = logging.getLogger("libav")  # noqa: TID251 - Not ours.
        logger.propagate = False
        logger.addHandler(_StrayErrors())
    return av


class _StrayErrors(logging.Handler):
    """Logs what a decoder's own threads report, of pictures larger than 1080p.

    FFmpeg does not say of which camera, and a reader captures its own thread only.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lines, self._next = 0, 0.0

    def emit(self, record: logging.LogRecord) -> None:
        """Log the first line a minute, and how many there were."""
        self._lines += 1
        if time.monotonic() >= self._next:
            line, more = one_line(record.getMessage()), self._lines - 1
            extra = {"event": "decoder_error", "lines": self._lines}
            _log.warning("decoder of a large picture: %s (and %d more)", line, more, extra=extra)
            self._lines, self._next = 0, time.monotonic() + ERRORS_EVERY_S


def show_ffmpeg_lines() -> None:
    """Have FFmpeg write its own lines on stderr, from warnings on, for the whole process.

    The lines may hold addresses with passwords.
    """
    av = import_av()
    av.logging.set_level(av.logging.WARNING)
    av.logging.restore_default_callback()


@functools.cache
def find_hwaccel(wanted: str) -> tuple[str | None, str]:
    """Find the device that decodes.

    Args:
        wanted: One of `HWACCELS`, or the name of a device that FFmpeg knows.

    Returns:
        The name of the device, None for software, and a line that says which and why.

    Raises:
        UsageError: FFmpeg here does not know the device.
        BackendError: PyAV is not installed.
    """
    if wanted == "none":
        return None, "decoding in software"
    av = import_av()
    known = av.codec.hwaccel.hwdevices_available()
    if wanted not in (*HWACCELS, *known):
        raise UsageError(
            f"no hardware decoding {safe_repr(wanted)}: choose one of "
            f"{', '.join((*HWACCELS, *known))}",
            code="unknown_hwaccel",
            found=wanted,
        )
    for name in known if wanted == "auto" else (wanted,):
        accel = av.codec.hwaccel.HWAccel(name)
        # There is no such device, or no driver.
        with av.logging.Capture(), suppress(av.FFmpegError):
            if av.CodecContext.create("h264", "r", hwaccel=accel).is_hwaccel:
                return name, f"decoding on {name}, in software what it cannot decode"
    tried = ", ".join(known) if wanted == "auto" else wanted
    return None, f"decoding in software: no device answers ({tried})"


def open_hwaccel(wanted: str) -> Any:
    """Return PyAV's object for a device, see `find_hwaccel`; None for software."""
    name, _ = find_hwaccel(wanted)
    # Frames stay on the device until `Pictures`: PyAV's own transfer loses what they are marked as.
    return None if name is None else import_av().codec.hwaccel.HWAccel(name, is_hw_owned=True)


def is_on_device(frame: Any) -> bool:
    """Whether a frame is in the memory of a device that decoded it."""
    return not frame.format.components


class Pictures:
    """Makes pictures of the frames of one stream, in their order.

    The first interlaced frame starts the deinterlacer, which is then one frame late and lets
    progressive frames through; streams without interlaced frames have none.
    """

    def __init__(self) -> None:
        self._av = import_av()
        self._scaler = self._av.video.reformatter.VideoReformatter()
        self._graph: Any = None
        """The deinterlacer."""
        self._shape: tuple[int, int, str] | None = None
        """Width, height and format of the frames in it."""

    def put(self, frame: Any) -> list[Any]:
        """Take a decoded frame; return the frames that are complete."""
        shape = frame.width, frame.height, frame.format.name
        ready = [] if shape == self._shape else self.flush()
        if self._graph is None and not frame.interlaced_frame:
            return [*ready, frame]
        device = is_on_device(frame)
        if device:  # The filter works in memory; there the frame is no longer marked.
            frame = self._scaler.reformat(frame, format="yuv420p", threads=1)
        if self._graph is None:
            self._shape = shape
            self._graph = self._new_graph(frame, "all" if device else "interlaced")
        self._graph.push(frame)
        return [*ready, *self._pull()]

    def flush(self) -> list[Any]:
        """Return the frames that are left; the next one begins anew."""
        if self._graph is None:
            return []
        self._graph.push(None)
        left = self._pull()
        self._graph = self._shape = None
        return left

    def picture(self, frame: Any) -> NDArray[np.uint8]:
        """Return a frame of `put` as BGR, uint8 [H, W, 3], upright."""
        # Bicubic as OpenCV reads videos, one thread for each camera.
        bgr = self._scaler.reformat(frame, format="bgr24", interpolation="BICUBIC", threads=1)
        picture: NDArray[np.uint8] = bgr.to_ndarray()
        turns = round(frame.rotation / 90) % 4
        return np.ascontiguousarray(np.rot90(picture, turns)) if turns else picture

    def _new_graph(self, frame: Any, which: str) -> Any:
        graph = self._av.filter.Graph()
        graph.threads = 1
        size = {"width": frame.width, "height": frame.height}
        entrance = graph.add_buffer(**size, format=frame.format, time_base=frame.time_base)
        deinterlacer = graph.add("bwdif", _DEINTERLACER.format(which))
        graph.link_nodes(entrance, deinterlacer, graph.add("buffersink")).configure()
        return graph

    def _pull(self) -> list[Any]:
        frames: list[Any] = []
        with suppress(self._av.BlockingIOError, self._av.EOFError):
            while True:
                frames.append(self._graph.vpull())
        return frames
