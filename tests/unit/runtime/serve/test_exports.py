"""An export has what the page shows, and says so."""

import hashlib
import html
import json
import re

import pytest

from tests.helpers.console import ODD, exported, id_of, log_lines, problem
from tests.helpers.toy_bundle import COLOURS
from upperson_console import pages
from upperson_console.oversight import Oversight, RefusedSentences


def facts_of(answer):
    """The items of an export and its manifest; the hashes of all files hold."""
    files = exported(answer)
    manifest = json.loads(files["manifest.json"])
    rest = {name: body for name, body in files.items() if name != "manifest.json"}
    assert manifest["sha256"] == {n: hashlib.sha256(b).hexdigest() for n, b in rest.items()}
    return json.loads(files["items.json"])["items"], manifest


def form_of(page, label):
    """The fields that a page of results sends with a button of its export form."""
    form = re.search(r'<form [^>]*id="export".*?</form>', page, re.DOTALL)[0]
    buttons = re.findall("<button([^>]*)>(.*?)</button>", form)
    (button,) = [more for more, text in buttons if re.sub("<[^>]*>", "", text) == label]
    fields = {}
    inputs = re.findall(r"<input[^>]*>", form) + re.findall(
        r'<input[^>]* form="export"[^>]*>', page
    )
    for one in [*inputs, button]:
        name, value = (re.search(rf'{what}="([^"]*)"', one) for what in ("name", "value"))
        if name and value:
            fields.setdefault(name[1], []).append(html.unescape(value[1]))
    return fields


def test_these_are_all_views_of_the_cards_and_all_are_those_of_the_search(console):
    page = console.client.get("/?q=red").text
    assert page.count('class="open"') == 2 * len(COLOURS)
    form = form_of(page, "Export these 12")
    items, manifest = facts_of(console.client.post("/export", data=form))
    assert len(items) == manifest["pictures"] == 18  # Each track with all its views.
    narrow = console.client.get("/?q=red&camera=gate").text
    form = form_of(narrow, "Export these 6")
    items, _ = facts_of(console.client.post("/export", data={**form, "which": "all"}))
    assert {one["camera"] for one in items} == {"gate"}
    assert len(items) == 12


def test_all_hits_are_counted_before_and_may_be_likely_only(calibrated, monkeypatch):
    monkeypatch.setattr(pages, "PAGE_HITS", 2)
    page = calibrated.client.get("/?q=woman+in+a+red+coat").text
    pictures = calibrated.client.get("/api/v1/info").json()["pictures"]
    form = form_of(page, f"Export all hits: {pictures} pictures")
    every, _ = facts_of(calibrated.client.post("/export", data=form))
    assert len(every) == pictures
    likely, _ = facts_of(
        calibrated.client.post("/export", data=form_of(page, "Export likely hits only"))
    )
    judged = {(one["hit"] or {}).get("match") for one in likely}
    assert 0 < len(likely) < len(every)
    assert "likely" in judged <= {"likely", None}  # Views of a likely track have no label.


def test_all_hits_are_more_than_those_of_the_page(console, monkeypatch):
    monkeypatch.setattr("upperson_console.pages.PAGE_HITS", 3)
    page = console.client.get("/?q=red&by=picture").text
    items, _ = facts_of(console.client.post("/export", data=form_of(page, "Export these 3")))
    assert len(items) == 3
    form = form_of(page, "Export all hits: 18 pictures")
    items, manifest = facts_of(console.client.post("/export", data=form))
    assert len(items) == 18
    counts = {"entries": 18, "pictures": 18, "missing": [], "frames": 0, "clips": 0, "left_out": 0}
    assert {name: manifest[name] for name in counts} == counts
    assert (log_lines(console)[-1]["action"], len(log_lines(console)[-1]["ids"])) == ("export", 18)
    monkeypatch.setattr("upperson_console.exports.MOST_EXPORTED", 5)
    items, manifest = facts_of(console.client.post("/export", data=form))
    assert len(items) == 5
    assert manifest["left_out"] == 13


def test_a_yes_stands_for_all_views_of_its_track(console):
    id_ = id_of(console, "red-1")
    form = form_of(console.client.get(f"/?q=red&marks=y{id_}").text, "Export 1 yes")
    items, _ = facts_of(console.client.post("/export", data=form))
    assert {one["key"] for one in items} == {"red-0", "red-1"}
    form = form_of(console.client.get(f"/?q=red&by=picture&marks=y{id_}").text, "Export 1 yes")
    items, _ = facts_of(console.client.post("/export", data=form))
    assert [one["key"] for one in items] == ["red-1"]


