"""ONVIF cameras: discovery on the loopback network, streams, and malicious devices."""

import base64
import datetime
import re

import pytest

from tests.helpers.onvif_device import MATCH, onvif_device, responder
from tests.helpers.refused import refused
from tests.helpers.small_servers import dripping_server, no_server, other_server
from upperson_camera.onvif import Answer, ask_cameras, device_at, discover, read_answer
from upperson_camera.source import Logins, parse_source
from upperson_network.remote import password_digest
from upperson_rt.errors import InputError, UsageError

LOGIN = ("anna", "s:e/c<ret&1")
STREAMS = {"main": "rtsp://127.0.0.1:8554/main", "sub": "rtsp://127.0.0.1:8554/sub?channel=2"}
LOOPBACK = "127.0.0.1"
SOAP = (
    '<e:Envelope xmlns:e="http://www.w3.org/2003/05/soap-envelope"><e:Body>{}</e:Body></e:Envelope>'
)


def http_answer(content, status="200 OK"):
    return f"HTTP/1.0 {status}\r\n\r\n".encode() + content


def ask(device, login=None):
    (camera,) = ask_cameras([device_at(device.address)], Logins({LOOPBACK: login} if login else {}))
    return camera


def match(relates_to, name="Front%20Door", addresses="http://127.0.0.1/onvif/device_service"):
    return MATCH.format(relates_to=relates_to, name=name, addresses=addresses).encode()


def test_the_digest_of_a_password_is_the_published_one():
    """The example of ONVIF's Application Programmer's Guide, 6.1.1.3."""
    nonce = base64.b64decode("LKqI6G/AikKCQrN0zqZFlg==")
    digest = password_digest(nonce, "2010-09-16T07:50:45Z", "userpassword")
    assert digest == "tuOSpGlFlIXsozq4HFNeeGeFLEI="


def test_devices_that_answer_in_time_are_found():
    def answers(question):
        addresses = "http://10.0.0.1/x https://127.0.0.1/s http://127.0.0.1/o"
        return [match(question, addresses=addresses), match(question, name="again")]

    with responder(answers) as (port, asked):
        found = discover(1.0, LOOPBACK, port)  # A busy machine may send late.
    address = "http://127.0.0.1/o"
    expected = Answer(host=LOOPBACK, address=address, name="Front Door", hardware="C5")
    assert found == {LOOPBACK: expected}
    assert len(asked) == 4, "both kinds of device, twice"
    assert len(set(asked)) == 2


def test_what_is_no_answer_and_addresses_of_others_are_left_out():
    probe = "urn:uuid:mine"
    elsewhere = match(probe, addresses="http://10.0.0.1/x http://[::1 ftp://127.0.0.1/")
    answer = read_answer(elsewhere, LOOPBACK, [probe])
    assert answer.address is None
    assert ask_cameras([answer], Logins())[0].code == "service_elsewhere"
    nested = b"".join(
        b'<!ENTITY a%d "%s">' % (n, b"&a%d;" % (n - 1) * 10 if n else b"x") for n in range(12)
    )
    typed = match(probe).decode().replace("?>", '?><!DOCTYPE a [<!ENTITY b "c">]>', 1)
    for content in (
        *(b"", b"\xff" * 2000, b"<a/>", b"<a>", match("urn:uuid:another")),
        b"<!DOCTYPE a [" + nested + b"]><a>&a11;</a>",
        *(typed.encode(), typed.replace("UTF-8", "UTF-16").encode("utf-16")),
    ):
        assert read_answer(content, LOOPBACK, [probe]) is None


def test_an_interface_that_is_not_there_is_refused_before_anything_is_sent():
    begun = []
    for interface, error, code in (
        ("10.255.255.1", InputError, "network_unreachable"),
        ("lo", UsageError, "interface_malformed"),
        ("", UsageError, "interface_malformed"),
    ):
        with refused(code, error, interface=interface):
            discover(0.1, interface, begun=lambda: begun.append(1))
    assert begun == []


