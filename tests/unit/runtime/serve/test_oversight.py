"""Purposes and case numbers, logins in the log, the page Records, and refused sentences."""

import json
import re
from collections import Counter
from datetime import datetime, timezone
from types import SimpleNamespace

import numpy as np
import pytest

from tests.helpers.console import BASE, Client, id_of, last_line, log_lines, logged, problem
from tests.helpers.refused import refused
from upperson_console import access_log, log_view
from upperson_console.oversight import Oversight, RefusedSentences, Stated, read_oversight
from upperson_console.refused_sentences import built_in_phrases, extra_phrases, found_in
from upperson_rt.errors import InputError
from upperson_synthetic.captions import brief, caption
from upperson_synthetic.look import anywhere
from upperson_synthetic.people import sample_people

PURPOSES = Oversight(
    purposes=("Theft, reported", "Missing person"),
    case_number="required",
    case_pattern=r"\d{4}-\d+",
    accounts={"vera": Stated(purpose="Missing person", case="2026-1")},
)
STATED = {"Upperson-Purpose": "Theft, reported", "Upperson-Case": "2026-17"}


def test_the_file_is_read_and_checked(tmp_path):
    def read(text):
        (tmp_path / "oversight.yaml").write_text(text)
        return read_oversight(tmp_path / "oversight.yaml")

    found = read(
        'purposes: ["Theft, reported"]\ncase_number: optional\ntwo_persons: [export, delete]\n'
        "accounts: {nvr: {purpose: 'Theft, reported'}}\nrefused_sentences: {extra: [tattoo*]}\n"
    )
    assert (found.two_persons, found.approvals_expire_hours) == (("export", "delete"), 24)
    assert found.accounts["nvr"] == Stated(purpose="Theft, reported")
    for text, code, at in (
        ("purpose: [a]", "key_unknown", ""),
        ("purposes: a", "value_unfit", "purposes"),
        ("two_persons: [search]", "value_unfit", "two_persons[0]"),
        ("case_number: off", "value_unfit", "case_number"),
        ("case_pattern: '('", "value_unfit", "case_pattern"),
        ("approvals_expire_hours: 0", "value_unfit", "approvals_expire_hours"),
        ("purposes: [a]\naccounts: {nvr: {purpose: b}}", "purpose_missing", "accounts.nvr"),
    ):
        with refused(code, InputError, at=at):
            read(text)
    with refused("not_yaml", InputError):
        read("a: [")


def test_a_case_number_that_shows_nothing_is_none():
    free = Oversight(case_number="required", case_pattern=".+")
    for headers, cookie in (({"upperson-case": "%E2%80%8B"}, None), ({}, "|%E2%80%8B")):
        assert free.lacks(free.context("olga", None, headers, cookie))


def test_programs_state_purpose_and_case_in_headers(make_guarded, monkeypatch):
    console = make_guarded(oversight=PURPOSES)
    client, id_ = console.operator, id_of(console, "red-0")
    for path in ("/api/v1/cameras", f"/api/v1/items/{id_}", f"/people/{id_}/picture", "/live"):
        answer = client.get(path)
        assert answer.status_code in (303, 403), path
    query = {"sentence": "red"}
    for wrong in ({}, STATED | {"Upperson-Purpose": "Fun"}, STATED | {"Upperson-Case": "17"}):
        answer = client.post("/api/v1/search", json=query, headers=wrong)
        problem(answer, 403, "purpose_missing")
    assert {line["action"] for line in log_lines(console)} == {"forbidden"}
    assert client.get("/api/v1/info").status_code == 200
    monkeypatch.chdir(console.folder.parent)
    monkeypatch.setattr(console.service.current.last.gallery, "location", console.folder.name)
    answer = client.post("/api/v1/search", json=query, headers=STATED)
    hits = [int(hit["id"]) for hit in answer.json()["hits"]]
    line = logged(console, purpose="Theft, reported", case="2026-17", user="olga")
    assert (line["sentence"], line["ids"], line["address"]) == ("red", hits, "127.0.0.1")
    about = line["model"], line["gallery"]  # By its absolute path.
    assert about == (console.service.encoder.fingerprint, str(console.folder))
    assert datetime.fromisoformat(line["time"]).tzinfo == timezone.utc
    mark = {"sentence": "red", "yes": [str(id_)], "no": []}
    assert client("PUT", "/api/v1/marks", json=mark, headers=STATED).status_code == 200
    line = last_line(console)
    assert (line["user"], line["action"], line["details"]["yes"]) == ("olga", "mark", [id_])
    # An account may have a fixed purpose.
    assert console.viewer.post("/api/v1/search", json=query, headers=STATED).status_code == 200
    logged(console, purpose="Missing person", case="2026-1")


