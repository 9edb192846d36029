"""Asks ONVIF cameras for the addresses of their streams."""

import datetime
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from urllib.parse import urlsplit
from xml.etree.ElementTree import Element
from xml.sax.saxutils import escape, quoteattr

from upperson_rt.camera.discovery import Answer
from upperson_rt.camera.logins import Logins
from upperson_rt.camera.soap import Caller, RefusedError, child_text, named
from upperson_rt.camera.source import Source, without_secrets
from upperson_rt.camera.stream import check_address
from upperson_rt.errors import InputError, UsageError
from upperson_rt.passwords import may_hide_login
from upperson_rt.printable import shortened, shown

__all__ = ["FoundCamera", "FoundStream", "ask_cameras", "device_at"]

_DEVICE = "http://www.onvif.org/ver10/device/wsdl"
_MEDIA = ("http://www.onvif.org/ver20/media/wsdl", "http://www.onvif.org/ver10/media/wsdl")
"""The newer one first: the older cannot tell of H.265."""
_AT_A_TIME = 16
_MOST_STREAMS = 16
_MOST_AHEAD_S = 100 * 365 * 86400.0
"""A clock that is further off is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundStream:
    """A stream of a camera."""

    profile: str
    """The camera's name for it."""
    address: str
    """As `upperson-rt watch` takes it; without user name and password."""
    width: int | None
    height: int | None
    encoding: str | None
    """Such as ``H264``."""
    frame_rate: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundCamera:
    """A camera that was asked."""

    host: str
    name: str
    """For ``NAME=ADDRESS``: letters, digits, ``.``, ``_`` and ``-``; no two are the same."""
    maker: str | None
    model: str | None
    streams: tuple[FoundStream, ...]
    problem: str | None
    """Why it tells no streams, or not all."""


def device_at(place: str) -> Answer:
    """Return a device that a user names by host, ``host:port`` or the address of its service.

    Raises:
        UsageError: It is none of these.
    """
    address = place if "://" in place else f"http://{place}"
    try:
        parts = urlsplit(address)
        host = parts.hostname if parts.port != 0 else None
        has_login = parts.username is not None or may_hide_login(address)
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https") or has_login:
        told = "an address with a login" if "@" in place else shown(place)
        raise UsageError(
            f"{told} is no camera's host: expected such as 10.0.0.5, 10.0.0.5:8000 or "
            "http://10.0.0.5/onvif/device_service; names and passwords go into a file, see --netrc"
        )
    if parts.path in ("", "/"):
        address = f"{parts.scheme}://{parts.netloc}/onvif/device_service"
    return Answer(host=host, address=address, name=None, hardware=None)


def ask_cameras(answers: Sequence[Answer], logins: Logins) -> list[FoundCamera]:
    """Ask devices for their streams, several at a time; each has some seconds for each question.

    Args:
        answers: Devices, see `discover` and `device_at`.
        logins: User names and passwords by host.

    Returns:
        A camera for each device, in the same order.
    """
    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        found = list(pool.map(lambda answer: _ask(answer, logins.of(answer.host)), answers))
    often = Counter(camera.name for camera in found)
    return [
        camera
        if often[camera.name] == 1
        else replace(camera, name=_as_name(f"{camera.name}-{urlsplit(place(answer)).netloc}"))
        for camera, answer in zip(found, answers, strict=True)
    ]


def place(answer: Answer) -> str:
    """Return the address of a device's service, as far as it is known."""
    return answer.address or f"http://{answer.host}"


def _ask(answer: Answer, login: tuple[str, str] | None) -> FoundCamera:
    camera = FoundCamera(
        host=answer.host,
        name=_as_name(answer.name or answer.host),
        maker=None,
        model=answer.hardware,
        streams=(),
        problem=None,
    )
    if answer.address is None:
        return replace(camera, problem="it names no address of its own")
    caller = Caller(answer.host, login)
    try:
        caller.clock_ahead_s = _clock_ahead_s(caller, answer.address)
        namespace, media = _media_service(caller, answer.address)
        camera = _with_maker(camera, caller, answer.address)
        profiles = _call(caller, media, namespace, "GetProfiles", _EVERYTHING[namespace])
        streams = tuple(
            _stream(caller, media, namespace, profile)
            for profile in named(profiles, "Profiles")[:_MOST_STREAMS]
            if named(profile, "VideoEncoderConfiguration") or named(profile, "VideoEncoder")
        )
    except InputError as error:
        return replace(camera, problem=str(error))
    return replace(camera, streams=streams, problem=None if streams else "it has no video stream")


_EVERYTHING: Mapping[str, str] = {
    _MEDIA[0]: "<m:Type>All</m:Type>",
    _MEDIA[1]: "",
}


