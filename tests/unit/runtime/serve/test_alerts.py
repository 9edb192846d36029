"""Text alerts in the API and the pages: what they do, who may, and what the log has of it."""

import html
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.alert_kills import SENTENCE, vectors_of
from tests.helpers.console import ODD, Client, log_lines, problem
from tests.helpers.toy_bundle import draw_person
from upperson_alerts.alerts import add_alert, note_uncalibrated
from upperson_console.accounts import Access, Account
from upperson_console.app import make_app
from upperson_rt.gallery import Gallery, Item
from upperson_rt.ingest.service import Crop, Ingest

API, MESSAGES = "/api/v1/alerts", "/api/v1/alerts/messages"
VISITS = 400
"""Of yesterday, at each of two cameras."""


def limited(console, role, *cameras):
    """A client of an account that sees some cameras alone."""
    account = Account(name="lea", role=role, cameras=cameras, logs_in=False)
    return Client(make_app(console.service, Access(None, account)))


@pytest.fixture
def folder(served_encoder, tmp_path):
    """A gallery of a day's visits, whose scores for `SENTENCE` are 0 to 0.4."""
    space = served_encoder.fingerprint, served_encoder.embed_dim
    rng = np.random.default_rng(0)
    with Gallery.open(tmp_path / "alerted", *space, create=True) as gallery:
        begin = (time.time() // 86400 - 1) * 86400
        items = [
            Item(key=f"{camera}-{n}", camera=camera, time=begin + n * 86400 / VISITS, track=str(n))
            for camera in ("gate", ODD)
            for n in range(VISITS)
        ]
        gallery.add(items, vectors_of(served_encoder, rng.uniform(0, 0.4, len(items)), rng))
        gallery.crops_dir.mkdir()
        draw_person(gallery.crops_dir / "new.png", "red", seed=1)
    return tmp_path / "alerted"


@pytest.fixture
def alerted(make_console, folder):
    """A console over that gallery, and functions that commit new people who match, and so on."""
    console = make_console(folder)

    def appear(*names, camera="gate"):
        encoder, gallery = console.service.encoder, console.service.current.last.rows
        about = {"camera": camera, "time": time.time(), "crop": "new.png"}
        items = [Item(key=name, track=name, **about) for name in names]
        crops = [Crop(item=item, pixels=np.zeros((24, 8, 3), np.uint8)) for item in items]
        vectors = vectors_of(encoder, np.linspace(0.8, 0.9, len(names)), np.random.default_rng(1))
        Ingest(encoder, gallery).commit(crops, vectors)

    def add(**more):
        answer = console.client.post(API, json={"sentence": SENTENCE, "rate": "4/day", **more})
        assert answer.status_code == 201, answer.text
        return answer.json()

    def messages(query=""):
        return console.client.get(MESSAGES + query).json()

    return SimpleNamespace(**vars(console), appear=appear, add=add, messages=messages)


def test_an_alert_is_added_judged_paused_and_removed(alerted):
    client = alerted.client
    added = alerted.add(cameras=["gate"], name="red")
    assert (added["state"], added["missing"], added["cameras"]) == ("active", 0, ["gate"])
    assert (added["rate"], added["visits_per_day"], added["notices"]) == ("4/day", VISITS, [])
    one = f"{API}/{added['id']}"
    alerted.appear("a", "b", "c")
    alerted.appear("hidden", camera=ODD)
    test = client.get(f"{one}/test").json()
    assert (test["visits"], test["count"], len(test["best"])) == (VISITS + 3, 4, 5)
    assert {visit["track"] for visit in test["raised"]} > {"a", "b", "c"}
    found = alerted.messages()
    assert {message["track"] for message in found} == {"a", "b", "c"}
    assert {message["alert"] for message in found} == {added["id"]}
    assert found == alerted.messages(f"?state=ready&alert={added['id']}")
    (newest,) = alerted.messages("?limit=1")
    assert newest == found[0]
    assert (newest["camera"], newest["state"], newest["verdict"]) == ("gate", "ready", None)
    assert newest["score"] == pytest.approx(0.85, abs=0.06)
    assert client.get(newest["item"]["picture"]).headers["content-type"] == "image/jpeg"
    for message, verdict in zip(found, ("confirm", "dismiss"), strict=False):
        judged = client.post(f"{MESSAGES}/{message['id']}/{verdict}").json()
        assert judged[f"{verdict}ed"] == 1
    verdicts = [message["verdict"] for message in alerted.messages()]
    assert verdicts == ["confirmed", "dismissed", None]
    assert client.post(f"{one}/pause").json()["state"] == "paused"
    alerted.appear("d")
    assert len(alerted.messages()) == 3
    assert client.post(f"{one}/resume").json()["state"] == "active"
    assert client("DELETE", one).status_code == 204
    assert client.get(API).json() == alerted.messages() == []
    lines = log_lines(alerted)
    assert {line["user"] for line in lines} == {"local"}
    actions = [line["action"] for line in lines if line["action"] != "view"]
    changes = ("add", "test", "confirm", "dismiss", "pause", "resume", "remove")
    assert actions == [f"alert-{change}" for change in changes]
    assert (lines[0]["sentence"], lines[0]["filter"]) == (SENTENCE, {"camera": ["gate"]})
    shown = next(line for line in lines if line["action"] == "view")
    assert {*map(str, shown["ids"])} == {message["item"]["id"] for message in found}


def test_what_an_alert_still_needs_and_that_it_is_uncalibrated(alerted):
    added = alerted.add(rate="1/week")
    assert (added["state"], added["missing"] > 0) == ("collecting", True)
    assert f"{added['missing']:,} more visits" in html.unescape(alerted.client.get("/alerts").text)
    with alerted.service.gallery.outbox(write=True) as outbox:
        note_uncalibrated(outbox, {added["id"]: True})
    (found,) = alerted.client.get(API).json()
    assert found["state"] == "uncalibrated"


def test_a_cap_is_shown_and_a_message_stays_as_long_as_its_picture(alerted):
    alerted.add(cap=1)
    alerted.appear("a")
    alerted.service.gallery.bin.add(["a"], "olga", "blurred")
    (message,) = alerted.messages()
    assert (message["track"], message["item"]) == ("a", None)
    assert message["id"] in alerted.client.get("/alerts").text
    alerted.service.gallery.bin.delete()
    assert alerted.messages() == []
    assert message["id"] not in alerted.client.get("/alerts").text
    alerted.appear("b", "c")
    assert [one["type"] for one in alerted.messages()].count("alert.capped") == 1
    assert "The cap of this hour is reached" in alerted.client.get("/alerts").text


def test_viewers_change_nothing_and_see_no_other_cameras(alerted):
    everywhere, there, here = (
        alerted.add(**more)["id"] for more in ({}, {"cameras": [ODD]}, {"cameras": ["gate"]})
    )
    alerted.appear("a")
    alerted.appear("secret", camera=ODD)
    assert len(alerted.messages()) == 4
    for client in (limited(alerted, "viewer", "gate"), limited(alerted, "operator", "gate")):
        assert [one["id"] for one in client.get(API).json()] == [here]
        (message,) = client.get(MESSAGES).json()
        assert (message["alert"], message["camera"]) == (here, "gate")
        page = client.get("/alerts").text
        assert (message["id"] in page, "hall" in page) == (True, False)
        assert client.get(f"{API}/{here}/test").status_code == 200
        for hidden in (everywhere, there):
            problem(client.get(f"{API}/{hidden}/test"), 404, "alert_not_found")
            problem(client.get(f"{MESSAGES}?alert={hidden}"), 404, "alert_not_found")
            assert client.get(f"/alerts?of={hidden}").status_code == 404
    viewer, operator = limited(alerted, "viewer"), limited(alerted, "operator", "gate")
    for method, path in (
        ("POST", API),
        ("POST", f"{API}/{here}/pause"),
        ("DELETE", f"{API}/{here}"),
        ("POST", f"{MESSAGES}/{message['id']}/confirm"),
    ):
        problem(viewer(method, path, json={"sentence": SENTENCE}), 403, "role_missing")
    for path in ("", f"/{here}/remove", f"/messages/{'0' * 16}/confirm"):
        assert viewer.post(f"/alerts{path}").status_code == 403
    # An operator of one camera: for it alone, and what is hidden looks as if it were not there.
    other = alerted.messages(f"?alert={everywhere}")[0]["id"]
    problem(operator.post(f"{MESSAGES}/{other}/dismiss"), 404, "message_not_found")
    problem(operator("DELETE", f"{API}/{there}"), 404, "alert_not_found")
    body = {"sentence": SENTENCE, "cameras": [ODD]}
    assert "gate" not in problem(operator.post(API, json=body), 422, "camera_unknown")
    assert operator.post(API, json={"sentence": SENTENCE}).json()["cameras"] == ["gate"]


def test_what_is_wrong_or_cannot_be_logged_changes_nothing(alerted, full_disk):
    client = alerted.client

    def add(**more):
        return client.post(API, json={"sentence": SENTENCE, **more})

    problem(add(rate="often"), 422, "rate_malformed")
    problem(add(rate="0/day"), 422, "rate_zero")
    problem(add(sentence="the"), 422, "sentence_not_understood")
    problem(add(cap=0), 422, "request_invalid")
    assert "gate" not in problem(add(cameras=["nowhere"]), 422, "camera_unknown")
    assert client.get(API).json() == []
    id_ = "0" * 8
    problem(client.post(f"{API}/{id_}/resume"), 404, "alert_not_found")
    problem(client.post(f"{MESSAGES}/{id_ * 2}/confirm"), 404, "message_not_found")
    problem(client("DELETE", f"{API}/red"), 422, "request_invalid")
    problem(client.get(f"{API}/{id_}/test?days=0"), 422, "request_invalid")
    kept = alerted.add()
    alerted.appear("a")
    with full_disk():
        for answer in (add(), client("DELETE", f"{API}/{kept['id']}"), client.get(MESSAGES)):
            problem(answer, 507, "log_not_writable")
    assert [one["id"] for one in client.get(API).json()] == [kept["id"]]


def test_a_gallery_without_an_outbox_says_so(alerted, monkeypatch):
    store, client = type(alerted.service.current.last.rows), alerted.client
    monkeypatch.setattr(store, "has_outbox", False)  # As those on Milvus.
    monkeypatch.setattr(store, "outbox", Gallery.outbox)
    assert 'action="/alerts"' not in client.get("/alerts").text
    for method, path in (
        ("GET", API),
        ("GET", MESSAGES),
        ("POST", API),
        ("DELETE", f"{API}/{0:08}"),
    ):
        problem(client(method, path, json={"sentence": SENTENCE}), 422, "outbox_unsupported")


def test_alerts_of_a_read_only_gallery_are_shown_only(served_encoder, folder, make_console):
    with Gallery.open(folder, served_encoder.fingerprint) as gallery:
        add_alert(gallery, served_encoder, SENTENCE, rate=4.0)
    console = make_console(folder)
    console.service.gallery._database.read_only = True  # Root may write everywhere.
    assert "<button>" not in console.client.get("/alerts").text
    (found,) = console.client.get(API).json()
    for path in (API, f"{API}/{found['id']}/pause"):
        answer = console.client.post(path, json={"sentence": SENTENCE})
        problem(answer, 422, "gallery_read_only")


def test_the_page_adds_and_judges_without_scripts(alerted):
    client = alerted.client
    results = client.get("/", params={"q": SENTENCE, "camera": ODD}).text
    link = re.search(r'href="(/alerts\?q=[^"]+)">Alert me', results)[1].replace("&amp;", "&")
    assert "Alert me" not in limited(alerted, "viewer").get("/", params={"q": SENTENCE}).text
    page = client.get(link).text
    assert (f'value="{SENTENCE}"' in page, page.count(" checked"), ODD in page) == (True, 1, False)
    form = {"sentence": SENTENCE, "camera": ["gate"], "count": "4", "period": "day"}
    wrong = client.post("/alerts", data={**form, "sentence": "the"})
    assert (wrong.status_code, 'value="the"' in wrong.text) == (422, True)
    assert client.get(API).json() == []
    assert client.post("/alerts", data=form).status_code == 200
    (alert,) = client.get(API).json()
    assert (alert["cameras"], alert["rate"]) == (["gate"], "4/day")
    alerted.appear("a")
    (message,) = alerted.messages()
    page = client.get("/alerts").text
    assert f"/people/{message['item']['id']}/picture?size=thumb" in page
    judge = f"/alerts/messages/{message['id']}"
    judged = client.post(f"{judge}/dismiss", data={"of": alert["id"]})
    assert judged.status_code == 303
    assert judged.headers["location"] == f"/alerts?of={alert['id']}#m{message['id']}"
    assert "is-no" in client.get(judged.headers["location"]).text
    elsewhere = client.post(f"{judge}/confirm", data={"of": "//elsewhere.example"})
    assert elsewhere.status_code == 422
    assert client.get(f"/alerts/{alert['id']}/test").text.count('class="card"') >= 1
    for change, states in (("pause", ["paused"]), ("resume", ["active"]), ("remove", [])):
        changed = client.post(f"/alerts/{alert['id']}/{change}")
        assert (changed.status_code, changed.headers["location"]) == (303, "/alerts")
        assert [one["state"] for one in client.get(API).json()] == states
