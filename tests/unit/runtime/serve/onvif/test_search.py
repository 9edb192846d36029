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

from tests.helpers.console import ODD, START, last_line, log_lines
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
BACK = {**ALL, "StartPoint": ALL["EndPoint"], "EndPoint": ALL["StartPoint"]}
LIVE = {**ALL, "EndPoint": at(90_000)}
"""Goes on until after the present."""
LATEST = at(600 * 5 + 20 + 7200)
NO_TOKEN, BUSY = ("InvalidArgVal", "InvalidToken"), ("Action", "ResourceProblem")


def uuids(found):
    return [one.ObjectUUID for one in found.Result]


def find(search, text="red", **more):
    """Begin a search; return its token."""
    return search.SearchImageByNL(**{"Text": text, **ALL, **more})


def take(search, token, **more):
    return search.GetNLSearchResults(SearchToken=token, **more)


def by_image(search, **given):
    return search.GetImageSearchResults(search.SearchImageByImage(**given, **ALL))


def outcome(found):
    """The state of a search, and the number of results that were returned."""
    return found.SearchState, len(found.Result)


def add_red(onvif, key="new", seconds=86_000.0, **more):
    """Record a person in red, by default after all others."""
    file = draw_person(onvif.log.with_name(f"{key}.png"), "red", seed=3)
    vectors = onvif.service.encoder.encode_images([file])
    item = Item(**{"key": key, "time": START + seconds, "camera": "gate", "track": key, **more})
    onvif.service.gallery.add([item], vectors)


def refused_as(subcodes, *attempts):
    """Expect a fault with these subcodes of each attempt, whose sender or receiver is at fault."""
    code = "env:Receiver" if subcodes[0].startswith("Action") else "env:Sender"
    for attempt in attempts:
        with fault(*subcodes, code=code):
            attempt()


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
    assert (found.SearchState, len({*uuids(found)})) == ("Completed", 12)  # Colours and cameras.
    similar = [one.Similarity for one in found.Result]
    assert similar == sorted(similar, reverse=True)
    assert 0 <= similar[-1] < similar[0] < 0.5  # The bundle has no score calibration.
    cameras = set()
    for one in found.Result[:2]:
        id_ = int(one.TargetImageURI.rpartition("/")[2])
        item, _ = shared.service.gallery.get([id_])[id_]
        cameras.add(item.camera)
        assert (item.key[:4], one.Time.timestamp()) == ("red-", item.time)
        assert uuid.UUID(one.ObjectUUID).version == 5
    assert cameras == {"gate", ODD}
    # A track has the same id in every search.
    other = uuids(take(vms, find(vms, "a man in blue")))
    assert uuids(found) != other
    assert {*uuids(found)} == {*other}


def test_ranges_include_both_ends_and_may_go_back_or_have_no_end(vms):
    whole = take(vms, find(vms))
    times = {one.Time for one in whole.Result}
    assert min(times) < at(21)
    found = take(vms, find(vms, **{**ALL, "StartPoint": max(times), "EndPoint": max(times)}))
    assert [one.Time for one in found.Result] == [max(times)]
    between = {**ALL, "StartPoint": at(21), "EndPoint": at(599)}
    assert outcome(take(vms, find(vms, **between))) == ("Completed", 0)
    token = find(vms, **BACK)
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
    assert (second.SearchState, [one.Time for one in second.Result]) == ("Searching", [at(86_000)])
    onvif.sessions.now = lambda: START + 90_001
    assert outcome(take(vms, token)) == ("Completed", 0)
    assert vms.EndSearch(token) == LIVE["EndPoint"]


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


