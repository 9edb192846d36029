"""What is raised, kept for review, and not raised, commit by commit."""

from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.alert_kills import SENTENCE, START
from tests.helpers.refused import refused
from upperson_alerts.alerts import (
    add_alert,
    confirm,
    dismiss,
    list_alerts,
    pause_alert,
    recent_messages,
    remove_alert,
    resume_alert,
)
from upperson_alerts.background import Tails
from upperson_alerts.outbox import Failure, Message
from upperson_alerts.replay import replay_alert
from upperson_rt.errors import InputError, UsageError
from upperson_rt.gallery.sqlite import deletion

RATE = 2.0
"""A day; with 400 visits a day p must be at most 1/200."""


def scores(world, count):
    """Scores of people who are not meant: 0 to 0.4."""
    return world.rng.uniform(0, 0.4, count)


@pytest.fixture
def ready(world):
    """A gallery with two days of visits, and an alert that can keep its promise."""
    world.add(scores(world, 800), days=2.0)
    report, notices = add_alert(world.gallery, world.encoder, SENTENCE, rate=RATE, cap=3)
    assert (report.state, report.missing, notices) == ("active", 0, [])
    assert report.standing.per_day == 400
    world.alert = report.alert
    return world


def states(world):
    return [
        (one.body["type"], one.state, one.body["data"].get("reason")) for one in world.messages()
    ]


def key_of(world, message):
    picture = message.body["data"]["picture"]
    return world.gallery.get([picture])[picture][0].key


def stored(world):
    return b"".join(path.read_bytes() for path in world.gallery.path.glob("gallery.sqlite*"))


def set_cap(world, cap):
    with world.gallery.outbox(write=True) as outbox:
        name = f"alert/{world.alert.id}"
        outbox.write(name, outbox.document(name) | {"cap": cap})
        outbox.write("alerts/version", 99)


def test_a_match_is_raised_in_the_same_commit_once_for_a_visit(ready):
    (item,) = ready.items(1, start=START + 2 * 86400)
    ready.commit([item], [0.7])
    (message,) = ready.messages()
    data = message.body["data"]
    assert (message.state, message.topic) == ("ready", ready.alert.id)
    assert data["alert"] == {"id": ready.alert.id, "name": SENTENCE}
    assert (data["camera"], data["track"], data["sentence"]) == ("gate", item.track, SENTENCE)
    assert data["score"] == pytest.approx(0.7, abs=0.01)
    assert data["p_value"] == pytest.approx(1 / 801)
    assert key_of(ready, message) == item.key
    again = [replace(item, key=f"again-{n}") for n in range(5)]
    ready.commit(again, [0.8] * 5)
    ready.commit([item], [0.9])  # Indexed again.
    ready.restart()
    ready.commit([replace(item, key="later")], [0.9])
    assert len(ready.messages()) == 1
    assert ready.gallery.verify() == []


def test_ordinary_visits_raise_no_more_than_promised(ready):
    set_cap(ready, 1000)  # The threshold alone decides.
    days = 5
    found = scores(ready, days * 400)
    items = ready.items(len(found), days=days, start=START + 2 * 86400)
    ready.commit(items, found, 100)
    raised = len(ready.messages(state="ready"))
    assert 0 < raised <= 2 * RATE * days  # A Poisson of mean 10 exceeds 20 once in 600 seeds.
    (report,) = list_alerts(ready.gallery)
    assert report.standing.visits == pytest.approx(800 + len(found), abs=100)
    assert report.days == pytest.approx(days, rel=0.01)
    assert (report.unjudged, report.upper_bound) == (raised, None)
    for one in ready.messages():
        confirm(ready.gallery, one.key)
    (report,) = list_alerts(ready.gallery)
    assert (report.unjudged, report.confirmed) == (0, raised)
    assert report.upper_bound == pytest.approx(3 / report.days)


def test_the_best_picture_of_a_visit_counts(ready):
    (item,) = ready.items(1)
    ready.commit([replace(item, key=f"crop-{n}") for n in range(3)], [0.1, 0.7, 0.6])
    (message,) = ready.messages()
    assert key_of(ready, message) == "crop-1"
    ready.visit(0.8, 0.8, 0.1, track=False)  # Each is a visit of its own.
    assert len(ready.messages()) == 3


