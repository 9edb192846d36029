"""Logins, redirects, playlists and certificates: a camera's stream stays at the camera's host."""

import base64
import re
import socket
from contextlib import closing
from dataclasses import replace
from urllib.parse import urlsplit

import pytest

from tests.helpers import hostile_cameras as hostile
from tests.helpers.certificate import written
from tests.helpers.onvif_device import onvif_device
from tests.helpers.refused import refused
from tests.helpers.rtsp_camera import reason_to_skip, rtsp_camera
from tests.helpers.small_servers import dripping_server
from upperson_camera.access import Access, target_of
from upperson_camera.onvif import ask_cameras, device_at
from upperson_camera.relay import Relay, _Units
from upperson_camera.source import Logins, parse_source
from upperson_camera.stream import StreamReader
from upperson_rt.errors import InputError

CASES = hostile.cases(hostile.Elsewhere())
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
    content = hostile.film()
    lines = ["#EXTINF:1,", "/0.ts", "#EXTINF:1,", "/1.ts"]
    bodies = [hostile.playlist(*lines[:2]).replace(b"#EXT-X-ENDLIST\n", b"")]
    bodies.append(hostile.playlist(*lines))

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
        part = content[served[-1] :]
        return hostile.http(206 if begin else 200, "Accept-Ranges: bytes", body=part)

    def whole(first, number):
        return reply(first, number).replace(b"HTTP/1.1 206", b"HTTP/1.1 200")

    with hostile.tcp_server(reply if knows_parts else whole) as (port, requests):
        address = f"http://127.0.0.1:{port}/film.mp4"
        if knows_parts:
            assert read_one(address).shape == (64, 64, 3)
        else:
            with pytest.raises(InputError, match="the server answers 200"):
                read_one(address)
    assert served[0] == 0
    assert any(served[1:])


def test_another_host_that_is_allowed_gets_no_login():
    files = {"/film.ts": hostile.film()}
    with hostile.tcp_server(camera_of_files(files, False), "127.0.0.2") as (other, arrived):
        moved = {"/a": f"http://127.0.0.2:{other}/film.ts"}
        with hostile.tcp_server(camera_of_files(moved)) as (port, _):
            address = f"http://{hostile.LOGIN}@127.0.0.1:{port}/a"
            with refused("redirect_to_other_host", InputError, host="127.0.0.2"):
                read_one(address)
            assert not arrived
            assert read_one(address, allowed_hosts=frozenset({"127.0.0.2"})) is not None
    assert arrived
    assert not any(b"uthorization" in request for request in arrived)


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


@pytest.mark.parametrize("start", ["", "#EXTM3U\n", "#EXTM3U\n#EXT-X-STREAM-INF:" + "A" * 10**5])
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
        ({}, "insecure", True),
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


@pytest.mark.parametrize("content", [b"nothing", None])
def test_a_file_without_certificates_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "ca.pem").write_bytes(content)
    with refused("ca_unreadable", InputError, path=tmp_path / "ca.pem"):
        Access(ca_file=tmp_path / "ca.pem").context()


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


def answer_of(relay, address):
    """Return what a relay answers to the description of an address."""
    parts = urlsplit(relay.address)
    with socket.create_connection((parts.hostname, parts.port), 10) as reader:
        reader.sendall(f"DESCRIBE {address} RTSP/1.0\r\nCSeq: 1\r\n\r\n".encode())
        return reader.recv(1000)


@pytest.mark.parametrize("status", ["300 X", "301 Moved", "302 Found", "305 Use Proxy", "399 X"])
def test_a_relay_passes_no_redirect_on(status):
    moved = hostile.rtsp(status, "Location: rtsp://127.0.0.2/x")
    steps = hostile.rtsp_steps({"DESCRIBE": moved}, login=False)
    with (
        hostile.tcp_server(steps) as (port, _),
        closing(Relay(f"rtsp://127.0.0.1:{port}/x", Access(), 10)) as relay,
    ):
        assert answer_of(relay, relay.address) == b""
        assert relay.location == "rtsp://127.0.0.2/x"


def test_others_on_this_machine_get_nothing_of_a_camera():
    steps = hostile.rtsp_steps({})
    with (
        hostile.tcp_server(steps) as (port, requests),
        closing(Relay(f"rtsp://{hostile.LOGIN}@127.0.0.1:{port}/x", Access(), 10)) as relay,
    ):
        place = urlsplit(relay.address).netloc
        assert answer_of(relay, f"rtsp://{place}/x") == b""
        assert not requests
        assert answer_of(relay, relay.address).startswith(b"RTSP/1.0 200 OK")
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
