"""WS-Discovery: says that this server is there, and answers probes of clients in its network.

It runs only if asked for. Messages are read only if they come to the multicast address, which
routers do not forward, and are short; answers are few a second. What is malformed is not answered.
"""

import random
import socket
import struct
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from urllib.parse import urlsplit
from xml.etree.ElementTree import Element, iterparse, register_namespace, tostring

from upperson_console.onvif.device import SCOPES
from upperson_console.onvif.soap import DEVICE, element, elements
from upperson_network.soap import ENVELOPE, parse_xml
from upperson_rt.errors import InputError
from upperson_rt.printable import error_text, get_logger

GROUP, PORT = "239.255.255.250", 3702
_ADDRESSING = "http://schemas.xmlsoap.org/ws/2004/08/addressing"
_DISCOVERY = "http://schemas.xmlsoap.org/ws/2005/04/discovery"
_EVERYONE = "urn:schemas-xmlsoap-org:ws:2005:04:discovery"
_BY_PATH = f"{_DISCOVERY}/rfc3986"
_LONGEST = 4096
"""Bytes of a message that is read."""
_LATEST_S = 0.1
"""An answer waits for a random time up to this, so that devices do not answer all at once."""
_MOST_REMEMBERED = 100
"""Ids of messages, which clients send more than once."""
_LOG = get_logger(__name__)
register_namespace("wsa", _ADDRESSING)
register_namespace("wsd", _DISCOVERY)


@dataclass(frozen=True)
class Responder:
    """What a server says of itself."""

    id: uuid.UUID
    """The same at each start of this server."""
    url: str
    """Address of the device service; clients get it with the host that they reach."""
    started: int
    """Unix seconds, which order the messages of several starts."""

    def answer(self, content: bytes, host: str, number: int) -> tuple[str, bytes] | None:
        """Return the id of a probe, and what answers it for a client that reaches ``host``.

        None if it is no probe, or one for others.
        """
        try:
            root = parse_xml(content)
        except ValueError:
            return None
        probe = root.find(f"{{{ENVELOPE}}}Body/{{{_DISCOVERY}}}Probe")
        message = root.findtext(f"{{{ENVELOPE}}}Header/{{{_ADDRESSING}}}MessageID", "").strip()
        if not message or probe is None or not _matches(probe, content):
            return None
        match = element(_DISCOVERY, "ProbeMatch", *self._about(host))
        answer = element(_DISCOVERY, "ProbeMatches", match)
        return message, self._message(answer, number, f"{_ADDRESSING}/role/anonymous", message)

    def announcement(self, kind: str, host: str, number: int) -> bytes:
        """Return a Hello or Bye; ``number`` counts the messages of this start."""
        about = self._about(host) if kind == "Hello" else self._about(host)[:1]
        return self._message(element(_DISCOVERY, kind, *about), number, _EVERYONE)

    def _message(self, answer: Element, number: int, to: str, relates_to: str = "") -> bytes:
        kind = answer.tag.rpartition("}")[2]
        values = {"MessageID": uuid.uuid4().urn, "To": to, "Action": f"{_DISCOVERY}/{kind}"}
        related = {"RelatesTo": relates_to} if relates_to else {}
        count = {"InstanceId": str(self.started), "MessageNumber": str(number)}
        header = element(
            ENVELOPE,
            "Header",
            *elements(_ADDRESSING, values | related),
            element(_DISCOVERY, "AppSequence", **count),
        )
        envelope = element(ENVELOPE, "Envelope", header, element(ENVELOPE, "Body", answer))
        envelope.set("xmlns:tds", DEVICE)  # Of the type, which is a text.
        content: bytes = tostring(envelope, "utf-8", xml_declaration=True)
        return content

    def _about(self, host: str) -> list[Element]:
        place = urlsplit(self.url)
        address = place._replace(netloc=f"{host}:{place.port}").geturl()
        values = {"Types": "tds:Device", "Scopes": " ".join(SCOPES), "XAddrs": address}
        name = element(_ADDRESSING, "Address", self.id.urn)
        reference = element(_ADDRESSING, "EndpointReference", name)
        return [reference, *elements(_DISCOVERY, values | {"MetadataVersion": "1"})]


