"""Why a source does not open, from servers that refuse."""

import os
import socket
import sys
from urllib.parse import quote

import pytest

from tests.helpers.refused import refused
from tests.helpers.small_servers import (
    PASSWORD,
    USER,
    dripping_server,
    http_server,
    no_server,
    other_server,
    rtsp_server,
)
from upperson_camera.access import PORTS
from upperson_camera.reasons import reason_of_address, reason_of_device
from upperson_camera.settings import CameraSettings
from upperson_camera.source import OpenCVReader, parse_source
from upperson_camera.stream import StreamReader, open_source
from upperson_network.remote import Limit
from upperson_rt.errors import BackendError, InputError, UsageError

LOGIN = f"{USER}:{quote(PASSWORD, safe='')}@"
SERVERS = {"rtsp": rtsp_server, "http": http_server}


def ask(scheme, port, login="", timeout_s=10):
    reason = reason_of_address(f"{scheme}://{login}127.0.0.1:{port}/stream?token=abc", timeout_s)
    words = set(str(reason).split())
    assert not {"abc", PASSWORD, quote(PASSWORD, safe="")} & words
    return reason


def code_of(*asked, **options):
    reason = ask(*asked, **options)
    return reason and reason.code


@pytest.mark.parametrize("scheme", SERVERS)
@pytest.mark.parametrize("auth", ["basic", "digest"])
def test_credentials_that_are_missing_wrong_and_right(scheme, auth):
    several = {"more": 'WWW-Authenticate: Digest realm="a", nonce="1", algorithm=SHA-512-256\r\n'}
    with SERVERS[scheme](auth=auth, **several if scheme == "rtsp" else {}) as port:
        assert code_of(scheme, port) == "credentials_missing"
        assert code_of(scheme, port, "anna:other@") == "credentials_wrong"
        assert ask(scheme, port, LOGIN) is None


@pytest.mark.parametrize(
    ("scheme", "status", "code"),
    [
        ("rtsp", "404 Not Found", "stream_not_found"),
        ("rtsp", "454 Session Not Found", "session_unknown"),
        ("rtsp", "503 Service Unavailable", "server_busy"),
        ("rtsp", "500 Internal Server Error", "server_error"),
        ("http", 404, "stream_not_found"),
        ("http", 403, "forbidden"),
    ],
)
def test_statuses(scheme, status, code):
    with SERVERS[scheme](status) as port:
        reason = ask(scheme, port)
    assert (reason.code, reason.fields["status"]) == (code, int(str(status)[:3]))
    assert str(reason.fields["status"]) in str(reason)


def test_answers_that_are_no_stream():
    with http_server(kind="text/html; charset=utf-8") as port:
        reason = ask("http", port)
        assert (reason.code, reason.fields["kind"]) == ("not_video", "text/html")
    with other_server(b"SSH-2.0-OpenSSH_9.7\r\n") as port:
        assert code_of("rtsp", port) == "not_rtsp"
        assert ask("http", port).fields["error"] == "BadStatusLine"
    with other_server(b"") as port:
        assert code_of("rtsp", port) == "not_rtsp"
        assert ask("rtmp", port) is None, "it is there; more is not asked"
    assert reason_of_address("udp://239.0.0.1:1234", 1) is None


@pytest.mark.parametrize("scheme", SERVERS)
def test_a_server_that_drips_has_its_time(scheme):
    with dripping_server(b"HTTP/1.0 200 OK\r\nX: ") as (port, cut):
        assert code_of(scheme, port, timeout_s=0.5) == "no_answer"
        assert cut.wait(10)


@pytest.mark.parametrize("scheme", SERVERS)
def test_a_redirect_is_shown_and_not_followed(scheme):
    answer = f"{scheme.upper()}/1.0 302 Found\r\nLocation: %s\r\n\r\n"
    with no_server() as other:
        to = f"{scheme}://anna:secret@127.0.0.1:{other}/live?token=abc"
        with other_server((answer % to).encode()) as port:
            shown = f"{scheme}://127.0.0.1:{other}/live,"
            assert code_of(scheme, port) == "redirected"
            assert shown in str(ask(scheme, port)).split()
            with pytest.raises(InputError, match=shown):
                StreamReader(parse_source(f"{scheme}://127.0.0.1:{port}/stream"), 10)
    with other_server((answer % "../login").encode()) as port:
        assert f"{scheme}://127.0.0.1:{port}/login," in str(ask(scheme, port)).split()
    for location in ("http://[::1/", "http://anna:12/secret@camera/live", None):
        field = "" if location is None else f"Location: {location}\r\n"
        with other_server(answer.replace("Location: %s\r\n", field).encode()) as port:
            assert code_of(scheme, port) == "redirected"


