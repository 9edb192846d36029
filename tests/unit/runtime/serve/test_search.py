"""Searches by API and page: the same answer, the address is the search, pages without gaps."""

import html
import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from types import SimpleNamespace
from urllib.parse import urlencode

import numpy as np
import pytest

from tests.helpers.console import ODD
from upperson_console import current
from upperson_console.search import Search
from upperson_rt.errors import UsageError
from upperson_rt.gallery import Filter, Item
from upperson_rt.phrases import parse
from upperson_rt.retriever import Retriever
from upperson_rt.search.calibration import ScoreCalibration

START = 1_790_000_000.0


def keys(answer):
    assert answer.status_code == 200, answer.text
    return [hit["key"] for hit in answer.json()["hits"]]


def cards(answer):
    return re.findall(r'class="open" href="/people/(\d+)\?', answer.text)


def lines(console):
    return [json.loads(line) for line in console.log.read_text().splitlines()]


def test_api_and_page_find_what_the_retriever_finds(reader):
    retriever = Retriever(reader.desk.encoder, reader.desk.gallery)
    expected = retriever.query("a woman in red", k=5, by_track=True)
    answer = reader.client.search(sentence="a woman in red", limit=5)
    assert keys(answer) == [hit.item.key for hit in expected]
    found = answer.json()
    assert [hit["id"] for hit in found["hits"]] == [str(hit.id) for hit in expected]
    assert [hit["score"] for hit in found["hits"]] == pytest.approx([h.score for h in expected])
    assert found["hits"][0]["span"]["pictures"] == expected[0].span.pictures
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", found["hits"][0]["time"]
    )
    assert found["total"] == 18
    page = reader.client.get("/?q=a+woman+in+red")
    assert cards(page)[:5] == [str(hit.id) for hit in expected]


def test_what_a_sentence_denies_counts_as_it_does_for_the_retriever(reader):
    sentence = "a woman in red without a bag"
    expected = Retriever(reader.desk.encoder, reader.desk.gallery).query(
        sentence, k=5, by_track=True
    )
    answer = reader.client.search(sentence=sentence, limit=5)
    assert keys(answer) == [hit.item.key for hit in expected]
    scores = [hit["score"] for hit in answer.json()["hits"]]
    assert scores == pytest.approx([hit.score for hit in expected])
    assert {"excluded": {"phrases": ["bag"]}}.items() <= {
        one["code"]: one["fields"] for one in answer.json()["notices"]
    }.items()
    plain = reader.client.search(sentence="a woman in red", limit=5).json()
    assert [hit["score"] for hit in plain["hits"]] != scores
    assert not any("Must not" in note for note in plain["notes"])


def test_a_picture_and_both_together(reader, red_jpeg):
    given = reader.client.post("/api/v1/pictures", files={"picture": ("x.jpg", red_jpeg)})
    assert given.status_code == 201
    id_ = given.json()["picture"]
    by_picture = keys(reader.client.search(picture=id_, limit=4))
    assert by_picture[0].startswith("red")
    once = reader.client.post(
        "/api/v1/search/picture",
        files={"picture": ("x.jpg", red_jpeg)},
        data={"search": '{"limit": 4}'},
    )
    assert keys(once) == by_picture
    first = [
        reader.client.search(sentence="green coat", picture=id_, picture_share=share).json()
        for share in (0, 0.5, 1)
    ]
    assert [found["hits"][0]["key"].split("-")[0] for found in (first[0], first[2])] == [
        "green",
        "red",
    ]
    text_D = reader.desk.encoder.encode_texts(["green coat"])[0]
    mixed_D = text_D + reader.desk.query_pictures.get(id_).vector_D
    (hits,) = reader.desk.gallery.search(
        (mixed_D / np.linalg.norm(mixed_D))[None], 24, by_track=True
    )
    assert [hit["key"] for hit in first[1]["hits"]] == [hit.item.key for hit in hits]
    page = reader.client.get(f"/?q=green+coat&picture={id_}&share=1")
    assert 'type="range" name="share"' in page.text
    assert reader.client.get(f"/asked/{id_}").headers["content-type"] == "image/jpeg"


def test_a_picture_given_without_a_script_leads_to_its_search(reader, red_jpeg):
    answer = reader.client.post(
        "/picture", files={"picture": ("x.jpg", red_jpeg)}, data={"address": "camera=gate"}
    )
    assert answer.status_code == 303
    assert re.fullmatch(r"/\?picture=[0-9a-f]{32}&camera=gate", answer.headers["location"])


def test_like_one_finds_itself_first(reader):
    (id_,) = reader.desk.gallery.ids(["blue-1"]).values()
    assert keys(reader.client.search(like=str(id_), by_track=False, limit=1)) == ["blue-1"]