def test_no_result_comes_twice_and_max_matches_ends_a_search(shared, vms):
    token = find(vms)
    pages = [take(vms, token, MaxResults=5) for _ in range(4)]
    assert [outcome(page) for page in pages] == [
        ("Searching", 5), ("Searching", 5), ("Completed", 2), ("Completed", 0)
    ]  # fmt: skip
    given = [one for page in pages for one in uuids(page)]
    assert len({*given}) == 12
    token = find(vms, MaxMatches=3, **LIVE)
    for state, best in (("Searching", given[:2]), ("Completed", given[2:3]), ("Completed", [])):
        found = take(vms, token, MaxResults=2)
        assert (found.SearchState, uuids(found)) == (state, best)
    token = find(vms)
    clients = [shared.client().search for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:  # Requests at the same time.
        pages = [*pool.map(lambda client: take(client, token, MaxResults=3), clients)]
    given = [one for page in pages for one in uuids(page)]
    assert len(given) == len({*given}) == 12


def test_a_token_is_of_one_user_and_kind_until_its_search_is_ended(shared, vms):
    door, token = shared.client("door").search, find(vms)
    refused_as(
        NO_TOKEN,
        lambda: take(door, token),
        lambda: door.EndSearch(token),
        lambda: vms.GetImageSearchResults(SearchToken=token),
        lambda: vms.GetRecordingSearchResults(SearchToken=token),
        lambda: take(vms, "x" * 32),
        lambda: vms.EndSearch(""),
    )
    assert vms.EndSearch(token) == ALL["StartPoint"]  # It had not begun.
    refused_as(NO_TOKEN, lambda: take(vms, token), lambda: vms.EndSearch(token))
    token = find(vms)
    assert len(take(vms, token).Result) == 12
    assert vms.EndSearch(token) == ALL["EndPoint"]
    token = find(vms, **LIVE)
    take(vms, token)
    assert vms.EndSearch(token).timestamp() == NOW


def test_a_search_ends_after_its_keep_alive_time(onvif, monkeypatch):
    vms, now = onvif.client().search, [1000.0]
    onvif.sessions.clock = lambda: now[0]
    token = find(vms, KeepAliveTime=MINUTE / 2)
    for _ in range(3):  # Counted from each request.
        now[0] += 30
        take(vms, token, MaxResults=1)
    now[0] += 31
    refused_as(NO_TOKEN, lambda: take(vms, token))
    assert onvif.sessions._sessions == {}
    token = find(vms, KeepAliveTime="P1Y")  # An hour at most.
    now[0] += 3601
    refused_as(NO_TOKEN, lambda: take(vms, token))
    # Time at the encoder is no silence of the client.
    search = recordings.scored_hits

    def slowly(*args):
        now[0] += 100
        onvif.sessions._drop_expired()  # As any request of others does meanwhile.
        return search(*args)

    monkeypatch.setattr(recordings, "scored_hits", slowly)
    token = find(vms)
    assert len(take(vms, token, MaxResults=5).Result) == 5
    assert len(take(vms, token).Result) == 7


def test_it_waits_for_enough_results_that_can_come(onvif, vms):
    with waiting(onvif, least=2) as ((request,), _):
        add_red(onvif, "one")
        assert not request.done()
        add_red(onvif, "two")
        assert outcome(request.result()) == ("Searching", 2)
    for query, count in ((ALL, 12), ({"MaxMatches": 2, **LIVE}, 2)):
        found = take(vms, find(vms, **query), MinResults=100, WaitTime="PT1H")
        assert outcome(found) == ("Completed", count)
    token = find(vms, **LIVE)
    assert len(take(vms, token).Result) == 12
    for more in ({"WaitTime": "PT0.05S", "MinResults": 1}, {}):  # Without a time it does not wait.
        assert outcome(take(vms, token, **more)) == ("Searching", 0)


@pytest.mark.parametrize("end", ["search", "server"])
def test_an_end_and_the_next_request_answer_waiting_ones(onvif, end):
    with waiting(onvif, 3) as (requests, token):
        until(lambda: sum(one.done() for one in requests) == 2)
        if end == "server":
            onvif.server.end()
        else:
            onvif.client().search.EndSearch(token)
        assert [one.result().Result for one in requests] == [[], [], []]
    if end == "search":
        refused_as(NO_TOKEN, lambda: take(onvif.client().search, token))


def test_a_client_that_has_gone_gets_no_results(onvif):
    vms = onvif.client().search
    with waiting(onvif) as ((request,), token):
        assert take(vms, token, WaitTime="PT0S").Result == request.result().Result == []
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


def test_a_busy_encoder_refuses_searches_and_a_defect_is_no_traceback(onvif, monkeypatch, caplog):
    vms, queue = onvif.client().search, onvif.service.queue
    token = find(vms, "a man in blue", **LIVE)
    onvif.service.current.last.search.queries._kept.clear()
    queue.waiting = queue._most
    refused_as(BUSY, lambda: find(vms))
    assert len(onvif.sessions._sessions) == 1
    assert outcome(take(vms, token)) == ("Queued", 0)
    queue.waiting = 0
    assert len(take(vms, token).Result) == 12
    monkeypatch.setattr(recordings, "scored_hits", lambda *args: 1 / 0)
    refused_as(["Action"], lambda: find(vms))
    assert "division by zero" in caplog.text


def test_a_malformed_search_is_refused(vms, shared):
    """No address of elsewhere is fetched for a picture."""
    for more in ({"Text": ""}, {"Text": "x" * 2001}, {"MaxMatches": 0}, {"Similarity": 1.5}):
        with fault("InvalidArgVal", code="env:Sender"):
            find(vms, **more)
    refused_as(NO_TOKEN, lambda: find(vms, RecordingToken="nowhere"))
    places = ("http://127.0.0.1:1/a.jpg", "file:///etc/passwd", "/onvif/pictures/1")
    wrong = [{"TargetImageURI": place} for place in places]
    for given in (*wrong, {}, {"TargetImageData": b"GIF89a nothing"}):
        with fault("InvalidArgVal"):
            vms.SearchImageByImage(**given, **ALL)
    assert shared.sessions._sessions == {}


def test_a_picture_finds_who_looks_like_it(vms, shared, red_jpeg):
    found = by_image(vms, TargetImageData=red_jpeg)
    assert outcome(found) == ("Completed", 12)
    best = [one.Time.timestamp() - START for one in found.Result[:2]]
    assert min(best) <= 10  # Red came first, at both cameras.
    assert max(best) == 7220
    # A result can be searched with; data count before it.
    blue = take(vms, find(vms, "blue")).Result[0]
    place = {"TargetImageURI": blue.TargetImageURI}
    for data in ({}, {"TargetImageData": b""}):
        assert uuids(by_image(vms, **place, **data))[0] == blue.ObjectUUID
    assert uuids(by_image(vms, **place, TargetImageData=red_jpeg))[0] != blue.ObjectUUID
    odd = take(vms, find(vms, "blue", RecordingToken=odd_token(vms))).Result[0]
    door = shared.client("door").search
    refused_as(["InvalidArgVal"], lambda: by_image(door, TargetImageURI=odd.TargetImageURI))


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
    assert (odd.LatestRecording, "6 pictures" in odd.Content) == (LATEST, True)
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
    for found, token in (
        (take(vms, vms.SearchImageByNL(Text="red", RecordingToken="gate", **ALL)), "gate"),
        (take(vms, find(vms, RecordingToken=odd)), odd),
        (take(door, find(door)), "gate"),
        (by_image(door, TargetImageData=red_jpeg), "gate"),
    ):
        assert [one.RecordingToken for one in found.Result] == [token] * 6
    (gate,) = recordings_of(door)[1].RecordingInformation
    assert gate.RecordingToken == "gate"
    refused_as(NO_TOKEN, lambda: find(door, RecordingToken=odd))


def test_pictures_without_camera_or_time_are_of_no_recording(onvif):
    vms = onvif.client().search
    add_red(onvif, "a", 5, camera=None, track=None)
    add_red(onvif, "b", time=None)
    assert len(take(vms, find(vms)).Result) == 12
    onvif.service.gallery.delete_where(Filter(camera="gate"))
    onvif.service.current.last.has_changed()
    door = onvif.client("door").search
    assert outcome(take(door, find(door))) == ("Completed", 0)
    line = last_line(onvif)  # No camera does not mean all.
    assert ("camera" in line["filter"], line["details"]["cameras"]) == (False, [])


def test_what_is_shown_is_in_the_log_before(onvif, red_jpeg, full_disk):
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
    begun, first, second, searched = lines
    assert begun["sentence"] == first["sentence"] == "a woman in red"
    assert (begun["ids"], begun["k"], first["k"]) == ([], 9, 4)
    ids = [int(one.TargetImageURI.rpartition("/")[2]) for one in found.Result]
    assert (first["ids"], len(second["ids"])) == (ids, 2)
    assert (first["filter"]["camera"], first["filter"]["since"]) == (["gate"], START)
    assert searched["details"]["picture"]
    assert verify_log(onvif.log).problems == []
    # What cannot be logged is not shown, and comes later.
    vms, known = onvif.client().search, len(onvif.sessions._sessions)
    token = find(vms)
    events = {"SearchFilter": {}, "IncludeStartState": False, "Scope": {}, **ALL}
    with full_disk():
        asks = (lambda: take(vms, token), lambda: find(vms), lambda: vms.FindEvents(**events))
        refused_as(["Action"], *asks)
    assert len(onvif.sessions._sessions) == known + 1
    assert len(take(vms, token).Result) == 12
