"""Events of recordings, and what is said of recordings without a search."""

import datetime

import pytest
from lxml import etree

from tests.helpers.console import ODD, START, log_lines
from tests.unit.runtime.serve.onvif.conftest import NOW
from tests.unit.runtime.serve.onvif.test_search import (
    ALL,
    BACK,
    BUSY,
    LATEST,
    LIVE,
    MINUTE,
    NO_TOKEN,
    add_red,
    at,
    find,
    odd_token,
    refused_as,
    take,
)
from upperson_console.onvif import events, sessions
from upperson_console.onvif.events import PERSON, RECORDING_STATE, TRACK_STATE

WSNT = "http://docs.oasis-open.org/wsn/b-2"
CONCRETE = "http://www.onvif.org/ver10/tev/topicExpression/ConcreteSet"
ITEMS = "http://www.onvif.org/ver10/tev/messageContentFilter/ItemFilter"
COLOURS = [600 * place for place in range(6)]
"""When a person comes to the gate; to the other camera 7,220 seconds later."""


def topics(text, dialect=CONCRETE, name="TopicExpression"):
    element = etree.Element(f"{{{WSNT}}}{name}", Dialect=dialect)
    element.text = text
    return {"_value_1": [element]}


def content(text, dialect=ITEMS):
    return topics(text, dialect, "MessageContent")


PEOPLE = topics("tns1:RuleEngine//.")
STATES = topics(RECORDING_STATE)


def begin(search, given=None, scope=(), states=False, **more):
    given = given or {}
    wanted = {"Scope": dict(scope), "SearchFilter": given, "IncludeStartState": states}
    return search.FindEvents(**wanted, **{**ALL, **more})


def results(search, *given, **more):
    found = search.GetEventSearchResults(begin(search, *given, **more))
    assert found.SearchState == "Completed"
    return found.Result


def seconds(found):
    return [one.Time.timestamp() - START for one in found]


def items(one):
    """The names and values of an event."""
    message = one.Event.Message._value_1
    return {item.get("Name"): item.get("Value") for item in message.iter("{*}SimpleItem")}


def test_people_are_events_in_the_order_of_time(shared, vms):
    found = results(vms, PEOPLE)
    assert seconds(found) == COLOURS + [7220 + one for one in COLOURS]
    assert {one.Event.Topic._value_1 for one in found} == {PERSON}
    assert {one.TrackToken for one in found} == {"people"}
    assert seconds(results(vms, PEOPLE, **BACK)) == seconds(found)[::-1]
    open_end = vms.FindEvents(
        StartPoint=at(1), Scope={}, SearchFilter=PEOPLE, IncludeStartState=False,
        KeepAliveTime=MINUTE,
    )  # fmt: skip
    there = vms.GetEventSearchResults(open_end).Result
    assert seconds(there) == [10, *seconds(found)[1:]]  # The first had come before.
    assert vms.EndSearch(open_end) == LATEST
    # The ids are those of other searches, and the picture is one of the person.
    by_sentence = take(vms, find(vms)).Result
    (seen,) = found[0].Event.Message._value_1.iter("{*}Object")
    assert {one.ObjectUUID for one in by_sentence} >= {seen.get("UUID")}
    (place,) = seen.iter("{*}ImageRef")
    id_ = int(place.text.rpartition("/")[2])
    item, _ = shared.service.gallery.get([id_])[id_]
    assert (item.time - START, item.camera) == (0, "gate")


def test_recordings_begin_and_end(vms):
    odd = odd_token(vms)
    found = results(vms, STATES)
    values = [(one.RecordingToken, items(one)["IsRecording"]) for one in found]
    assert values == [("gate", "true"), ("gate", "false"), (odd, "true"), (odd, "false")]
    assert [one.Time for one in found] == [at(0), at(3010), at(7220), LATEST]
    tracks = results(vms, topics(TRACK_STATE))
    assert [items(one)["IsDataPresent"] for one in tracks] == ["true", "false"] * 2
    assert seconds(tracks) == seconds(found)
    assert not any(one.StartStateEvent for one in found)


def test_states_at_the_start_come_first(vms):
    gate = {"IncludedRecordings": ["gate"]}
    for start, value in ((1, "true"), (3010, "false"), (-1, "false")):
        first, *_ = results(vms, STATES, gate, states=True, StartPoint=at(start))
        assert (first.StartStateEvent, first.Time) == (True, at(start))
        assert items(first) == {"RecordingToken": "gate", "IsRecording": value}
    back = {"StartPoint": at(4000), "EndPoint": at(1)}
    found = results(vms, STATES, gate, states=True, **back)
    assert [one.StartStateEvent for one in found] == [True, True, False]
    assert [items(one)["IsRecording"] for one in found] == ["false", "true", "false"]


def test_filters_choose_events(vms):
    assert len(results(vms)) == 12 + 8
    for text, count in (
        ("tns1:RecordingHistory//.", 8),
        (f"{RECORDING_STATE}|{PERSON}", 16),
        ("tns1:RecordingHistory", 0),
        ("tns1:VideoSource/MotionAlarm", 0),
    ):
        assert len(results(vms, topics(text))) == count, text
    for text, count in (
        ('boolean(//tt:SimpleItem[@Name="RecordingToken" and @Value="gate"])', 10),
        ('not(boolean(//SimpleItem[@Name="IsRecording"])) and boolean(//Object)', 12),
        ('boolean(//SimpleItem[@Name="AggregationStart" and @Value<"2026-09-21T14:33:20Z"])', 2),
    ):
        assert len(results(vms, content(text))) == count, text
    for given in (
        topics("tns1:a", "http://127.0.0.1/other"), topics("tns1:a//"), topics("//a"), topics(""),
        content("true()"), content("boolean(//a)", ""), {"_value_1": [etree.Element("other")]},
    ):  # fmt: skip
        refused_as(["InvalidArgVal", "InvalidFilterFault"], lambda given=given: begin(vms, given))