def _matches(probe: Element, content: bytes) -> bool:
    """Return whether a probe is for ONVIF devices, or for all, within the scopes of this one."""
    kinds = probe.findtext(f"{{{_DISCOVERY}}}Types", "").split()
    found = iterparse(BytesIO(content), ("start-ns",))
    spaces: dict[str, str] = dict(pair for _, pair in found)
    split = [kind.rpartition(":") for kind in kinds]
    if any((spaces.get(space), name) != (DEVICE, "Device") for space, _, name in split):
        return False
    scopes = probe.find(f"{{{_DISCOVERY}}}Scopes")
    if scopes is None:
        return True
    wanted = (scopes.text or "").split()
    has_rule = scopes.get("MatchBy", _BY_PATH) == _BY_PATH
    return has_rule and all(any(_is_within(own, scope) for own in SCOPES) for scope in wanted)


def _is_within(own: str, wanted: str) -> bool:
    """Return whether a scope is the wanted one, or below it, by the segments of their paths."""
    return f"{own}/".startswith(wanted.rstrip("/") + "/")


@contextmanager
def discoverable(url: str, interface: str, port: int = PORT) -> Iterator[Responder]:
    """Say that a device service is there, and answer probes until the end of the context.

    Args:
        url: Address of the device service.
        interface: IPv4 address of this machine in the network; 0.0.0.0 leaves it to the system.
        port: Of WS-Discovery.

    Raises:
        InputError: The multicast address or port cannot be used.
    """
    end = threading.Event()
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as place,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        try:
            own = socket.inet_aton(interface)
            place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            place.bind((GROUP, port))
            membership = struct.pack("4s4s", socket.inet_aton(GROUP), own)
            place.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
            place.settimeout(0.2)
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, own)
            sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 1)
            sender.bind((interface, 0))
        except OSError as error:
            raise InputError(
                f"WS-Discovery cannot be used at {interface}: {error.strerror or error}",
                code="discovery_unusable",
                interface=interface,
            ) from error
        name = f"{socket.gethostname()}:{urlsplit(url).port}:{uuid.getnode()}"
        responder = Responder(uuid.uuid5(uuid.NAMESPACE_DNS, name), url, int(time.time()))
        thread = threading.Thread(
            target=_serve, args=(responder, place, sender, end), name="discovery", daemon=True
        )
        group = GROUP, port
        _send(sender, responder.announcement("Hello", _host_for(group, interface), 1), group)
        thread.start()
        try:
            yield responder
        finally:
            end.set()
            thread.join()
            _send(sender, responder.announcement("Bye", interface, 1 << 30), group)


def _serve(
    responder: Responder, place: socket.socket, sender: socket.socket, end: threading.Event
) -> None:
    seen: deque[str] = deque(maxlen=_MOST_REMEMBERED)
    number = 1
    while not end.is_set():
        try:
            content, client = place.recvfrom(_LONGEST + 1)
        except OSError:  # Mostly because none came in time.
            end.wait(_LATEST_S)
            continue
        host = _host_for(client, sender.getsockname()[0])
        answer = responder.answer(content, host, number + 1) if len(content) <= _LONGEST else None
        if answer is None or answer[0] in seen:
            continue
        seen.append(answer[0])
        number += 1
        end.wait(random.uniform(0, _LATEST_S))
        _send(sender, answer[1], client)


def _host_for(client: Sequence[object], interface: str) -> str:
    """Return the address of this machine that a client reaches."""
    if interface != "0.0.0.0":
        return interface
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((str(client[0]), 9))  # Sends nothing.
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def _send(sender: socket.socket, content: bytes, place: tuple[str, int]) -> None:
    try:
        sender.sendto(content, place)
    except OSError as error:
        _LOG.warning("WS-Discovery: %s", error_text(error))