def test_pages_ask_for_the_purpose_once(make_console):
    console = make_console(oversight=PURPOSES)
    browser = console.client
    first = browser.get("/?q=red")
    place = first.headers["location"]
    assert (first.status_code, place) == (303, "/purpose?next=%2F%3Fq%3Dred")
    assert "Missing person</option>" in browser.get(place).text
    given = {"purpose": "Theft, reported", "next": "/?q=red"}
    wrong = browser.post("/purpose", data={**given, "case": "x-17"})
    kept = "<option selected>Theft, reported</option>" in wrong.text, 'value="x-17"' in wrong.text
    assert (wrong.status_code, kept, r"\d" in wrong.text) == (422, (True, True), False)
    stated = browser.post("/purpose", data={**given, "case": "2026-17"})
    assert (stated.status_code, stated.headers["location"]) == (303, "/?q=red")
    cookie, _, more = stated.headers["set-cookie"].partition(";")
    assert "HttpOnly" in more
    browser = Client(console.app, cookie=cookie)
    assert "Case 2026-17" in browser.get("/?q=red").text
    logged(console, purpose="Theft, reported", case="2026-17")
    elsewhere = browser.post("/purpose", data={**given, "case": "2026-17", "next": "//evil"})
    assert elsewhere.headers["location"] == "/"
    for referer, back in ((f"{BASE}/?q=red&by=track", "/?q=red&amp;by=track"), (f"{BASE}//a", "/")):
        page = browser.get("/purpose", headers={"referer": referer}).text
        assert f'name="next" value="{back}"' in page
    assert console.client.get("/records").status_code == 200


def test_logins_and_refusals_are_logged_without_the_token(guarded):
    client, token = Client(guarded.app), guarded.tokens["operator"]
    assert client.post("/login", data={"token": "wrong-secret"}).status_code == 401
    cookie = client.post("/login", data={"token": token}).headers["set-cookie"].partition(";")[0]
    assert Client(guarded.app, cookie=cookie).post("/logout").status_code == 303
    assert guarded.viewer.get("/records").status_code == 403
    assert Client(guarded.app, authorization="Bearer no").get("/api/v1/info").status_code == 401
    lines = log_lines(guarded)
    assert [(line["action"], line["user"]) for line in lines] == [
        ("login-failed", "unknown client"),
        ("login", "olga"),
        ("logout", "olga"),
        ("forbidden", "vera"),
        ("login-failed", "unknown client"),
    ]
    assert {line["address"] for line in lines} == {"127.0.0.1"}
    assert lines[3]["details"] == {"path": "/records", "code": "role_missing"}
    text = guarded.log.read_text()
    assert [one for one in (token, "wrong-secret") if one in text] == []


def test_failed_logins_and_refusals_do_not_fill_the_disk_or_hide_each_other(
    make_guarded, monkeypatch
):
    now = [6000.0]
    monkeypatch.setattr(access_log, "time", SimpleNamespace(monotonic=lambda: now[0]))
    console = make_guarded(oversight=PURPOSES)
    client = Client(console.app)
    for _ in range(25):
        assert client.post("/login", data={"token": "wrong"}).status_code == 401
        assert console.operator.get("/live").status_code == 303  # It leads on, and is not logged.
        problem(console.operator.get("/api/v1/cameras"), 403, "purpose_missing")
    client.post("/login", data={"token": console.tokens["operator"]})
    assert console.operator.get("/records").status_code == 403
    whys = (line.get("details", {}).get("code", line["action"]) for line in log_lines(console))
    assert Counter(whys) == {
        "login-failed": 10, "purpose_missing": 10, "login": 1, "role_missing": 1
    }  # fmt: skip
    now[0] += 60
    client.post("/login", data={"token": "wrong"})
    assert last_line(console)["details"] == {"left_out": 15}


def test_records_have_pages_filters_and_an_export(make_guarded, monkeypatch):
    console = make_guarded(oversight=PURPOSES)
    monkeypatch.setattr(log_view, "_LINES", 5)
    for number in range(12):
        who = console.operator if number % 2 else console.viewer
        body = {"sentence": f"red {number:03}"}
        assert who.post("/api/v1/search", json=body, headers=STATED).status_code == 200
    seen, address = [], "/records"
    for _ in range(3):
        page = console.admin.get(address).text
        seen.append({number for number in range(12) if f"red {number:03}" in page})
        address = page.rpartition('rel="next"')[0].rpartition('href="')[2].partition('"')[0]
        address = address.replace("&amp;", "&")
    assert seen == [{*range(7, 12)}, {*range(2, 7)}, {0, 1}]
    page = console.admin.get("/records?case=2026-17&action=query").text
    assert ("red 011" in page, "red 010" in page) == (True, False)
    assert "red 0" not in console.admin.get("/records?until=2020-01-01T00:00").text
    assert console.admin.get("/records?since=nonsense").status_code == 422
    answer = console.admin.get("/records/lines?user=vera")
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["sentence"] for line in lines] == [f"red {n:03}" for n in range(0, 12, 2)]
    assert answer.text.splitlines()[0] in console.log.read_text()
    logged(console, action="log-export", details={"filter": "user=vera"})
    assert console.operator.get("/records/lines").status_code == 403
    red, blue = (id_of(console, f"{colour}-0") for colour in ("red", "blue"))
    for id_ in (red, blue):
        console.viewer.get(f"/people/{id_}", headers=STATED)
    for picture in (red, blue):
        lines = console.admin.get(f"/records/lines?picture=1+{picture}&action=view").text
        assert [picture in json.loads(line)["ids"] for line in lines.splitlines()] == [True]
    named = {line["action"] for line in log_lines(console)}
    assert {"query", "view", "log-export"} <= named <= set(log_view.ACTIONS)
    page = console.admin.get(f"/people/{red}", headers=STATED).text
    address = re.search(r'href="(/records\?picture=[^"]*)"', page)[1]
    assert "<td>vera</td>" in console.admin.get(address).text
    assert "/records?picture" not in console.operator.get(f"/people/{red}", headers=STATED).text


