"""The rules of a search, each as an unmodified SOAP client sees it."""

import datetime
import re
import shutil
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest

from tests.helpers.console import ODD, START, log_lines
from tests.helpers.toy_bundle import draw_person
from tests.unit.runtime.serve.onvif.conftest import NOW, envelope, fault, running
from upperson_console.onvif import recordings
from upperson_log.chain import verify_log
from upperson_rt.gallery import Filter, Item


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


NO_TOKEN = ("InvalidArgVal", "InvalidToken")


def find(search, text="red", **more):
    """Begin a search; return its token."""
    return search.SearchImageByNL(**{"Text": text, **ALL, **more})


def take(search, token, **more):
    return search.GetNLSearchResults(SearchToken=token, **more)


def outcome(found):
    """The state of a search, and the number of results that were returned."""
    return found.SearchState, len(found.Result)


def add_red(onvif, key="new", seconds=86_000.0, **more):
    """Record a person in red, by default after all others."""
    file = draw_person(onvif.log.with_name(f"{key}.png"), "red", seed=3)
    vectors = onvif.service.encoder.encode_images([file])
    item = Item(**{"key": key, "time": START + seconds, "camera": "gate", "track": key, **more})
    onvif.service.gallery.add([item], vectors)


def until(condition):
    """Wait for something that another thread does."""
    while not condition():
        time.sleep(0.01)


def waiting_requests(onvif):
    """Requests for results under way."""
    return sum(session.asking for session in onvif.sessions._sessions.values())


@contextmanager
def waiting(onvif, count=1, least=1):
    """Yield requests that wait for more results of a search that goes on, and its token."""
    onvif.sessions.poll_s = 0.02
    token = find(onvif.client().search, **LIVE)
    take(onvif.client().search, token)
    with ThreadPoolExecutor(count) as pool:
        clients = [onvif.client().search for _ in range(count)]
        more = {"MinResults": least, "WaitTime": "PT1H"}
        requests = [pool.submit(take, client, token, **more) for client in clients]
        until(lambda: waiting_requests(onvif))
        yield requests, token


def test_it_finds_what_a_sentence_says(vms, shared):
    found = take(vms, find(vms, "a woman in red"))
    assert found.SearchState == "Completed"
    assert len(set(uuids(found))) == 12  # Tracks: six colours at two cameras.
    similar = [one.Similarity for one in found.Result]
    assert similar == sorted(similar, reverse=True)
    assert 0 <= similar[-1] < similar[0] < 0.5  # The bundle has no score calibration.
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
    other = take(vms, find(vms, "a man in blue"))
    assert uuids(found) != uuids(other)
    assert set(uuids(found)) == set(uuids(other))


def test_ranges(vms):
    """They include both ends, may go back, and end at the latest recording without an end."""
    whole = take(vms, find(vms))
    times = {one.Time for one in whole.Result}
    one = {**ALL, "StartPoint": max(times), "EndPoint": max(times)}
    found = take(vms, find(vms, **one))
    assert [one.Time for one in found.Result] == [max(times)]
    assert min(times) < at(21)
    between = {**ALL, "StartPoint": at(21), "EndPoint": at(599)}
    assert outcome(take(vms, find(vms, **between))) == ("Completed", 0)
    back = {**ALL, "StartPoint": ALL["EndPoint"], "EndPoint": ALL["StartPoint"]}
    token = find(vms, **back)
    assert uuids(take(vms, token)) == uuids(whole)
    assert vms.EndSearch(token) == ALL["StartPoint"]
    token = vms.SearchImageByNL(Text="red", StartPoint=at(0), KeepAliveTime=MINUTE)
    assert outcome(take(vms, token)) == ("Completed", 12)
    assert vms.EndSearch(token) == LATEST


