"""The rules of a search, each as an unmodified SOAP client sees it."""

import datetime
import re
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
from zeep.exceptions import Fault

from tests.helpers.console import ODD, START, log_lines
from tests.helpers.toy_bundle import draw_person
from tests.unit.runtime.serve.onvif.conftest import NOW
from upperson_console.onvif import recordings
from upperson_console.onvif.sessions import MOST_SESSIONS
from upperson_rt.gallery import Filter, Item
from upperson_rt.log_chain import verify_log


def at(seconds):
    """A time after the first picture."""
    return datetime.datetime.fromtimestamp(START + seconds, datetime.timezone.utc)


MINUTE = datetime.timedelta(seconds=60)
ALL = {"StartPoint": at(0), "EndPoint": at(80_000), "KeepAliveTime": MINUTE}
LIVE = {**ALL, "EndPoint": at(90_000)}
"""Goes on until after the present."""
LATEST = at(600 * 5 + 20 + 7200)


def uuids(found):
    return [one.ObjectUUID for one in found.Result]


def refused(*subcodes):
    """A fault with these subcodes."""

    def has_them(fault):
        assert [code.localname for code in fault.subcodes] == list(subcodes)
        return True

    return pytest.raises(Fault, check=has_them)


def take(search, token, **more):
    return search.GetNLSearchResults(SearchToken=token, **more)


def add_red(onvif, key="new", seconds=86_000.0, **more):
    """Record a person in red after all others."""
    file = draw_person(onvif.log.with_name(f"{key}.png"), "red", seed=3)
    vectors = onvif.service.encoder.encode_images([file])
    item = Item(key=key, time=START + seconds, **{"camera": "gate", "track": key, **more})
    onvif.service.gallery.add([item], vectors)


def until(condition):
    """Wait for something that another thread does."""
    while not condition():
        time.sleep(0.01)


def waiting_requests(onvif):
    """Requests for results under way."""
    return sum(session.asking for session in onvif.sessions._sessions.values())


@contextmanager
def waiting(onvif, count=1):
    """Yield requests that wait for one more result of a search that goes on, and its token."""
    onvif.sessions.poll_s = 0.02
    token = onvif.client().search.SearchImageByNL(Text="red", **LIVE)
    take(onvif.client().search, token)
    with ThreadPoolExecutor(count) as pool:
        clients = [onvif.client().search for _ in range(count)]
        yield (
            [pool.submit(take, one, token, MinResults=1, WaitTime="PT1H") for one in clients],
            token,
        )


def test_it_finds_what_a_sentence_says(vms, shared):
    found = take(vms, vms.SearchImageByNL(Text="a woman in red", **ALL))
    assert found.SearchState == "Completed"
    assert len(set(uuids(found))) == 12  # Tracks: six colours at two cameras.
    similar = [one.Similarity for one in found.Result]
    assert similar == sorted(similar, reverse=True)
    assert 0 <= similar[-1] < similar[0] <= 1
    cameras = set()
    for one in found.Result[:2]:
        id_ = int(one.TargetImageURI.rpartition("/")[2])
        item, _ = shared.service.gallery.get([id_])[id_]
        assert item.key.startswith("red-")
        cameras.add(item.camera)
        assert one.Time.timestamp() == item.time
        assert uuid.UUID(one.ObjectUUID).version == 5
    assert cameras == {"gate", ODD}
    # A track has the same id in every search.
    other = take(vms, vms.SearchImageByNL(Text="a man in blue", **ALL))
    assert uuids(found) != uuids(other)
    assert set(uuids(found)) == set(uuids(other))


