"""Authentication by either scheme; no request is accepted twice."""

import base64
import re
import stat
from contextlib import contextmanager

import httpx
import pytest
import requests
from requests.auth import HTTPDigestAuth
from zeep.exceptions import Fault

from tests.helpers.console import problem
from tests.helpers.refused import refused
from tests.unit.runtime.serve.onvif.conftest import NAMESPACES, described, security
from tests.unit.runtime.serve.onvif.test_search import ALL, MINUTE, take
from upperson_console.onvif import security as module
from upperson_console.onvif.security import Authentication, UnauthorizedError, Users, add_user
from upperson_console.onvif.soap import FaultError, read_envelope, time_text
from upperson_rt.errors import InputError, UsageError

NOW = 1_790_000_000.0
CREATED = "2026-09-21T14:13:20Z"
CAMERAS = (
    "<tse:FindRecordings><tse:Scope/><tse:KeepAliveTime>PT9S</tse:KeepAliveTime>"
    "</tse:FindRecordings>"
)


def post(onvif, content, **headers):
    """Send the bytes of an envelope; return status and answer."""
    answer = httpx.post(f"{onvif.url}/onvif/search_service", content=content, headers=headers)
    return answer.status_code, answer


@pytest.mark.parametrize("proof", ["token", "digest"])
def test_both_schemes_are_accepted(shared, proof):
    client = shared.client("door", proof)
    for _ in range(3):  # Each request proves it again.
        token = client.search.FindRecordings(Scope={}, KeepAliveTime=MINUTE)
        client.search.EndSearch(token)
    found = client.device.GetDeviceInformation()
    assert found.Manufacturer == "UP-Person Edge"
    assert found.SerialNumber == shared.service.encoder.fingerprint


@pytest.mark.parametrize("proof", ["token", "digest", None])
@pytest.mark.parametrize(
    ("name", "password"), [("vms", "wrong"), ("nobody", "wrong"), ("nobody", ""), ("", "x")]
)
def test_a_wrong_one_is_not(shared, proof, name, password):
    client = shared.client(name, proof, password)
    for ask in (
        lambda: client.search.FindRecordings(Scope={}, KeepAliveTime=MINUTE),
        lambda: client.search.SearchImageByNL(Text="red", **ALL),
        lambda: client.search.GetNLSearchResults("x"),
        lambda: client.search.EndSearch("x"),
        client.device.GetDeviceInformation,
    ):
        with pytest.raises(Fault) as caught:
            ask()
        assert caught.value.code == "env:Sender"
        assert [code.localname for code in caught.value.subcodes] == ["NotAuthorized"]


@pytest.mark.parametrize("proof", ["token", "digest", None])
def test_what_leads_there_needs_no_proof(shared, proof):
    client = shared.client("nobody", proof, "wrong")
    moment = client.device.GetSystemDateAndTime().UTCDateTime
    assert 2000 < moment.Date.Year < 2200
    services = {one.Namespace: one.XAddr for one in client.device.GetServices(False)}
    assert services == {
        f"http://www.onvif.org/ver10/{name}/wsdl": f"{shared.url}/onvif/{name}_service"
        for name in ("device", "search")
    }
    for given in ([], ["All"], ["Device", "Media"]):
        found = client.device.GetCapabilities(given)
        assert found.Extension.Search.XAddr == services["http://www.onvif.org/ver10/search/wsdl"]
        assert found.Extension.Search.NLSearch is True
    with pytest.raises(Fault) as caught:
        client.device.GetCapabilities(["PTZ"])
    assert caught.value.subcodes[-1].localname == "NoSuchService"
    abilities = client.search.GetServiceCapabilities()
    assert abilities.NLSearch
    assert abilities.ImageSearch
    assert not abilities.MetadataSearch


def test_services_report_their_capabilities(shared):
    answer = httpx.post(
        f"{shared.url}/onvif/device_service",
        content=b'<e:Envelope xmlns:e="http://www.w3.org/2003/05/soap-envelope"><e:Body>'
        b'<GetServices xmlns="http://www.onvif.org/ver10/device/wsdl">'
        b"<IncludeCapability>true</IncludeCapability></GetServices></e:Body></e:Envelope>",
    )
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/soap+xml; charset=utf-8"
    assert 'NLSearch="true"' in answer.text
    assert answer.text.count("Version>") == 4