@pytest.mark.parametrize(
    "options",
    [
        {}, {"media2": True}, {"http_digest": True},
        {"clock_ahead": datetime.timedelta(days=-4000)},
        {"clock_ahead": datetime.timedelta(days=20_000)},
        {"login": None},
    ],
    ids=["media", "media2", "digest of HTTP", "a slow clock", "a fast clock", "no login"],
)  # fmt: skip
def test_streams_need_the_login(options):
    with onvif_device(**{"login": LOGIN, "streams": STREAMS} | options) as device:
        camera = ask(device, LOGIN)
        assert (camera.maker, camera.model, camera.name) == ("Maker & Sons", "Cam 5", "Cam-5")
        assert {stream.profile: stream.address for stream in camera.streams} == STREAMS
        assert [(s.width, s.height, s.encoding, s.frame_rate) for s in camera.streams] == [
            (640, 360, "H264", 25),
            (1280, 720, "H264", 25),
        ]
        assert camera.problem is None
        assert LOGIN[1].encode() not in device.received
        if device.login is None:
            return
        wrong, missing = ask(device, (LOGIN[0], "other")), ask(device)
        assert (wrong.code, missing.code) == ("credentials_wrong", "credentials_missing")
        assert wrong.streams == missing.streams == ()


def test_old_devices_are_asked_in_the_old_way():
    def answer(name):
        if name == "GetServices":
            fault = "<e:Fault><e:Reason><e:Text>unknown action</e:Text></e:Reason></e:Fault>"
            return http_answer(SOAP.format(fault).encode(), "500 No")
        media = f"<Capabilities><Media><XAddr>{device.address}</XAddr></Media></Capabilities>"
        return http_answer(SOAP.format(media).encode()) if name == "GetCapabilities" else None

    with onvif_device(streams=STREAMS, answer=answer) as device:
        assert len(ask(device).streams) == 2


def test_cameras_of_one_name_get_several():
    with onvif_device(streams=STREAMS) as one, onvif_device(streams=STREAMS) as other:
        answers = [device_at(one.address), device_at(other.address)]
        names = [camera.name for camera in ask_cameras(answers, Logins())]
    assert names == [f"Cam-5-127.0.0.1-{device.port}" for device in (one, other)]


@pytest.mark.parametrize(
    "address",
    [
        "/etc/passwd", "0", "file:///etc/passwd", "rtsp://127.0.0.1/\n-x", "rtsp://127.0.0.1/!a",
        "rtps://127.0.0.1/x", "rtsp://127.0.0.1/" + "x" * 3000, "",
    ],
)  # fmt: skip
def test_an_address_of_something_else_or_with_a_login_is_not_passed_on(address):
    """It would be pasted behind `watch`, which reads files and pipelines, too."""
    with onvif_device(streams={"main": address}) as device:
        camera = ask(device)
        device.streams["main"] = "rtsp://admin:s3cret@127.0.0.1/x?password=s3cret&user=a"
        (stream,) = ask(device).streams
    code = "stream_address_malformed" if address else "no_stream_address"
    assert (camera.streams, camera.code) == ((), code)
    assert stream.address == "rtsp://127.0.0.1/x?password=***&user=a"


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"SSH-2.0\r\n", "broke_off"),
        (http_answer(b""), "not_soap"),
        (http_answer(b"<a/>", "404 Not Found"), "not_soap"),
        (http_answer('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'.encode("utf-16")), "not_soap"),
        (http_answer(b"x" * (2**20 + 70000)), "answer_too_long"),
        (b"HTTP/1.0 302 Go\r\nLocation: http://127.0.0.1:1/x\r\n\r\n", "not_soap"),
        (b"HTTP/1.0 401 No\r\n\r\n", "credentials_missing"),
        (None, "connection_refused"),
    ],
)
def test_what_is_no_device(content, code):
    with no_server() if content is None else other_server(content) as port:
        (camera,) = ask_cameras([device_at(f"127.0.0.1:{port}")], Logins())
    assert (camera.code, camera.streams) == (code, ())
    assert camera.problem


@pytest.mark.parametrize("start", [b"HTTP/1.0 200 OK\r\nX: ", http_answer(b"<a>")])
def test_a_device_that_drips_has_its_time(monkeypatch, start):
    monkeypatch.setattr("upperson_camera.soap._CALL_S", 0.5)
    with dripping_server(start) as (port, cut):
        (camera,) = ask_cameras([device_at(f"127.0.0.1:{port}")], Logins())
        assert camera.code == "no_answer"
        assert cut.wait(10)


