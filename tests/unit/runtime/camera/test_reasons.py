"""Why a source does not open, told by servers that refuse."""

import os
import socket
import sys
from urllib.parse import quote

import pytest

from tests.helpers.small_servers import (
    PASSWORD,
    USER,
    dripping_server,
    http_server,
    no_server,
    other_server,
    rtsp_server,
)
from upperson_camera.reasons import reason_of_address, reason_of_device
from upperson_camera.settings import CameraSettings
from upperson_camera.source import OpenCVReader, parse_source
from upperson_camera.stream import StreamReader, open_source
from upperson_rt.errors import BackendError, InputError, UsageError
from upperson_rt.remote import Limit

LOGIN = f"{USER}:{quote(PASSWORD, safe='')}@"
SERVERS = {"rtsp": rtsp_server, "http": http_server}


def ask(scheme, port, login=""):
    reason = reason_of_address(f"{scheme}://{login}127.0.0.1:{port}/stream?token=abc", 10)
    assert reason is None or not {"abc", PASSWORD, quote(PASSWORD, safe="")} & set(reason.split())
    return reason


@pytest.mark.parametrize("scheme", SERVERS)
@pytest.mark.parametrize("auth", ["basic", "digest"])
def test_credentials_that_are_missing_wrong_and_right(scheme, auth):
    with SERVERS[scheme](auth=auth) as port:
        said = "the server answers 401 Unauthorized: user name and password are"
        assert ask(scheme, port) == f"{said} missing"
        assert ask(scheme, port, "anna:other@") == f"{said} wrong"
        assert ask(scheme, port, LOGIN) is None


@pytest.mark.parametrize(
    ("scheme", "status", "reason"),
    [
        ("rtsp", "404 Not Found", "answers 404 Not Found: it has no such stream: check the path"),
        ("rtsp", "454 Session Not Found", "answers 454 Session Not Found: it knows no such"),
        ("rtsp", "503 Service Unavailable", "503 Service Unavailable: it is busy or has too many"),
        ("rtsp", "500 Internal Server Error", "500 Internal Server Error: it does not say why"),
        ("http", 404, "answers 404 Not Found: it has no such stream: check the path"),
        ("http", 403, "answers 403 Forbidden: it forbids that"),
    ],
)
def test_statuses(scheme, status, reason):
    with SERVERS[scheme](status) as port:
        assert reason in ask(scheme, port)


def test_answers_that_are_no_stream():
    with http_server(kind="text/html; charset=utf-8") as port:
        assert ask("http", port) == "the server answers with text/html, which is no video"
    with other_server(b"SSH-2.0-OpenSSH_9.7\r\n") as port:
        assert ask("rtsp", port) == f"127.0.0.1 port {port} does not speak RTSP"
        assert "breaks off (BadStatusLine)" in ask("http", port)
    with other_server(b"") as port:
        assert ask("rtsp", port) == f"127.0.0.1 port {port} does not speak RTSP"
        assert ask("rtmp", port) is None, "it is there; more is not asked"


@pytest.mark.parametrize("scheme", SERVERS)
def test_who_says_a_little_now_and_then_has_its_time(scheme):
    with dripping_server(b"HTTP/1.0 200 OK\r\nX: ") as (port, cut):
        reason = reason_of_address(f"{scheme}://127.0.0.1:{port}/stream", 0.5)
        assert reason == f"127.0.0.1 port {port} does not answer"
        assert cut.wait(10)


@pytest.mark.skipif(not socket.has_ipv6, reason="this Python knows no IPv6")
@pytest.mark.parametrize(("scheme", "port"), [("http", 80), ("https", 443)])
def test_an_address_of_ipv6_has_colons_that_are_no_port(monkeypatch, scheme, port):
    asked = []

    def connect(limit, *place):
        asked.append(place[:2])
        raise ConnectionRefusedError

    monkeypatch.setattr(Limit, "connect", connect)
    assert "nothing listens there" in reason_of_address(f"{scheme}://[fe80::1]/x", 1)
    assert asked == [("fe80::1", port)]


