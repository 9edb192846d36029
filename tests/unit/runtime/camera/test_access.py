"""Why a source does not open, and a stream that stays at the camera's host."""

import base64
import os
import re
import socket
import sys
from contextlib import closing
from dataclasses import replace
from urllib.parse import quote, urlsplit

import pytest

from tests.helpers import hostile_cameras as hostile
from tests.helpers.certificate import written
from tests.helpers.onvif_device import onvif_device
from tests.helpers.refused import refused
from tests.helpers.rtsp_camera import reason_to_skip, rtsp_camera
from tests.helpers.small_servers import (
    PASSWORD,
    USER,
    dripping_server,
    http_server,
    no_server,
    other_server,
    rtsp_server,
)
from upperson_camera.access import PORTS, Access, target_of
from upperson_camera.onvif import ask_cameras, device_at
from upperson_camera.reasons import reason_of_address, reason_of_device
from upperson_camera.relay import Relay, _Units
from upperson_camera.settings import CameraSettings
from upperson_camera.source import Logins, OpenCVReader, parse_source
from upperson_camera.stream import StreamReader, open_source
from upperson_network.remote import Limit
from upperson_rt.errors import BackendError, InputError, UsageError

ODD = hostile.targets("http", hostile.Elsewhere()).keys()
ODD -= {"other host", "own host at another port", "a file"}
# A redirect of HTTP stands for all that names an odd target.
CASES = [
    name
    for name in hostile.cases(hostile.Elsewhere())
    if name.startswith("http 302 to")
    or not name.endswith(tuple(f" {word} {odd}" for word in ("to", "at") for odd in ODD))
]
SENT = base64.b64encode(hostile.LOGIN.encode())


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    path = tmp_path_factory.mktemp("films") / "secret.ts"
    path.write_bytes(hostile.film())
    with hostile.elsewhere(path) as found:
        yield found


@pytest.mark.parametrize("name", CASES)
def test_no_camera_sends_its_reader_elsewhere(name, there):
    outcome = hostile.tried(*hostile.cases(there)[name], there, 1.0)
    assert outcome.is_safe, outcome


def camera_of_files(files, asks_login=True):
    """Return a server of files by path: bytes, or a path or address that they have moved to."""
    asked = set() if asks_login else set(files)

    def reply(first, number):
        if not first:
            return b""
        if (path := first.split(" ")[1]) not in asked:  # The next request has the login.
            asked.add(path)
            return hostile.http(401, hostile.ASKS)
        if isinstance(files[path], str):
            return hostile.http(302, f"Location: {files[path]}")
        return hostile.http(200, body=files[path])

    return reply


def read_one(address, timeout_s=10, **access):
    source = replace(parse_source(address), access=Access(**access))
    with closing(StreamReader(source, timeout_s)) as reader:
        return reader.read()


def pictures_at(address):
    """Return the number of pictures up to the end of a stream."""
    with closing(StreamReader(parse_source(address), 10)) as reader:
        return sum(1 for _ in iter(lambda: reader.read() is not None, False))


def test_a_redirect_and_a_playlist_at_the_cameras_own_place_are_read_with_its_login():
    playlist = hostile.playlist("#EXTINF:1,", "part.ts")
    master = b"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\n/live/own.m3u8\n"
    files = {
        "/a": "/b/c", "/b/c": "../live.m3u8",
        "/live.m3u8": master, "/live/own.m3u8": playlist, "/live/part.ts": hostile.film(),
    }  # fmt: skip
    with hostile.tcp_server(camera_of_files(files)) as (port, requests):
        assert read_one(f"http://{hostile.LOGIN}@127.0.0.1:{port}/a").shape == (64, 64, 3)
    with_login = [request.split(b" ")[1].decode() for request in requests if SENT in request]
    assert list(dict.fromkeys(with_login)) == list(files)


@pytest.mark.parametrize("kind", ["video/mp4", "application/x-mpegurl"])
def test_a_playlist_that_grows_is_read_again(kind):
    content, lines = hostile.film(), ["#EXTINF:1,", "/0.ts", "#EXTINF:1,", "/1.ts"]
    begun = hostile.playlist(*lines[:2]).replace(b"#EXT-X-ENDLIST\n", b"")
    bodies = [begun, hostile.playlist(*lines)]

    def reply(first, number):
        if ".m3u8" in first:
            return hostile.http(200, body=bodies.pop(0), kind=kind)
        return hostile.http(200, body=content) if first else b""

    with hostile.tcp_server(reply) as (port, _):
        assert pictures_at(f"http://127.0.0.1:{port}/live.m3u8") == 100


