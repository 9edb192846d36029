"""ONVIF cameras: found on the loopback network, asked for streams, and not believed too much."""

import base64
import datetime
import os

import pytest

from tests.helpers.onvif_device import MATCH, onvif_device, responder
from tests.helpers.small_servers import dripping_server, no_server, other_server
from upperson_camera.onvif import Answer, ask_cameras, device_at, discover
from upperson_camera.source import Logins, parse_source
from upperson_rt.errors import InputError, UsageError
from upperson_rt.remote import password_digest

LOGIN = ("anna", "s:e/c<ret&1")
STREAMS = {"main": "rtsp://127.0.0.1:8554/main", "sub": "rtsp://127.0.0.1:8554/sub?channel=2"}
LOOPBACK = "127.0.0.1"


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


def test_whoever_answers_in_time_is_found():
    def answers(question):
        return [
            match(question, addresses="http://10.0.0.1/x https://127.0.0.1/s http://127.0.0.1/o"),
            match(question, name="again"),
        ]

    with responder(answers) as (port, asked):
        found = discover(0.5, LOOPBACK, port)
    assert found == {
        LOOPBACK: Answer(
            host=LOOPBACK, address="http://127.0.0.1/o", name="Front Door", hardware="C5"
        )
    }
    assert len(asked) == 4, "both kinds of device, twice"
    assert len(set(asked)) == 2


def test_what_is_no_answer_to_the_question_is_left_out():
    nested = b"".join(
        b'<!ENTITY a%d "%s">' % (n, b"&a%d;" % (n - 1) * 10 if n else b"x") for n in range(12)
    )
    contents = [
        *(b"", b"\xff" * 2000, b"<a/>", b"<a>", match("urn:uuid:another")),
        b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>',
        b"<!DOCTYPE a [" + nested + b"]><a>&a11;</a>",
    ]
    with responder(lambda question: contents) as (port, asked):
        assert discover(0.5, LOOPBACK, port) == {}
    assert asked


def test_a_device_vouches_for_itself_only():
    def answers(question):
        return [match(question, addresses="http://10.0.0.1/x http://[::1 ftp://127.0.0.1/")]

    with responder(answers) as (port, _):
        found = discover(0.3, LOOPBACK, port)
    assert found[LOOPBACK].address is None
    (camera,) = ask_cameras(list(found.values()), Logins())
    assert camera.problem == "it names no address of its own"


@pytest.mark.parametrize(
    ("interface", "error", "message"),
    [
        ("10.255.255.1", InputError, "name an IPv4 address of this machine"),
        ("999.1.1.1", UsageError, "'999.1.1.1' is no IPv4 address: expected one of this machine"),
        ("lo", UsageError, "'lo' is no IPv4 address"),
        ("", UsageError, "'' is no IPv4 address"),
    ],
)
def test_an_interface_that_is_not_there_is_told_before_anything_is_asked(interface, error, message):
    begun = []
    with pytest.raises(error, match=message):
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
    ids=["media", "media2", "digest of HTTP", "a slow clock", "a fast clock", "nobody is asked"],
)  # fmt: skip
def test_streams_are_told_to_whoever_has_the_login(options):
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
        wrong = ask(device, (LOGIN[0], "other"))
        assert (wrong.problem, wrong.streams) == ("user name and password are wrong", ())
        nobody = ask(device)
        assert (nobody.problem, nobody.streams) == ("user name and password are missing", ())


def test_old_devices_are_asked_in_the_old_way():
    def answer(name):
        if name == "GetServices":
            return b"HTTP/1.0 500 No\r\n\r\n" + (
                b'<e:Envelope xmlns:e="http://www.w3.org/2003/05/soap-envelope"><e:Body><e:Fault>'
                b"<e:Reason><e:Text>unknown action</e:Text></e:Reason></e:Fault></e:Body>"
                b"</e:Envelope>"
            )
        if name == "GetCapabilities":
            return (
                b"HTTP/1.0 200 OK\r\n\r\n"
                b'<e:Envelope xmlns:e="http://www.w3.org/2003/05/soap-envelope"><e:Body>'
                b"<Capabilities><Media><XAddr>%s</XAddr></Media></Capabilities></e:Body>"
                b"</e:Envelope>" % device.address.encode()
            )
        return None

    with onvif_device(streams=STREAMS, answer=answer) as device:
        assert len(ask(device).streams) == 2