def test_a_token_of_the_console_is_no_password(shared):
    with pytest.raises(Fault) as caught:
        shared.client("ada", password=shared.token).search.EndSearch("x")
    assert [code.localname for code in caught.value.subcodes] == ["NotAuthorized"]
    answer = httpx.get(
        f"{shared.url}/api/v1/info", headers={"authorization": f"Bearer {shared.passwords['vms']}"}
    )
    assert answer.status_code == 401


def test_a_request_is_not_taken_twice(shared, envelope):
    content = envelope(shared, CAMERAS)
    assert post(shared, content)[0] == 200
    status, answer = post(shared, content)
    assert status == 400
    assert "ter:NotAuthorized" in answer.text
    nonce = base64.b64decode(re.search("Nonce>([^<]+)<", content.decode())[1])
    other = security("vms", shared.passwords["vms"], nonce, created="2026-01-01T00:00:00Z")
    assert post(shared, envelope(shared, CAMERAS, other))[0] == 400


def test_a_digest_is_not_taken_twice(shared, envelope):
    session = requests.Session()
    auth = HTTPDigestAuth("vms", shared.passwords["vms"])
    body = envelope(shared, CAMERAS, header="")
    sent = session.post(f"{shared.url}/onvif/search_service", data=body, auth=auth)
    session.close()
    assert sent.status_code == 200
    challenges = sent.history[0].headers["www-authenticate"]
    assert "algorithm=SHA-256" in challenges
    assert challenges.endswith("algorithm=MD5")
    status, answer = post(shared, body, authorization=sent.request.headers["authorization"])
    assert status == 401
    assert "www-authenticate" in answer.headers


def test_a_digest_of_sha_256_is_taken(shared, envelope):
    auth = httpx.DigestAuth("vms", shared.passwords["vms"])
    body = envelope(shared, CAMERAS, header="")
    answer = httpx.post(f"{shared.url}/onvif/search_service", content=body, auth=auth)
    assert answer.status_code == 200
    assert "SHA-256" in answer.request.headers["authorization"]


@pytest.fixture
def known(tmp_path):
    """Proofs of one user at one time, which a test may change."""
    password = add_user(tmp_path / "onvif.json", "vms", None)
    proofs = Authentication(Users(tmp_path / "onvif.json"), clock=lambda: proofs.at)
    proofs.at, proofs.password = NOW, password
    return proofs


def header(name, password, **more):
    """A header of WS-Security, read."""
    found, _ = read_envelope(
        (
            f"<env:Envelope {NAMESPACES}><env:Header>{security(name, password, **more)}"
            "</env:Header><env:Body><a/></env:Body></env:Envelope>"
        ).encode()
    )
    return found[0]


@contextmanager
def unauthorized(code):
    with pytest.raises(UnauthorizedError) as found:
        yield found
    assert found.value.problem == code


def test_clocks_may_differ_somewhat(known):
    for seconds, is_taken in ((-301, False), (-299, True), (299, True), (301, False)):
        known.at = NOW + seconds
        if is_taken:
            assert known.by_header(header("vms", known.password, created=CREATED)).name == "vms"
        else:
            with unauthorized("clock_differs"):
                known.by_header(header("vms", known.password, created=CREATED))


def test_a_nonce_is_remembered_as_long_as_it_is_valid(known, monkeypatch):
    monkeypatch.setattr(module, "_MOST_REMEMBERED", 3)
    late = "2026-09-21T14:18:20Z"  # As new as allowed: it is valid for ten minutes.
    token = header("vms", known.password, nonce=b"once", created=late)
    known.by_header(token)
    for seconds in (0, 599, 600):
        known.at = NOW + seconds
        with unauthorized("replayed"):
            known.by_header(token)
    known.at = NOW + 601
    with unauthorized("clock_differs"):
        known.by_header(token)
    for number in range(9):  # There is room again after old ones.
        known.at = NOW + 301 * number
        known.by_header(header("vms", known.password, created=time_text(known.at)))
    assert len(known._used["vms"]) <= 3
    known._used.clear()  # A full store drops none that is still valid.
    known.at = NOW
    known.by_header(token)
    known.at = NOW + 301
    for _ in range(2):
        known.by_header(header("vms", known.password, created=time_text(known.at)))
    with pytest.raises(FaultError) as found:
        known.by_header(header("vms", known.password, created=time_text(known.at)))
    assert found.value.code == "Receiver"
    with unauthorized("replayed"):
        known.by_header(token)


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"kind": "http://docs.oasis-open.org/x#PasswordText"}, "malformed"),
        ({"nonce": b""}, "malformed"),
        ({"nonce": bytes(257)}, "replayed"),  # Too long to be remembered.
        ({"created": ""}, "malformed"),
        ({"created": "yesterday"}, "malformed"),
        ({"created": "2026-02-30T00:00:00Z"}, "malformed"),
    ],
)
def test_an_incomplete_token_is_refused(known, more, code):
    with unauthorized(code):
        known.by_header(header("vms", known.password, **{"created": CREATED, **more}))


