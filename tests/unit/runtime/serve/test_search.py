"""Searches by API and page: the same results, the address is the search, pages without gaps."""

import re
from dataclasses import replace
from urllib.parse import parse_qsl, urlencode

import numpy as np
import pytest

from tests.helpers.console import ODD, START, add_items, id_of
from tests.helpers.refused import refused
from upperson_console.models import SearchIn
from upperson_console.problems import ProblemError
from upperson_console.search import Cursor, Search, make_cursor, read_cursor
from upperson_phrases import parse_query
from upperson_rt.errors import UsageError
from upperson_rt.gallery import Filter, Item
from upperson_rt.retriever import Retriever
from upperson_rt.search.background import BackgroundScores


def keys(answer):
    assert answer.status_code == 200, answer.text
    return [hit["key"] for hit in answer.json()["hits"]]


def cards(answer):
    return re.findall(r'class="open" href="/people/(\d+)\?', answer.text)


def codes(found):
    return {notice["code"]: notice["fields"] for notice in found["notices"]}


@pytest.mark.parametrize("sentence", ["a woman in red", "a woman in red without a bag"])
def test_api_and_page_find_what_the_retriever_finds(reader, sentence):
    retriever = Retriever(reader.service.encoder, reader.service.gallery)
    expected = retriever.query(sentence, k=5, by_track=True)
    found = reader.client.search(sentence=sentence, limit=5).json()
    hits = found["hits"]
    shown = [(hit["key"], hit["id"]) for hit in hits]
    assert shown == [(hit.item.key, str(hit.id)) for hit in expected]
    assert [hit["score"] for hit in hits] == pytest.approx([hit.score for hit in expected])
    assert hits[0]["span"]["pictures"] == expected[0].span.pictures
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d", hits[0]["time"])
    assert found["total"] == 18
    assert codes(found) == ({"excluded": {"phrases": ["bag"]}} if "bag" in sentence else {})
    page = reader.client.get("/?" + urlencode({"q": sentence}))
    assert cards(page)[:5] == [str(hit.id) for hit in expected]


def test_a_picture_and_both_together(reader, red_jpeg):
    files = {"picture": ("x.jpg", red_jpeg)}
    id_ = reader.client.post("/api/v1/pictures", files=files).json()["picture"]
    by_picture = keys(reader.client.search(picture=id_, limit=4))
    assert by_picture[0].startswith("red")
    data = {"search": '{"limit": 4}'}
    once = reader.client.post("/api/v1/search/picture", files=files, data=data)
    assert keys(once) == by_picture

    def mixed(share):
        return keys(reader.client.search(sentence="green coat", picture=id_, picture_share=share))

    assert mixed(0)[0].startswith("green")
    assert mixed(1)[0].startswith("red")
    text_D = reader.service.encoder.encode_texts(["green coat"])[0]
    mixed_D = text_D + reader.service.query_pictures.get(id_).vector_D
    query_ND = (mixed_D / np.linalg.norm(mixed_D))[None]
    (hits,) = reader.service.gallery.search(query_ND, 24, by_track=True)
    assert mixed(0.5) == [hit.item.key for hit in hits]
    page = reader.client.get(f"/?q=green+coat&picture={id_}&share=1")
    assert 'type="range" name="share"' in page.text
    assert reader.client.get(f"/query-pictures/{id_}").headers["content-type"] == "image/jpeg"
    # Without a script.
    form = reader.client.post("/picture", files=files, data={"address": "camera=gate"})
    assert form.headers["location"] == f"/?picture={id_}&camera=gate"
    like = str(id_of(reader, "blue-1"))
    assert keys(reader.client.search(like=like, by_track=False, limit=1)) == ["blue-1"]


def test_filters_narrow(reader):
    where = {"cameras": ["gate"], "attributes": {"floor": 0}, "since": "2026-09-21T14:13:20Z"}
    found = reader.client.search(sentence="red", by_track=False, limit=100, filter=where)
    same = Filter(camera="gate", attributes={"floor": 0}, since=START)
    expected = {item.key for item in reader.service.gallery.items(same)}
    assert set(keys(found)) == expected
    assert found.json()["total"] == len(expected) == 6
    page = reader.client.get("/?q=red&by=picture&camera=gate&where=floor%3D0")
    assert len(cards(page)) == 6