def test_cameras_of_one_name_are_told_apart():
    with onvif_device(streams=STREAMS) as one, onvif_device(streams=STREAMS) as other:
        answers = [device_at(one.address), device_at(other.address)]
        names = [camera.name for camera in ask_cameras(answers, Logins())]
    assert names == [f"Cam-5-127.0.0.1-{device.port}" for device in (one, other)]


def test_logins_in_addresses_are_not_told():
    streams = {"main": "rtsp://admin:s3cret@127.0.0.1/x?password=s3cret&user=a"}
    with onvif_device(streams=streams) as device:
        (stream,) = ask(device).streams
    assert stream.address == "rtsp://127.0.0.1/x?password=***&user=a"


@pytest.mark.parametrize(
    "address",
    [
        "/etc/passwd", "0", "file:///etc/passwd", "rtsp://127.0.0.1/a b", "rtsp://127.0.0.1/\n-x",
        "rtsp://h/x ! filesink location=y", "rtsp://h/!a", "concat:a|b", "rtps://127.0.0.1/x",
        "rtsp://h/" + "x" * 3000, "",
    ],
)  # fmt: skip
def test_an_address_of_something_else_is_not_passed_on(address):
    """It would be pasted behind `watch`, which reads files and pipelines, too."""
    with onvif_device(streams={"main": address}) as device:
        camera = ask(device)
    assert camera.streams == ()
    assert "address" in camera.problem


def http_answer(content, status=b"200 OK"):
    return b"HTTP/1.0 " + status + b"\r\n\r\n" + content


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"SSH-2.0\r\n", "breaks off (BadStatusLine)"),
        (http_answer(b""), "it answers 200 and no SOAP (not XML)"),
        (
            http_answer(b'<?xml version="1.0" encoding="TTF-8"?><a/>'),
            "it answers 200 and no SOAP (not XML)",
        ),
        (http_answer(b"<a/>", b"404 Not Found"), "it answers 404 and no SOAP (there is no body)"),
        (http_answer(b'<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>'), "no SOAP (a document type)"),
        (http_answer(b"x" * (2**20 + 70000)), "its answer is longer than any"),
        (b"HTTP/1.0 302 Go\r\nLocation: http://127.0.0.1:1/x\r\n\r\n", "it answers 302 and no"),
        (b"HTTP/1.0 401 No\r\n\r\n", "user name and password are missing"),
    ],
)
def test_what_is_no_device(content, problem):
    with other_server(content) as port:
        (camera,) = ask_cameras([device_at(f"127.0.0.1:{port}")], Logins())
    assert problem in camera.problem
    assert camera.streams == ()


@pytest.mark.parametrize("start", [b"HTTP/1.0 200 OK\r\nX: ", http_answer(b"<a>")])
def test_a_device_that_says_a_little_now_and_then_has_its_time(monkeypatch, start):
    monkeypatch.setattr("upperson_camera.soap._CALL_S", 0.5)
    with dripping_server(start) as (port, cut):
        (camera,) = ask_cameras([device_at(f"127.0.0.1:{port}")], Logins())
        assert camera.problem == "it does not answer within 0.5 s"
        assert cut.wait(10), "nobody reads it any more"


def test_a_device_has_its_time_for_all_answers_together(monkeypatch):
    monkeypatch.setattr("upperson_camera.soap._CALLS_S", -1.0)
    with onvif_device(streams=STREAMS) as device:
        assert "it is too slow" in ask(device).problem
        assert device.asked == []


@pytest.mark.parametrize(
    "challenge",
    [
        "Digest", "Digest ", "Digest realm", "Digest realm=", "Digest =", "Digest ,", "Digest a=1",
        'Digest realm="a", nonce=', 'Digest realm="a", nonce="b", qop="auth-int"',
        'Digest realm="a", nonce="b", qop=', 'Digest realm="a", nonce="b", algorithm=SHA-512',
        'Digest realm="a", nonce="b", algorithm=', 'Digest realm="\xe4", nonce="b"',
        'Digest realm="a", nonce="\xff\xfe"', "Digest " + "a=b, " * 3000,
        'Digest realm="' + "a" * 9000,
        "Basic", "Bearer x", "Negotiate", "", '"', "Digest \x01\x02=\x03",
    ],
)  # fmt: skip
def test_a_challenge_that_nobody_can_answer_is_a_refusal(challenge):
    def answer(name):
        head = f"HTTP/1.0 401 No\r\nWWW-Authenticate: {challenge}\r\n\r\n"
        return head.encode("latin-1")

    with onvif_device(login=LOGIN, answer=answer) as device:
        assert ask(device, LOGIN).problem == "user name and password are wrong"


