"""Reads files and network streams with FFmpeg's libraries, by PyAV.

OpenCV uses FFmpeg, too, but it scales all pictures to the size of the first one
(https://github.com/opencv/opencv/issues/27116), and interlaced
files come out black in 4.13 and 4.14.
"""

import errno
import http.client
import io
import os
import re
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from upperson_camera.access import target_of, without_login
from upperson_camera.decoding import Pictures, find_hwaccel, import_av, is_on_device, open_hwaccel
from upperson_camera.reasons import not_opened, reason_of_address
from upperson_camera.relay import Relay
from upperson_camera.source import (
    MOST_FRAME_PIXELS,
    OpenCVReader,
    Opener,
    Reader,
    Source,
    check_frame_size,
    without_secrets,
)
from upperson_camera.web import WebReader
from upperson_network.remote import may_hide_login
from upperson_rt.errors import InputError, UsageError
from upperson_rt.extensions import load_extension
from upperson_rt.printable import get_logger, one_line

_log = get_logger(__name__)

_SCHEMES = ("rtsp", "rtsps", "http", "https", "rtmp", "rtmps", "rtp", "srt", "tcp", "udp")
_WITHOUT_HOST = ("rtp", "srt", "tcp", "udp")
"""Their streams may also be sent to this machine."""
_MOST_PIXELS = {"max_pixels": str(MOST_FRAME_PIXELS)}
"""Has the decoder refuse larger pictures before it takes memory for them."""
_TOO_LARGE = re.compile("size ([0-9]{1,6})x([0-9]{1,6}) exceeds specified max pixel")
_MOST_THREADS = 4
_ONE_THREAD_PIXELS = 2_500_000
"""Up to so many pixels (1080p and a little more) one thread decodes faster than cameras send."""
_FORMATS = (
    "asf,av1,avi,flv,h264,hevc,ivf,jpeg_pipe,live_flv,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,"
    "mpjpeg,nut,obu,ogg,rtp,rtsp,vvc"
)
"""What a stream may be: nothing that names other streams, but for RTSP."""
_KINDS = ("file", "network")
_FILE_FORMATS = f"{_FORMATS},dhav,dv,gif,gxf,mxf,rm,vc1,vc1test,wtv,yuv4mpegpipe"
"""What a file may be: nothing that names other files."""
_OPENING_S = 10.0
_LONGEST_LINE = 200
_MOST_LINES = 1000
"""Lines of errors that are kept until they are taken."""
_PROTOCOLS = {"rtp": "rtp,udp", "rtmp": "rtmp,tcp", "rtmps": "rtmps,rtmp,tls,tcp"}
"""What FFmpeg opens of a stream; of others the one that they begin with."""
_RTSP = {
    "protocol_whitelist": "rtp,udp,tcp",
    # TCP first, which loses nothing; UDP where a camera offers nothing else.
    "rtsp_flags": "prefer_tcp",
    "allowed_media_types": "video",
}


def check_address(source: Source) -> None:
    """Refuse an address of a kind that cannot be read, such as ``rtps://``, or a malformed one."""
    scheme = source.scheme
    if scheme not in _SCHEMES:
        text = (
            f"{source.shown} cannot be read: an address begins with {', '.join(_SCHEMES)} and "
            f"://, found {scheme}://"
        )
        raise UsageError(text, code="unknown_scheme", scheme=scheme)
    try:
        parts = urlsplit(source.address)
        readable = parts.port is not None or parts.hostname is not None
        readable &= parts.hostname is not None or scheme in _WITHOUT_HOST
    except ValueError:
        readable = False
    if scheme not in _WITHOUT_HOST and may_hide_login(source.address):
        raise UsageError(
            f"an address of {scheme}:// has an @ behind its host, or a password that is not "
            "escaped: write in a password %2F for /, %3F for ?, %23 for # and %40 for @, or put it "
            "into a file, see --netrc; and elsewhere %40 for @",
            code="login_not_escaped",
        )
    if not readable:
        # Part of a password may be where the port is.
        named = f"an address of {scheme}://" if "@" in source.address else source.shown
        raise UsageError(
            f"{named} has no host or port that can be read: expected such as "
            f"{scheme}://10.0.0.5:8554/path, and in a password %2F for /, %23 for #, "
            "%40 for @, %5B for [, %5D for ], or the password in a file, see --netrc",
            code="address_without_host",
        )


