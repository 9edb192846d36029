"""Authentication by either scheme, which `test_published` passes; no request is taken twice."""

import base64
import re
import stat
from contextlib import contextmanager

import httpx
import pytest
import requests
from requests.auth import HTTPDigestAuth

from tests.helpers.console import START, last_line, logged, problem
from tests.helpers.refused import refused
from tests.unit.runtime.serve.onvif.conftest import described, envelope, running, security, whole
from tests.unit.runtime.serve.onvif.test_search import ALL, find, refused_as, take
from upperson_console.onvif import security as module
from upperson_console.onvif.security import Authentication, UnauthorizedError, Users, add_user
from upperson_console.onvif.soap import FaultError, read_envelope, time_text
from upperson_console.oversight import Oversight, RefusedSentences, Stated
from upperson_rt.errors import InputError, UsageError

NOW, CREATED = START, "2026-09-21T14:13:20Z"
CAMERAS = (
    "<tse:FindRecordings><tse:Scope/><tse:KeepAliveTime>PT9S</tse:KeepAliveTime>"
    "</tse:FindRecordings>"
)


def post(onvif, content, **more):
    return httpx.post(f"{onvif.url}/onvif/search_service", content=content, **more)


@pytest.mark.parametrize("proof", ["token", "digest", None])
@pytest.mark.parametrize(("name", "password"), [("vms", "wrong"), ("nobody", ""), ("", "x")])
def test_a_wrong_password_is_refused(shared, proof, name, password):
    client = shared.client(name, proof, password)
    refused_as(
        ["NotAuthorized"],
        lambda: client.search.SearchImageByNL(Text="red", **ALL),
        lambda: client.search.EndSearch("x"),
        client.device.GetDeviceInformation,
    )


def test_what_leads_there_needs_no_proof(shared, reader):
    client = shared.client("nobody", "token", "wrong")
    assert 2000 < client.device.GetSystemDateAndTime().UTCDateTime.Date.Year < 2200
    services = {one.Namespace: one.XAddr for one in client.device.GetServices(False)}
    assert services == {
        f"http://www.onvif.org/ver10/{name}/wsdl": f"{shared.url}/onvif/{name}_service"
        for name in ("device", "search")
    }
    found = client.device.GetCapabilities([]).Extension.Search
    assert found.XAddr == services["http://www.onvif.org/ver10/search/wsdl"]
    able = client.search.GetServiceCapabilities()
    assert (able.NLSearch, able.ImageSearch, able.MetadataSearch) == (True, True, False)
    refused_as(
        ["ActionNotSupported", "NoSuchService"], lambda: client.device.GetCapabilities(["PTZ"])
    )
    wanted = "<tds:IncludeCapability>true</tds:IncludeCapability>"
    answer = post(shared, whole(f"<tds:GetServices>{wanted}</tds:GetServices>"))
    assert (answer.status_code, 'NLSearch="true"' in answer.text) == (200, True)
    for name in ("device", "search"):
        answer = httpx.get(f"{shared.url}/onvif/{name}.wsdl")
        assert (answer.status_code, len(described(name).bindings)) == (200, 1)
        assert answer.headers["content-type"].startswith("text/xml")
    assert httpx.get(f"{shared.url}/onvif/other.wsdl").status_code == 422
    for method, path in (("GET", "device_service"), ("GET", "search.wsdl"), ("POST", "x_service")):
        problem(reader.client(method, f"/onvif/{path}"), 404, "not_found")  # Without the option.


def test_a_token_of_the_console_is_no_password(shared):
    ada = shared.client("ada", password=shared.token).search
    refused_as(["NotAuthorized"], lambda: ada.EndSearch("x"))
    headers = {"authorization": f"Bearer {shared.passwords['vms']}"}
    assert httpx.get(f"{shared.url}/api/v1/info", headers=headers).status_code == 401