def test_nobody_there():
    with no_server() as port:
        (camera,) = ask_cameras([device_at(f"127.0.0.1:{port}")], Logins())
    assert camera.problem == f"nothing listens at http://127.0.0.1:{port}/onvif/device_service"


def test_a_device_cannot_send_us_to_another():
    with onvif_device(streams=STREAMS, login=LOGIN) as victim:
        for other in (f"localhost:{victim.port}", "[::1", "127.0.0.1@localhost:1", ""):
            with onvif_device(other_host=other or " ", login=LOGIN) as device:
                assert "it sends on to another place" in ask(device, LOGIN).problem
        assert victim.asked == []


@pytest.mark.parametrize(
    ("place", "address"),
    [
        ("10.0.0.5", "http://10.0.0.5/onvif/device_service"),
        ("10.0.0.5:8000", "http://10.0.0.5:8000/onvif/device_service"),
        ("cam.local", "http://cam.local/onvif/device_service"),
        ("https://cam.local/", "https://cam.local/onvif/device_service"),
        ("http://cam.local/other", "http://cam.local/other"),
    ],
)
def test_a_device_is_named_by_its_host(place, address):
    assert device_at(place).address == address


@pytest.mark.parametrize(
    "place",
    [
        "",
        "rtsp://10.0.0.5/x",
        "anna:secret@10.0.0.5",
        "10.0.0.5:port",
        "http://[::1",
        "anna:12/secret@10.0.0.5",
        "http://anna:12#secret@10.0.0.5/",
    ],
)
def test_what_is_no_host(place):
    with pytest.raises(UsageError, match="is no camera's host") as raised:
        device_at(place)
    assert "secret" not in str(raised.value)


@pytest.fixture
def netrc_file(tmp_path):
    def write(text, mode=0o600):
        path = tmp_path / "cameras.netrc"
        path.write_text(text)
        path.chmod(mode)
        return path

    return write


def test_logins_come_from_a_file_by_host(netrc_file):
    path = netrc_file(
        "machine 10.0.0.5 login viewer password p:w/1@x\nmachine Cam.local login a password b\n"
    )
    logins = Logins.read(path)
    assert logins.of("10.0.0.5") == ("viewer", "p:w/1@x")
    assert logins.of("10.0.0.6") is None
    assert "p:w" not in repr(logins)
    for address, given in (
        ("rtsp://10.0.0.5:554/s?a=1", "rtsp://viewer:p%3Aw%2F1%40x@10.0.0.5:554/s?a=1"),
        ("rtsp://other@10.0.0.5/s", "rtsp://other@10.0.0.5/s"),
        ("http://cam.local/x", "http://a:b@cam.local/x"),
        ("http://CAM.local/x", "http://a:b@CAM.local/x"),
        ("rtsp://10.0.0.6/s", "rtsp://10.0.0.6/s"),
        ("http://[::1", "http://[::1"),
        ("0", "0"),
    ):
        source = logins.given_to(parse_source(address))
        assert source.address == given
    assert logins.given_to(parse_source("rtsp://10.0.0.5/s")).shown == "rtsp://10.0.0.5/s"


def test_a_default_login_is_for_all_hosts(netrc_file):
    logins = Logins.read(netrc_file("default login viewer password secret"))
    assert logins.of("10.0.0.6") == ("viewer", "secret")


@pytest.mark.parametrize(
    ("text", "mode", "message"),
    [
        (
            "machine a login b password c",
            0o644,
            "holds passwords, and others may read it: .*600",
        ),
        ("machine a login b\npassword c\nhunter2 x", 0o600, r"line 3: expected  machine HOST"),
        (None, 0, "cannot read .*No such file"),
    ],
)
def test_files_of_logins_that_cannot_be_used(netrc_file, tmp_path, text, mode, message):
    path = tmp_path / "none" if text is None else netrc_file(text, mode)
    with pytest.raises(InputError, match=message) as raised:
        Logins.read(path)
    assert "hunter2" not in str(raised.value)
    assert os.fspath(path) in str(raised.value)