def test_ranges(vms):
    """They include both ends, may go back, and end at the latest recording without an end."""
    whole = take(vms, vms.SearchImageByNL(Text="red", **ALL))
    times = {one.Time for one in whole.Result}
    one = {**ALL, "StartPoint": max(times), "EndPoint": max(times)}
    found = take(vms, vms.SearchImageByNL(Text="red", **one))
    assert [one.Time for one in found.Result] == [max(times)]
    assert min(times) < at(21)
    between = {**ALL, "StartPoint": at(21), "EndPoint": at(599)}
    found = take(vms, vms.SearchImageByNL(Text="red", **between))
    assert (found.SearchState, found.Result) == ("Completed", [])
    back = {**ALL, "StartPoint": ALL["EndPoint"], "EndPoint": ALL["StartPoint"]}
    token = vms.SearchImageByNL(Text="red", **back)
    assert uuids(take(vms, token)) == uuids(whole)
    assert vms.EndSearch(token) == ALL["StartPoint"]
    token = vms.SearchImageByNL(Text="red", StartPoint=at(0), KeepAliveTime=MINUTE)
    found = take(vms, token)
    assert (found.SearchState, len(found.Result)) == ("Completed", 12)
    assert vms.EndSearch(token) == LATEST


def test_a_range_that_goes_on_is_through_at_its_end(onvif):
    vms = onvif.client().search
    token = vms.SearchImageByNL(Text="red", **LIVE)
    first = take(vms, token)
    assert (first.SearchState, len(first.Result)) == ("Searching", 12)
    add_red(onvif)
    add_red(onvif, "too late", seconds=90_001.0)
    second = take(vms, token)
    assert (second.SearchState, len(second.Result)) == ("Searching", 1)
    assert second.Result[0].Time == at(86_000)
    onvif.sessions.now = lambda: START + 90_001
    third = take(vms, token)
    assert (third.SearchState, third.Result) == ("Completed", [])
    assert vms.EndSearch(token) == LIVE["EndPoint"]


def test_max_matches_ends_it(vms):
    best = uuids(take(vms, vms.SearchImageByNL(Text="red", **ALL)))[:3]
    token = vms.SearchImageByNL(Text="red", MaxMatches=3, **LIVE)
    first = take(vms, token, MaxResults=2)
    assert (first.SearchState, uuids(first)) == ("Searching", best[:2])
    second = take(vms, token, MaxResults=2)
    assert (second.SearchState, uuids(second)) == ("Completed", best[2:])
    assert take(vms, token).Result == []


def test_similarity_is_the_least_of_a_result(vms):
    found = take(vms, vms.SearchImageByNL(Text="red", **ALL)).Result
    least = found[3].Similarity * 0.999
    token = vms.SearchImageByNL(Text="red", Similarity=least, **ALL)
    over = take(vms, token)
    assert over.SearchState == "Completed"
    assert len(over.Result) == sum(one.Similarity >= least for one in found) >= 4
    none = take(vms, vms.SearchImageByNL(Text="red", Similarity=1.0, **ALL))
    assert (none.SearchState, none.Result) == ("Completed", [])