def test_a_device_has_its_time_for_all_answers_together(monkeypatch):
    monkeypatch.setattr("upperson_camera.soap._CALLS_S", -1.0)
    with onvif_device(streams=STREAMS) as device:
        assert ask(device).code == "device_too_slow"
        assert device.asked == []


@pytest.mark.parametrize(
    "challenge",
    [
        "Digest", "Digest realm=", 'Digest realm="a", nonce="b", qop="auth-int"',
        'Digest realm="a", nonce="b", algorithm=', 'Digest realm="a", nonce="\xff\xfe"',
        'Digest realm="' + "a" * 9000, "Bearer x", "", "Digest \x01\x02=\x03",
    ],
)  # fmt: skip
def test_a_challenge_without_an_answer_is_a_refusal(challenge):
    def answer(name):
        head = f"HTTP/1.0 401 No\r\nWWW-Authenticate: {challenge}\r\n\r\n"
        return head.encode("latin-1")

    with onvif_device(login=LOGIN, answer=answer) as device:
        assert ask(device, LOGIN).code == "credentials_wrong"


def test_a_device_cannot_send_us_to_another():
    with onvif_device(streams=STREAMS, login=LOGIN) as victim:
        for other in (f"localhost:{victim.port}", "[::1", "127.0.0.1@localhost:1", ""):
            with onvif_device(other_host=other or " ", login=LOGIN) as device:
                assert ask(device, LOGIN).code == "service_elsewhere"
        assert victim.asked == []


@pytest.mark.parametrize(
    ("place", "address"),
    [
        ("10.0.0.5", "http://10.0.0.5/onvif/device_service"),
        ("10.0.0.5:8000", "http://10.0.0.5:8000/onvif/device_service"),
        ("https://cam.local/", "https://cam.local/onvif/device_service"),
        ("http://cam.local/other", "http://cam.local/other"),
        *((wrong, None) for wrong in (
            "", "rtsp://10.0.0.5/x", "10.0.0.5:port", "http://[::1", "anna:12/secret@10.0.0.5",
        )),
    ],
)  # fmt: skip
def test_a_device_is_named_by_its_host(place, address):
    if address is not None:
        assert device_at(place).address == address
        return
    with refused("device_malformed", UsageError) as raised:
        device_at(place)
    assert "secret" not in str(raised.value)


def test_logins_come_from_a_file_by_host(tmp_path):
    def read(text):
        path.write_text(text)
        path.chmod(0o600)
        return Logins.read(path)

    path = tmp_path / "cameras.netrc"
    viewer = "machine 10.0.0.5 login viewer password p:w/1@x\n"
    logins = read(f"{viewer}machine Cam.local login a password b\n")
    assert logins.of("10.0.0.5") == ("viewer", "p:w/1@x")
    assert logins.of("10.0.0.6") is None
    assert "p:w" not in repr(logins)
    for address, given in (
        ("rtsp://10.0.0.5:554/s?a=1", "rtsp://viewer:p%3Aw%2F1%40x@10.0.0.5:554/s?a=1"),
        ("rtsp://other@10.0.0.5/s", "rtsp://other@10.0.0.5/s"),
        ("http://CAM.local/x", "http://a:b@CAM.local/x"),
        ("rtsp://10.0.0.6/s", "rtsp://10.0.0.6/s"),
        ("0", "0"),
    ):
        assert logins.given_to(parse_source(address)).address == given
    assert logins.given_to(parse_source("rtsp://10.0.0.5/s")).shown == "rtsp://10.0.0.5/s"
    assert read("default login viewer password secret").of("10.0.0.6") == ("viewer", "secret")
    with refused("netrc_malformed", InputError, line=3) as raised:
        read("machine a login b\npassword c\nhunter2 x")
    assert str(path) in str(raised.value)
    assert "hunter2" not in str(raised.value)
    path.write_text(viewer)
    path.chmod(0o644)  # Others may read it.
    for unusable in (path, tmp_path / "none"):
        with pytest.raises(InputError, match=re.escape(str(unusable))):
            Logins.read(unusable)