@pytest.mark.parametrize("scheme", ["rtsp", "http", "rtmp"])
def test_no_server(scheme, monkeypatch):
    with no_server() as port:
        assert code_of(scheme, port) == "connection_refused"
    for error, code in (
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "host_unknown"),
        (TimeoutError(), "no_answer"),
        (OSError(113, "No route to host"), "no_route"),
        (ConnectionResetError(), "broke_off"),
    ):

        def connect(*arguments, error=error):
            raise error

        monkeypatch.setattr(Limit, "connect", connect)
        assert code_of(scheme, 5) == code
    asked = []
    monkeypatch.setattr(Limit, "connect", lambda limit, *place: asked.append(place[:2]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reason_of_address(f"{scheme}://[fe80::1]/x", 1)
    assert asked == [("fe80::1", PORTS[scheme])], "IPv6 has colons that are no port"


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
            assert code_of(scheme, port) == "credentials_missing"
            assert code_of(scheme, port, LOGIN) in ("challenge_unknown", "credentials_wrong")


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
def test_an_address_that_cannot_be_read_is_refused_without_its_secrets(address):
    reason = reason_of_address(address, 1)
    assert reason.code == "address_malformed"
    assert "s3cret" not in str(reason)


def test_devices(monkeypatch):
    assert reason_of_device(987).code == "device_not_found"
    with refused("device_not_found", InputError, source="/dev/video987"):
        OpenCVReader(parse_source("/dev/video987"), 5)
    monkeypatch.setattr(os.path, "exists", lambda path: True)
    for allowed, code in ((False, "device_forbidden"), (True, "device_busy")):
        monkeypatch.setattr(os, "access", lambda path, mode, allowed=allowed: allowed)
        assert reason_of_device(0).code == code


@pytest.mark.parametrize(
    ("address", "code"),
    [
        *((f"{scheme}://host/x", "unknown_scheme") for scheme in ("rtps", "htp", "onvif")),
        *((a, "address_without_host") for a in (
            "rtsp:///x", "rtsp://", "rtsp://h:99999/x", "rtsp://anna:s3cret[x@h/x", "http://[::1",
        )),
        *((a.replace("12", "s3cret12"), "login_not_escaped") for a in (
            "http://admin:12/x@host", "rtsp://admin:12/x@host/y", "rtsps://admin:12?x@host:5/y",
            "rtsp://admin:12#x@host", "rtsp://admin:ab12/x@host", "rtsp://admin:12@2/x@host",
            "rtsp://admin:/x12@host/y", "rtsp://office/anna:12x@10.0.0.5/y",
        )),
        *((a, None) for a in (
            "rtsp://10.0.0.5:554/user=admin&password=a@b", "rtsp://admin:12%2Fx@[fe80::1]:554/ch@1",
            "rtsp://camera.local/ch@1", "rtsp://camera.local/1:2/ch@1", "udp://@239.0.0.1:5000",
            "rtsp://10.0.0.5/user:a@b", "srt://camera.local:7001?passphrase=a@b", "udp://:5000",
            "rtp://@:5004", "srt://:7001?mode=listener", "0",
        )),
    ],
)  # fmt: skip
def test_which_addresses_are_read_and_refused_ones_are_not_shown(address, code):
    source = parse_source(address)
    fields = {"name": "gate", "source": source, "detector": list, "drop": "oldest"}
    fields |= {"start_time": None, "realtime": False}
    CameraSettings(opener=lambda source, timeout_s: None, **fields)  # Another may read it.
    if code is None:
        CameraSettings(opener=open_source, **fields)
        return
    with refused(code, UsageError) as raised:
        CameraSettings(opener=open_source, **fields)
    assert "s3cret" not in str(raised.value)
    assert "x@" not in str(raised.value)


def test_a_stream_without_what_reads_it_is_refused_at_the_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    StreamReader.require(parse_source("0"))
    with refused("extra_missing", BackendError, package="av", extra="camera"):
        StreamReader.require(parse_source("rtsp://host/x"))