def test_a_range_that_goes_on_is_through_at_its_end(onvif):
    vms = onvif.client().search
    token = find(vms, **LIVE)
    assert outcome(take(vms, token)) == ("Searching", 12)
    add_red(onvif)
    add_red(onvif, "too late", seconds=90_001.0)
    second = take(vms, token)
    assert (second.SearchState, len(second.Result)) == ("Searching", 1)
    assert second.Result[0].Time == at(86_000)
    onvif.sessions.now = lambda: START + 90_001
    assert outcome(take(vms, token)) == ("Completed", 0)
    assert vms.EndSearch(token) == LIVE["EndPoint"]


def test_max_matches_ends_it(vms):
    best = uuids(take(vms, find(vms)))[:3]
    token = find(vms, MaxMatches=3, **LIVE)
    first = take(vms, token, MaxResults=2)
    assert (first.SearchState, uuids(first)) == ("Searching", best[:2])
    second = take(vms, token, MaxResults=2)
    assert (second.SearchState, uuids(second)) == ("Completed", best[2:])
    assert take(vms, token).Result == []


def test_half_is_a_threshold_of_a_calibrated_similarity(
    served_folder, calibrated_encoder, tmp_path, monkeypatch
):
    monkeypatch.setattr("upperson_rt.search.verdict.FEWEST", 10)
    gallery = shutil.copytree(served_folder / "gallery", tmp_path / "gallery")
    with running(gallery, tmp_path, calibrated_encoder) as onvif:
        vms = onvif.client().search
        found = take(vms, find(vms, "a woman in red", Similarity=0.5))
        ids = [int(one.TargetImageURI.rpartition("/")[2]) for one in found.Result]
        keys = {item.key[:4] for item, _ in onvif.service.gallery.get(ids).values()}
        assert (outcome(found), keys) == (("Completed", 2), {"red-"})  # A track at each camera.
        assert all(one.Similarity > 0.9 for one in found.Result)
        nobody = find(vms, "a woman in a purple coat", Similarity=0.5)
        assert outcome(take(vms, nobody)) == ("Completed", 0)


def test_likelihoods_need_not_fall_with_scores(vms, monkeypatch):
    search = recordings.scored_hits

    def judged(*args):
        return [(hit, float(row in (5, 7, 8))) for row, (hit, _) in enumerate(search(*args))]

    monkeypatch.setattr(recordings, "scored_hits", judged)
    token = find(vms, Similarity=0.5, MaxMatches=2)
    assert outcome(take(vms, token, MaxResults=1)) == ("Searching", 1)
    assert outcome(take(vms, token, MaxResults=1)) == ("Completed", 1)