def test_an_id_that_is_given_twice_is_one_member(console):
    ids = 3 * [str(id_of(console, "red-0"))]
    items, _ = facts_of(console.client.post("/api/v1/export", json={"ids": ids}))
    assert len(items) == 1
    views = {"ids": ids, "tracks": True}
    items, _ = facts_of(console.client.post("/api/v1/export", json=views))
    assert [one["key"] for one in items] == ["red-0", "red-1"]
    # Of as many as a page can show, only one is there; of others nothing is exported.
    gone = [str(10_000_000_000 + number) for number in range(1999)]
    form = {"ids": [*gone, ids[0]], "address": "q=red&by=picture"}
    items, manifest = facts_of(console.client.post("/export", data=form))
    assert ([one["key"] for one in items], manifest["gone"]) == (["red-0"], 1999)
    none = console.client.post("/api/v1/export", json={"ids": gone[:1]})
    problem(none, 404, "picture_not_found")


def test_a_picture_that_is_not_kept_is_said_and_not_counted(console):
    (console.folder / "crops" / "red0.png").unlink()
    gone = str(id_of(console, "red-0"))
    answer = console.client.post(
        "/api/v1/export", json={"ids": [gone, str(id_of(console, "red-1"))]}
    )
    items, manifest = facts_of(answer)
    assert [one["file"] is None for one in items] == [True, False]
    assert (manifest["entries"], manifest["pictures"]) == (2, 1)
    assert manifest["missing"] == [gone]
    assert gone in exported(answer)["index.html"].decode()
    assert '-1-picture.zip"' in answer.headers["content-disposition"]
    details = log_lines(console)[-1]["details"]
    assert (details["pictures"], details["missing"]) == (1, [gone])


@pytest.mark.parametrize(
    ("sentence", "words"),
    [
        ("Frau in einem grünen Mantel, Hut", "frau-in-einem-grunen-mantel-hut"),
        ('../../x"; filename=\r\n<b>', "x-filename-b"),
        ("女", "export"),
        ("a" * 300, "a" * 60),
    ],
)
def test_the_name_has_date_words_and_number(console, sentence, words):
    body = {"ids": [str(id_of(console, "red-0"))], "search": {"sentence": sentence}}
    answer = console.client.post("/api/v1/export", json=body)
    disposition = answer.headers["content-disposition"]
    pattern = rf'attachment; filename="\d{{4}}-\d\d-\d\d-{words}-1-picture\.zip"'
    assert re.fullmatch(pattern, disposition), disposition


def test_the_report_has_no_address_and_nothing_from_elsewhere(console):
    address = "q=red+%3Cb%3E&camera=gate&last=week"
    form = {"ids": str(id_of(console, "red-0")), "address": address}
    page = exported(console.client.post("/export", data=form))["index.html"].decode()
    assert "red &lt;b&gt;" in page
    for absent in ("q=red", "http:", "https:", "8480", "//", "<script"):
        assert absent not in page
    assert ODD not in page


def test_the_picture_that_was_searched_with_is_logged_and_counted(guarded):
    own, *others = [id_of(guarded, key) for key in ("red-0", "blue-0", "green-0")]
    guarded.service.view_log.quota = 2
    for other, is_left in zip(others, (True, False), strict=True):
        body = {"ids": [str(own)], "search": {"like": str(other)}}
        answer = guarded.operator.post("/api/v1/export", json=body)
        if is_left:
            assert "query.jpg" in exported(answer)
            assert log_lines(guarded)[-1]["ids"] == [own, other]
        else:
            problem(answer, 429, "view_quota_exceeded")


def test_a_sentence_that_is_refused_is_not_exported_either(make_guarded):
    refused = RefusedSentences(extra=("tattoo*",))
    console = make_guarded(oversight=Oversight(refused_sentences=refused))
    body = {"ids": [str(id_of(console, "red-0"))], "search": {"sentence": "a tattooed man"}}
    problem(console.operator.post("/api/v1/export", json=body), 422, "sentence_refused")
    assert [line["action"] for line in log_lines(console)] == ["refused"]
