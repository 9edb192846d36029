"""An export has what the page shows, and says so."""

import hashlib
import html
import json
import re

from tests.helpers.console import ODD, exported, id_of, last_line, problem
from upperson_console import pages


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
    inputs = re.findall(r'<input[^>]* form="export"[^>]*>', page)
    fields = {}
    for one in [*re.findall(r"<input[^>]*>", form), *inputs, button]:
        name, value = (re.search(rf'{what}="([^"]*)"', one) for what in ("name", "value"))
        if name and value:
            fields.setdefault(name[1], []).append(html.unescape(value[1]))
    return fields


def sent(console, address, label, **more):
    """What a button of a page of results exports."""
    form = form_of(console.client.get(f"/?{address}").text, label)
    return facts_of(console.client.post("/export", data={**form, **more}))


def test_these_are_all_views_of_the_cards_and_all_are_those_of_the_search(console, monkeypatch):
    items, manifest = sent(console, "q=red", "Export these 12")
    assert len(items) == manifest["pictures"] == 18  # Each track with all its views.
    items, _ = sent(console, "q=red&camera=gate", "Export these 6", which="all")
    assert [one["camera"] for one in items] == ["gate"] * 12
    monkeypatch.setattr(pages, "PAGE_HITS", 3)
    assert len(sent(console, "q=red&by=picture", "Export these 3")[0]) == 3
    every = "q=red&by=picture", "Export all hits: 18 pictures"
    items, manifest = sent(console, *every)
    counts = {"entries": 18, "pictures": 18, "missing": [], "frames": 0, "clips": 0, "left_out": 0}
    assert (len(items), manifest.items() >= counts.items()) == (18, True)
    line = last_line(console)
    assert (line["action"], len(line["ids"])) == ("export", 18)
    monkeypatch.setattr("upperson_console.exports.MOST_EXPORTED", 5)
    items, manifest = sent(console, *every)
    assert (len(items), manifest["left_out"]) == (5, 13)


def test_all_hits_are_counted_before_and_may_be_likely_only(calibrated, monkeypatch):
    monkeypatch.setattr(pages, "PAGE_HITS", 2)
    pictures = calibrated.client.get("/api/v1/info").json()["pictures"]
    address = "q=woman+in+a+red+coat"
    every, _ = sent(calibrated, address, f"Export all hits: {pictures} pictures")
    likely, _ = sent(calibrated, address, "Export likely hits only")
    assert 0 < len(likely) < len(every) == pictures
    judged = {(one["hit"] or {}).get("match") for one in likely}
    assert "likely" in judged <= {"likely", None}  # Views of a likely track have no label.


def test_a_yes_stands_for_all_views_of_its_track(console):
    marked = f"marks=y{id_of(console, 'red-1')}"
    for by, keys in (("track", {"red-0", "red-1"}), ("picture", {"red-1"})):
        items, _ = sent(console, f"q=red&by={by}&{marked}", "Export 1 yes")
        assert {one["key"] for one in items} == keys


def test_an_id_that_is_given_twice_is_one_member(console):
    ids = 3 * [str(id_of(console, "red-0"))]
    items, _ = facts_of(console.client.post("/api/v1/export", json={"ids": ids}))
    assert len(items) == 1
    views = {"ids": ids, "tracks": True}
    items, manifest = facts_of(console.client.post("/api/v1/export", json=views))
    assert ([one["key"] for one in items], manifest["gone"]) == (["red-0", "red-1"], 0)
    # Of as many as a page can show, only one is there; of others nothing is exported.
    gone = [str(10_000_000_000 + number) for number in range(1999)]
    form = {"ids": [*gone, ids[0]], "address": "q=red&by=picture"}
    items, manifest = facts_of(console.client.post("/export", data=form))
    assert ([one["key"] for one in items], manifest["gone"]) == (["red-0"], 1999)
    none = console.client.post("/api/v1/export", json={"ids": gone[:1]})
    problem(none, 404, "picture_not_found")


def test_a_picture_that_is_not_kept_is_said_and_not_counted(console):
    (console.folder / "crops" / "red0.png").unlink()
    ids = gone, _ = [str(id_of(console, key)) for key in ("red-0", "red-1")]
    answer = console.client.post("/api/v1/export", json={"ids": ids})
    items, manifest = facts_of(answer)
    assert [one["file"] is None for one in items] == [True, False]
    counted = {"pictures": 1, "missing": [gone]}
    assert manifest.items() >= {"entries": 2, **counted}.items()
    assert last_line(console)["details"].items() >= counted.items()
    assert gone in exported(answer)["index.html"].decode()
    assert '-1-picture.zip"' in answer.headers["content-disposition"]


def test_the_name_has_date_words_and_number(console):
    for sentence, words in (
        ("Frau in einem grünen Mantel, Hut", "frau-in-einem-grunen-mantel-hut"),
        ('../../x"; filename=\r\n<b>', "x-filename-b"),
        ("女", "export"),
        ("a" * 300, "a" * 60),
    ):
        body = {"ids": [str(id_of(console, "red-0"))], "search": {"sentence": sentence}}
        answer = console.client.post("/api/v1/export", json=body)
        pattern = rf'attachment; filename="\d{{4}}-\d\d-\d\d-{words}-1-picture\.zip"'
        assert re.fullmatch(pattern, answer.headers["content-disposition"])


def test_the_report_has_no_address_and_nothing_from_elsewhere(console):
    address = "q=red+%3Cb%3E&camera=gate&last=week"
    form = {"ids": str(id_of(console, "red-0")), "address": address}
    page = exported(console.client.post("/export", data=form))["index.html"].decode()
    assert "red &lt;b&gt;" in page
    for absent in ("q=red", "http:", "https:", "8480", "//", "<script", ODD):
        assert absent not in page


def test_the_picture_that_was_searched_with_is_logged_and_counted(guarded):
    own, *others = [id_of(guarded, key) for key in ("red-0", "blue-0", "green-0")]
    guarded.service.view_log.quota = 2
    for other, is_left in zip(others, (True, False), strict=True):
        body = {"ids": [str(own)], "search": {"like": str(other)}}
        answer = guarded.operator.post("/api/v1/export", json=body)
        if is_left:
            assert "query.jpg" in exported(answer)
            assert last_line(guarded)["ids"] == [own, other]
        else:
            problem(answer, 429, "view_quota_exceeded")