def test_no_event_comes_twice(onvif):
    vms = onvif.client().search
    token = begin(vms, PEOPLE, EndPoint=LIVE["EndPoint"])
    first = vms.GetEventSearchResults(token, MaxResults=5)
    second = vms.GetEventSearchResults(token, MaxResults=50)
    assert seconds(first.Result + second.Result) == COLOURS + [7220 + one for one in COLOURS]
    assert (first.SearchState, second.SearchState) == ("Searching", "Searching")
    assert vms.GetSearchState(token) == "Searching"
    add_red(onvif)
    assert seconds(vms.GetEventSearchResults(token).Result) == [86_000]
    assert len(results(vms, MaxMatches=3)) == 3
    refused_as(NO_TOKEN, lambda: vms.GetNLSearchResults(token))
    assert vms.EndSearch(token).timestamp() == NOW
    refused_as(NO_TOKEN, lambda: vms.GetSearchState(token))


@pytest.mark.parametrize("goes_back", [False, True])
def test_many_people_are_looked_at_in_parts(vms, monkeypatch, goes_back):
    """A request returns what it found in some parts, in the same order as in one."""
    span = BACK if goes_back else ALL
    whole = results(vms, **span)
    monkeypatch.setattr(events, "_AT_ONCE", 2)
    monkeypatch.setattr(events, "_MOST_PARTS", 2)
    token, found, states = begin(vms, **span), [], []
    while not states or states[-1] != "Completed":
        part = vms.GetEventSearchResults(token, MaxResults=5)
        found += part.Result
        states.append(part.SearchState)
    assert {*states[:-1]} == {"Searching"}
    assert len(states) > 2
    assert seconds(found) == seconds(whole) == sorted(seconds(found), reverse=goes_back)
    changes = [[items(one) for one in of if "IsRecording" in items(one)] for of in (found, whole)]
    assert changes[0] == changes[1] != []
    least = vms.GetEventSearchResults(begin(vms, **span), MinResults=3, WaitTime="PT1H")
    assert len(least.Result) >= 3


def test_events_are_of_cameras_that_a_user_may_see_and_logged(onvif):
    door = onvif.client("door").search
    assert {one.RecordingToken for one in results(door)} == {"gate"}
    odd = {"IncludedRecordings": [odd_token(onvif.client().search)]}
    refused_as(NO_TOKEN, lambda: begin(door, scope=odd))
    begun, shown = log_lines(onvif)
    assert (begun["ids"], len(shown["ids"])) == ([], 6)
    for line in (begun, shown):
        assert (line["user"], line["action"], line["sentence"]) == ("door", "query", "")
        assert line["details"]["onvif"] == "FindEvents"
        assert (line["filter"]["camera"], line["filter"]["since"]) == (["gate"], START)


def test_recordings_are_described(shared, vms):
    odd, door = odd_token(vms), shared.client("door").search
    whole = vms.GetRecordingSummary()
    assert (whole.NumberRecordings, whole.DataFrom, whole.DataUntil) == (2, at(0), LATEST)
    own = door.GetRecordingSummary()
    assert (own.NumberRecordings, own.DataUntil) == (1, at(3010))
    gate = vms.GetRecordingInformation("gate")
    (track,) = gate.Track
    assert (track.TrackToken, track.TrackType) == ("people", "Metadata")
    assert (track.DataFrom, track.DataTo) == (gate.EarliestRecording, gate.LatestRecording)
    assert vms.GetRecordingInformation(odd).Source.Name == ODD
    (there,) = vms.GetMediaAttributes([], at(100))
    assert (there.RecordingToken, there.From, there.Until) == ("gate", at(0), at(3010))
    assert there.TrackAttributes[0].MetadataAttributes.CanContainPTZ is False
    assert vms.GetMediaAttributes(["gate", odd], at(5000)) == []
    assert [one.RecordingToken for one in vms.GetMediaAttributes([odd], at(7300))] == [odd]
    refused_as(
        NO_TOKEN,
        lambda: door.GetRecordingInformation(odd),
        lambda: door.GetMediaAttributes(["gate", odd], at(100)),
        lambda: vms.GetRecordingInformation("nowhere"),
    )
    refused_as(["InvalidArgVal"], lambda: vms.GetMediaAttributes([], datetime.time(1)))


def test_a_full_server_has_room_for_those_with_fewer_searches(onvif, monkeypatch):
    monkeypatch.setattr(sessions, "MOST_SESSIONS", 5)
    vms, door = onvif.client().search, onvif.client("door").search

    def list_cameras(search):
        return search.FindRecordings(Scope={}, KeepAliveTime=MINUTE)

    def is_full(*searches):
        refused_as(BUSY, *(lambda s=s: list_cameras(s) for s in searches))

    oldest, second, *_ = [list_cameras(vms) for _ in range(5)]
    is_full(vms)
    vms.GetRecordingSearchResults(oldest)  # The second is silent for longest now.
    for token in (list_cameras(door), list_cameras(door)):
        assert door.GetSearchState(token) == "Queued"
    refused_as(NO_TOKEN, lambda: vms.GetSearchState(second))
    assert vms.GetSearchState(oldest) == "Completed"
    is_full(vms, door)
    monkeypatch.setattr(sessions, "MOST_SESSIONS", 32)
    monkeypatch.setattr(sessions, "_MOST_OF_ONE", 2)
    is_full(door)
    door.EndSearch(token)
    assert list_cameras(door)