def test_no_result_comes_twice(shared, vms):
    token = vms.SearchImageByNL(Text="red", **ALL)
    pages = [take(vms, token, MaxResults=5) for _ in range(4)]
    assert [len(page.Result) for page in pages] == [5, 5, 2, 0]
    states = [page.SearchState for page in pages]
    assert states == ["Searching", "Searching", "Completed", "Completed"]
    assert len({one for page in pages for one in uuids(page)}) == 12
    token = vms.SearchImageByNL(Text="red", **ALL)
    clients = [shared.client().search for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:  # Requests at the same time.
        pages = [*pool.map(lambda client: take(client, token, MaxResults=3), clients)]
    given = [one for page in pages for one in uuids(page)]
    assert len(given) == len(set(given)) == 12


def test_an_ended_search_is_not_there_any_more(vms):
    token = vms.SearchImageByNL(Text="red", **ALL)
    assert vms.EndSearch(token) == ALL["StartPoint"]  # It had not begun.
    for again in (lambda: take(vms, token), lambda: vms.EndSearch(token)):
        with refused("InvalidArgVal", "InvalidToken"):
            again()
    token = vms.SearchImageByNL(Text="red", **ALL)
    take(vms, token, MaxResults=1)
    assert vms.EndSearch(token) == ALL["EndPoint"]
    token = vms.SearchImageByNL(Text="red", **LIVE)
    take(vms, token)
    assert vms.EndSearch(token).timestamp() == NOW


def test_a_search_ends_after_its_keep_alive_time(onvif):
    vms, now = onvif.client().search, [1000.0]
    onvif.sessions.clock = lambda: now[0]
    token = vms.SearchImageByNL(Text="red", **{**ALL, "KeepAliveTime": MINUTE / 2})
    for _ in range(3):  # Counted from each request.
        now[0] += 30
        take(vms, token, MaxResults=1)
    now[0] += 31
    with refused("InvalidArgVal", "InvalidToken"):
        take(vms, token)
    assert onvif.sessions._sessions == {}
    token = vms.SearchImageByNL(Text="red", **{**ALL, "KeepAliveTime": "P1Y"})
    now[0] += 3601
    with refused("InvalidArgVal", "InvalidToken"):
        take(vms, token)


def test_time_at_the_encoder_is_no_silence_of_the_client(onvif, monkeypatch):
    vms, now = onvif.client().search, [1000.0]
    onvif.sessions.clock = lambda: now[0]
    search = recordings.scored_hits

    def slowly(*args):
        now[0] += 100
        onvif.sessions._drop_expired()  # As any request of others does meanwhile.
        return search(*args)

    monkeypatch.setattr(recordings, "scored_hits", slowly)
    token = vms.SearchImageByNL(Text="red", **ALL)
    assert len(take(vms, token, MaxResults=5).Result) == 5
    assert len(take(vms, token).Result) == 7


def test_it_waits_for_enough_results(onvif):
    vms = onvif.client().search
    onvif.sessions.poll_s = 0.02
    token = vms.SearchImageByNL(Text="red", **LIVE)
    take(vms, token)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(take, onvif.client().search, token, MinResults=2, WaitTime="PT1H")
        until(lambda: waiting_requests(onvif))
        add_red(onvif, "one")
        assert not waiting.done()
        add_red(onvif, "two")
        found = waiting.result()
    assert (found.SearchState, len(found.Result)) == ("Searching", 2)


def test_it_waits_for_the_given_time_only_for_what_can_come(vms):
    for query, count in ((ALL, 12), ({"MaxMatches": 2, **LIVE}, 2)):
        token = vms.SearchImageByNL(Text="red", **query)
        found = take(vms, token, MinResults=100, WaitTime="PT1H")
        assert (found.SearchState, len(found.Result)) == ("Completed", count)
    token = vms.SearchImageByNL(Text="red", **LIVE)
    assert len(take(vms, token).Result) == 12
    for more in ({"MinResults": 1}, {"MaxResults": 9}, {}):
        found = take(vms, token, WaitTime="PT0.05S", **more)
        assert (found.SearchState, found.Result) == ("Searching", [])
    for more in ({"MinResults": 0}, {}):  # Without a time it does not wait.
        assert take(vms, token, **more).Result == []


@pytest.mark.parametrize("end", ["search", "server"])
def test_an_end_answers_waiting_requests(onvif, end):
    with waiting(onvif) as ((request,), token):
        until(lambda: waiting_requests(onvif))
        if end == "server":
            onvif.server.end()
            assert request.result().Result == []
            return
        onvif.client().search.EndSearch(token)
        assert request.result().Result == []
    with refused("InvalidArgVal", "InvalidToken"):
        take(onvif.client().search, token)


def test_a_waiting_request_is_answered_by_the_next_one(onvif):
    with waiting(onvif, 3) as (requests, token):
        until(lambda: sum(one.done() for one in requests) == 2)
        assert take(onvif.client().search, token, WaitTime="PT0S").Result == []
        assert [one.result().Result for one in requests] == [[], [], []]


def test_a_client_that_has_gone_gets_no_results(onvif, envelope):
    vms = onvif.client().search
    onvif.sessions.poll_s = 0.02
    token = vms.SearchImageByNL(Text="red", **LIVE)
    take(vms, token)
    body = (
        f"<tse:GetNLSearchResultsRequest><tse:SearchToken>{token}</tse:SearchToken>"
        "<tse:MinResults>1</tse:MinResults><tse:WaitTime>PT1H</tse:WaitTime>"
        "</tse:GetNLSearchResultsRequest>"
    )
    place = f"{onvif.url}/onvif/search_service"
    with httpx.Client() as client, pytest.raises(httpx.ReadTimeout):
        client.post(place, content=envelope(onvif, body), timeout=httpx.Timeout(30, read=0.2))
    until(lambda: not waiting_requests(onvif))
    add_red(onvif)
    assert len(take(vms, token).Result) == 1


def test_the_number_of_searches_is_limited(onvif):
    vms, door = onvif.client().search, onvif.client("door").search
    for client in (vms, door):
        tokens = [
            client.FindRecordings(Scope={}, KeepAliveTime=MINUTE) for _ in range(MOST_SESSIONS // 2)
        ]
        with refused("Action", "ResourceProblem"):
            client.SearchImageByNL(Text="red", **ALL)
        with refused("Action", "ResourceProblem"):
            client.FindRecordings(Scope={}, KeepAliveTime=MINUTE)
    assert len(onvif.sessions._sessions) == MOST_SESSIONS
    door.EndSearch(tokens[0])
    assert door.SearchImageByNL(Text="red", **ALL)


def test_a_busy_encoder_refuses_searches(onvif):
    vms = onvif.client().search
    token = vms.SearchImageByNL(Text="a man in blue", **LIVE)
    onvif.service.current.last.search.queries._kept.clear()
    queue = onvif.service.queue
    queue.waiting = queue._most
    with refused("Action", "ResourceProblem"):
        vms.SearchImageByNL(Text="red", **ALL)
    assert len(onvif.sessions._sessions) == 1
    found = take(vms, token)
    assert (found.SearchState, found.Result) == ("Queued", [])
    queue.waiting = 0
    assert len(take(vms, token).Result) == 12


def test_a_token_is_of_one_user_and_one_kind(shared, vms):
    door = shared.client("door").search
    token = vms.SearchImageByNL(Text="red", **ALL)
    for attempt in (
        lambda: take(door, token),
        lambda: door.EndSearch(token),
        lambda: vms.GetImageSearchResults(SearchToken=token),
        lambda: vms.GetRecordingSearchResults(SearchToken=token),
        lambda: take(vms, "x" * 32),
        lambda: vms.EndSearch(""),
    ):
        with refused("InvalidArgVal", "InvalidToken"):
            attempt()
    assert len(take(vms, token).Result) == 12


@pytest.mark.parametrize(
    ("more", "subcodes"),
    [
        ({"Text": ""}, ["InvalidArgVal"]),
        ({"Text": "x" * 2001}, ["InvalidArgVal"]),
        ({"MaxMatches": 0}, ["InvalidArgVal"]),
        ({"MaxMatches": -1}, ["InvalidArgVal"]),
        ({"Similarity": 1.5}, ["InvalidArgVal"]),
        ({"Similarity": float("nan")}, ["InvalidArgVal"]),
        ({"RecordingToken": "nowhere"}, ["InvalidArgVal", "InvalidToken"]),
    ],
)
def test_a_malformed_search_is_refused(vms, shared, more, subcodes):
    with refused(*subcodes) as caught:
        vms.SearchImageByNL(**{"Text": "red", **ALL, **more})
    assert caught.value.code == "env:Sender"
    assert shared.sessions._sessions == {}


def test_a_picture_finds_who_looks_like_it(vms, shared, red_jpeg):
    token = vms.SearchImageByImage(TargetImageData=red_jpeg, **ALL)
    found = vms.GetImageSearchResults(SearchToken=token)
    assert (found.SearchState, len(found.Result)) == ("Completed", 12)
    best = [one.Time.timestamp() - START for one in found.Result[:2]]
    assert min(best) <= 10  # Red came first, at both cameras.
    assert max(best) == 7220
    # A result can be searched with.
    blue = take(vms, vms.SearchImageByNL(Text="blue", **ALL)).Result[0]
    place = {"TargetImageURI": blue.TargetImageURI}
    for more in ({}, {"TargetImageData": b""}):
        token = vms.SearchImageByImage(**place, **more, **ALL)
        assert uuids(vms.GetImageSearchResults(SearchToken=token))[0] == blue.ObjectUUID
    token = vms.SearchImageByImage(**place, TargetImageData=red_jpeg, **ALL)
    best = vms.GetImageSearchResults(SearchToken=token).Result[0]
    assert best.ObjectUUID != blue.ObjectUUID  # The data count.
    odd = take(vms, vms.SearchImageByNL(Text="blue", RecordingToken=odd_token(vms), **ALL))
    with refused("InvalidArgVal"):
        shared.client("door").search.SearchImageByImage(
            TargetImageURI=odd.Result[0].TargetImageURI, **ALL
        )


@pytest.mark.parametrize(
    "given",
    [
        *({"TargetImageURI": place} for place in (
            "http://127.0.0.1:1/a.jpg", "file:///etc/passwd", "", "/onvif/pictures/1",
        )),
        {},
        {"TargetImageData": b"GIF89a nothing"},
    ],
)  # fmt: skip
def test_only_pictures_and_results_are_taken(vms, given):
    """No address of elsewhere is fetched."""
    with refused("InvalidArgVal"):
        vms.SearchImageByImage(**given, **ALL)


def odd_token(search):
    """The token of the camera whose name is no token."""
    token = search.FindRecordings(Scope={}, KeepAliveTime=MINUTE)
    found = search.GetRecordingSearchResults(SearchToken=token).RecordingInformation
    (odd,) = [one.RecordingToken for one in found if one.Source.Name == ODD]
    return odd


def test_a_camera_is_a_recording(vms):
    token = vms.FindRecordings(Scope={}, KeepAliveTime=MINUTE)
    found = vms.GetRecordingSearchResults(SearchToken=token)
    assert found.SearchState == "Completed"
    odd, gate = sorted(found.RecordingInformation, key=lambda one: one.Source.Name)
    assert (gate.RecordingToken, gate.Source.Name) == ("gate", "gate")
    assert (gate.EarliestRecording, gate.LatestRecording) == (at(0), at(3010))
    assert re.fullmatch("camera-[0-9a-f]{32}", odd.RecordingToken)
    assert odd.LatestRecording == LATEST
    assert "6 pictures" in odd.Content
    assert vms.GetRecordingSearchResults(SearchToken=token).RecordingInformation == []
    for scope in (
        {"IncludedRecordings": ["gate", "nowhere"]},
        {"IncludedSources": [{"Token": "gate"}]},
    ):
        token = vms.FindRecordings(Scope=scope, KeepAliveTime=MINUTE)
        (one,) = vms.GetRecordingSearchResults(SearchToken=token).RecordingInformation
        assert one.RecordingToken == "gate"
    token = vms.FindRecordings(Scope={}, MaxMatches=1, KeepAliveTime=MINUTE)
    found = vms.GetRecordingSearchResults(SearchToken=token, MinResults=2, WaitTime="PT1H")
    assert (found.SearchState, len(found.RecordingInformation)) == ("Completed", 1)
    vms.EndSearch(token)
    with refused("InvalidArgVal"):
        vms.FindRecordings(
            Scope={"RecordingInformationFilter": "boolean(//Track)"}, KeepAliveTime=MINUTE
        )


def test_a_search_is_of_one_recording_or_of_those_that_a_user_may_see(shared, vms, red_jpeg):
    odd, door = odd_token(vms), shared.client("door").search
    by_image = door.SearchImageByImage(TargetImageData=red_jpeg, **ALL)
    for found, token in (
        (take(vms, vms.SearchImageByNL(Text="red", RecordingToken="gate", **ALL)), "gate"),
        (take(vms, vms.SearchImageByNL(Text="red", RecordingToken=odd, **ALL)), odd),
        (take(door, door.SearchImageByNL(Text="red", **ALL)), "gate"),
        (door.GetImageSearchResults(by_image), "gate"),
    ):
        assert {one.RecordingToken for one in found.Result} == {token}
        assert len(found.Result) == 6
    listed = door.FindRecordings(Scope={}, KeepAliveTime=MINUTE)
    (gate,) = door.GetRecordingSearchResults(SearchToken=listed).RecordingInformation
    assert gate.RecordingToken == "gate"
    with refused("InvalidArgVal", "InvalidToken"):
        door.SearchImageByNL(Text="red", RecordingToken=odd, **ALL)


def test_pictures_without_camera_or_time_are_of_no_recording(onvif):
    vms = onvif.client().search
    for key, more in (("a", {"camera": None, "track": None}), ("b", {"time": None})):
        file = draw_person(onvif.log.with_name(f"{key}.png"), "red", seed=4)
        item = Item(**{"key": key, "camera": "gate", "time": START + 5, "track": key, **more})
        onvif.service.gallery.add([item], onvif.service.encoder.encode_images([file]))
    assert len(take(vms, vms.SearchImageByNL(Text="red", **ALL)).Result) == 12
    onvif.service.gallery.delete_where(Filter(camera=["gate", ODD]))
    onvif.service.current.last.has_changed()
    found = take(vms, vms.SearchImageByNL(Text="red", **ALL))
    assert (found.SearchState, found.Result) == ("Completed", [])


def test_what_is_shown_is_in_the_log_before(onvif, red_jpeg):
    door = onvif.client("door").search
    token = door.SearchImageByNL(Text="a woman in red", MaxMatches=9, **ALL)
    found = take(door, token, MaxResults=4)
    take(door, token)
    take(door, token)
    image = door.SearchImageByImage(TargetImageData=red_jpeg, RecordingToken="gate", **ALL)
    lines = log_lines(onvif)
    assert {(line["user"], line["action"]) for line in lines} == {("door", "query")}
    names = [line["details"]["onvif"] for line in lines]
    assert names == [*["SearchImageByNL"] * 3, "SearchImageByImage"]
    begun, first, second, by_image = lines
    assert begun["sentence"] == first["sentence"] == "a woman in red"
    assert (begun["ids"], begun["k"], first["k"]) == ([], 9, 4)
    ids = [int(one.TargetImageURI.rpartition("/")[2]) for one in found.Result]
    assert first["ids"] == ids
    assert len(second["ids"]) == 2
    assert first["filter"]["camera"] == ["gate"]
    assert first["filter"]["since"] == START
    assert by_image["details"]["picture"]
    assert image
    assert verify_log(onvif.log).problems == []


def test_the_log_of_a_user_without_cameras_does_not_say_all(onvif):
    onvif.service.gallery.delete_where(Filter(camera="gate"))
    onvif.service.current.last.has_changed()
    door = onvif.client("door").search
    assert take(door, door.SearchImageByNL(Text="a woman in red", **ALL)).Result == []
    (line,) = log_lines(onvif)
    assert "camera" not in line["filter"]
    assert line["details"]["cameras"] == []


def test_what_cannot_be_logged_is_not_shown(onvif, monkeypatch):
    vms = onvif.client().search
    token = vms.SearchImageByNL(Text="red", **ALL)

    def full(*args, **more):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("upperson_rt.query_log.write_head", full)
        with pytest.raises(Fault, match="No space left on device") as caught:
            take(vms, token)
        assert caught.value.code == "env:Receiver"
        with refused("Action"):
            vms.SearchImageByNL(Text="red", **ALL)
    assert len(onvif.sessions._sessions) == 1
    assert len(take(vms, token).Result) == 12  # Nothing was lost.


def test_a_defect_is_no_traceback(onvif, monkeypatch, caplog):
    vms = onvif.client().search
    monkeypatch.setattr(recordings, "scored_hits", lambda *args: 1 / 0)
    with pytest.raises(Fault, match="ZeroDivisionError") as caught:
        vms.SearchImageByNL(Text="red", **ALL)
    assert caught.value.code == "env:Receiver"
    assert "division by zero" in caplog.text


def test_many_clients_at_once(shared, vms):
    """Each gets its own results."""
    clients = [shared.client().search for _ in range(8)]
    barrier = threading.Barrier(8)

    def search(client):
        barrier.wait()
        token = client.SearchImageByNL(Text="red", **ALL)
        given = []
        while True:
            page = take(client, token, MaxResults=5)
            given += uuids(page)
            if page.SearchState == "Completed":
                client.EndSearch(token)
                return given

    with ThreadPoolExecutor(8) as pool:
        lists = [*pool.map(search, clients)]
    assert all(one == lists[0] for one in lists)
    assert len(set(lists[0])) == 12