def test_a_playlist_of_parts_of_one_file():
    flags = "frag_every_frame+empty_moov+default_base_moof"
    content = hostile.film("mp4", "mjpeg", movflags=flags)
    starts = [found.start() - 4 for found in re.finditer(b"moof", content)]
    assert len(starts) == 50
    lines = [f'#EXT-X-MAP:URI="film.mp4",BYTERANGE="{starts[0]}@0"']
    for number in (1, 2, 3, 20):
        start, end = starts[number - 1 : number + 1]
        at = "" if number in (2, 3) else f"@{start}"
        lines += ["#EXTINF:1,", f"#EXT-X-BYTERANGE:{end - start}{at}", "film.mp4"]
    best = b"#EXT-X-STREAM-INF:BANDWIDTH=2\nbest.m3u8\n"
    files = {
        "/a": b"#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\nno.m3u8\n" + best,
        "/best.m3u8": hostile.playlist(*lines),
    }

    def reply(first, number):
        if not first:
            return b""
        asked = re.search(rb"Range: bytes=(\d+)-(\d+)", requests[-1])
        if asked is None:
            return hostile.http(200, body=files[first.split(" ")[1]])
        return hostile.http(206, body=content[int(asked[1]) : int(asked[2]) + 1])

    with hostile.tcp_server(reply) as (port, requests):
        assert pictures_at(f"http://127.0.0.1:{port}/a") == 4
    assert not any(b"no.m3u8" in request for request in requests)


@pytest.mark.parametrize("knows_parts", [True, False])
def test_parts_of_files_are_asked_for(knows_parts):
    content = hostile.film("mp4", "mjpeg")
    assert content.index(b"moov") > content.index(b"mdat"), "what tells the stream is at the end"
    served = []

    def reply(first, number):
        if not first:
            return b""
        begin = requests[-1].decode().partition("Range: bytes=")[2].partition("-")[0]
        served.append(int(begin or 0))
        status, part = 206 if begin and knows_parts else 200, content[served[-1] :]
        return hostile.http(status, "Accept-Ranges: bytes", body=part)

    with hostile.tcp_server(reply) as (port, requests):
        address = f"http://127.0.0.1:{port}/film.mp4"
        if knows_parts:
            assert read_one(address).shape == (64, 64, 3)
        else:
            with pytest.raises(InputError, match="the server answers 200"):
                read_one(address)
    assert served[0] == 0
    assert any(served[1:])


@pytest.mark.parametrize(
    ("named", "location", "opened"),
    [
        ("rtsp://u:p@cam/a", "rtsp://cam/b", "rtsp://u:p@cam/b"),
        ("rtsp://u:p@CAM/a", "rtsp://x:y@cam:554/b", "rtsp://u:p@cam:554/b"),
        ("rtsp://u:p@cam/a", "rtsps://cam/b", "rtsps://u:p@cam/b"),
        ("rtsp://u:p@cam/a", "rtsp://cam:555/b", "rtsp://cam:555/b"),
        ("rtsp://u:p@cam:555/a", "rtsps://cam/b", "rtsps://cam/b"),
        ("rtsps://u:p@cam/a/b", "../c?d", "rtsps://u:p@cam/c?d"),
        ("http://u:p@cam/a", "https://cam/b", "https://u:p@cam/b"),
        ("http://u:p@cam/a", "https://cam:444/b", "https://cam:444/b"),
        ("http://u:p@cam:81/a", "http://cam/b", "http://cam/b"),
        ("http://u:p@cam/a", "http://friend/b", "http://friend/b"),
        ("http://u:p@[::1]/a", "/b", "http://u:p@[::1]/b"),
        ("https://u:p@cam/a", "http://cam/b", None),
        ("rtsps://u:p@cam/a", "rtsp://cam/b", None),
        ("rtsp://u:p@cam/a", "http://cam/b", None),
        ("http://u:p@cam/a", "http://cam.other/b", None),
        ("http://u:p@cam/a", "http://cam@other/b", None),
        ("http://u:p@cam/a", "http:", None),
        ("http://u:p@cam/a", "file:///etc/passwd", None),
        ("http://u:p@cam/a", "http://[::1/b", None),
        ("http://u:p@cam/a", "http://cam:99999/b", None),
    ],
)
def test_where_a_camera_may_send_to(named, location, opened):
    access = Access(allowed_hosts=frozenset({"friend"}))
    if opened is not None:
        assert urlsplit(target_of(named, location, None, access)) == urlsplit(opened)
        return
    with pytest.raises(InputError) as raised:
        target_of(named, location, None, access)
    assert "u:p" not in str(raised.value)


