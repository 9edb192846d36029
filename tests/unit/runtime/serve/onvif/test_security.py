"""Who gets in, by either proof; nothing is proof twice."""

import base64
import json
import os
import re
import stat

import httpx
import pytest
import requests
from requests.auth import HTTPDigestAuth
from zeep.exceptions import Fault

from tests.helpers.console import START
from tests.unit.runtime.serve.onvif.conftest import described, security
from tests.unit.runtime.serve.onvif.test_search import ALL, MINUTE, take
from upperson_console.onvif import security as module
from upperson_console.onvif.security import Authentication, StrangerError, Users, add_user
from upperson_console.onvif.soap import read_envelope, time_text
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
def test_both_proofs_are_taken(shared, proof):
    search = shared.client("door", proof).search
    for _ in range(3):  # Each is a new one.
        token = search.FindRecordings(Scope={}, KeepAliveTime=MINUTE)
        search.EndSearch(token)


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
    with pytest.raises(Fault, match="no such service"):
        client.device.GetCapabilities(["PTZ"])
    abilities = client.search.GetServiceCapabilities()
    assert abilities.NLSearch
    assert abilities.ImageSearch
    assert not abilities.MetadataSearch


def test_services_can_tell_what_they_can(shared):
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


def test_it_says_what_it_is(shared):
    found = shared.client().device.GetDeviceInformation()
    assert found.Manufacturer == "UP-Person Edge"
    assert found.SerialNumber == shared.desk.encoder.fingerprint


def test_a_token_of_the_console_is_no_password(shared):
    with pytest.raises(Fault, match="not known"):
        shared.client("ada", password=shared.token).search.EndSearch("x")
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
    assert "used before" in answer.text
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
    assert "used before" in answer.text
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
    from tests.unit.runtime.serve.onvif.conftest import NAMESPACES

    found, _ = read_envelope(
        (
            f"<env:Envelope {NAMESPACES}><env:Header>{security(name, password, **more)}"
            "</env:Header><env:Body><a/></env:Body></env:Envelope>"
        ).encode()
    )
    return found[0]


def test_clocks_may_differ_somewhat(known):
    for seconds, is_taken in ((-301, False), (-299, True), (299, True), (301, False)):
        known.at = NOW + seconds
        if is_taken:
            assert known.by_header(header("vms", known.password, created=CREATED)).name == "vms"
        else:
            with pytest.raises(StrangerError, match="GetSystemDateAndTime"):
                known.by_header(header("vms", known.password, created=CREATED))


def test_a_nonce_is_remembered_for_as_long_as_it_would_be_taken(known, monkeypatch):
    monkeypatch.setattr(module, "_MOST_REMEMBERED", 3)
    late = "2026-09-21T14:18:20Z"  # As new as may be: it would be taken for ten minutes.
    token = header("vms", known.password, nonce=b"once", created=late)
    known.by_header(token)
    for seconds in (0, 599, 600):
        known.at = NOW + seconds
        with pytest.raises(StrangerError, match="used before"):
            known.by_header(token)
    known.at = NOW + 601
    with pytest.raises(StrangerError, match="too old"):
        known.by_header(token)
    for number in range(9):  # There is room again, as old ones go.
        known.at = NOW + 301 * number
        created = time_text(known.at)
        known.by_header(header("vms", known.password, created=created))
    assert len(known._used["vms"]) <= 3


def test_who_sends_too_much_is_told_to_wait(known, monkeypatch):
    monkeypatch.setattr(module, "_MOST_REMEMBERED", 3)
    for _ in range(3):
        known.by_header(header("vms", known.password, created=CREATED))
    with pytest.raises(module.FaultError, match="too many requests of one user"):
        known.by_header(header("vms", known.password, created=CREATED))


@pytest.mark.parametrize(
    "more",
    [
        {"kind": "http://docs.oasis-open.org/x#PasswordText"},
        {"nonce": b""},
        {"nonce": os.urandom(257)},
        {"created": ""},
        {"created": "yesterday"},
        {"created": "2026-02-30T00:00:00Z"},
    ],
)
def test_half_a_proof_is_none(known, more):
    with pytest.raises(StrangerError):
        known.by_header(header("vms", known.password, **{"created": CREATED, **more}))


def digest_of(known, name="vms", target="/onvif/x", **more):
    """The header that requests makes for a challenge."""
    auth = HTTPDigestAuth(name, known.password)
    auth.init_per_thread_state()
    challenge = known.challenge("x").challenges[-1]
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
    with pytest.raises(StrangerError) as caught:
        known.by_digest(made, "POST", "/onvif/x")
    assert len(caught.value.challenges) == 2
    with pytest.raises(StrangerError):
        known.by_digest(digest_of(known), "GET", "/onvif/x")


@pytest.mark.parametrize(
    "text", ["", ",", "=", 'username="', "a=b", 'nc="x', "username=\udcff", "\x00"]
)
def test_nonsense_is_no_digest(known, text):
    with pytest.raises(StrangerError, match="cannot be read"):
        known.by_digest(text, "POST", "/")


def test_an_old_challenge_is_renewed(known):
    made = digest_of(known)
    known.at = NOW + 301
    with pytest.raises(StrangerError, match="too old") as caught:
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
    file.chmod(0o640)
    with pytest.raises(InputError, match="chmod 600"):
        Users(file)


@pytest.mark.parametrize("name", ["", "a b", 'a"', "a:b", "\u00e4", "x" * 65])
def test_a_name_is_one_that_every_client_sends(tmp_path, name):
    with pytest.raises(UsageError, match="letters a-z"):
        add_user(tmp_path / "onvif.json", name, None)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"schema_version": 1, "onvif_users": []}', "names nobody"),
        ('{"schema_version": 3, "onvif_users": []}', "update upperson-rt"),
        (
            '{"schema_version": 1, "tokens": []}',
            "tokens of the console, expected ONVIF users",
        ),
        ("[]", "holds something else, expected ONVIF users"),
        (
            '{"schema_version": 1, "onvif_users": [{"name": "a", "password": "short"}]}',
            "16 letters",
        ),
        ("", "not valid JSON.*; expected ONVIF users, as  upperson-rt token FILE NAME --onvif"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path, content, words):
    file = tmp_path / "onvif.json"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(InputError, match=words):
        Users(file)


def test_what_describes_it_is_there_for_anybody(shared):
    for name in ("device", "search"):
        answer = httpx.get(f"{shared.url}/onvif/{name}.wsdl")
        assert answer.status_code == 200
        assert len(described(name).bindings) == 1
        assert answer.headers["content-type"].startswith("text/xml")
    assert httpx.get(f"{shared.url}/onvif/other.wsdl").status_code == 422


def test_without_the_option_there_is_nothing(reader):
    for path in ("/onvif/device_service", "/onvif/search.wsdl"):
        assert reader.client.get(path).status_code == 404
    assert START
    assert json.loads(reader.client.post("/onvif/search_service").text)["status"] == 404
