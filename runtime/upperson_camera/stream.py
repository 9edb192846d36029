"""Reads network streams with FFmpeg's libraries, by PyAV.

OpenCV uses FFmpeg, too, but for some streams, such as MJPEG over HTTP, it scales all pictures to
the size of the first one (https://github.com/opencv/opencv/issues/27116).
"""

import errno
import http.client
import os
import ssl
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from upperson_camera.access import target_of, without_login
from upperson_camera.reasons import not_opened, reason_of_address
from upperson_camera.relay import Relay
from upperson_camera.source import (
    MOST_FRAME_PIXELS,
    OpenCVReader,
    Reader,
    Source,
    check_frame_size,
    import_extra,
)
from upperson_camera.web import WebReader
from upperson_network.remote import may_hide_login
from upperson_rt.errors import InputError, UsageError
from upperson_rt.extensions import load_extension

_SCHEMES = ("rtsp", "rtsps", "http", "https", "rtmp", "rtmps", "rtp", "srt", "tcp", "udp")
_WITHOUT_HOST = ("rtp", "srt", "tcp", "udp")
"""Their streams may also be sent to this machine."""
_MOST_PIXELS = {"max_pixels": str(MOST_FRAME_PIXELS)}
"""Has the decoder refuse larger pictures before it takes memory for them."""
_MOST_THREADS = 4
_FORMATS = (
    "asf,av1,avi,flv,h264,hevc,ivf,jpeg_pipe,live_flv,m4v,matroska,mjpeg,mov,mpeg,mpegts,mpegvideo,"
    "mpjpeg,nut,obu,ogg,rtp,rtsp,vvc"
)
"""What a stream may be: nothing that names other streams, but for RTSP."""
_PROTOCOLS = {"rtp": "rtp,udp", "rtmp": "rtmp,tcp", "rtmps": "rtmps,rtmp,tls,tcp"}
"""What FFmpeg opens of a stream; of others the one that they begin with."""
_RTSP = {
    "protocol_whitelist": "rtp,udp,tcp",
    # TCP first, which loses nothing; UDP where a camera offers nothing else.
    "rtsp_flags": "prefer_tcp",
    "allowed_media_types": "video",
}


def _import_av() -> Any:
    return import_extra("av", "av", "camera", "reading a network stream")


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


def show_ffmpeg_lines() -> None:
    """Have FFmpeg write its own lines on stderr, from warnings on, for the whole process.

    PyAV keeps it silent. The lines may hold addresses with passwords.
    """
    av = _import_av()
    av.logging.set_level(av.logging.WARNING)
    av.logging.restore_default_callback()


def open_source(source: Source, timeout_s: float) -> Reader:
    """Open any source: an extension's, a network stream with PyAV, or all else with OpenCV.

    Raises:
        InputError: It cannot be opened.
        BackendError: What reads it is not installed.
    """
    if source.kind == "extension":
        reader: Reader = load_extension("sources", source.scheme)(source, timeout_s)
        return reader
    return (StreamReader if source.kind == "network" else OpenCVReader)(source, timeout_s)


class StreamReader(Reader):
    """Reads a network stream; each picture has the size that the camera gave it.

    A picture that cannot be decoded, or only in part, is returned as one without pixels.
    """

    def __init__(self, source: Source, timeout_s: float) -> None:
        """Open a stream; opening and each picture may take ``timeout_s``.

        Raises:
            InputError: It cannot be opened, or has no pictures, or too large ones.
            BackendError: PyAV is not installed.
        """
        if source.kind != "network":
            text = f"{source.shown} is no network stream: open it with OpenCVReader"
            raise UsageError(text, code="wrong_reader")
        self._av = _import_av()
        self._source = source
        self._timeout_s = timeout_s
        self._until = time.monotonic() + timeout_s
        """For opening."""
        self._web: WebReader | None = None
        self._relay: Relay | None = None
        self._container: Any = None
        self._frames: list[Any] = []
        try:
            try:
                self._container = self._open()
            except InputError as error:
                raise not_opened(source.shown, error) from None
            except (OSError, ValueError, http.client.HTTPException, self._av.FFmpegError) as error:
                # Not as its cause: PyAV's error holds the address, with the password.
                raise _unopened(source, timeout_s, error) from None
            self._packets = self._first_stream()
        except BaseException:
            self.close()
            raise

    def _open(self) -> Any:
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
        return self._av.open(file, options=options, timeout=limits, **more)

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

    def _first_stream(self) -> Iterator[Any]:
        if not self._container.streams.video:
            raise InputError(f"{self._source.shown} has no pictures, only other streams")
        stream = self._container.streams.video[0]
        codec = stream.codec_context
        if codec is None:
            raise InputError(f"{self._source.shown} sends pictures of a kind that is not known")
        check_frame_size(self._source, codec.width, codec.height)
        codec.options = _MOST_PIXELS
        # A core may be too slow for 4K; each thread more is a picture's delay, and its memory.
        codec.thread_type, codec.thread_count = "AUTO", min(_MOST_THREADS, os.cpu_count() or 1)
        packets: Iterator[Any] = self._container.demux(stream)
        return packets

    @staticmethod
    def require(source: Source) -> None:
        """Check that a network stream or an extension's source can be read; others pass.

        Raises:
            UsageError: Its address is malformed or of an unknown kind, see `check_address`.
            BackendError: PyAV is not installed, or the extension cannot be imported.
        """
        if source.kind == "extension":
            load_extension("sources", source.scheme)
        if source.kind == "network":
            check_address(source)
            _import_av()

    def read(self) -> NDArray[np.uint8] | None:
        """Return the next picture; None at the end, and where none came in time.

        Raises:
            InputError: The connection broke.
        """
        until = time.monotonic() + self._timeout_s
        if self._web is not None:
            self._web.start_time()
        while not self._frames:
            packet = self._next_packet()
            if packet is None or time.monotonic() > until:  # A camera may send and show nothing.
                return None
            try:
                self._frames = list(packet.decode())
            except self._av.FFmpegError:
                return _nothing()
        frame = self._frames.pop(0)
        if frame.is_corrupt:  # Smeared over what came before.
            return _nothing()
        picture: NDArray[np.uint8] = frame.to_ndarray(format="bgr24")
        return picture

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
        ended = TimeoutError, self._av.error.ExitError
        if isinstance(error, ended) or getattr(error, "errno", None) == errno.EIO:
            return None  # Its time was up, or it ended without saying so.
        reason = error if isinstance(error, InputError) else getattr(error, "strerror", None)
        reason = reason or type(error).__name__
        raise InputError(f"{self._source.shown} broke off: {reason}")

    def close(self) -> None:
        """Close the stream."""
        for opened in (self._container, self._web, self._relay):  # FFmpeg says goodbye by these.
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
    reason = reason_of_address(source.address, timeout_s, source.access)
    if reason is None and getattr(error, "errno", None) == errno.EPERM:  # FFmpeg's bare -1.
        reason = InputError("what it answers is not understood", code="answer_malformed")
    if reason is None:
        reason = InputError(getattr(error, "strerror", None) or type(error).__name__)
    return not_opened(source.shown, reason)