def test_alerts_come_pause_and_go_and_look_at_their_cameras(ready):
    ready.visit(0.1)
    report, _ = add_alert(ready.gallery, ready.encoder, SENTENCE, rate=RATE, cameras=["gate"])
    pause_alert(ready.gallery, ready.alert.id)
    ready.visit(0.7, 0.7, camera="hall")
    assert ready.messages() == []
    ready.visit(0.7)
    assert [one.topic for one in ready.messages()] == [report.alert.id]
    resume_alert(ready.gallery, ready.alert.id)
    ready.visit(0.9)
    topics = [one.topic for one in ready.messages()]
    assert sorted(topics) == sorted([ready.alert.id, report.alert.id, report.alert.id])
    remove_alert(ready.gallery, report.alert.id)
    ready.visit(0.95)
    assert [one.topic for one in ready.messages()] == [ready.alert.id] * 2


def test_more_than_the_cap_are_kept_and_one_message_says_so(ready, monkeypatch):
    now = [1_800_000_000.0 // 3600 * 3600]
    monkeypatch.setattr("upperson_alerts.matcher.time.time", lambda: now[0])
    for number in range(8):  # Each beats those before: they are background by then.
        ready.visit(0.7 + number / 100)
    found = states(ready)
    assert found.count(("alert.raised", "ready", None)) == 3
    assert found.count(("alert.raised", "review", "cap")) == 5
    assert found.count(("alert.capped", "ready", None)) == 1
    (capped,) = (one.key for one in ready.messages() if one.body["type"] == "alert.capped")
    with refused("message_of_no_visit", InputError):
        confirm(ready.gallery, capped)
    now[0] += 3600
    ready.visit(0.9)
    assert states(ready)[0] == ("alert.raised", "ready", None)


@pytest.mark.parametrize("jump_s", [4e9, -1.6e9])
def test_a_clock_that_jumps_neither_floods_nor_silences(ready, jump_s):
    found = scores(ready, 400)
    items = ready.items(len(found), start=START + jump_s, days=300)
    ready.commit(items, found, 40)
    assert len(ready.messages()) <= 4 + 3 * RATE
    before = len(ready.messages())
    ready.visit(0.9, start=START + 3 * 86400)
    assert len(ready.messages()) == before + 1
    (report,) = list_alerts(ready.gallery)
    assert report.standing.per_day == pytest.approx(400, rel=0.5)


@pytest.mark.parametrize("count", [0, 3, 100])
def test_too_few_visits_are_collected_and_none_is_raised(world, count):
    world.add(scores(world, count), days=0.25)
    report, _ = add_alert(world.gallery, world.encoder, SENTENCE, rate=1.0)
    assert report.state == "collecting"
    if count == 100:
        assert (report.standing.required, report.missing) == (400, 300)
        world.visit(0.9, 0.1, start=START + 3600)
        assert states(world) == [("alert.raised", "review", "collecting")]  # The best.
    else:
        assert (report.missing is None) == (count == 0)
        world.visit(*[0.9] * 12)
        assert world.messages() == []
        assert replay_alert(world.gallery, world.encoder, SENTENCE, START).raised == []
    assert recent_messages(world.gallery, state="ready") == []


def test_an_emptied_gallery_goes_on_with_what_it_knows(ready):
    ready.visit(0.1)
    ready.gallery.prune(keep_newest=0)
    ready.visit(0.9)
    assert len(ready.messages(state="ready")) == 1
    ready.restart()
    ready.visit(*[0.9] * 30)
    assert len(ready.messages(state="ready")) == 1


def test_confirmed_visits_leave_the_background(ready):
    (item,) = ready.items(1)
    ready.commit([item], [0.9])
    (message,) = ready.messages()
    assert confirm(ready.gallery, message.key).confirmed == 1
    ready.visit(0.7)
    first = ready.messages()[0].body["data"]["p_value"]
    assert first == pytest.approx(1 / 801)  # As if 0.9 were not there.
    dismiss(ready.gallery, message.key)  # It was a mistake.
    ready.visit(0.72)
    assert ready.messages()[0].body["data"]["p_value"] == pytest.approx(2 / 803)
    confirm(ready.gallery, message.key)
    ready.restart()
    ready.visit(0.75)
    assert ready.messages()[0].body["data"]["p_value"] == pytest.approx(1 / 803)


def test_what_messages_say_of_a_picture_goes_with_it_and_rates_stay(ready, caplog):
    items = [replace(one, track=f"walker-{n}") for n, one in enumerate(ready.items(3))]
    ready.commit(items, [0.7, 0.8, 0.9])
    judged, confirmed, kept = reversed(ready.messages())
    dismiss(ready.gallery, judged.key)
    before = confirm(ready.gallery, confirmed.key)
    with ready.gallery.outbox(write=True) as outbox:
        outbox.begin("hook")
        outbox.settle("hook", {judged.seq: Failure(attempts=1, due=0.0, error="down")})
    ready.gallery.bin.add([items[1].key], "olga", "blurred")
    assert len(ready.messages()) == 3  # It may be restored.
    ready.gallery.delete([items[0].key, items[1].key])
    logged = [(one.levelname, "1 message " in one.getMessage()) for one in caplog.records]
    assert logged == 2 * [("WARNING", True)], "neither was delivered"
    assert ready.messages() == [kept]
    assert list_alerts(ready.gallery) == [before]
    with ready.gallery.outbox() as outbox:
        assert [one for one, _ in outbox.due("hook", 0.0, 3600.0, 9)] == [kept]
        assert outbox.waiting() == {"hook": 1}
    assert [f"walker-{n}".encode() in stored(ready) for n in range(3)] == [False, False, True]
    with pytest.raises(InputError):
        dismiss(ready.gallery, judged.key)
    ready.commit([items[0]], [0.7])  # The same visit.
    assert ready.messages() == [kept]


def test_an_alert_that_is_resumed_starts_anew_though_pictures_are_deleted(ready):
    ready.visit(0.7, 0.8, 0.9)
    for message in ready.messages():
        dismiss(ready.gallery, message.key)
    ready.gallery.delete([key_of(ready, message) for message in ready.messages()])
    assert resume_alert(ready.gallery, ready.alert.id).dismissed == 0
    ready.visit(0.95)
    report = confirm(ready.gallery, ready.messages()[0].key)
    assert (report.state, report.dismissed, report.confirmed) == ("active", 0, 1)


def test_a_delivery_that_fails_while_its_picture_is_deleted_is_not_tried_again(ready):
    ready.visit(0.7)
    (message,) = ready.messages()
    with ready.gallery.outbox(write=True) as outbox:
        outbox.begin("hook")
    ready.gallery.delete([key_of(ready, message)])
    for is_dead in (False, True):
        failure = Failure(attempts=1, due=0.0, error="down", is_dead=is_dead)
        with ready.gallery.outbox(write=True) as outbox:
            outbox.settle("hook", {message.seq: failure})
            assert outbox.due("hook", 1.0, 3600.0, 9) == []
            assert (outbox.dead(), outbox.waiting()) == ([], {"hook": 0})


def test_each_step_of_a_deletion_forgets_its_messages_and_what_an_earlier_release_left(
    ready, monkeypatch
):
    monkeypatch.setattr(deletion, "STEP_ROWS", 1)
    ready.visit(0.7, 0.8, 0.9)
    keys, left = [key_of(ready, message) for message in ready.messages()], []
    step = deletion.Eraser._step

    def note(self, *given):
        left.append(len(ready.messages()))
        return step(self, *given)

    monkeypatch.setattr(deletion.Eraser, "_step", note)
    ready.gallery.delete(keys)
    assert left == [3, 2, 1]
    assert ready.messages() == []
    body = {"type": "alert.raised", "data": {"picture": 99_999, "visit": "0a", "track": "walker"}}
    with ready.gallery.outbox(write=True) as outbox:
        outbox.put(Message(key="k", topic=ready.alert.id, time=0.0, body=body))
    assert ready.gallery.delete(["no such key"]) == 0
    assert ready.messages() == []
    assert b"walker" not in stored(ready)


def test_a_broken_promise_demotes_until_it_is_resumed(ready, monkeypatch):
    monkeypatch.setattr("upperson_alerts.matcher.time.time", lambda: 1_800_000_000.0)
    for number in range(4):
        ready.visit(0.5 + number / 100, start=START + 2 * 86400 + number)
    assert states(ready).count(("alert.raised", "ready", None)) == 3  # The cap.
    set_cap(ready, 1000)
    for number in range(5):
        ready.visit(0.8 + number / 100, start=START + 2 * 86400 + number)
    raised = [one for one in ready.messages(state="ready") if one.body["type"] == "alert.raised"]
    seen = [dismiss(ready.gallery, one.key) for one in raised]
    assert [one.dismissed for one in seen] == list(range(1, 9))
    expected = ["review" if one.e_value >= 20 else "active" for one in seen]
    assert [one.state for one in seen] == expected
    assert (expected[0], expected[-1]) == ("active", "review")
    ready.visit(0.95)
    assert states(ready)[0] == ("alert.raised", "review", "demoted")
    report = resume_alert(ready.gallery, ready.alert.id)
    assert (report.state, report.dismissed) == ("active", 0)
    ready.visit(0.96)
    assert states(ready)[0] == ("alert.raised", "ready", None)


def test_what_it_would_have_raised(ready):
    assert replay_alert(ready.gallery, ready.encoder, SENTENCE, START + 2 * 86400).visits == 0
    ready.add([0.9, 0.1, 0.8], start=START + 3 * 86400)
    file = ready.gallery.path / "gallery.sqlite"
    before = file.read_bytes()
    found = replay_alert(ready.gallery, ready.encoder, ready.alert.id, START + 2 * 86400)
    assert file.read_bytes() == before
    assert (found.visits, found.against) == (3, "earlier")
    assert [round(one.score, 1) for one in found.raised] == [0.9, 0.8]
    assert [one.would_raise for one in found.best] == [True, True, False]
    whole = replay_alert(ready.gallery, ready.encoder, SENTENCE, START)
    assert (whole.visits, whole.against) == (803, "others")
    assert 2 <= len(whole.raised) <= 5


def test_bad_alerts_are_refused(ready):
    def add(sentence=SENTENCE, rate=1.0, **options):
        add_alert(ready.gallery, ready.encoder, sentence, rate=rate, **options)

    for options, code in (
        ({"sentence": "the a of"}, "sentence_not_understood"), ({"sentence": ""}, "no_name"),
        ({"cameras": ["gaet"]}, "camera_unknown"), ({"rate": 0.0}, "out_of_range"),
        ({"rate": float("nan")}, "out_of_range"), ({"cap": 0}, "out_of_range"),
        ({"cap": 10_000}, "out_of_range"),
    ):  # fmt: skip
        with refused(code, (InputError, UsageError)):
            add(**options)
    assert len(list_alerts(ready.gallery)) == 1
    for what, calls in (
        ("alert", (pause_alert, resume_alert, remove_alert)), ("message", (dismiss, confirm))
    ):  # fmt: skip
        for call in calls:
            with refused(f"{what}_not_found", InputError):
                call(ready.gallery, "nothing")
    add()
    with refused("alert_ambiguous", InputError):
        pause_alert(ready.gallery, SENTENCE)


def test_damaged_alerts_are_left_out_and_the_others_go_on(ready, caplog):
    with ready.gallery.outbox(write=True) as outbox:
        outbox.write("alert/bad", {"id": "bad"})
        outbox.write("alerts/version", 99)
    ready.visit(0.9)
    assert len(ready.messages()) == 1
    assert "alert bad is not used" in caplog.text


def test_tails_are_bounded_and_exact_above_their_floors():
    rng = np.random.default_rng(0)
    tails, scores_of = Tails(3, most=50), {}
    for size in [1, 1, 400, *[7] * 100, 300]:
        visits = rng.choice(800, size, replace=False).tolist()
        scores_VS = rng.uniform(size=(size, 3)).astype(np.float32)
        tails.add(visits, scores_VS)
        for visit, score_S in zip(visits, scores_VS, strict=True):
            scores_of[visit] = np.maximum(score_S, scores_of.get(visit, score_S))
    all_VS = np.array([*scores_of.values()])
    np.testing.assert_array_equal(tails.floors(), np.sort(all_VS, axis=0)[-50])
    for number in range(1, 50):
        score_S = np.sort(all_VS, axis=0)[-number]
        np.testing.assert_array_equal(tails.at_least(score_S), [number] * 3)
    best = [*scores_of][all_VS[:, 1].argmax()]
    assert tails.own(best)[1] == all_VS[:, 1].max()
    tails.drop(1, [best])
    assert tails.own(best)[1] == -np.inf
    assert tails.at_least(np.sort(all_VS, axis=0)[-9]).tolist() == [9, 8, 9]