def digest_of(known, name="vms", target="/onvif/x", **more):
    """The header that requests makes for a challenge."""
    auth = HTTPDigestAuth(name, known.password)
    auth.init_per_thread_state()
    challenge = known.challenge("x", "missing").challenges[-1]
    auth._thread_local.chal = requests.utils.parse_dict_header(challenge.partition(" ")[2])
    auth._thread_local.chal.update(more)
    return (auth.build_digest_header("POST", f"http://a{target}") or "").partition(" ")[2]


@pytest.mark.parametrize(
    "more",
    [
        {"name": "nobody"},
        {"target": "/onvif/y"},
        {"realm": "elsewhere"},
        {"qop": "auth-int"},
        {"algorithm": "SHA-512"},
        {"algorithm": "MD5-SESS"},
        {"nonce": "6ab2d0c0-0011223344556677-" + "0" * 32},
        {"nonce": "zz--"},
    ],
)
def test_a_digest_must_be_whole(known, more):
    assert known.by_digest(digest_of(known), "POST", "/onvif/x").name == "vms"
    made = digest_of(known, **more)
    with pytest.raises(UnauthorizedError) as caught:
        known.by_digest(made, "POST", "/onvif/x")
    assert len(caught.value.challenges) == 2
    with pytest.raises(UnauthorizedError):
        known.by_digest(digest_of(known), "GET", "/onvif/x")


@pytest.mark.parametrize(
    "text", ["", ",", "=", 'username="', "a=b", 'nc="x', "username=\udcff", "\x00"]
)
def test_nonsense_is_no_digest(known, text):
    with unauthorized("malformed"):
        known.by_digest(text, "POST", "/")


def test_an_old_challenge_is_renewed(known):
    made = digest_of(known)
    known.at = NOW + 301
    with unauthorized("nonce_expired") as caught:
        known.by_digest(made, "POST", "/onvif/x")
    assert all(one.endswith("stale=true") for one in caught.value.challenges)


def test_a_picture_is_shown_to_who_may_see_it(shared, vms):
    for one in take(vms, vms.SearchImageByNL(Text="red", **ALL)).Result:
        place = one.TargetImageURI
        answer = httpx.get(place)
        assert answer.status_code == 401
        assert "ter:NotAuthorized" in answer.text
        answer = httpx.get(place, auth=httpx.DigestAuth("vms", shared.passwords["vms"]))
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "image/jpeg"
        answer = httpx.get(place, auth=httpx.DigestAuth("door", shared.passwords["door"]))
        assert answer.status_code == (200 if one.RecordingToken == "gate" else 404)
    missing = f"{shared.url}/onvif/pictures/999999"
    answer = httpx.get(missing, auth=httpx.DigestAuth("vms", shared.passwords["vms"]))
    assert answer.status_code == 404
    assert answer.json()["detail"].startswith("there is no picture")


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
    with pytest.raises(InputError, match="chmod 600"):
        Users(file)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        ('{"schema_version": 1, "onvif_users": []}', "credentials_empty"),
        ('{"schema_version": 3, "onvif_users": []}', None),
        ('{"schema_version": 1, "tokens": []}', "credentials_of_other_kind"),
        ("[]", "credentials_of_other_kind"),
        ('{"schema_version": 1, "onvif_users": [{"name": "a", "password": "short"}]}', None),
        ("", "credentials_unreadable"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, content, code):
    file = tmp_path / "onvif.json"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(InputError) as found:
        Users(file)
    assert code in (None, found.value.code)


def test_its_description_needs_no_login_and_without_the_option_there_is_none(shared, reader):
    for name in ("device", "search"):
        answer = httpx.get(f"{shared.url}/onvif/{name}.wsdl")
        assert answer.status_code == 200
        assert len(described(name).bindings) == 1
        assert answer.headers["content-type"].startswith("text/xml")
    assert httpx.get(f"{shared.url}/onvif/other.wsdl").status_code == 422
    for path in ("/onvif/device_service", "/onvif/search.wsdl"):
        problem(reader.client.get(path), 404, "not_found")
    problem(reader.client.post("/onvif/search_service"), 404, "not_found")
