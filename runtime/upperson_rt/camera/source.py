"""Where pictures come from: files, network streams, devices, GStreamer pipelines."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import BackendError, InputError, missing_extra

__all__ = [
    "Reader",
    "Source",
    "SourceKind",
    "guess_start_time",
    "import_cv2",
    "open_reader",
    "parse_source",
    "without_secrets",
]

SourceKind: TypeAlias = Literal["file", "network", "device", "gstreamer"]

_SECRET = re.compile(
    r"(?i)([\w-]*(?:pass(?:word|wd)?|pwd|user-?pw|token|secret|auth|api-?key|signature|sig)[\w-]*=)"
    r"(\"[^\"]*\"|[^&\s/!;,]*)"
)
_LOGIN = re.compile(r"(?<=://)[^/@\s]+@")
_DEVICE = re.compile(r"/dev/video(\d+)|(\d+)")


def import_cv2() -> Any:
    """Return OpenCV.

    Raises:
        BackendError: It is not installed.
    """
    try:
        import cv2
    except ImportError as error:
        raise missing_extra("cv2", "camera", "the camera pipeline") from error
    return cv2


def without_secrets(text: str) -> str:
    """Return an address without user names, passwords and tokens, to be stored and logged."""
    return _SECRET.sub(r"\1***", _LOGIN.sub("", text))


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A source that was understood, not opened."""

    address: str
    """What OpenCV opens; may hold a password."""
    kind: SourceKind

    @property
    def is_live(self) -> bool:
        """Whether its pictures come when they want and can be lost, unlike those of a file."""
        return self.kind != "file"

    @property
    def shown(self) -> str:
        """The address without secrets; a file's absolute path."""
        if self.kind == "file":
            return str(Path(self.address).absolute())
        return without_secrets(self.address)

    @property
    def default_name(self) -> str:
        """A camera name that suits the source."""
        if self.kind == "file":
            return Path(self.address).stem
        if self.kind == "device":
            return f"video{self.address}"
        if self.kind == "network":
            return urlsplit(self.address).hostname or "camera"
        return "camera"


def parse_source(text: str) -> Source:
    """Understand a source: a file, an address, a device or a GStreamer pipeline.

    Addresses have a ``://``; devices are ``/dev/video0`` or ``0``; pipelines are told by a ``!``.

    Raises:
        InputError: Nothing of the kind, such as a file that is not there.
        BackendError: A GStreamer pipeline, and OpenCV was built without GStreamer.
    """
    device = _DEVICE.fullmatch(text.strip())
    if device and not Path(text).is_file():
        return Source(address=device[1] or device[2], kind="device")
    if "!" in text and not Path(text).is_file():
        cv2 = import_cv2()
        if not cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
            raise BackendError(
                f"OpenCV {cv2.__version__} here has no GStreamer, as all wheels from PyPI: use "
                "the OpenCV of JetPack or of the system, or name the camera as rtsp://..."
            )
        return Source(address=text, kind="gstreamer")
    if "://" in text:
        if text.lower().startswith("file://"):
            raise InputError(f"{without_secrets(text)}: name a file by its path")
        return Source(address=text, kind="network")
    if not Path(text).is_file():
        raise InputError(
            f"no video {text}: expected a file, an address such as rtsp://host/stream, a device "
            "such as /dev/video0, or a GStreamer pipeline"
        )
    return Source(address=text, kind="file")


class Reader(Protocol):
    """What the pipeline needs of an opened source; ``cv2.VideoCapture`` has it."""

    def read(self) -> tuple[bool, NDArray[np.uint8] | None]:
        """Return whether there was a next picture, and the picture."""

    def get(self, property_id: int) -> float:
        """Return a property, 0 if it is unknown."""

    def release(self) -> None:
        """Close the source."""


def open_reader(source: Source, timeout_s: float) -> Reader:
    """Open a source with OpenCV.

    Args:
        source: What to open.
        timeout_s: How long opening and reading may take; not every backend of OpenCV listens.

    Raises:
        InputError: It cannot be opened.
    """
    cv2 = import_cv2()
    timeout_ms = max(1, round(1000 * timeout_s))
    if source.kind == "device":
        reader = cv2.VideoCapture(int(source.address))
    elif source.kind == "gstreamer":
        reader = cv2.VideoCapture(source.address, cv2.CAP_GSTREAMER)
    elif source.kind == "network":
        limits = [
            *(cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, timeout_ms),
            *(cv2.CAP_PROP_READ_TIMEOUT_MSEC, timeout_ms),
        ]
        reader = cv2.VideoCapture(source.address, cv2.CAP_FFMPEG, limits)
    else:
        reader = cv2.VideoCapture(source.address)
    if not reader.isOpened():
        reader.release()
        raise InputError(f"cannot open {source.shown} as a video")
    opened: Reader = reader
    return opened


def guess_start_time(
    source: Source, opener: Callable[[Source, float], Reader] = open_reader
) -> float:
    """Return the unix time of a file's first frame: its last change minus its length.

    Raises:
        InputError: It cannot be opened.
    """
    cv2 = import_cv2()
    try:
        changed = os.stat(source.address).st_mtime
    except OSError as error:
        raise InputError(f"cannot read {source.shown}: {error.strerror}") from error
    reader = opener(source, 10.0)
    try:
        rate, frames = reader.get(cv2.CAP_PROP_FPS), reader.get(cv2.CAP_PROP_FRAME_COUNT)
    finally:
        reader.release()
    length_s = frames / rate if rate > 0 and 0 < frames < 1e9 else 0.0
    return float(changed - length_s)
