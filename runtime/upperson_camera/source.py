"""Sources of pictures, the reader of OpenCV (devices, GStreamer), and logins."""

import netrc
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import quote, urlsplit

import numpy as np
from numpy.typing import NDArray

from upperson_camera.access import USUAL_ACCESS, Access
from upperson_camera.reasons import not_opened, reason_of_device
from upperson_network.remote import may_hide_login, require_private
from upperson_rt.arguments import LONGEST_PATH, check_name
from upperson_rt.errors import BackendError, InputError, UsageError, missing_extra
from upperson_rt.extensions import extension_names

SourceKind: TypeAlias = Literal["file", "network", "device", "gstreamer", "extension"]

# Name and value apart: one expression for both takes the square of the time for a long name.
_NAME = re.compile(r"(?<![\w-])[\w-]+=")
_SECRET = re.compile(r"(?i)pass|pwd|user-?pw|token|secret|auth|api-?key|sig")
_VALUE = re.compile(r"\"[^\"]*\"|[^&\s/!;,]*")
_LOGIN = re.compile(r"(?<=://)[^/?#\s]+@")  # Up to the last one: a password may have its own.
_DEVICE = re.compile(r"/dev/video([0-9]{1,4})|([0-9]{1,4})")
MOST_FRAME_PIXELS = 36_000_000
"""Decoding takes seven bytes a pixel; a stream announces the size beforehand."""


def import_extra(module: str, package: str, extra: str, purpose: str) -> Any:
    """Return an optional module; raise BackendError that names its package and extra."""
    try:
        return import_module(module)
    except ImportError as error:
        raise missing_extra(package, extra, purpose) from error


def import_cv2() -> Any:
    """Return OpenCV."""
    return import_extra("cv2", "cv2", "camera", "the camera pipeline")


def quiet_opencv() -> None:
    """Keep OpenCV from writing its own lines on stderr, for the whole process.

    Our errors say what users need. A level in ``$OPENCV_LOG_LEVEL`` stays.
    """
    cv2 = import_cv2()
    if "OPENCV_LOG_LEVEL" not in os.environ:
        cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def without_secrets(text: str) -> str:
    """Return an address without user names, passwords and tokens, to be stored and logged."""
    text = re.sub(r"\S+", _without_login, text)
    parts, at = [], 0
    for name in _NAME.finditer(text):
        if name.start() < at or not _SECRET.search(name[0]):
            continue
        parts += [text[at : name.end()], "***"]
        if (value := _VALUE.match(text, name.end())) is not None:
            at = value.end()
    return "".join([*parts, text[at:]])


def _without_login(word: re.Match[str]) -> str:
    """Remove a login, and what may be one with a password that is not escaped."""
    text, last = word[0], word[0].rfind("@")
    for found in re.finditer(r"://[^/?#]*", text):
        if found.end() <= last and may_hide_login(text[found.start() :]):
            return _LOGIN.sub("", text[: found.start() + 3]) + text[last + 1 :]
    return _LOGIN.sub("", text)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A parsed source, not opened."""

    address: str
    """What is opened; may hold a password."""
    kind: SourceKind
    access: Access = USUAL_ACCESS
    """Which hosts and certificates a network stream may have; others have none."""
    hwaccel: str = "none"
    """What decodes a file or a network stream, see `upperson_camera.decoding.HWACCELS`."""

    @property
    def is_live(self) -> bool:
        """Whether its pictures come at their own time and can be lost, unlike a file's."""
        return self.kind != "file"

    @property
    def shown(self) -> str:
        """The address without secrets; a file's absolute path."""
        if self.kind == "file":
            return str(Path(self.address).absolute())
        return without_secrets(self.address)

    @property
    def scheme(self) -> str:
        """What stands before ``://``, in lower case."""
        return self.address.partition("://")[0].lower()

    @property
    def default_name(self) -> str:
        """A camera name that suits the source."""
        if self.kind == "file":
            return Path(self.address).stem
        if self.kind == "device":
            return f"video{self.address}"
        if self.kind == "gstreamer":
            return "camera"
        try:
            return urlsplit(self.address).hostname or "camera"
        except ValueError:  # Such as half an IPv6 address; opening it says what is wrong.
            return "camera"