@pytest.mark.parametrize("start", ["", "#EXTM3U\n#EXT-X-STREAM-INF:" + "A" * 10**5])
def test_a_server_that_drips_is_given_up_in_time(start):
    with dripping_server(f"HTTP/1.0 200 OK\r\n\r\n{start}".encode()) as (port, cut):
        with pytest.raises(InputError):
            StreamReader(parse_source(f"http://127.0.0.1:{port}/x"), 0.5)
        assert cut.wait(10)


# --- Certificates


@pytest.mark.parametrize("scheme", ["https", "rtsps"])
@pytest.mark.parametrize(
    ("options", "access", "is_sent"),
    [
        ({}, "usual", False),
        ({}, "ca", True),
        ({"host": "127.0.0.9"}, "ca", False),
        ({"days": -1}, "ca", False),
        ({"host": "127.0.0.9", "days": -1}, "insecure", True),
    ],
)
def test_nothing_is_sent_before_the_certificate_is_trusted(
    tmp_path, caplog, scheme, options, access, is_sent
):
    certificate = written(tmp_path, bits=None, **options)
    accesses = {"usual": {}, "ca": {"ca_file": certificate[0]}, "insecure": {"insecure": True}}
    reply = hostile.rtsp_steps({"SETUP": hostile.rtsp("404 Not Found")})
    if scheme == "https":
        reply = camera_of_files({"/x": b"no video"})
    with hostile.tcp_server(reply, certificate=certificate) as (port, requests):
        address = f"{scheme}://{hostile.LOGIN}@127.0.0.1:{port}/x"
        with pytest.raises(InputError) as raised:
            read_one(address, 2, **accesses[access])
    assert bool(requests) == is_sent
    assert any(SENT in request for request in requests) == is_sent
    assert (raised.value.code == "certificate_untrusted") != is_sent
    logged = [record for record in caplog.records if getattr(record, "event", "") == "insecure"]
    assert bool(logged) == (access == "insecure")
    assert "s3cret" not in caplog.text + str(raised.value)


def test_a_file_without_certificates_is_refused(tmp_path):
    (tmp_path / "no.pem").write_bytes(b"nothing")
    for path in (tmp_path / "no.pem", tmp_path / "none"):
        with refused("ca_unreadable", InputError, path=path):
            Access(ca_file=path).context()


def test_onvif_over_tls_and_streams_at_other_hosts(tmp_path):
    certificate = written(tmp_path, bits=None)
    reply = hostile.always(b"HTTP/1.1 200 X\r\nContent-Length: 0\r\n\r\n")

    def code(place, **access):
        (camera,) = ask_cameras([device_at(place)], Logins(), **access)
        assert not camera.streams
        return camera.code

    with hostile.tcp_server(reply, certificate=certificate) as (port, requests):
        place = f"https://127.0.0.1:{port}"
        assert code(place) == "certificate_untrusted"
        assert code(place, insecure=frozenset({"127.0.0.9"})) == "certificate_untrusted"
        assert not requests
        assert code(place, insecure=frozenset({"127.0.0.1"})) == "not_soap"
        assert code(place, access=Access(ca_file=certificate[0])) == "not_soap"
    with onvif_device(streams={"main": "rtsp://127.0.0.2/x"}) as device:
        assert code(device.address) == "stream_elsewhere"
        access = Access(allowed_hosts=frozenset({"127.0.0.2"}))
        (found,) = ask_cameras([device_at(device.address)], Logins(), access)
        assert [stream.address for stream in found.streams] == ["rtsp://127.0.0.2/x"]


# --- What else opens files and ports


@pytest.mark.parametrize("start", ["#EXTM3U\n#EXTINF:1,\n", "ffconcat version 1.0\nfile "])
def test_a_file_that_names_other_files_is_no_video(tmp_path, start):
    (tmp_path / "secret.ts").write_bytes(hostile.film())
    (tmp_path / "list").write_text(f"{start}secret.ts\n")
    (tmp_path / "video.mp4").symlink_to("list")
    with refused("file_is_playlist", InputError):
        StreamReader(parse_source(str(tmp_path / "video.mp4")), 1.0)