def all_pages(client, meanwhile=lambda found: None, **query):
    """The hits of all pages; in between ``meanwhile`` gets those that were found."""
    page = client.search(**query).json()
    found = page["hits"]
    while page["next"] is not None:
        meanwhile(found)
        page = client.search(**query, cursor=page["next"]).json()
        found += page["hits"]
        assert len(found) < 200
    assert [hit["rank"] for hit in found] == [*range(1, len(found) + 1)]
    return found


@pytest.mark.parametrize(("order", "limit"), [("match", 4), ("time", 7)])
def test_pages_follow_each_other_without_gaps(reader, order, limit):
    query = {"sentence": "red", "by_track": False, "order": order}
    whole = reader.client.search(**query, limit=100).json()["hits"]
    assert len({hit["key"] for hit in whole}) == len(whole) == 18
    found = all_pages(reader.client, **query, limit=limit)
    assert [hit["key"] for hit in found] == [hit["key"] for hit in whole]
    if order == "time":
        times = [hit["time"] for hit in whole]
        assert times == sorted(times, reverse=True)


def test_pages_go_on_from_likelihoods_to_scores(calibrated, monkeypatch):
    monkeypatch.setattr("upperson_rt.search.service.CANDIDATES", 7)
    query = {"sentence": "a woman in red", "by_track": False}
    whole = calibrated.client.search(**query, limit=100).json()["hits"]
    likely = [hit["likelihood"] for hit in whole][:7]
    assert likely == sorted(likely, reverse=True)

    def add_one(found):
        add_items(calibrated, Item(key=f"new {len(found)}"))

    found = all_pages(calibrated.client, add_one, **query, limit=3)
    keys = [hit["key"] for hit in found if not hit["key"].startswith("new")]
    assert sorted(keys) == sorted(hit["key"] for hit in whole)


def test_a_track_that_gets_a_better_picture_meanwhile_is_shown_once(calibrated):
    def add_better(found):
        if len(found) == 4:
            track = {name: found[0][name] for name in ("camera", "track")}
            item = Item(key="better", time=START + 30_000, **track)
            add_items(calibrated, item, text="a woman in red")

    found = all_pages(calibrated.client, add_better, sentence="a woman in red", limit=4)
    assert len(found) == len({(hit["camera"], hit["track"]) for hit in found}) == 18


def test_a_cursor_of_all_that_is_ordered_is_taken():
    search = Search(sentence="red", by_track=False)
    end = Cursor(offset=240, last=(-0.25, 2**63), shown=frozenset(range(2**32 - 200, 2**32)))
    text = make_cursor(search, end)
    assert read_cursor(text, search) == end
    assert SearchIn(sentence="red", cursor=text).cursor == text
    with pytest.raises(ProblemError):
        read_cursor("A" * 5000, search)


def test_a_misspelt_word_is_one_click_from_the_right_one(reader):
    found = reader.client.search(sentence="<woman in rde coat").json()
    meant = {"words": {"rde": "red"}, "sentence": "<woman in red coat"}
    assert codes(found)["did_you_mean"] == meant
    page = reader.client.get("/", params={"q": "<woman in rde coat"}).text
    assert '<a lang="en" href="/?q=%3Cwoman+in+red+coat">&lt;woman in red coat</a>' in page


def test_what_to_know_about_a_search_is_noticed(reader, red_jpeg, monkeypatch):
    long = reader.client.search(sentence="a woman in red " * 6).json()
    assert codes(long) == {"sentence_truncated": {"context_length": 12}}
    found = reader.client.search(sentence="a woman in zebra").json()
    (notice,) = found["notices"]
    assert codes(found) == {"words_unknown": {"words": ["zebra"]}}
    assert found["notes"] == [f"{notice['text'][0].upper()}{notice['text'][1:]}."]
    monkeypatch.setattr(
        BackgroundScores, "is_indistinct", lambda self, sentence, vector: "a" in sentence.wanted
    )
    found = reader.client.search(sentence="a", limit=3).json()
    assert "indistinct" in codes(found)
    assert found["notes"][0] in reader.client.get("/?q=a").text
    assert "indistinct" not in codes(reader.client.search(sentence="red").json())
    sent = reader.client.post("/api/v1/pictures", files={"picture": ("x.jpg", red_jpeg)}).json()
    both = reader.client.search(sentence="a", picture=sent["picture"], limit=1).json()
    assert "indistinct" not in codes(both)  # The picture makes it distinct.