def parse_source(text: str) -> Source:
    """Parse a source: a file, an address, a device or a GStreamer pipeline.

    Addresses have a ``://``, and an extension of ``upperson.sources`` goes before what we read
    ourselves; devices are ``/dev/video0`` or ``0``; pipelines contain a ``!``.

    Raises:
        InputError: Nothing of the kind, such as a file that is not there.
        UsageError: The address of a file, which is named by its path.
        BackendError: A GStreamer pipeline, and OpenCV was built without GStreamer.
    """
    check_name(text, "a source of pictures")
    if len(text) > LONGEST_PATH:
        why = f"a source of pictures has {len(text)} characters, expected at most {LONGEST_PATH}"
        raise InputError(why, code="source_too_long")
    device = _DEVICE.fullmatch(text.strip())
    is_file = os.path.isfile(text)  # False also for what no file can be called.
    if device and not is_file:
        return Source(address=device[1] or device[2], kind="device")
    found = Source(address=text, kind="extension")
    if "://" in text and not is_file and found.scheme in extension_names("sources"):
        return found
    if "!" in text and not is_file:
        OpenCVReader.require_gstreamer()
        return Source(address=text, kind="gstreamer")
    if "://" in text:
        if text.lower().startswith("file://"):
            why = f"{without_secrets(text)}: name a file by its path"
            raise UsageError(why, code="file_by_address")
        return Source(address=text, kind="network")
    if not is_file:
        raise InputError(
            f"no video {text}: expected a file, an address such as rtsp://host/stream, a device "
            "such as /dev/video0, or a GStreamer pipeline",
            code="source_not_found",
            source=text,
        )
    return Source(address=text, kind="file")


def check_frame_size(source: Source, width: int, height: int) -> None:
    """Raise InputError if a source announces pictures larger than any camera's."""
    if width * height > MOST_FRAME_PIXELS:
        raise InputError(
            f"{source.shown} has pictures of {width}x{height} pixels, at most "
            f"{MOST_FRAME_PIXELS:,} are read (8K): have it send smaller ones",
            code="frame_too_large",
            width=width,
            height=height,
        )


class Reader(ABC):
    """An opened source. A new kind of source is one such class.

    Give the class itself to `Pipeline.add_camera` as ``opener``: it is called with the `Source` and
    the seconds that opening and reading may take, and raises `InputError` if it cannot be opened.
    A live source needs `read` and `close` only; the fields are for files.
    """

    frame_rate: float = 0.0
    """Pictures a second; 0 if unknown."""
    frame_count: int = 0
    """Pictures in the file; 0 if unknown."""
    is_count_estimated: bool = False
    """Whether that is length times rate, because the file does not state it: one of a variable rate
    has fewer."""
    position_s: float = 0.0
    """Time of the picture that was read last, from the file's beginning."""
    on_packet: Callable[[Any], None] | None = None
    """Called with each packet of PyAV after it was decoded, in the thread that reads; clips are cut
    from those. A reader without packets never calls it, and gives no clips."""

    def take_errors(self) -> list[str]:
        """Return the lines of errors that the decoder wrote since the last call, without secrets.

        None by default.
        """
        return []

    @abstractmethod
    def read(self) -> NDArray[np.generic] | None:
        """Return the next picture, BGR or grey; None at the end. May wait, and hang.

        A picture without pixels counts as one that could not be decoded.
        """

    @abstractmethod
    def close(self) -> None:
        """Close the source."""


Opener: TypeAlias = Callable[[Source, float], Reader]
"""Opens a source with a time limit in seconds; raises InputError if it cannot."""