def test_filters_narrow(reader):
    found = reader.client.search(
        sentence="red",
        by_track=False,
        limit=100,
        filter={"cameras": ["gate"], "attributes": {"floor": 0}, "since": "2026-09-21T13:33:20Z"},
    )
    expected = {
        item.key
        for item in reader.desk.gallery.items(
            Filter(camera="gate", attributes={"floor": 0}, since=START)
        )
    }
    assert set(keys(found)) == expected
    assert found.json()["total"] == len(expected) == 6
    page = reader.client.get("/?q=red&by=picture&camera=gate&where=floor%3D0")
    assert len(cards(page)) == 6


@pytest.mark.parametrize("order", ["match", "time"])
@pytest.mark.parametrize("limit", [1, 4, 7])
def test_pages_follow_each_other_without_gaps(reader, order, limit):
    asked = {"sentence": "red", "by_track": False, "order": order}
    whole = keys(reader.client.search(**asked, limit=100))
    assert len(whole) == len(set(whole)) == 18
    found, cursor = [], None
    for _ in range(20):
        page = reader.client.search(**asked, limit=limit, cursor=cursor).json()
        found += [hit["key"] for hit in page["hits"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert found == whole
    if order == "time":
        times = [
            reader.desk.gallery.get([i])[i][0].time for i in reader.desk.gallery.ids(whole).values()
        ]
        assert sorted(times, reverse=True) == [
            reader.desk.gallery.get([reader.desk.gallery.ids([k])[k]]).popitem()[1][0].time
            for k in whole
        ]


def test_what_is_added_meanwhile_shows_nothing_twice(console):
    asked = {"sentence": "red", "by_track": False, "limit": 6}
    first = console.client.search(**asked).json()
    vector = console.desk.encoder.encode_texts(["red"])
    console.desk.gallery.add([Item(key="new", camera="gate")], vector)
    second = console.client.search(**asked, cursor=first["next"]).json()
    assert not {hit["key"] for hit in first["hits"]} & {hit["key"] for hit in second["hits"]}
    assert "new" not in {hit["key"] for hit in second["hits"]}


def codes(found):
    return [notice["code"] for notice in found["notices"]]


def test_a_long_sentence_and_unknown_words_are_noticed(reader):
    (notice,) = reader.client.search(sentence="a woman in red " * 6).json()["notices"]
    assert (notice["code"], notice["fields"]) == ("sentence_truncated", {"context_length": 12})
    found = reader.client.search(sentence="a woman in zebra").json()
    (notice,) = found["notices"]
    assert (notice["code"], notice["fields"]) == ("words_unknown", {"words": ["zebra"]})
    assert found["notes"] == [f"{notice['text'][0].upper()}{notice['text'][1:]}."]
    assert not reader.client.search(sentence="a woman in red").json()["notes"]


def test_a_sentence_that_tells_nobody_apart_is_noticed(reader, red_jpeg, monkeypatch):
    monkeypatch.setattr(
        ScoreCalibration, "is_indistinct", lambda self, sentence, vector: "a" in sentence.wanted
    )
    found = reader.client.search(sentence="a", limit=3).json()
    assert "indistinct" in codes(found)
    assert [hit["match"] for hit in found["hits"]] == ["", "", ""]  # Nobody is called a match.
    assert found["notes"][0] in reader.client.get("/?q=a").text
    assert "indistinct" not in codes(reader.client.search(sentence="red").json())
    given = reader.client.post("/api/v1/pictures", files={"picture": ("x.jpg", red_jpeg)}).json()
    both = reader.client.search(sentence="a", picture=given["picture"], limit=1).json()
    assert "indistinct" not in codes(both)  # The picture tells.
    assert both["hits"][0]["match"]


def test_a_camera_that_is_not_there_is_noticed(guarded):
    def notices(client, *cameras):
        found = client.search(sentence="red", filter={"cameras": [*cameras]}).json()
        return len(found["hits"]), {one["code"]: one["fields"] for one in found["notices"]}

    def unknown(*names):
        return {"camera_unknown": {"cameras": [*names]}}

    assert notices(guarded.operator, "gate", "yard") == (6, unknown("yard"))
    assert notices(guarded.operator, "gate", ODD) == (12, {})
    # What a viewer may not see looks as if it were not there, and no other camera is named.
    assert notices(guarded.viewer, ODD) == (0, unknown(ODD))
    assert notices(guarded.viewer, "yard") == (0, unknown("yard"))
    vector = guarded.desk.encoder.encode_texts(["red"])
    guarded.desk.gallery.add([Item(key="new", camera="yard")], vector)
    assert notices(guarded.operator, "yard") == (1, {})  # However old the list of cameras is.
    assert notices(guarded.viewer, "yard") == (0, unknown("yard"))
    page = html.unescape(guarded.operator.get("/?q=red&camera=gate&camera=hall").text)
    assert "no picture of the camera 'hall'" in page.lower()


def test_a_sentence_is_parsed_and_tokenized_once(console, monkeypatch):
    parsed, tokenized = [], []
    tokenizer = console.desk.encoder.tokenizer
    encode = tokenizer.encode
    monkeypatch.setattr(
        "upperson_rt.search.query.parse", lambda one: parsed.append(one) or parse(one)
    )
    monkeypatch.setattr(tokenizer, "encode", lambda texts: tokenized.extend(texts) or encode(texts))
    asked = {"sentence": "a woman in red without a bag", "limit": 2}
    cursor = console.client.search(**asked).json()["next"]
    console.client.search(**asked, cursor=cursor)
    console.client.get("/?q=a+woman+in+red+without+a+bag")
    assert parsed == ["a woman in red without a bag"]
    assert tokenized.count("a woman in red") == 1


SEARCHES = [
    Search(sentence="woman & man <b> 100% #1", order="time", by_track=False),
    Search(like=7, where=Filter(camera=("a&b", "<i>"), track="t=1")),
    Search(picture="0" * 32, sentence="x", share=0.25, marks=((12, True), (7, False))),
    Search(sentence="x", last="day", where=Filter(camera=("gate",))),
    Search(
        sentence="x",
        where=Filter(
            since=START,
            until=START + 0.5,
            attributes={"n": 2, "t": "2", "b": True, "q": 'a"b=c', "f": 0.5, "s": "plain"},
        ),
    ),
]


@pytest.mark.parametrize("search", SEARCHES)
def test_an_address_is_its_search(search):
    from urllib.parse import parse_qsl

    again = Search.from_address(parse_qsl(search.address()))
    assert again == search
    assert again.digest == search.digest
    assert replace(search, sentence="other").digest != search.digest


def test_every_page_of_a_search_is_in_the_log(console):
    console.client.search(sentence="red", filter={"cameras": ["gate"]}, limit=2)
    console.client.get("/?" + urlencode({"q": "green coat"}))
    first, second = lines(console)
    assert first["sentence"] == "red"
    assert first["filter"] == {"camera": ["gate"]}
    assert first["k"] == 2
    assert len(first["ids"]) == 2
    assert first["user"] == "desk"
    assert second["sentence"] == "green coat"


def test_nothing_found_says_why_and_what_to_do(console, make_console, tmp_path):
    def message(address):
        page = console.client.get(address)
        assert page.status_code == 200
        return html.unescape(page.text)

    assert "No pictures of the camera \u201cyard\u201d" in message("/?q=red&camera=yard")
    stopped = message("/?q=red&camera=gate&last=hour")
    assert "No picture in this time" in stopped
    assert "last picture" in stopped
    assert 'href="/live"' in stopped
    assert "Nothing passes the filter" in message("/?q=red&where=floor%3D9")
    from upperson_rt.gallery import Gallery

    encoder = console.desk.encoder
    Gallery.open(tmp_path / "empty", encoder.fingerprint, encoder.embed_dim, create=True).close()
    empty = make_console(folder=tmp_path / "empty")
    for address in ("/", "/?q=red"):
        page = empty.client.get(address)
        assert "The gallery is empty" in page.text
        assert "upperson-rt index" in page.text


def test_searches_refuse_what_contradicts():
    with pytest.raises(UsageError, match="exclude each other"):
        Search(picture="0" * 32, like=3)
    with pytest.raises(UsageError, match="100 marks at most"):
        Search(sentence="x", marks=tuple((n, True) for n in range(101)))


def test_what_is_counted_while_something_is_deleted_is_forgotten(console, monkeypatch):
    counts, goes_on = threading.Event(), threading.Event()

    def info():
        counts.set()
        assert goes_on.wait(30)
        return object()

    monkeypatch.setattr(console.desk.gallery, "info", info)
    opened = console.desk.current.last
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(opened.info)
        assert counts.wait(30)
        deleted = pool.submit(opened.has_changed)
        wait([deleted], timeout=0.2)  # It may wait for the count, or not.
        goes_on.set()
        before = first.result(30)
        deleted.result(30)
    assert opened.info() is not before


@pytest.mark.parametrize(("what", "of_gallery"), [("cameras", "by_camera"), ("info", "info")])
def test_counts_that_take_long_are_kept_for_longer(console, monkeypatch, what, of_gallery):
    """A million rows take a tenth of a second and more: not every five seconds."""
    clock, counted = [1000.0], []

    def count():
        counted.append(clock[0])
        clock[0] += took
        return {}

    monkeypatch.setattr(current, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(console.desk.gallery, of_gallery, count)
    opened = console.desk.current.last
    for took, kept in ((0.001, 5.0), (0.5, 100.0)):  # noqa: B007 - Read above.
        opened.has_changed()
        counted.clear()
        getattr(opened, what)()
        clock[0] += kept - 0.1
        getattr(opened, what)()
        assert len(counted) == 1
        clock[0] += 0.2
        getattr(opened, what)()
        assert len(counted) == 2