# --- Refused sentences

REFUSING = Oversight(refused_sentences=RefusedSentences(extra=("tattoo*", "head scarf")))


@pytest.mark.parametrize(
    ("category", "sentences"),
    [
        ("origin", "black man; a White woman with a bag; two tall, asian men; man with dark skin"),
        ("origin", "black man's jacket; a white man\u2019s coat; black woman\u02bcs bag"),
        ("religion", "a muslim's coat; Jehovah\u2019s witness; a Jew\u2018s hat"),
        ("origin", "a middle aged white man; an asian in jeans; man who is black; hispanic male"),
        ("religion", "Muslim woman; a catholic priest; jewish boy"),
        (
            "religion",
            "a &amp;#109;uslim man; a &#109;uslim man; \uff4duslim man; mus\u200blim; mus\xadlim",
        ),
        ("health", "a disabled person; mentally ill man; blind woman; pregnant"),
        ("politics", "protester with a flag; right-wing activist; trump supporter"),
        ("sexual orientation", "gay couple; straight man; LGBT person"),
    ],
)
def test_sentences_about_a_category_are_refused(category, sentences):
    for sentence in sentences.split("; "):
        found = found_in(sentence, built_in_phrases())
        assert (found and found[0], sentence) == (category, sentence)


ALLOWED = """woman in a black coat; white jacket man; man in white, woman in black;
man dressed in black; white haired woman; black bearded man; man in black woman's shoes;
jacket black, man with bag; Chinese dress; a woman with straight hair; man with Christian Dior bag;
man's black jacket; skin colored tights; man with a french braid; polish shoes; green party hat;
union jack shirt; person with a right hand bag; light brown hair; German shepherd dog;
black child seat; left wing of the building; right wing mirror; black men jacket; white kids shirt;
white worker helmet; black student backpack; a shirt that is black"""


def test_clothes_things_and_drawn_captions_are_not_refused():
    rng = np.random.default_rng(0)
    sentences = re.split(r";\s", ALLOWED)
    for person in sample_people(500, rng):
        sentences += [caption(person, anywhere(rng), rng).text, brief(person, rng).text]
    assert [one for one in sentences if found_in(one, built_in_phrases())] == []


def test_phrases_of_the_site_are_refused_as_whole_words():
    phrases = extra_phrases(("tattoo*", "Head scarf"))
    assert found_in("man with Tattoos", phrases) == ("extra", "tattoos")
    assert found_in("blue head scarf", phrases) == ("extra", "head scarf")
    assert found_in("overhead scarf", phrases) is None


def test_each_way_to_ask_refuses_and_logs(make_console):
    console = make_console(oversight=REFUSING)
    client, sentence = console.client, "black man"
    saved = {"name": "x", "address": "q=black+man", "shared": "true"}
    assert client.post("/saved", data=saved).status_code == 422
    assert console.service.user_state.saved("local") == []
    one = {"ids": [str(id_of(console, "red-0"))], "search": {"sentence": sentence}}
    answers = [
        client.search(sentence=sentence),
        client.post("/api/v1/export", json=one),
        client.post("/v1/embeddings", json={"input": ["red", sentence]}),
        client.post("/api/v1/alerts", json={"sentence": sentence, "rate": "1/day"}),
    ]
    for answer in answers:
        problem(answer, 422, "sentence_refused")
        assert answer.json()["category"] == "origin"
    for path in ("/?q=black+man", "/timeline?q=black+man"):
        page = client.get(path)
        assert (page.status_code, "words about origin" in page.text) == (422, True)
    refusals = [(line["action"], line["sentence"], line["ids"]) for line in log_lines(console)]
    assert refusals == [("refused", sentence, [])] * 7
    assert log_lines(console)[0]["details"] == {"category": "origin", "words": "black man"}
    problem(client.search(sentence="man with tattoos"), 422, "sentence_refused")
    assert client.search(sentence="man in a black coat").status_code == 200
