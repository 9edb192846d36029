"""Finds cameras on the local network, by WS-Discovery as ONVIF has it.

A question goes to a multicast address, which no router passes on, and whoever answers within a few
seconds is listed. Nothing does so by itself: it takes a call of `discover`.
"""

import ipaddress
import select
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from upperson_rt.camera.soap import child_text, named, parse_xml
from upperson_rt.errors import InputError, UsageError

__all__ = ["Answer", "discover", "read_answer"]

_GROUP, _PORT = "239.255.255.250", 3702
_TYPES = (
    ("http://www.onvif.org/ver10/network/wsdl", "NetworkVideoTransmitter"),
    ("http://www.onvif.org/ver10/device/wsdl", "Device"),
)
"""Devices answer to the one, the other, or both."""
_AGAIN_S = 0.2
"""After that the question is sent once more: UDP may lose it."""
_MOST_DEVICES = 1024
_SCOPE = "onvif://www.onvif.org/"


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A device that answered."""

    host: str
    """IPv4 address that the answer came from."""
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
    """Ask the local network which cameras there are.

    Args:
        timeout_s: How long to wait for answers; devices take up to half a second.
        interface: IPv4 address of this machine in the network to ask; by default the system's
            choice.
        port: Of WS-Discovery.
        begun: Called before the first question goes out, when all is known to be in order.

    Returns:
        Answers by host, in the order of their addresses.

    Raises:
        UsageError: The interface is no IPv4 address.
        InputError: This machine has no such interface, or no network.
    """
    if interface is not None:
        _check_interface(interface)
    asked = [f"urn:uuid:{uuid.uuid4()}" for _ in _TYPES]
    questions = [_probe(*kind, message) for kind, message in zip(_TYPES, asked, strict=True)]
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
                    answer = read_answer(content, host, asked)
                    if answer is not None and (host not in found or found[host].address is None):
                        found[host] = answer
        except OSError as error:
            where = "the local network" if interface is None else interface
            raise InputError(
                f"{where} cannot be asked for cameras ({error.strerror}): name an IPv4 address of "
                "this machine in their network with --interface"
            ) from error
    return {host: found[host] for host in sorted(found, key=ipaddress.IPv4Address)}


def _check_interface(text: str) -> None:
    try:
        ipaddress.IPv4Address(text)
    except ValueError as error:
        raise UsageError(
            f"'{text}' is no IPv4 address: expected one of this machine, such as 192.168.1.10"
        ) from error


def _probe(namespace: str, kind: str, message: str) -> bytes:
    return (
        '<?xml version="1.0" encoding="utf-8"?>'
        '<s:Envelope xmlns:s="http://www.w3.org/2003/05/soap-envelope" '
        'xmlns:a="http://schemas.xmlsoap.org/ws/2004/08/addressing" '
        'xmlns:d="http://schemas.xmlsoap.org/ws/2005/04/discovery"><s:Header>'
        f"<a:MessageID>{message}</a:MessageID>"
        "<a:To>urn:schemas-xmlsoap-org:ws:2005:04:discovery</a:To>"
        "<a:Action>http://schemas.xmlsoap.org/ws/2005/04/discovery/Probe</a:Action></s:Header>"
        f'<s:Body><d:Probe><d:Types xmlns:n="{namespace}">n:{kind}</d:Types></d:Probe></s:Body>'
        "</s:Envelope>"
    ).encode()


def read_answer(content: bytes, host: str, asked: list[str]) -> Answer | None:
    """Return what an answer says; None if it is none, or one to somebody else's question."""
    try:
        root = parse_xml(content)
    except ValueError:
        return None
    if child_text(root, "RelatesTo") not in asked or not named(root, "ProbeMatch"):
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
    """Return where its service is, without TLS if it can be; a device vouches for itself only."""
    own = []
    for address in addresses:
        try:
            parts = urlsplit(address)
        except ValueError:
            continue
        if parts.scheme in ("http", "https") and parts.hostname == host:
            own.append(address)
    return min(own, key=lambda address: address.startswith("https"), default=None)


def _scope(scopes: list[str], key: str) -> str | None:
    prefix = f"{_SCOPE}{key}/"
    values = [scope[len(prefix) :] for scope in scopes if scope.lower().startswith(prefix)]
    return unquote(values[0]) if values else None