def test_others_on_this_machine_get_nothing_of_a_camera():
    def answer_to(address):
        with socket.create_connection((place.hostname, place.port), 10) as reader:
            reader.sendall(f"DESCRIBE {address} RTSP/1.0\r\nCSeq: 1\r\n\r\n".encode())
            return reader.recv(1000)

    with (
        hostile.tcp_server(hostile.rtsp_steps({})) as (port, requests),
        closing(Relay(f"rtsp://{hostile.LOGIN}@127.0.0.1:{port}/x", Access(), 10)) as relay,
    ):
        place = urlsplit(relay.address)
        assert answer_to(f"rtsp://{place.netloc}/x") == b""
        assert not requests
        assert answer_to(relay.address).startswith(b"RTSP/1.0 200 OK")
    assert [request.split(b"\r\n")[0].decode() for request in requests] == [
        f"DESCRIBE rtsp://127.0.0.1:{port}/x RTSP/1.0"
    ] * 2, "once more with the login; the camera sees its own address"
    assert SENT in requests[1]


@pytest.mark.skipif(reason_to_skip() is not None, reason="no RTSP server of GStreamer")
def test_a_redirect_of_rtsp_within_a_host_is_followed():
    with rtsp_camera() as camera:
        moved = hostile.rtsp("302 Found", f"Location: {camera.address}")
        with hostile.tcp_server(hostile.rtsp_steps({"DESCRIBE": moved}, False)) as (port, _):
            assert read_one(f"rtsp://127.0.0.1:{port}/x").shape == (240, 320, 3)


def test_a_relay_passes_each_byte_on_however_it_is_cut():
    parts = [
        b"RTSP/1.0 200 OK\r\nCSeq: 1\r\nContent-Length: 300\r\n\r\n" + b"x" * 300,
        b"$\x00\x00\x05abcde" + b"$\x01\x00\x00" + b"$\x00\x01\x00" + b"y" * 256,
        b"RTSP/1.0 404 Not Found\r\n\r\n",
        b"OPTIONS * RTSP/1.0\r\nCSeq: 2\r\n\r\n",
    ]
    for step in (1, 3, 50, 10_000):
        units, content, passed = _Units(), b"".join(parts), b""
        for begin in range(0, len(content), step):
            for unit in units.add(content[begin : begin + step]):
                passed += unit if isinstance(unit, bytes) else unit.encoded()
        assert passed == content


# --- Why a source does not open, from servers that refuse


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


def test_answers_that_are_no_stream():
    for scheme, status, code in (
        ("rtsp", "404 Not Found", "stream_not_found"),
        ("rtsp", "454 Session Not Found", "session_unknown"),
        ("rtsp", "503 Service Unavailable", "server_busy"),
        ("rtsp", "500 Internal Server Error", "server_error"),
        ("http", 404, "stream_not_found"),
        ("http", 403, "forbidden"),
    ):
        with SERVERS[scheme](status) as port:
            reason = ask(scheme, port)
        assert (reason.code, reason.fields["status"]) == (code, int(str(status)[:3]))
        assert str(reason.fields["status"]) in str(reason)
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
    def redirecting(field):
        return other_server(f"{scheme.upper()}/1.0 302 Found\r\n{field}\r\n".encode())

    with no_server() as other:
        to = f"{scheme}://anna:secret@127.0.0.1:{other}/live?token=abc"
        with redirecting(f"Location: {to}\r\n") as port:
            shown = f"{scheme}://127.0.0.1:{other}/live,"
            assert code_of(scheme, port) == "redirected"
            assert shown in str(ask(scheme, port)).split()
            with pytest.raises(InputError, match=shown):
                StreamReader(parse_source(f"{scheme}://127.0.0.1:{port}/stream"), 10)
    with redirecting("Location: ../login\r\n") as port:
        assert f"{scheme}://127.0.0.1:{port}/login," in str(ask(scheme, port)).split()
    for location in ("http://[::1/", "http://anna:12/secret@camera/live"):
        with redirecting(f"Location: {location}\r\n") as port:
            assert code_of(scheme, port) == "redirected"
    with redirecting("") as port:
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


def test_an_address_that_cannot_be_read_is_refused_without_its_secrets():
    for address in (
        *("rtsp://host:port/x", "rtsp://[::1/x", "http://127.0.0.1:9/a b?token=s3cret"),
        *("http://127.0.0.1:9/\xe4\x7f?token=s3cret", "rtsp://anna:12/s3cret@127.0.0.1/y"),
        "rtsp://anna:s3cret\uff0f@127.0.0.1/y",
    ):
        reason = reason_of_address(address, 1)
        assert reason.code == "address_malformed", address
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
