"""WS-Discovery on the loopback network: probes of two clients that are not the server's."""

import select
import socket
import struct
from contextlib import contextmanager

import pytest
from lxml import etree
from onvif import ONVIFDiscovery

from tests.helpers.refused import refused
from upperson_camera.onvif import Answer, discover
from upperson_console.onvif import discovery
from upperson_console.onvif.discovery import GROUP, Responder, discoverable
from upperson_rt.errors import InputError

HERE, URL = "127.0.0.1", "http://0.0.0.0:8480/onvif/device_service"
FOUND = "http://127.0.0.1:8480/onvif/device_service"
PROBE = ONVIFDiscovery.WS_DISCOVERY_PROBE_MESSAGE
NAME = "onvif://www.onvif.org/name"


@contextmanager
def listener():
    """A member of the multicast group at a free port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        place.bind((GROUP, 0))
        membership = struct.pack("4s4s", socket.inet_aton(GROUP), socket.inet_aton(HERE))
        place.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
        place.settimeout(30)
        yield place, place.getsockname()[1]


@contextmanager
def client(port):
    """Yield what sends a message to the group and returns the answer."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:
        opened.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(HERE))
        opened.bind((HERE, 0))
        opened.settimeout(30)

        def send(content, *, answered=True):
            opened.sendto(content.encode(), (GROUP, port))
            return opened.recv(65536) if answered else None

        send.has_answer = lambda: bool(select.select([opened], [], [], 0)[0])
        yield send


def actions(place, count):
    return [
        etree.fromstring(place.recv(65536)).findtext(".//{*}Action").rpartition("/")[2]
        for _ in range(count)
    ]


def test_a_server_is_found():
    with listener() as (place, port):
        with discoverable(URL, HERE, port) as responder:
            found = discover(2.0, HERE, port)
            with client(port) as send:
                answer = send(PROBE.format(uuid="one"))
        assert set(found) == {HERE}
        assert found[HERE] == Answer(
            host=HERE, address=FOUND, name="UP-Person Edge", hardware="upperson-rt serve"
        )
        parsed = {"xml": answer.decode(), "address": HERE}
        (device,) = ONVIFDiscovery(interface=HERE)._parse_responses([parsed], False)
        assert (device["host"], device["port"], device["xaddrs"]) == (HERE, 8480, [FOUND])
        assert device["epr"] == responder.id.urn
        header = etree.fromstring(answer)[0]
        assert header.findtext("{*}RelatesTo") == "urn:uuid:one"
        sent = actions(place, 7)  # Hello, the probes of two kinds, each twice, one more, and Bye.
        assert (sent[0], set(sent[1:-1]), sent[-1]) == ("Hello", {"Probe"}, "Bye")


def test_messages_that_are_no_probe_for_it_are_not_answered():
    with listener() as (_, port), discoverable(URL, HERE, port), client(port) as send:
        bad = [
            "", "<a/>", "x" * 9000, f"<!DOCTYPE a []>{PROBE.format(uuid=1)}",
            PROBE.format(uuid=2).replace("<wsa:MessageID>urn:uuid:2</wsa:MessageID>", ""),
            PROBE.format(uuid=3).replace("tds:Device<", "tds:Other<"),
            PROBE.format(uuid=4).replace("ver10/device/wsdl", "ver10/media/wsdl"),
            PROBE.format(uuid=5) + " " * 5000,
        ]  # fmt: skip
        for message in bad:
            send(message, answered=False)
        send(PROBE.format(uuid="one"))
        for name in ("one", "one"):  # Clients send a message again, for UDP may lose it.
            send(PROBE.format(uuid=name), answered=False)
        assert b"urn:uuid:two" in send(PROBE.format(uuid="two"))
        assert not send.has_answer()


def scoped(scopes, rule=""):
    """Whether a probe with scopes is answered."""
    inner = f"<tns:Scopes{rule}>{scopes}</tns:Scopes></tns:Probe>"
    content = PROBE.format(uuid=1).replace("</tns:Probe>", inner).encode()
    return Responder(discovery.uuid.uuid4(), URL, 1).answer(content, HERE, 1) is not None


def test_scopes_match_by_the_segments_of_their_paths():
    for scopes in ("", "onvif://www.onvif.org", NAME, f"{NAME}/ {NAME}/UP-Person%20Edge"):
        assert scoped(scopes)
    for scopes in (f"{NAME}/UP", "onvif://www.onvif.org/nam", f"{NAME} onvif://www.onvif.org/x"):
        assert not scoped(scopes)
    assert not scoped(NAME, ' MatchBy="http://schemas.xmlsoap.org/ws/2005/04/discovery/ldap"')


@pytest.mark.parametrize("interface", ["10.255.255.1", "::1"])
def test_an_interface_that_is_not_there_is_refused(interface):
    problem = refused("discovery_unusable", InputError, interface=interface)
    with problem, discoverable(URL, interface, 0):
        pass