class OpenCVReader(Reader):
    """Reads devices and GStreamer pipelines with OpenCV."""

    def __init__(self, source: Source, timeout_s: float) -> None:
        """Open a source; OpenCV has no time limit here.

        Raises:
            InputError: It cannot be opened, or its pictures are too large.
            UsageError: It is a file or a network stream.
        """
        if source.kind not in ("device", "gstreamer"):
            text = f"{source.shown} is a file or a network stream: open it with StreamReader"
            raise UsageError(text, code="wrong_reader")
        cv2 = import_cv2()
        if source.kind == "device":
            capture = cv2.VideoCapture(int(source.address))
        else:
            capture = cv2.VideoCapture(source.address, cv2.CAP_GSTREAMER)
        if not capture.isOpened():
            capture.release()
            if source.kind == "device":
                number = int(source.address)
                raise not_opened(f"/dev/video{number}", reason_of_device(number))
            text = f"cannot open {source.shown} as a video"
            raise InputError(text, code="video_unreadable")
        width = round(capture.get(cv2.CAP_PROP_FRAME_WIDTH))
        height = round(capture.get(cv2.CAP_PROP_FRAME_HEIGHT))
        try:
            check_frame_size(source, width, height)
        except InputError:
            capture.release()
            raise
        self._capture = capture

    @staticmethod
    def require_gstreamer() -> None:
        """Raise BackendError if OpenCV was built without GStreamer."""
        cv2 = import_cv2()
        if not cv2.videoio_registry.hasBackend(cv2.CAP_GSTREAMER):
            raise BackendError(
                f"OpenCV {cv2.__version__} here has no GStreamer, as all wheels from PyPI: use "
                "the OpenCV of JetPack or of the system, or name the camera as rtsp://...",
                code="gstreamer_missing",
            )

    def read(self) -> NDArray[np.generic] | None:
        """Return the next picture."""
        is_there, image = self._capture.read()
        picture: NDArray[np.generic] | None = image if is_there else None
        return picture

    def close(self) -> None:
        """Close the source."""
        self._capture.release()


# --- User names and passwords of cameras, from a file in the format of ``.netrc``, by host


@dataclass(frozen=True, slots=True)
class Logins:
    """Logins by host."""

    _by_host: dict[str, tuple[str, str]] = field(default_factory=dict, repr=False)

    @classmethod
    def read(cls, path: Path) -> "Logins":
        """Read a file with lines such as ``machine 10.0.0.5 login viewer password secret``.

        ``default`` instead of ``machine`` and a host stands for all others.

        Raises:
            InputError: It cannot be read or understood, or others may read it, too.
        """
        require_private(path)
        try:
            hosts = netrc.netrc(path).hosts
        except OSError as error:
            text = f"cannot read {path}: {error.strerror}"
            raise InputError(text, code="netrc_unreadable", path=path) from error
        except netrc.NetrcParseError as error:  # Not its message, which quotes the line.
            line = error.lineno
            text = f"{path}, line {line}: expected  machine HOST login NAME password PASSWORD"
            raise InputError(text, code="netrc_malformed", line=line) from None
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is no text in UTF-8") from error
        except ValueError as error:  # Of Python 3.10, for quotes without an end.
            raise InputError(f"{path} cannot be understood: {error}") from error
        # Host names are case-insensitive.
        return cls(
            {host.lower(): (user, password or "") for host, (user, _, password) in hosts.items()}
        )

    def of(self, host: str) -> tuple[str, str] | None:
        """Return user name and password for a host; None if there are none."""
        return self._by_host.get(host.lower(), self._by_host.get("default"))

    def given_to(self, source: Source) -> Source:
        """Return a network stream with the login for its host, unless its address has one."""
        if source.kind != "network":
            return source
        try:
            parts = urlsplit(source.address)
            host, named = parts.hostname, parts.username is not None
        except ValueError:  # Opening it says what is wrong.
            return source
        login = None if host is None or named else self.of(host)
        if login is None:
            return source
        place = f"{':'.join(quote(part, safe='') for part in login)}@{parts.netloc}"
        return replace(source, address=parts._replace(netloc=place).geturl())
