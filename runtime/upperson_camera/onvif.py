"""Finds ONVIF cameras on the local network, and gets the addresses of their streams."""

import datetime
import ipaddress
import re
import select
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from urllib.parse import unquote, urlsplit
from xml.etree.ElementTree import Element
from xml.sax.saxutils import escape

from upperson_camera.access import USUAL_ACCESS, Access
from upperson_camera.soap import (
    ENVELOPE,
    Caller,
    RefusedError,
    child_text,
    is_http_of,
    named,
    parse_xml,
)
from upperson_camera.source import Logins, Source, without_secrets
from upperson_camera.stream import check_address
from upperson_network.remote import may_hide_login
from upperson_rt.errors import InputError, UsageError
from upperson_rt.printable import safe_repr, shortened

# --- Discovery on the local network, by WS-Discovery
#
# A probe goes to a multicast address, which routers do not forward. Devices that answer within a
# few seconds are listed. Only `discover` sends probes.

_GROUP, _PORT = "239.255.255.250", 3702
_TYPES = (
    ("http://www.onvif.org/ver10/network/wsdl", "NetworkVideoTransmitter"),
    ("http://www.onvif.org/ver10/device/wsdl", "Device"),
)
"""Devices answer to the one, the other, or both."""
_AGAIN_S = 0.2
"""After that the probe is sent once more: UDP may lose it."""
_MOST_DEVICES = 1024
_SCOPE = "onvif://www.onvif.org/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A device that answered."""

    host: str
    """IPv4 address of the answer."""
    address: str | None
    """Of its device service; None if it names no address of its own."""
    name: str | None
    hardware: str | None


def discover(
    timeout_s: float,
    interface: str | None = None,
    port: int = _PORT,
    begun: Callable[[], None] | None = None,
) -> dict[str, Answer]:
    """Search the local network for cameras; return answers in the order of their addresses.

    Args:
        timeout_s: How long to wait for answers; devices take up to half a second.
        interface: IPv4 address of this machine in the network; None leaves it to the system.
        port: Of WS-Discovery.
        begun: Called before the first probe goes out, when all is known to be in order.

    Raises:
        UsageError: The interface is no IPv4 address.
        InputError: This machine has no such interface, or no network.
    """
    if interface is not None:
        try:
            ipaddress.IPv4Address(interface)
        except ValueError as error:
            text = (
                f"'{interface}' is no IPv4 address: expected one of this machine, such as "
                "192.168.1.10"
            )
            raise UsageError(text, code="interface_malformed", interface=interface) from error
    probes = {f"urn:uuid:{uuid.uuid4()}": kind for kind in _TYPES}
    questions = [_probe(*kind, message) for message, kind in probes.items()]
    found: dict[str, Answer] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        try:
            if interface is not None:
                own = ipaddress.IPv4Address(interface).packed
                opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, own)
                opened.bind((interface, 0))
            opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 1)
            if begun is not None:
                begun()
            began = time.monotonic()
            sent = 0
            while (passed := time.monotonic() - began) < timeout_s and len(found) < _MOST_DEVICES:
                if sent < 2 and passed >= sent * _AGAIN_S:
                    for question in questions:
                        opened.sendto(question, (_GROUP, port))
                    sent += 1
                wait_s = (_AGAIN_S if sent < 2 else timeout_s) - passed
                if select.select([opened], [], [], max(0.0, wait_s))[0]:
                    content, (host, _) = opened.recvfrom(65536)
                    answer = read_answer(content, host, probes)
                    if answer is not None and (host not in found or found[host].address is None):
                        found[host] = answer
        except OSError as error:
            text = (
                f"{interface or 'the local network'} cannot be searched for cameras "
                f"({error.strerror}): name an IPv4 address of this machine in their network with "
                "--interface"
            )
            raise InputError(text, code="network_unreachable", interface=interface) from error
    return {host: found[host] for host in sorted(found, key=ipaddress.IPv4Address)}


def _probe(namespace: str, kind: str, message: str) -> bytes:
    return (
        '<?xml version="1.0" encoding="utf-8"?>'
        f'<s:Envelope xmlns:s="{ENVELOPE}" '
        'xmlns:a="http://schemas.xmlsoap.org/ws/2004/08/addressing" '
        'xmlns:d="http://schemas.xmlsoap.org/ws/2005/04/discovery"><s:Header>'
        f"<a:MessageID>{message}</a:MessageID>"
        "<a:To>urn:schemas-xmlsoap-org:ws:2005:04:discovery</a:To>"
        "<a:Action>http://schemas.xmlsoap.org/ws/2005/04/discovery/Probe</a:Action></s:Header>"
        f'<s:Body><d:Probe><d:Types xmlns:n="{namespace}">n:{kind}</d:Types></d:Probe></s:Body>'
        "</s:Envelope>"
    ).encode()