def test_no_result_comes_twice(shared, vms):
    token = find(vms)
    pages = [take(vms, token, MaxResults=5) for _ in range(4)]
    assert [len(page.Result) for page in pages] == [5, 5, 2, 0]
    states = [page.SearchState for page in pages]
    assert states == ["Searching", "Searching", "Completed", "Completed"]
    assert len({one for page in pages for one in uuids(page)}) == 12
    token = find(vms)
    clients = [shared.client().search for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:  # Requests at the same time.
        pages = [*pool.map(lambda client: take(client, token, MaxResults=3), clients)]
    given = [one for page in pages for one in uuids(page)]
    assert len(given) == len(set(given)) == 12


def test_an_ended_search_is_not_there_any_more(vms):
    token = find(vms)
    assert vms.EndSearch(token) == ALL["StartPoint"]  # It had not begun.
    for again in (lambda: take(vms, token), lambda: vms.EndSearch(token)):
        with fault(*NO_TOKEN):
            again()
    token = find(vms)
    take(vms, token, MaxResults=1)
    assert vms.EndSearch(token) == ALL["EndPoint"]
    token = find(vms, **LIVE)
    take(vms, token)
    assert vms.EndSearch(token).timestamp() == NOW


def test_a_search_ends_after_its_keep_alive_time(onvif):
    vms, now = onvif.client().search, [1000.0]
    onvif.sessions.clock = lambda: now[0]
    token = find(vms, KeepAliveTime=MINUTE / 2)
    for _ in range(3):  # Counted from each request.
        now[0] += 30
        take(vms, token, MaxResults=1)
    now[0] += 31
    with fault(*NO_TOKEN):
        take(vms, token)
    assert onvif.sessions._sessions == {}
    token = find(vms, KeepAliveTime="P1Y")  # An hour at most.
    now[0] += 3601
    with fault(*NO_TOKEN):
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
    token = find(vms)
    assert len(take(vms, token, MaxResults=5).Result) == 5
    assert len(take(vms, token).Result) == 7


def test_it_waits_for_enough_results(onvif):
    with waiting(onvif, least=2) as ((request,), _):
        add_red(onvif, "one")
        assert not request.done()
        add_red(onvif, "two")
        found = request.result()
    assert (found.SearchState, len(found.Result)) == ("Searching", 2)


def test_it_waits_for_the_given_time_only_for_what_can_come(vms):
    for query, count in ((ALL, 12), ({"MaxMatches": 2, **LIVE}, 2)):
        found = take(vms, find(vms, **query), MinResults=100, WaitTime="PT1H")
        assert outcome(found) == ("Completed", count)
    token = find(vms, **LIVE)
    assert len(take(vms, token).Result) == 12
    for more in ({"WaitTime": "PT0.05S", "MinResults": 1}, {}):  # Without a time it does not wait.
        assert outcome(take(vms, token, **more)) == ("Searching", 0)


@pytest.mark.parametrize("end", ["search", "server"])
def test_an_end_answers_waiting_requests(onvif, end):
    with waiting(onvif) as ((request,), token):
        if end == "server":
            onvif.server.end()
            assert request.result().Result == []
            return
        onvif.client().search.EndSearch(token)
        assert request.result().Result == []
    with fault(*NO_TOKEN):
        take(onvif.client().search, token)


def test_a_waiting_request_is_answered_by_the_next_one(onvif):
    with waiting(onvif, 3) as (requests, token):
        until(lambda: sum(one.done() for one in requests) == 2)
        assert take(onvif.client().search, token, WaitTime="PT0S").Result == []
        assert [one.result().Result for one in requests] == [[], [], []]


def test_a_client_that_has_gone_gets_no_results(onvif):
    vms = onvif.client().search
    onvif.sessions.poll_s = 0.02
    token = find(vms, **LIVE)
    take(vms, token)
    body = (
        f"<tse:GetNLSearchResultsRequest><tse:SearchToken>{token}</tse:SearchToken>"
        "<tse:MinResults>1</tse:MinResults><tse:WaitTime>PT1H</tse:WaitTime>"
        "</tse:GetNLSearchResultsRequest>"
    )
    place, timeout = f"{onvif.url}/onvif/search_service", httpx.Timeout(30, read=0.2)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(place, content=envelope(onvif, body), timeout=timeout)
    until(lambda: not waiting_requests(onvif))
    add_red(onvif)
    assert len(take(vms, token).Result) == 1


def test_a_busy_encoder_refuses_searches(onvif):
    vms, queue = onvif.client().search, onvif.service.queue
    token = find(vms, "a man in blue", **LIVE)
    onvif.service.current.last.search.queries._kept.clear()
    queue.waiting = queue._most
    with fault("Action", "ResourceProblem"):
        find(vms)
    assert len(onvif.sessions._sessions) == 1
    assert outcome(take(vms, token)) == ("Queued", 0)
    queue.waiting = 0
    assert len(take(vms, token).Result) == 12


def test_a_token_is_of_one_user_and_one_kind(shared, vms):
    door = shared.client("door").search
    token = find(vms)
    for attempt in (
        lambda: take(door, token),
        lambda: door.EndSearch(token),
        lambda: vms.GetImageSearchResults(SearchToken=token),
        lambda: vms.GetRecordingSearchResults(SearchToken=token),
        lambda: take(vms, "x" * 32),
        lambda: vms.EndSearch(""),
    ):
        with fault(*NO_TOKEN):
            attempt()
    assert len(take(vms, token).Result) == 12


def test_a_malformed_search_is_refused(vms, shared):
    """No address of elsewhere is fetched for a picture."""
    for more in ({"Text": ""}, {"Text": "x" * 2001}, {"MaxMatches": 0}, {"Similarity": 1.5}):
        with fault("InvalidArgVal", code="env:Sender"):
            find(vms, **more)
    with fault(*NO_TOKEN):
        find(vms, RecordingToken="nowhere")
    places = ("http://127.0.0.1:1/a.jpg", "file:///etc/passwd", "/onvif/pictures/1")
    wrong = [{"TargetImageURI": place} for place in places]
    for given in (*wrong, {}, {"TargetImageData": b"GIF89a nothing"}):
        with fault("InvalidArgVal"):
            vms.SearchImageByImage(**given, **ALL)
    assert shared.sessions._sessions == {}


def test_a_picture_finds_who_looks_like_it(vms, shared, red_jpeg):
    token = vms.SearchImageByImage(TargetImageData=red_jpeg, **ALL)
    found = vms.GetImageSearchResults(SearchToken=token)
    assert (found.SearchState, len(found.Result)) == ("Completed", 12)
    best = [one.Time.timestamp() - START for one in found.Result[:2]]
    assert min(best) <= 10  # Red came first, at both cameras.
    assert max(best) == 7220
    # A result can be searched with.
    blue = take(vms, find(vms, "blue")).Result[0]
    place = {"TargetImageURI": blue.TargetImageURI}
    for more in ({}, {"TargetImageData": b""}):
        token = vms.SearchImageByImage(**place, **more, **ALL)
        assert uuids(vms.GetImageSearchResults(SearchToken=token))[0] == blue.ObjectUUID
    token = vms.SearchImageByImage(**place, TargetImageData=red_jpeg, **ALL)
    best = vms.GetImageSearchResults(SearchToken=token).Result[0]
    assert best.ObjectUUID != blue.ObjectUUID  # The data count.
    odd = take(vms, find(vms, "blue", RecordingToken=odd_token(vms)))
    with fault("InvalidArgVal"):
        shared.client("door").search.SearchImageByImage(
            TargetImageURI=odd.Result[0].TargetImageURI, **ALL
        )


def recordings_of(search, scope=(), **more):
    token = search.FindRecordings(Scope=dict(scope), KeepAliveTime=MINUTE, **more)
    return token, search.GetRecordingSearchResults(token, MinResults=2, WaitTime="PT1H")


def odd_token(search):
    """The token of the camera whose name is no token."""
    found = recordings_of(search)[1].RecordingInformation
    return next(one.RecordingToken for one in found if one.Source.Name == ODD)


def test_a_camera_is_a_recording(vms):
    token, found = recordings_of(vms)
    assert found.SearchState == "Completed"
    odd, gate = sorted(found.RecordingInformation, key=lambda one: one.Source.Name)
    assert (gate.RecordingToken, gate.Source.Name) == ("gate", "gate")
    assert (gate.EarliestRecording, gate.LatestRecording) == (at(0), at(3010))
    assert re.fullmatch("camera-[0-9a-f]{32}", odd.RecordingToken)
    assert odd.LatestRecording == LATEST
    assert "6 pictures" in odd.Content
    assert vms.GetRecordingSearchResults(SearchToken=token).RecordingInformation == []
    metadata = {"RecordingInformationFilter": 'contains(//Source/Name, "gate")'}
    named = {"IncludedRecordings": ["gate"]}
    for scope in (named, {"IncludedSources": [{"Token": "gate"}]}, metadata):
        (one,) = recordings_of(vms, scope)[1].RecordingInformation
        assert one.RecordingToken == "gate"
    for scope, problem in (
        ({"RecordingInformationFilter": "//Track"}, "InvalidFilterFault"),
        ({"IncludedRecordings": ["gate", "nowhere"]}, "InvalidToken"),
        ({"IncludedSources": [{"Token": "nowhere"}]}, "InvalidSource"),
    ):
        with fault("InvalidArgVal", problem):
            recordings_of(vms, scope)


def test_a_search_is_of_one_recording_or_of_those_that_a_user_may_see(shared, vms, red_jpeg):
    odd, door = odd_token(vms), shared.client("door").search
    by_image = door.SearchImageByImage(TargetImageData=red_jpeg, **ALL)
    for found, token in (
        (take(vms, vms.SearchImageByNL(Text="red", RecordingToken="gate", **ALL)), "gate"),
        (take(vms, find(vms, RecordingToken=odd)), odd),
        (take(door, find(door)), "gate"),
        (door.GetImageSearchResults(by_image), "gate"),
    ):
        assert {one.RecordingToken for one in found.Result} == {token}
        assert len(found.Result) == 6
    (gate,) = recordings_of(door)[1].RecordingInformation
    assert gate.RecordingToken == "gate"
    with fault(*NO_TOKEN):
        find(door, RecordingToken=odd)


def test_pictures_without_camera_or_time_are_of_no_recording(onvif):
    vms = onvif.client().search
    add_red(onvif, "a", 5, camera=None, track=None)
    add_red(onvif, "b", time=None)
    assert len(take(vms, find(vms)).Result) == 12
    onvif.service.gallery.delete_where(Filter(camera="gate"))
    onvif.service.current.last.has_changed()
    door = onvif.client("door").search
    assert outcome(take(door, find(door))) == ("Completed", 0)
    line = log_lines(onvif)[-1]  # No camera does not mean all.
    assert ("camera" in line["filter"], line["details"]["cameras"]) == (False, [])


def test_what_is_shown_is_in_the_log_before(onvif, red_jpeg):
    door = onvif.client("door").search
    token = find(door, "a woman in red", MaxMatches=9)
    found = take(door, token, MaxResults=4)
    take(door, token)
    take(door, token)
    door.SearchImageByImage(TargetImageData=red_jpeg, RecordingToken="gate", **ALL)
    lines = log_lines(onvif)
    assert {(line["user"], line["action"]) for line in lines} == {("door", "query")}
    names = [line["details"]["onvif"] for line in lines]
    assert names == [*["SearchImageByNL"] * 3, "SearchImageByImage"]
    begun, first, second, by_image = lines
    assert begun["sentence"] == first["sentence"] == "a woman in red"
    assert (begun["ids"], begun["k"], first["k"]) == ([], 9, 4)
    ids = [int(one.TargetImageURI.rpartition("/")[2]) for one in found.Result]
    assert (first["ids"], len(second["ids"])) == (ids, 2)
    assert (first["filter"]["camera"], first["filter"]["since"]) == (["gate"], START)
    assert by_image["details"]["picture"]
    assert verify_log(onvif.log).problems == []


def test_what_cannot_be_logged_is_not_shown(onvif, full_disk):
    vms = onvif.client().search
    token = find(vms)
    events = {"SearchFilter": {}, "IncludeStartState": False, "Scope": {}, **ALL}
    with full_disk():
        for ask in (
            lambda: take(vms, token),
            lambda: find(vms),
            lambda: vms.FindEvents(**events),
        ):
            with fault("Action", code="env:Receiver"):
                ask()
    assert len(onvif.sessions._sessions) == 1
    assert len(take(vms, token).Result) == 12  # Nothing was lost.


def test_a_defect_is_no_traceback(onvif, monkeypatch, caplog):
    vms = onvif.client().search
    monkeypatch.setattr(recordings, "scored_hits", lambda *args: 1 / 0)
    with fault("Action", code="env:Receiver"):
        find(vms)
    assert "division by zero" in caplog.text