def test_no_request_is_taken_twice(shared):
    content = envelope(shared, CAMERAS)
    assert post(shared, content).status_code == 200
    again = post(shared, content)
    assert (again.status_code, "ter:NotAuthorized" in again.text) == (400, True)
    nonce = base64.b64decode(re.search("Nonce>([^<]+)<", content.decode())[1])
    other = security("vms", shared.passwords["vms"], nonce, created="2026-01-01T00:00:00Z")
    assert post(shared, envelope(shared, CAMERAS, other)).status_code == 400
    body = envelope(shared, CAMERAS, header="")
    sent = post(shared, body, auth=httpx.DigestAuth("vms", shared.passwords["vms"]))
    assert (sent.status_code, len(sent.history)) == (200, 1)
    assert sent.history[0].headers["www-authenticate"].endswith("algorithm=MD5")
    digest = sent.request.headers["authorization"]
    assert "SHA-256" in digest
    again = post(shared, body, headers={"authorization": digest})
    assert (again.status_code, "www-authenticate" in again.headers) == (401, True)


@pytest.fixture
def known(tmp_path):
    """Proofs of one user at one time, which a test may change."""
    password = add_user(tmp_path / "onvif.json", "vms", None)
    proofs = Authentication(Users(tmp_path / "onvif.json"), clock=lambda: proofs.at)
    proofs.at, proofs.password = NOW, password
    return proofs


def header(known, **more):
    """A header of WS-Security, read."""
    content = whole("<a/>", header=security("vms", known.password, **more))
    return read_envelope(content.encode())[0][0]


@contextmanager
def unauthorized(code):
    with pytest.raises(UnauthorizedError) as found:
        yield found
    assert found.value.problem == code


def test_a_nonce_is_remembered_as_long_as_it_is_valid(known, monkeypatch):
    monkeypatch.setattr(module, "_MOST_REMEMBERED", 3)
    late = "2026-09-21T14:18:20Z"  # As new as allowed: it is valid for ten minutes.
    token = header(known, nonce=b"once", created=late)
    known.by_header(token)
    for seconds, code in ((0, "replayed"), (600, "replayed"), (601, "clock_differs")):
        known.at = NOW + seconds
        with unauthorized(code):
            known.by_header(token)
    for number in range(9):  # There is room again after old ones.
        known.at = NOW + 301 * number
        known.by_header(header(known, created=time_text(known.at)))
    assert len(known._used["vms"]) <= 3
    known._used.clear()  # A full store drops none that is still valid.
    known.at = NOW
    known.by_header(token)
    known.at = NOW + 301
    for _ in range(2):
        known.by_header(header(known, created=time_text(known.at)))
    with pytest.raises(FaultError) as found:
        known.by_header(header(known, created=time_text(known.at)))
    assert found.value.code == "Receiver"
    with unauthorized("replayed"):
        known.by_header(token)


def test_an_incomplete_token_or_one_of_another_time_is_refused(known):
    for more, code in (
        ({"kind": "PasswordText"}, "malformed"),
        ({"nonce": b""}, "malformed"),
        ({"nonce": bytes(257)}, "replayed"),  # Too long to be remembered.
        ({"created": ""}, "malformed"),
        ({"created": "2026-02-30T00:00:00Z"}, "malformed"),
    ):
        with unauthorized(code):
            known.by_header(header(known, **{"created": CREATED, **more}))
    for seconds in (-299, 299):
        known.at = NOW + seconds
        assert known.by_header(header(known, created=CREATED)).name == "vms"
    for seconds in (-301, 301):
        known.at = NOW + seconds
        with unauthorized("clock_differs"):
            known.by_header(header(known, created=CREATED))


def digest_of(known, name="vms", target="/onvif/x", **more):
    """The header that requests makes for a challenge."""
    auth = HTTPDigestAuth(name, known.password)
    auth.init_per_thread_state()
    challenge = known.challenge("x", "missing").challenges[-1]
    auth._thread_local.chal = requests.utils.parse_dict_header(challenge.partition(" ")[2])
    auth._thread_local.chal.update(more)
    return (auth.build_digest_header("POST", f"http://a{target}") or "").partition(" ")[2]