def read_answer(content: bytes, host: str, probes: Collection[str]) -> Answer | None:
    """Return the device of an answer; None if it is none, or answers another probe."""
    try:
        root = parse_xml(content)
    except ValueError:
        return None
    if child_text(root, "RelatesTo") not in probes or not named(root, "ProbeMatch"):
        return None
    match = named(root, "ProbeMatch")[0]
    scopes = (child_text(match, "Scopes") or "").split()
    return Answer(
        host=host,
        address=_own_address((child_text(match, "XAddrs") or "").split(), host),
        name=_scope(scopes, "name"),
        hardware=_scope(scopes, "hardware"),
    )


def _own_address(addresses: list[str], host: str) -> str | None:
    """Return the address of its service, without TLS if possible, and at its own host only."""
    own = [address for address in addresses if is_http_of(address, host)]
    return min(own, key=lambda address: address.startswith("https"), default=None)


def _scope(scopes: list[str], key: str) -> str | None:
    prefix = f"{_SCOPE}{key}/"
    values = [scope[len(prefix) :] for scope in scopes if scope.lower().startswith(prefix)]
    return unquote(values[0]) if values else None


# --- The streams of a device


_DEVICE = "http://www.onvif.org/ver10/device/wsdl"
_MEDIA = ("http://www.onvif.org/ver20/media/wsdl", "http://www.onvif.org/ver10/media/wsdl")
"""The newer one first: the older has no H.265."""
_AT_A_TIME = 16
_MOST_STREAMS = 16
_MOST_AHEAD_S = 100 * 365 * 86400.0
"""A clock that is further off is ignored."""


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
    """A device that was asked for its streams."""

    host: str
    name: str
    """For ``NAME=ADDRESS``: letters, digits, ``.``, ``_`` and ``-``; no two are the same."""
    maker: str | None
    model: str | None
    streams: tuple[FoundStream, ...]
    problem: str | None
    """Why it has no streams here."""
    code: str | None
    """The same as a code, such as ``credentials_missing``."""


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
        name = "an address with a login" if "@" in place else safe_repr(place)
        raise UsageError(
            f"{name} is no camera's host: expected such as 10.0.0.5, 10.0.0.5:8000 or "
            "http://10.0.0.5/onvif/device_service; names and passwords go into a file, see --netrc",
            code="device_malformed",
        )
    if parts.path in ("", "/"):
        address = f"{parts.scheme}://{parts.netloc}/onvif/device_service"
    return Answer(host=host, address=address, name=None, hardware=None)


def ask_cameras(
    answers: Sequence[Answer],
    logins: Logins,
    access: Access = USUAL_ACCESS,
    insecure: frozenset[str] = frozenset(),
) -> list[FoundCamera]:
    """Get the streams of devices, several at a time; return a camera for each, in their order.

    Args:
        answers: Devices, see `discover` and `device_at`.
        logins: User names and passwords by host.
        access: Certificates that are trusted, and hosts besides a device's own that may have its
            streams.
        insecure: Hosts of which any certificate is accepted.
    """

    def camera_of(answer: Answer) -> FoundCamera:
        own = replace(access, insecure=answer.host in insecure)
        return _ask(answer, logins.of(answer.host), own)

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        found = list(pool.map(camera_of, answers))
    often = Counter(camera.name for camera in found)
    for number, (camera, answer) in enumerate(zip(found, answers, strict=True)):
        if often[camera.name] > 1:
            place = answer.address or f"http://{answer.host}"
            name = _as_name(f"{camera.name}-{urlsplit(place).netloc}")
            found[number] = replace(camera, name=name)
    return found


def _ask(answer: Answer, login: tuple[str, str] | None, access: Access) -> FoundCamera:
    camera = FoundCamera(
        host=answer.host,
        name=_as_name(answer.name or answer.host),
        maker=None,
        model=answer.hardware,
        streams=(),
        problem=None,
        code=None,
    )
    if answer.address is None:
        return replace(camera, problem="it names no address of its own", code="service_elsewhere")
    caller = Caller(answer.host, login, access)
    try:
        caller.clock_ahead_s = _clock_ahead_s(caller, answer.address)
        namespace, media = _media_service(caller, answer.address)
        about = caller.call(answer.address, _DEVICE, "GetDeviceInformation")
        maker, model = child_text(about, "Manufacturer"), child_text(about, "Model")
        if camera.name == camera.host and model is not None:
            camera = replace(camera, name=_as_name(model))
        camera = replace(camera, maker=maker, model=model or camera.model)
        everything = "<m:Type>All</m:Type>" if namespace == _MEDIA[0] else ""
        profiles = caller.call(media, namespace, "GetProfiles", everything)
        streams = tuple(
            _stream(caller, media, namespace, profile)
            for profile in named(profiles, "Profiles")[:_MOST_STREAMS]
            if named(profile, "VideoEncoderConfiguration") or named(profile, "VideoEncoder")
        )
    except InputError as error:
        return replace(camera, problem=str(error), code=error.code)
    if not streams:
        return replace(camera, problem="it has no video stream", code="no_stream")
    return replace(camera, streams=streams)