def open_source(source: Source, timeout_s: float) -> Reader:
    """Open any source: an extension's, a file or network stream with PyAV, all else with OpenCV.

    Raises:
        InputError: It cannot be opened.
        BackendError: What reads it is not installed.
    """
    if source.kind == "extension":
        reader: Reader = load_extension("sources", source.scheme)(source, timeout_s)
        return reader
    return (StreamReader if source.kind in _KINDS else OpenCVReader)(source, timeout_s)


def guess_start_time(source: Source, opener: Opener = open_source) -> float:
    """Return the unix time of a file's first frame: its last change minus its length.

    Raises:
        InputError: It cannot be opened.
    """
    try:
        changed = os.stat(source.address).st_mtime
    except OSError as error:
        raise InputError(f"cannot read {source.shown}: {error.strerror}") from error
    reader = opener(source, _OPENING_S)
    reader.close()
    return changed - (reader.frame_count / reader.frame_rate if reader.frame_rate > 0 else 0.0)


class StreamReader(Reader):
    """Reads a file or a network stream; each picture has the size that the camera gave it.

    Interlaced pictures are deinterlaced, and those that are marked as lying or upside down come
    upright. A picture that cannot be decoded, or only in part, is returned as one without pixels.
    """

    def __init__(self, source: Source, timeout_s: float) -> None:
        """Open a source; opening a stream and each of its pictures may take ``timeout_s``.

        Raises:
            InputError: It cannot be opened, or has no pictures, or too large ones.
            UsageError: It is neither a file nor a network stream.
            BackendError: PyAV is not installed.
        """
        if source.kind not in _KINDS:
            text = f"{source.shown} is no file or network stream: open it with OpenCVReader"
            raise UsageError(text, code="wrong_reader")
        self._av = import_av()
        self._source = source
        self._timeout_s = timeout_s
        self._until = time.monotonic() + timeout_s
        """For opening."""
        self._file: io.BufferedReader | None = None
        self._web: WebReader | None = None
        self._relay: Relay | None = None
        self._container: Any = None
        self._codec: Any = None
        self._frames: list[Any] = []
        self._pictures = Pictures()
        self._errors: list[str] = []
        self._is_device_known = source.hwaccel == "none"
        try:
            with self._keeping_errors() as lines:
                try:
                    self._container = self._open()
                except InputError as error:
                    raise not_opened(source.shown, error) from None
                except (
                    OSError,
                    ValueError,
                    http.client.HTTPException,
                    self._av.FFmpegError,
                ) as error:
                    # Not as its cause: PyAV's error holds the address, with the password.
                    raise _unopened(source, timeout_s, error) from None
                self._packets = self._first_stream(lines)
        except BaseException:
            self.close()
            raise

    def _open(self) -> Any:
        if self._source.kind == "file":
            return self._open_file()
        scheme = urlsplit(self._source.address).scheme
        if scheme in ("http", "https"):
            return self._open_web()
        if scheme in ("rtsp", "rtsps"):
            return self._open_rtsp()
        protocols = {"protocol_whitelist": _PROTOCOLS.get(scheme, scheme)}
        if scheme == "rtmps":
            protocols |= _tls_options(self._source)
        return self._open_with(self._source.address, protocols)

    def _open_with(self, file: Any, options: dict[str, str], **more: Any) -> Any:
        options = _MOST_PIXELS | {"format_whitelist": _FORMATS} | options
        limits = (max(0.1, self._until - time.monotonic()), self._timeout_s)
        more = {"timeout": limits, "hwaccel": open_hwaccel(self._source.hwaccel)} | more
        return self._av.open(file, options=options, **more)

    def _open_file(self) -> Any:
        """Open a file; FFmpeg gets no name and can open no other, a slow disk has its time."""
        file = self._file = io.BufferedReader(io.FileIO(self._source.address))
        if file.peek(16).startswith((b"#EXTM3U", b"ffconcat")):
            text = "it is a playlist, expected a video: name the videos in it"
            raise InputError(text, code="file_is_playlist")
        options = {"protocol_whitelist": "none", "format_whitelist": _FILE_FORMATS}
        return self._open_with(file, options, timeout=None)

    def _open_web(self) -> Any:
        web = self._web = WebReader(self._source, self._timeout_s)
        try:
            return self._open_with(web, {"protocol_whitelist": "none"}, format=web.kind)
        except self._av.FFmpegError as error:
            raise web.problem or error from None

    def _open_rtsp(self) -> Any:
        """Open a stream at the camera, or where it sends us to, if it may."""
        source, address, redirects = self._source, self._source.address, 0
        while True:
            left_s = max(0.1, self._until - time.monotonic())
            relay = self._relay = Relay(address, source.access, left_s)
            transports = "tcp" if urlsplit(address).scheme == "rtsps" else "tcp+udp"
            try:
                return self._open_with(relay.address, _RTSP | {"rtsp_transport": transports})
            except self._av.FFmpegError:
                relay.close()
                if not relay.location:
                    raise
            address = target_of(
                source.address, relay.location, address, source.access, redirects=redirects
            )
            redirects += 1

    def _first_stream(self, lines: list[tuple[int, str, str]]) -> Iterator[Any]:
        if not self._container.streams.video:
            raise InputError(f"{self._source.shown} has no pictures, only other streams")
        stream = self._container.streams.video[0]
        codec = stream.codec_context
        if codec is None:
            raise InputError(f"{self._source.shown} sends pictures of a kind that is not known")
        # What is larger than `_MOST_PIXELS` has no size here, only in FFmpeg's line.
        too_large = filter(None, (_TOO_LARGE.search(line) for _, _, line in lines))
        width, height = next((map(int, found.groups()) for found in too_large), (0, 0))
        check_frame_size(self._source, codec.width or width, codec.height or height)
        codec.options = _MOST_PIXELS
        # A core may be too slow for 4K; each thread more is a picture's delay, and its memory.
        is_large = codec.width * codec.height > _ONE_THREAD_PIXELS
        threads = min(_MOST_THREADS, os.cpu_count() or 1) if is_large else 1
        codec.thread_type, codec.thread_count = "AUTO", threads
        self._codec, self._start_s = codec, 0.0
        if self._source.kind == "file":
            self.frame_rate = float(stream.guessed_rate or stream.average_rate or 0)
            length_s = (self._container.duration or 0) / self._av.time_base
            self.frame_count = stream.frames or round(length_s * self.frame_rate)
            self.is_count_estimated = not stream.frames
            self._start_s = float((stream.start_time or 0) * stream.time_base)
        packets: Iterator[Any] = self._container.demux(stream)
        return packets

    @staticmethod
    def require(source: Source) -> None:
        """Check that a file, a network stream or an extension's source can be read; others pass.

        Raises:
            UsageError: Its address is malformed or of an unknown kind, see `check_address`, or
                FFmpeg knows no such device for decoding.
            BackendError: PyAV is not installed, or the extension cannot be imported.
        """
        if source.kind == "extension":
            load_extension("sources", source.scheme)
        if source.kind == "network":
            check_address(source)
        if source.kind in _KINDS:
            import_av()
            find_hwaccel(source.hwaccel)

    def read(self) -> NDArray[np.uint8] | None:
        """Return the next picture; None at the end, and where none came in time.

        Raises:
            InputError: The connection broke.
        """
        with self._keeping_errors():
            return self._read()

    def take_errors(self) -> list[str]:
        """Return FFmpeg's lines of errors since the last call, without secrets."""
        lines, self._errors = self._errors, []
        return lines

    @contextmanager
    def _keeping_errors(self) -> Iterator[list[tuple[int, str, str]]]:
        """Keep what FFmpeg writes in this thread."""
        with self._av.logging.Capture() as lines:
            try:
                yield lines
            finally:
                self._errors += [
                    without_secrets(one_line(f"{name}: {line}"))[:_LONGEST_LINE]
                    for _, name, line in lines
                ]
                del self._errors[:-_MOST_LINES]

    def _read(self) -> NDArray[np.uint8] | None:
        until = time.monotonic() + self._timeout_s
        if self._web is not None:
            self._web.start_time()
        while not self._frames:
            packet = self._next_packet()
            if packet is None:
                self._frames = self._pictures.flush()
                if not self._frames:
                    return None
                break
            # A camera may send and show nothing.
            if self._source.is_live and time.monotonic() > until:
                return None
            try:
                for frame in packet.decode():
                    # Smeared over what came before is None.
                    self._frames += [None] if frame.is_corrupt else self._pictures.put(frame)
            except self._av.FFmpegError:
                return _nothing()
            finally:
                if self.on_packet is not None:
                    self.on_packet(packet)
        frame = self._frames.pop(0)
        if frame is None:
            return _nothing()
        self._note_device(frame)
        if frame.pts is not None:
            self.position_s = float(frame.pts * frame.time_base) - self._start_s
        try:
            return self._pictures.picture(frame)
        except self._av.FFmpegError:
            return _nothing()

    def _next_packet(self) -> Any:
        """Return the next packet; None where none came."""
        packet, error = None, None
        try:
            packet = next(self._packets, None)
        except self._av.FFmpegError as raised:
            error = raised
        if self._web is not None:
            error = self._web.problem or error
        if packet is not None or error is None:
            return packet
        if self._source.kind == "file":
            return None  # The rest cannot be read; how much that is will be said.
        ended = TimeoutError, self._av.error.ExitError
        if isinstance(error, ended) or getattr(error, "errno", None) == errno.EIO:
            return None  # Its time was up, or it ended without saying so.
        reason = error if isinstance(error, InputError) else getattr(error, "strerror", None)
        reason = reason or type(error).__name__
        raise InputError(f"{self._source.shown} broke off: {reason}")

    def _note_device(self, frame: Any) -> None:
        """Log once where hardware decoding was wanted and a stream is decoded in software."""
        if self._is_device_known:
            return
        self._is_device_known = True
        name, _ = find_hwaccel(self._source.hwaccel)
        if name is not None and not is_on_device(frame):
            text = "%s: %s does not decode %s: decoding in software"
            _log.warning(text, self._source.shown, name, self._codec.name)

    def close(self) -> None:
        """Close the source."""
        if self._codec is not None:
            self._codec.flush_buffers()  # Waits for its threads: they may write, which needs ours.
        # FFmpeg says goodbye by those that follow the first.
        for opened in (self._container, self._file, self._web, self._relay):
            if opened is not None:
                opened.close()


def _tls_options(source: Source) -> dict[str, str]:
    """Return how FFmpeg verifies a certificate; for RTMP only, others have TLS of Python."""
    access = source.access
    access.context(without_login(urlsplit(source.address)))  # Checks the file, and logs.
    authorities = access.ca_file or ssl.get_default_verify_paths().cafile
    options = {"tls_verify": "0" if access.insecure else "1"}
    return options if authorities is None else options | {"ca_file": str(authorities)}


def _nothing() -> NDArray[np.uint8]:
    return np.zeros((0, 0, 3), np.uint8)


def _unopened(source: Source, timeout_s: float, error: Exception) -> InputError:
    if source.kind == "file":
        reason = getattr(error, "strerror", None) or type(error).__name__
        why = f"it cannot be read as a video: {reason}"
        return not_opened(source.shown, InputError(why, code="video_unreadable"))
    reason = reason_of_address(source.address, timeout_s, source.access)
    if reason is None and getattr(error, "errno", None) == errno.EPERM:  # FFmpeg's bare -1.
        reason = InputError("what it answers is not understood", code="answer_malformed")
    if reason is None:
        reason = InputError(getattr(error, "strerror", None) or type(error).__name__)
    return not_opened(source.shown, reason)