@pytest.mark.parametrize("scheme", SERVERS)
def test_who_is_sent_elsewhere_is_told_and_does_not_go(scheme):
    answer = f"{scheme.upper()}/1.0 302 Found\r\nLocation: %s\r\n\r\n"
    with no_server() as other:
        to = f"{scheme}://anna:secret@127.0.0.1:{other}/live?token=abc"
        with other_server((answer % to).encode()) as port:
            assert ask(scheme, port) == (
                f"the server answers 302 Found: it sends to {scheme}://127.0.0.1:{other}/live, "
                "which does not open either: name that address to learn why"
            )
            source = parse_source(f"{scheme}://127.0.0.1:{port}/stream")
            with pytest.raises(InputError, match=f"302 Found: it sends to .*:{other}/live, which"):
                StreamReader(source, 10)
    with other_server((answer % "../login").encode()) as port:
        assert f"it sends to {scheme}://127.0.0.1:{port}/login, which" in ask(scheme, port)
    for malformed in ("http://[::1/", "http://anna:12/secret@camera/live"):
        with other_server((answer % malformed).encode()) as port:
            assert ask(scheme, port).endswith("302 Found: where it sends to cannot be read")
    with other_server(answer.encode().replace(b"Location: %s\r\n", b"")) as port:
        assert ask(scheme, port) == "the server answers 302 Found: it does not say where to"


@pytest.mark.parametrize("scheme", ["rtsp", "http", "rtmp"])
def test_nobody_there(scheme, monkeypatch):
    with no_server() as port:
        refused = f"127.0.0.1 port {port} refuses connections: nothing listens there"
        assert ask(scheme, port) == refused

    def fail(error):
        def connect(*arguments):
            raise error

        monkeypatch.setattr(Limit, "connect", connect)
        return reason_of_address(f"{scheme}://camera.local:5/", 10)

    unknown = socket.gaierror(socket.EAI_NONAME, "Name or service not known")
    assert fail(unknown) == "the host 'camera.local' is unknown (Name or service not known)"
    assert fail(TimeoutError()) == "camera.local port 5 does not answer"
    assert (
        fail(OSError(113, "No route to host"))
        == "there is no way to camera.local (No route to host)"
    )
    assert fail(ConnectionResetError()) == "camera.local port 5 breaks off (ConnectionResetError)"


@pytest.mark.parametrize(
    "asked",
    [
        *('Bearer realm="x"', 'Digest realm="x", nonce="1", algorithm=SHA-512-256'),
        *("Digest nonsense", "Digest realm=", 'Digest realm="x", nonce="1", qop="auth-int"'),
    ],
)
def test_other_kinds_of_credentials(asked):
    head = f"401 Unauthorized\r\nWWW-Authenticate: {asked}\r\nContent-Length: 0\r\n"
    for scheme, version, more in (("rtsp", "RTSP/1.0", "CSeq: 1\r\n"), ("http", "HTTP/1.1", "")):
        with other_server(f"{version} {head}{more}\r\n".encode()) as port:
            assert "the server answers 401 Unauthorized" in ask(scheme, port)
            reason = ask(scheme, port, LOGIN)
            wrong = "user name and password are wrong"
            assert (
                reason.startswith("the server wants another proof of who asks") or wrong in reason
            )


def test_the_known_one_of_several_challenges_is_answered():
    several = 'WWW-Authenticate: Digest realm="a", nonce="1", algorithm=SHA-512-256\r\n'
    with rtsp_server(auth="digest", more=several) as port:
        assert ask("rtsp", port, LOGIN) is None
        assert ask("rtsp", port, "anna:other@").endswith("user name and password are wrong")


def test_addresses_that_nobody_can_be_asked_about():
    assert reason_of_address("udp://239.0.0.1:1234", 1) is None


@pytest.mark.parametrize(
    "address",
    [
        "rtsp://host:port/x",
        "rtsp://[::1/x",
        "http://127.0.0.1:9/a b?token=s3cret",
        "http://127.0.0.1:9/\x7f?token=s3cret",
        "http://127.0.0.1:9/\xe4\xf6?token=s3cret",
        "rtsp://anna:s3cret/x@127.0.0.1/y",
        "rtsp://anna:12/s3cret@127.0.0.1/y",
        "http://anna:12#s3cret@127.0.0.1/y",
        "rtsp://anna:s3cret\uff0f@127.0.0.1/y",
    ],
)
def test_an_address_that_cannot_be_read_is_told_without_its_secrets(address):
    reason = reason_of_address(address, 1)
    assert reason.startswith("the address is malformed")
    assert "s3cret" not in reason