def _clock_ahead_s(caller: Caller, address: str) -> float:
    """Return how far the device's clock is ahead of ours; that needs no login."""
    try:
        answer = caller.call(address, _DEVICE, "GetSystemDateAndTime", with_login=False)
    except RefusedError:
        return 0.0  # A device without a time has ours.
    for element in named(answer, "UTCDateTime"):
        names = ("Year", "Month", "Day", "Hour", "Minute", "Second")
        values = [child_text(element, name) or "" for name in names]
        try:
            moment = datetime.datetime(*map(int, values), tzinfo=datetime.timezone.utc)  # type: ignore[arg-type,misc]
            ahead_s = moment.timestamp() - time.time()
        except (ValueError, OverflowError):
            break
        if abs(ahead_s) < _MOST_AHEAD_S:
            return ahead_s
    return 0.0


def _media_service(caller: Caller, address: str) -> tuple[str, str]:
    """Return namespace and address of the newest media service."""
    services = {}
    try:
        content = "<m:IncludeCapability>false</m:IncludeCapability>"
        answer = caller.call(address, _DEVICE, "GetServices", content)
        for service in named(answer, "Service"):
            services[child_text(service, "Namespace")] = child_text(service, "XAddr")
    except RefusedError:  # Old devices have only the other call, which may be refused as well.
        answer = caller.call(address, _DEVICE, "GetCapabilities", "<m:Category>All</m:Category>")
        for media in named(answer, "Media"):
            services[_MEDIA[1]] = child_text(media, "XAddr")
    for namespace in _MEDIA:
        if (found := services.get(namespace)) is not None:
            return namespace, found
    raise InputError("it has no media service", code="no_media_service")


def _stream(caller: Caller, media: str, namespace: str, profile: Element) -> FoundStream:
    token = escape(profile.get("token", ""))
    if namespace == _MEDIA[0]:
        content = f"<m:Protocol>RTSP</m:Protocol><m:ProfileToken>{token}</m:ProfileToken>"
    else:
        content = (
            '<m:StreamSetup xmlns:t="http://www.onvif.org/ver10/schema">'
            "<t:Stream>RTP-Unicast</t:Stream>"
            "<t:Transport><t:Protocol>RTSP</t:Protocol></t:Transport></m:StreamSetup>"
            f"<m:ProfileToken>{token}</m:ProfileToken>"
        )
    answer = caller.call(media, namespace, "GetStreamUri", content)
    address = child_text(answer, "Uri")
    if address is None:
        raise InputError("it gives no address for its stream", code="no_stream_address")
    encoder = (named(profile, "VideoEncoderConfiguration") or named(profile, "VideoEncoder"))[0]
    width, height = _number(encoder, "Width"), _number(encoder, "Height")
    return FoundStream(
        profile=child_text(profile, "Name") or token,
        address=_watchable(address, caller),
        width=None if width is None else int(width),
        height=None if height is None else int(height),
        encoding=child_text(encoder, "Encoding"),
        frame_rate=_number(encoder, "FrameRateLimit"),
    )


def _watchable(address: str, caller: Caller) -> str:
    """Return the address of a stream without logins.

    Users paste it into a command line of `watch`, which also reads files and pipelines: so it must
    be the address of a network stream, at the device's host or one that is allowed.
    """
    if not re.fullmatch(r"[a-z]{3,5}://[\x21-\x7e]{1,2000}", address) or "!" in address:
        text = f"its stream has an address that is none: {shortened(without_secrets(address))}"
        raise InputError(text, code="stream_address_malformed")
    source = Source(address=address, kind="network")
    try:
        check_address(source)
    except UsageError as error:
        text = f"its stream has an address that cannot be read: {error}"
        raise InputError(text, code="stream_address_malformed") from error
    host = urlsplit(address).hostname
    if host != caller.host and host not in caller.access.allowed_hosts:
        text = (
            f"its stream is at another host, {shortened(host or 'none')}: if that is right, name "
            "it with --allow-host"
        )
        raise InputError(text, code="stream_elsewhere", host=host)
    return source.shown


def _number(element: Element, name: str) -> float | None:
    text = child_text(element, name) or ""
    return float(text) if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) else None


def _as_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text).strip("-")[:100] or "camera"