def _call(
    caller: Caller,
    address: str,
    namespace: str,
    name: str,
    content: str = "",
    with_login: bool = True,
) -> Element:
    body = f"<m:{name} xmlns:m={quoteattr(namespace)}>{content}</m:{name}>"
    return caller.ask(address, body, with_login=with_login)


def _clock_ahead_s(caller: Caller, address: str) -> float:
    """Return how far the device's clock is ahead of ours; anybody may ask for it."""
    try:
        answer = _call(caller, address, _DEVICE, "GetSystemDateAndTime", with_login=False)
    except RefusedError:
        return 0.0  # One that does not tell its time has to take ours.
    for element in named(answer, "UTCDateTime"):
        names = ("Year", "Month", "Day", "Hour", "Minute", "Second")
        values = [child_text(element, name) or "" for name in names]
        try:
            told = datetime.datetime(*map(int, values), tzinfo=datetime.timezone.utc)  # type: ignore[arg-type,misc]
            ahead_s = told.timestamp() - time.time()
        except (ValueError, OverflowError):
            break
        if abs(ahead_s) < _MOST_AHEAD_S:
            return ahead_s
    return 0.0


def _media_service(caller: Caller, address: str) -> tuple[str, str]:
    """Return namespace and address of the newest media service."""
    services = {}
    try:
        answer = _call(
            caller, address, _DEVICE, "GetServices",
            "<m:IncludeCapability>false</m:IncludeCapability>",
        )  # fmt: skip
        for service in named(answer, "Service"):
            services[child_text(service, "Namespace")] = child_text(service, "XAddr")
    except RefusedError:  # Old ones only know the other question, which may be refused as well.
        answer = _call(caller, address, _DEVICE, "GetCapabilities", "<m:Category>All</m:Category>")
        for media in named(answer, "Media"):
            services[_MEDIA[1]] = child_text(media, "XAddr")
    for namespace in _MEDIA:
        if (found := services.get(namespace)) is not None:
            return namespace, found
    raise InputError("it has no media service")


def _with_maker(camera: FoundCamera, caller: Caller, address: str) -> FoundCamera:
    told = _call(caller, address, _DEVICE, "GetDeviceInformation")
    maker, model = child_text(told, "Manufacturer"), child_text(told, "Model")
    name = camera.name
    if name == camera.host and model is not None:
        name = _as_name(model)
    return replace(camera, name=name, maker=maker, model=model or camera.model)


def _stream(caller: Caller, media: str, namespace: str, profile: Element) -> FoundStream:
    token = escape(profile.get("token", ""))
    if namespace == _MEDIA[0]:
        asked = f"<m:Protocol>RTSP</m:Protocol><m:ProfileToken>{token}</m:ProfileToken>"
    else:
        asked = (
            '<m:StreamSetup xmlns:t="http://www.onvif.org/ver10/schema">'
            "<t:Stream>RTP-Unicast</t:Stream>"
            "<t:Transport><t:Protocol>RTSP</t:Protocol></t:Transport></m:StreamSetup>"
            f"<m:ProfileToken>{token}</m:ProfileToken>"
        )
    answer = _call(caller, media, namespace, "GetStreamUri", asked)
    address = child_text(answer, "Uri")
    if address is None:
        raise InputError("it gives no address for its stream")
    encoder = (named(profile, "VideoEncoderConfiguration") or named(profile, "VideoEncoder"))[0]
    width, height = _number(encoder, "Width"), _number(encoder, "Height")
    return FoundStream(
        profile=child_text(profile, "Name") or token,
        address=_watchable(address),
        width=None if width is None else int(width),
        height=None if height is None else int(height),
        encoding=child_text(encoder, "Encoding"),
        frame_rate=_number(encoder, "FrameRateLimit"),
    )


def _watchable(address: str) -> str:
    """Return the address of a stream without logins.

    It ends on a command line of `watch`, which also reads files and pipelines: from a device it is
    taken as nothing but a stream's.

    Raises:
        InputError: It is something else.
    """
    if not re.fullmatch(r"[a-z]{3,5}://[\x21-\x7e]{1,2000}", address) or "!" in address:
        told = shortened(without_secrets(address))
        raise InputError(f"its stream has an address that is none: {told}")
    source = Source(address=address, kind="network")
    try:
        check_address(source)
    except UsageError as error:
        raise InputError(f"its stream has an address that cannot be read: {error}") from error
    return source.shown


def _number(element: Element, name: str) -> float | None:
    text = child_text(element, name) or ""
    return float(text) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) else None


def _as_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-")[:100] or "camera"
