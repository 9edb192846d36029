"""`upperson-rt alert`, from the first picture to a delivered message."""

import json

import pytest

from tests.helpers.gallery_untouched import look_of
from tests.helpers.invoke import run_rt as run
from tests.helpers.toy_bundle import draw_person
from upperson_rt.gallery import Gallery

NOT_RED = ("green", "blue", "white", "yellow")


@pytest.fixture
def alert(toy_bundle, tmp_path, monkeypatch):
    """Runs commands on a gallery of 80 people, none of them in red, four a day."""
    monkeypatch.setenv("UPPERSON_BUNDLE", str(toy_bundle))
    monkeypatch.setenv("UPPERSON_GALLERY", str(tmp_path / "gallery"))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number in range(80):
        name = f"gate_202611{1 + number // 4:02d}_{6 * (number % 4):02d}0000.png"
        draw_person(pictures / name, NOT_RED[number % 4], seed=number)
    index(pictures)

    def call(*words, code=0):
        result = run("alert", *words, "--json")
        assert result.exit_code == code, result.stderr
        found = json.loads(result.stdout)
        return found["error"] if code else found

    return call


def index(path):
    options = ("--camera", "gate", "--time-from", "name", "--threads", 1)
    assert run("index", path, *options, "--backend", "onnxruntime").exit_code == 0


def test_an_alert_from_its_sentence_to_its_delivery(alert, tmp_path):
    assert alert("list") == {"alerts": [], "waiting": {}, "dead": 0}
    assert "no alerts: add one" in run("alert", "list").stdout
    added = alert("add", "man", "in", "red", "coat", "--camera", "gate", "--max-false", "1/week")
    assert (added["sentence"], added["state"], added["cameras"]) == (
        "man in red coat", "active", ["gate"],
    )  # fmt: skip
    assert added["standing"]["visits"] == 80
    index(draw_person(tmp_path / "gate_20261122_120000.png", "red"))
    (message,) = alert("messages")["messages"]
    assert (message["state"], message["verdict"]) == ("ready", None)
    assert message["data"]["camera"] == "gate"
    tried = alert("test", added["id"], "--since", "2026-11-21")
    assert [one["picture"] for one in tried["raised"]] == [message["data"]["picture"]]
    shown = run("alert", "deliver", "--to", "stdout", "--once")
    assert json.loads(shown.stdout)["data"] == message["data"]
    assert "1 delivered, 0 refused" in shown.stderr
    key = message["data"]["id"]
    assert alert("dismiss", key)["dismissed"] == 1
    confirmed = alert("confirm", key)
    assert (confirmed["dismissed"], confirmed["confirmed"]) == (0, 1)
    for command, state in (("pause", "paused"), ("resume", "active")):
        assert alert(command, "man in red coat")["state"] == state
    (listed,) = alert("list")["alerts"]
    assert (listed["delivered"], listed["review"], listed["state"]) == (1, 0, "active")
    for words, text in (
        (("list",), "man in red coat"), (("messages",), key), (("letters",), "no dead letters"),
        (("test", added["id"], "--since", "2026-11-21"), "would have raised"),
        (("replay",), "0 messages"),
        (("pause", added["id"]), "paused"),
        (("deliver", "--to", "stdout", "--forget"), "forgot stdout#"),
        (("remove", added["id"]), f"removed {added['id']}"),
    ):  # fmt: skip
        result = run("alert", *words)
        assert result.exit_code == 0
        assert text in result.stdout
    assert alert("messages") == {"messages": []}


def test_what_cannot_be_is_refused_with_a_code(alert, tmp_path):
    for words, code, exit_code in (
        (("add", "man in red", "--camera", "gaet"), "camera_unknown", 3),
        (("add", "man in red", "--max-false", "0/day"), "rate_zero", 2),
        (("deliver", "--to", "https://u:p@host"), "login_in_address", 2),
    ):
        assert alert(*words, code=exit_code)["code"] == code
    with Gallery.open(tmp_path / "gallery") as gallery, gallery.outbox() as outbox:
        assert outbox.documents("") == {}


def test_listing_and_trying_change_nothing(alert, tmp_path):
    alert("add", "man in red coat")
    before = look_of(tmp_path / "gallery")
    for words in (("list",), ("messages",), ("letters",), ("test", "man in red coat")):
        alert(*words)
    assert look_of(tmp_path / "gallery") == before