def test_notices_show_nothing_of_hidden_cameras(guarded, monkeypatch):
    def unknown(client, *cameras):
        """The number of hits, and the cameras that are reported as unknown."""
        found = client.search(sentence="red", filter={"cameras": [*cameras]}).json()
        reported = codes(found).get("camera_unknown", {"cameras": []})
        return len(found["hits"]), reported["cameras"]

    assert unknown(guarded.operator, "gate", "yard") == (6, ["yard"])
    assert unknown(guarded.operator, "gate", ODD) == (12, [])
    # A camera that a viewer may not see looks as if it were not there.
    assert unknown(guarded.viewer, ODD, "yard") == (0, [ODD, "yard"])
    add_items(guarded, Item(key="new", camera="yard"))
    assert unknown(guarded.operator, "yard") == (1, [])  # However old the list of cameras is.
    assert unknown(guarded.viewer, "yard") == (0, ["yard"])
    monkeypatch.setattr(BackgroundScores, "is_indistinct", lambda *arguments: True)
    assert "indistinct" in codes(guarded.operator.search(sentence="a").json())
    assert "indistinct" not in codes(guarded.viewer.search(sentence="a").json())


def test_a_sentence_is_parsed_and_tokenized_once(console, monkeypatch):
    parsed, tokenized = [], []
    tokenizer = console.service.encoder.tokenizer
    encode = tokenizer.encode
    monkeypatch.setattr(
        "upperson_rt.search.query.parse_query", lambda one: parsed.append(one) or parse_query(one)
    )
    monkeypatch.setattr(tokenizer, "encode", lambda texts: tokenized.extend(texts) or encode(texts))
    query = {"sentence": "a woman in red without a bag", "limit": 2}
    cursor = console.client.search(**query).json()["next"]
    console.client.search(**query, cursor=cursor)
    console.client.get("/?q=a+woman+in+red+without+a+bag")
    assert parsed == ["a woman in red without a bag"]
    assert tokenized.count("a woman in red") == 1


ATTRIBUTES = {"n": 2, "t": "2", "b": True, "q": 'a"b=c', "f": 0.5, "s": "plain"}


@pytest.mark.parametrize(
    "search",
    [
        Search(sentence="woman & man <b> 100% #1", order="time", by_track=False),
        Search(like=7, where=Filter(camera=("a&b", "<i>"), track="t=1")),
        Search(picture="0" * 32, sentence="x", share=0.25, marks=((12, True), (7, False))),
        Search(sentence="x", last="day", where=Filter(camera=("gate",))),
        Search(sentence="x", where=Filter(since=START, until=START + 0.5, attributes=ATTRIBUTES)),
    ],
)
def test_an_address_is_its_search(search):
    again = Search.from_address(parse_qsl(search.address()))
    assert (again, again.digest) == (search, search.digest)
    assert replace(search, sentence="other").digest != search.digest


def test_the_last_hour_counts_back_from_now_and_a_malformed_address_is_refused():
    for address, code in {
        "since=yesterday": "time_malformed",
        "since=2026-11-25T10:00&until=2026-11-25T09:00": "times_reversed",
        "like=abc": "id_malformed",
        "share=7": "share_out_of_range",
        "marks=x1": "mark_malformed",
        "like=9999999999999999999": "id_malformed",
        "marks=y9999999999999999999": "id_malformed",
        f"q={'x' * 2001}": "sentence_too_long",
        f"picture={'0' * 32}&like=3": "two_pictures",
        f"marks={'.'.join(f'y{n}' for n in range(101))}": "too_many_marks",
    }.items():
        with refused(code, UsageError):
            Search.from_address(parse_qsl(address))
    search = Search(sentence="x", last="hour", where=Filter(camera="gate"))
    until = START + 10  # The clock of a camera may be ahead of ours, but not by a day.
    assert search.filter_at(START) == Filter(camera="gate", since=START - 3600, until=until)
    newest = replace(search, marks=((1, True), (2, True))).with_marks(
        dict.fromkeys(range(3, 103), True)
    )
    assert newest.yes == (*range(3, 103),)