def test_a_digest_must_be_whole_of_one_method_and_of_now(known):
    for more in (
        {"name": "nobody"}, {"target": "/onvif/y"}, {"realm": "elsewhere"}, {"qop": "auth-int"},
        {"algorithm": "SHA-512"}, {"algorithm": "MD5-SESS"}, {"nonce": "zz--"},
        {"nonce": "6ab2d0c0-0011223344556677-" + "0" * 32},
    ):  # fmt: skip
        made = digest_of(known, **more)
        with pytest.raises(UnauthorizedError) as caught:
            known.by_digest(made, "POST", "/onvif/x")
        assert len(caught.value.challenges) == 2
    assert known.by_digest(digest_of(known), "POST", "/onvif/x").name == "vms"
    with unauthorized("unknown"):
        known.by_digest(digest_of(known), "GET", "/onvif/x")
    made = digest_of(known)
    known.at = NOW + 301
    with unauthorized("nonce_expired") as caught:
        known.by_digest(made, "POST", "/onvif/x")
    assert all(one.endswith("stale=true") for one in caught.value.challenges)
    for text in ("", ",", "=", 'username="', "a=b", 'nc="x', "username=\udcff", "\x00"):
        with unauthorized("malformed"):
            known.by_digest(text, "POST", "/")


def test_a_picture_is_shown_to_who_may_see_it(shared, vms):
    found = take(vms, vms.SearchImageByNL(Text="red", **ALL)).Result

    def get(place, *user):
        auth = httpx.DigestAuth(user[0], shared.passwords[user[0]]) if user else None
        return httpx.get(place, auth=auth)

    for one in found[:2]:  # A red one at each camera.
        answer = get(one.TargetImageURI)
        assert (answer.status_code, "ter:NotAuthorized" in answer.text) == (401, True)
        answer = get(one.TargetImageURI, "vms")
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg")
        answer = get(one.TargetImageURI, "door")
        assert answer.status_code == (200 if one.RecordingToken == "gate" else 404)
    assert len({one.RecordingToken for one in found[:2]}) == 2
    problem(get(f"{shared.url}/onvif/pictures/999999", "vms"), 404, "picture_not_found")


def test_passwords_are_for_their_owner_alone(tmp_path):
    file = tmp_path / "onvif.json"
    password = add_user(file, "vms", None)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(password) == 24
    add_user(file, "door", ("gate",))
    again = add_user(file, "vms", None)
    users = Users(file)
    assert users.password("vms") == again != password
    assert users.account("door").cameras == ("gate",)
    assert users.account("nobody") is None
    for name in ("", "a b", 'a"', "a:b", "\u00e4", "x" * 65):  # Clients encode them differently.
        with refused("onvif_name_invalid", UsageError, found=name):
            add_user(file, name, None)
    file.chmod(0o640)
    assert users.account("vms") is None  # A running console sees it.
    assert users.password("vms") != again
    with pytest.raises(InputError, match="chmod 600"):
        Users(file)
    assert Users.read(file)  # To list and revoke them.


def test_purposes_refused_sentences_and_failed_logins(served_folder, served_encoder, tmp_path):
    vms = Stated(purpose="Missing person", case="2026-1")
    oversight = Oversight(
        purposes=("Missing person",), accounts={"vms": vms}, refused_sentences=RefusedSentences()
    )
    with running(served_folder / "gallery", tmp_path, served_encoder, oversight) as onvif:
        find(onvif.client("vms").search)
        line = logged(onvif, user="vms", purpose="Missing person", case="2026-1")
        refused_as(["Action"], lambda: find(onvif.client("door").search))  # Without a purpose.
        assert last_line(onvif) == line
        refused_as(["InvalidArgVal"], lambda: find(onvif.client("vms").search, "black man"))
        logged(onvif, action="refused", user="vms", sentence="black man")
        assert len(onvif.sessions._sessions) == 1
        wrong = onvif.client("vms", password="wrong-password").search
        refused_as(["NotAuthorized"], lambda: find(wrong))
        logged(onvif, action="login-failed", details={"onvif": "unknown"})
        assert "wrong-password" not in onvif.log.read_text()