def test_devices(monkeypatch, tmp_path):
    assert reason_of_device(987) == "there is no such device: plug the camera in, or name another"
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert reason_of_device(0).startswith("it may not be read: add the user to the group")
    monkeypatch.setattr(os, "access", lambda path, mode: True)
    assert reason_of_device(0) == "it is in use or gives no pictures"


def test_the_reader_says_why():
    with rtsp_server("404 Not Found") as port, pytest.raises(InputError) as raised:
        StreamReader(parse_source(f"rtsp://anna:secret@127.0.0.1:{port}/x"), 5)
    assert str(raised.value) == (
        f"cannot open rtsp://127.0.0.1:{port}/x: the server answers 404 Not Found: it has no such "
        "stream: check the path"
    )
    with pytest.raises(InputError, match="cannot open /dev/video987: there is no such device"):
        OpenCVReader(parse_source("/dev/video987"), 5)


@pytest.mark.parametrize("address", ["rtps://host/x", "htp://host/x", "onvif://host/x"])
def test_an_unknown_kind_of_address_is_refused_where_opencv_reads_it(address):
    source = parse_source(address)
    scheme = address.partition(":")[0]
    with pytest.raises(UsageError, match=rf"begins with rtsp, rtsps, http, .*found {scheme}://"):
        StreamReader.require(source)
    fields = {
        "name": "gate",
        "source": source,
        "detector": lambda frame: [],
        "drop": "oldest",
        "start_time": None,
        "realtime": False,
    }
    with pytest.raises(UsageError, match="cannot be read"):
        CameraSettings(opener=open_source, **fields)
    CameraSettings(opener=lambda source, timeout_s: None, **fields)  # Another reader may know it.


@pytest.mark.parametrize(
    "address",
    ["rtsp:///x", "rtsp://", "rtsp://h:99999/x", "rtsp://anna:s[cret@h/x", "http://[::1"],
)
def test_an_address_without_a_host_or_port_is_refused_and_not_shown(address):
    with pytest.raises(UsageError, match="has no host or port that can be read") as raised:
        StreamReader.require(parse_source(address))
    assert "cret" not in str(raised.value)


@pytest.mark.parametrize(
    "address",
    ["http://admin:12/x@host", "rtsp://admin:12/x@host/y", "rtsps://admin:12?x@host:5/y",
     "rtsp://admin:12#x@host", "rtsp://admin:ab12/x@host", "rtsp://admin:1@2/x@host",
     "rtsp://admin:/x@host/y", "rtsp://office/anna:12x@10.0.0.5/y"],
)  # fmt: skip
def test_what_may_be_a_password_is_refused_and_not_shown(address):
    told = "or a password that is not escaped: write in a password %2F for /"
    with pytest.raises(UsageError, match=told) as raised:
        StreamReader.require(parse_source(address))
    assert "12" not in str(raised.value)
    assert "x@" not in str(raised.value)


def test_an_at_behind_a_host_that_is_certain_is_taken():
    for address in (
        "rtsp://10.0.0.5:554/user=admin&password=a@b",
        "rtsp://admin:12%2Fx@[fe80::1]:554/ch@1",
        "rtsp://camera.local/ch@1",
        "rtsp://camera.local/1:2/ch@1",
        "rtsp://10.0.0.5/user:a@b",
        "srt://camera.local:7001?passphrase=a@b",
    ):
        StreamReader.require(parse_source(address))


def test_a_stream_that_is_sent_here_needs_no_host():
    for address in (
        "udp://:5000",
        "udp://@239.0.0.1:5000",
        "rtp://@:5004",
        "srt://:7001?mode=listener",
    ):
        StreamReader.require(parse_source(address))


def test_a_stream_without_what_reads_it_is_refused_at_the_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    StreamReader.require(parse_source("0"))
    with pytest.raises(BackendError, match=r"a network stream needs the package 'av'.*camera"):
        StreamReader.require(parse_source("rtsp://host/x"))
