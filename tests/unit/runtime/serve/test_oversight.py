"""Purposes and case numbers, logins in the log, the page Records, and refused sentences."""

import json
import re
from datetime import datetime, timezone
from types import SimpleNamespace

from tests.helpers.console import BASE, Client, id_of, log_lines, problem
from tests.helpers.refused import refused
from upperson_console import access_log, log_view
from upperson_console.oversight import Oversight, Stated, read_oversight
from upperson_rt.errors import InputError

PURPOSES = Oversight(
    purposes=("Theft, reported", "Missing person"),
    case_number="required",
    case_pattern=r"\d{4}-\d+",
    accounts={"vera": Stated(purpose="Missing person", case="2026-1")},
)
STATED = {"Upperson-Purpose": "Theft, reported", "Upperson-Case": "2026-17"}


def read(tmp_path, text):
    file = tmp_path / "oversight.yaml"
    file.write_text(text)
    return read_oversight(file)


def test_the_file_is_read_and_checked(tmp_path):
    found = read(
        tmp_path,
        'purposes: ["Theft, reported"]\ncase_number: optional\ntwo_persons: [export, delete]\n'
        "accounts: {nvr: {purpose: 'Theft, reported'}}\nrefused_sentences: {extra: [tattoo*]}\n",
    )
    assert found.two_persons == ("export", "delete")
    assert found.approvals_expire_hours == 24
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
        with refused(code, InputError, at=at) as found:
            read(tmp_path, text)
        assert "/purpose" not in str(found.value)
    with refused("not_yaml", InputError):
        read(tmp_path, "a: [")


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
    line = log_lines(console)[-1]
    assert (line["purpose"], line["case"], line["user"]) == ("Theft, reported", "2026-17", "olga")
    assert (line["sentence"], line["ids"], line["address"]) == ("red", hits, "127.0.0.1")
    assert line["model"] == console.service.encoder.fingerprint
    assert line["gallery"] == str(console.folder)  # By its absolute path.
    assert datetime.fromisoformat(line["time"]).tzinfo == timezone.utc
    mark = {"sentence": "red", "yes": [str(id_)], "no": []}
    assert client("PUT", "/api/v1/marks", json=mark, headers=STATED).status_code == 200
    line = log_lines(console)[-1]
    assert (line["user"], line["action"], line["details"]["yes"]) == ("olga", "mark", [id_])
    # An account may have a fixed purpose.
    assert console.viewer.post("/api/v1/search", json=query, headers=STATED).status_code == 200
    line = log_lines(console)[-1]
    assert (line["purpose"], line["case"]) == ("Missing person", "2026-1")


def test_pages_ask_for_the_purpose_once(make_console):
    console = make_console(oversight=PURPOSES)
    browser = console.client
    first = browser.get("/?q=red")
    place = first.headers["location"]
    assert (first.status_code, place) == (303, "/purpose?next=%2F%3Fq%3Dred")
    assert "Missing person</option>" in browser.get(place).text
    given = {"purpose": "Theft, reported", "next": "/?q=red"}
    wrong = browser.post("/purpose", data={**given, "case": "x-17"})
    assert wrong.status_code == 422
    assert "<option selected>Theft, reported</option>" in wrong.text
    assert ('value="x-17"' in wrong.text, r"\d" in wrong.text) == (True, False)
    stated = browser.post("/purpose", data={**given, "case": "2026-17"})
    assert (stated.status_code, stated.headers["location"]) == (303, "/?q=red")
    cookie = stated.headers["set-cookie"]
    assert "HttpOnly" in cookie
    browser = Client(console.app, cookie=cookie.partition(";")[0])
    assert "Case 2026-17" in browser.get("/?q=red").text
    line = log_lines(console)[-1]
    assert (line["purpose"], line["case"]) == ("Theft, reported", "2026-17")
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
    assert token not in text
    assert "wrong-secret" not in text


def test_failed_logins_do_not_fill_the_disk(guarded, monkeypatch):
    now = [6000.0]
    monkeypatch.setattr(access_log, "time", SimpleNamespace(monotonic=lambda: now[0]))
    client = Client(guarded.app)
    for _ in range(25):
        assert client.post("/login", data={"token": "wrong"}).status_code == 401
    client.post("/login", data={"token": guarded.tokens["operator"]})
    assert [line["user"] for line in log_lines(guarded)] == ["unknown client"] * 10 + ["olga"]
    now[0] += 60
    client.post("/login", data={"token": "wrong"})
    assert log_lines(guarded)[-1]["details"] == {"left_out": 15}


def test_refusals_of_one_kind_hide_none_of_another(make_guarded, monkeypatch):
    monkeypatch.setattr(access_log, "time", SimpleNamespace(monotonic=lambda: 6000.0))
    console = make_guarded(oversight=PURPOSES)
    for _ in range(12):
        assert console.operator.get("/live").status_code == 303
    assert not console.log.read_text()
    for _ in range(12):
        problem(console.operator.get("/api/v1/cameras"), 403, "purpose_missing")
    assert console.operator.get("/records").status_code == 403
    codes = [line["details"]["code"] for line in log_lines(console)]
    assert codes == ["purpose_missing"] * 10 + ["role_missing"]


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
    line = log_lines(console)[-1]
    assert (line["action"], line["details"]) == ("log-export", {"filter": "user=vera"})
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
