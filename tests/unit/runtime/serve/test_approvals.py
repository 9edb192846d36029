"""Exports, deletions and alerts that a second person approves."""

import hashlib
import json
import re
import sqlite3
from dataclasses import replace

import pytest

from tests.helpers.console import (
    ODD,
    client_of,
    exported,
    id_of,
    last_line,
    log_lines,
    problem,
    rows_of,
)
from tests.helpers.refused import refused
from tests.helpers.toy_bundle import COLOURS
from upperson_console import accounts, approvals, oversight_pages
from upperson_console.accounts import Account, Accounts, add_token
from upperson_console.oversight import Oversight
from upperson_log.chain import verify_log
from upperson_rt.gallery import Filter

TWO = Oversight(two_persons=("export", "delete", "alert"))


@pytest.fixture
def console(make_guarded):
    """A console with a second operator and a second admin."""
    made = make_guarded(oversight=TWO)
    for name, role in (("otto", "operator"), ("adam", "admin")):
        setattr(made, name, client_of(made, add_token(made.token_file, name, role, None)))
    return made


def pending(answer):
    """The id of the request that an answer reports."""
    problem(answer, 202, "approval_pending")
    return answer.json()["approval"]


def judge(client, id_, decision="approve", reason="", status=303):
    """Decide on the page."""
    answer = client.post(f"/approvals/{id_}/{decision}", data={"reason": reason})
    assert answer.status_code == status, answer.text


def export(client, *ids, **more):
    return client.post("/api/v1/export", json={"ids": [*map(str, ids)], **more})


def downloaded(client, id_):
    return client.get(f"/api/v1/approvals/{id_}/export")


def states(console):
    seen = Account(name="ada", role="admin")
    return {one.id: one.state for one in console.service.approvals.visible(seen)}


def test_an_export_is_what_was_asked_for(console, monkeypatch):
    ids = [str(id_of(console, key)) for key in ("red-0", "blue-0")]
    id_ = pending(export(console.operator, *ids, search={"sentence": "red"}))
    assert pending(export(console.operator, *ids, search={"sentence": "red"})) == id_
    problem(downloaded(console.operator, id_), 403, "approval_missing")
    judge(console.operator, id_, status=403)
    judge(console.viewer, id_, status=403)
    assert states(console) == {id_: "pending"}
    judge(console.otto, id_)
    judge(console.admin, id_, status=409)
    problem(downloaded(console.otto, id_), 403, "approval_missing")
    monkeypatch.setattr(accounts, "address_of", lambda request: "10.0.0.9")
    answer = downloaded(console.operator, id_)
    about = json.loads(exported(answer)["items.json"])
    assert [str(one["id"]) for one in about["items"]] == ids
    last = last_line(console)
    who = {"user": "olga", "approved_by": "otto", "approval": id_}
    assert who.items() | {("role", "operator")} <= about.items()
    assert who.items() | {("address", "10.0.0.9")} <= last.items()
    assert last["details"]["sha256"] == hashlib.sha256(answer.content).hexdigest()
    actions = [line["action"] for line in log_lines(console) if line["action"] != "forbidden"]
    assert actions == ["approval-ask", "approval-approve", "export"]
    assert not verify_log(console.log).problems


def test_a_deletion_and_pruning_take_the_pictures_that_were_requested(console):
    id_, gallery = id_of(console, "red-0"), console.service.gallery
    count = gallery.count()
    path = f"/api/v1/items/{id_}?reason=requested"
    approval = pending(console.admin("DELETE", path))
    assert gallery.count() == count
    judge(console.otto, approval, status=404)
    judge(console.adam, approval)
    assert (gallery.count(), id_ in gallery.get([id_])) == (count - 1, False)
    last, decision = log_lines(console)[-2:]
    assert (decision["action"], decision["user"]) == ("approval-approve", "adam")
    assert (last["action"], last["user"], last["approved_by"]) == ("delete", "ada", "adam")
    assert (last["ids"], last["details"]["reason"]) == ([id_], "requested")
    judge(console.adam, approval, status=409)
    body = {"keep_newest": 10, "reason": "old", "dry_run": False}
    approval = pending(console.admin.post("/api/v1/prune", json=body))
    gallery.delete(["red-1"])
    judge(console.adam, approval, status=409)
    assert last_line(console)["action"] == "approval-ask"
    assert states(console)[approval] == "pending"
    more = {"keep_newest": 5, "camera": "gate"}
    approval = pending(console.admin.post("/api/v1/prune", json={**body, **more}))
    page = console.adam.get("/approvals").text
    for value in ("gate", "5", "old"):
        assert f"<dd>{value}</dd>" in page
    left = gallery.count() - gallery.count(Filter(camera="gate")) + 5
    judge(console.adam, approval)
    assert gallery.count() == left


def test_an_alert_is_added_at_its_approval(console):
    """One that cannot be added stays pending."""
    ids = []
    for sentence in ("man in red coat", "red"):
        body = {"sentence": sentence, "rate": "1/day", "cameras": ["gate"]}
        ids.append(pending(console.operator.post("/api/v1/alerts", json=body)))
    assert console.operator.get("/api/v1/alerts").json() == []
    judge(console.otto, ids[0])
    (alert,) = console.operator.get("/api/v1/alerts").json()
    found = alert["sentence"], alert["rate"], alert["cameras"]
    assert found == ("man in red coat", "1/day", ["gate"])
    judge(console.otto, ids[1], status=422)
    assert states(console) == {ids[0]: "approved", ids[1]: "pending"}
    sent = console.operator.post("/alerts", data={"sentence": "man in blue coat"})
    assert (sent.status_code, sent.headers["location"]) == (303, "/approvals")


def test_a_refusal_has_a_reason_and_requests_expire(console, monkeypatch):
    one = id_of(console, "red-0")
    first = pending(export(console.operator, one))
    for unseen in ("", "\u200b"):
        judge(console.otto, first, "refuse", unseen, status=422)
    judge(console.otto, first, "refuse", "no case")
    second, third = (pending(export(who, one)) for who in (console.operator, console.otto))
    judge(console.operator, third)
    now = approvals.time.time()
    monkeypatch.setattr(approvals.time, "time", lambda: now + 25 * 3600)
    assert states(console) == {first: "refused", second: "expired", third: "expired"}
    judge(console.otto, second, status=409)
    problem(downloaded(console.otto, third), 403, "approval_missing")


def test_a_limited_or_newer_account_or_token_decides_nothing(console):
    lea = client_of(console, add_token(console.token_file, "lea", "operator", ("gate",)))
    ids = [str(id_of(console, key)) for key in ("red-0", "red-2")]
    judge(lea, pending(export(console.operator, *ids)), status=404)
    own = pending(export(lea, *ids))
    judge(console.otto, own)
    rows = rows_of(downloaded(lea, own))
    assert [str(row["id"]) for row in rows] == ids[:1]
    made = pending(export(console.operator, id_of(console, "red-0")))
    for name in ("zed", "otto"):  # A new account, and a new token of an old one.
        newer = client_of(console, add_token(console.token_file, name, "operator", None))
        judge(newer, made, status=403)
    assert states(console)[made] == "pending"
    judge(console.admin, made)


def changed(console, name, **fields):
    """Change an entry of the token file; without fields, remove it."""
    if not fields:
        return Accounts.revoke(console.token_file, name)
    known = next(one for one in Accounts.read(console.token_file) if one.name == name)
    return Accounts.put(console.token_file, replace(known, **fields))


@pytest.mark.parametrize(
    "change",
    [
        lambda c: changed(c, "otto"),
        lambda c: changed(c, "otto", role="viewer"),
        lambda c: changed(c, "otto", cameras=("gate",)),
        lambda c: changed(c, "otto", expires=accounts.time.time() - 1),
        lambda c: add_token(c.token_file, "otto", "operator", None),
    ],
    ids=["removed", "downgraded", "limited", "expired", "made anew"],
)
def test_an_approval_holds_while_its_approver_may_decide(console, change):
    """The approver's token may have been stolen, or the person may have left."""
    one = pending(export(console.operator, id_of(console, "red-0")))
    judge(console.otto, one)
    assert downloaded(console.operator, one).status_code == 200
    changed(console, "otto", expires=accounts.time.time() + 3600)
    assert downloaded(console.operator, one).status_code == 200
    change(console)
    problem(downloaded(console.operator, one), 409, "approval_outdated")
    judge(console.adam, pending(export(console.operator, id_of(console, "blue-0"))))


def test_a_clock_that_is_set_back_opens_no_request(console, monkeypatch):
    one = id_of(console, "red-0")
    first, second = (pending(export(who, one)) for who in (console.operator, console.otto))
    judge(console.operator, second)
    now = approvals.time.time()
    monkeypatch.setattr(approvals.time, "time", lambda: now - 3600)
    assert states(console) == {first: "expired", second: "expired"}
    judge(console.otto, first, status=409)
    problem(downloaded(console.otto, second), 403, "approval_missing")


@pytest.mark.parametrize(
    "now",
    [("viewer", None), ("operator", None), ("operator", ("gate",)), None],
    ids=["downgraded", "made anew", "limited", "removed"],
)
def test_an_approval_holds_for_the_account_as_it_is_now(console, now):
    lea = client_of(console, add_token(console.token_file, "lea", "operator", None))
    ids = [id_of(console, key) for key in ("red-0", "red-2")]
    early, late = (pending(export(lea, *some)) for some in (ids, ids[::-1]))
    alert = {"sentence": "man in red", "cameras": [ODD]}
    alert = pending(lea.post("/api/v1/alerts", json=alert))
    judge(console.otto, early)
    if now is None:
        changed(console, "lea")
    elif now[1]:
        changed(console, "lea", cameras=now[1])
    else:
        lea = client_of(console, add_token(console.token_file, "lea", *now))
    for one in (late, alert):
        judge(console.otto, one, status=409)
    assert states(console) == {early: "approved", late: "pending", alert: "pending"}
    assert console.operator.get("/api/v1/alerts").json() == []
    if now and now[0] == "operator":
        problem(downloaded(lea, early), 409, "approval_outdated")


def test_the_page_shows_requests_and_takes_decisions(console, monkeypatch):
    id_ = id_of(console, "red-0")
    sent = console.operator.post("/export", data={"ids": [id_], "address": "q=red"})
    assert sent.headers["location"] == "/approvals"
    own, other = (client.get("/approvals").text for client in (console.operator, console.otto))
    assert "Approve</button>" not in own
    assert ("Approve</button>" in other, f"/people/{id_}" in other) == (True, True)
    (approval,) = states(console)
    judge(console.otto, approval)
    assert f"/api/v1/approvals/{approval}/export" in console.operator.get("/approvals").text
    assert "/approvals" not in console.viewer.get("/").text

    def badge(client):
        found = re.search(r'class="badge">(\d+)', client.get("/approvals").text)
        return found and found[1]

    requested = pending(export(console.operator, id_))
    pending(console.admin("DELETE", f"/api/v1/items/{id_}", params={"reason": "requested"}))
    who = console.operator, console.otto, console.admin, console.adam
    assert [badge(one) for one in who] == [None, "1", "1", "2"]
    assert badge(console.viewer) is None
    judge(console.otto, requested)
    assert [badge(one) for one in who] == [None, None, None, "1"]
    monkeypatch.setattr(approvals, "_MOST_PENDING", 2)
    *two, third = (id_of(console, f"{colour}-0") for colour in [*COLOURS][:3])
    for id_ in two:
        pending(export(console.operator, id_))
    problem(export(console.operator, third), 422, "too_many_pending")


def test_the_second_person_sees_everything_that_is_requested(console):
    console.service.blur = True
    own, like = (id_of(console, key) for key in ("red-0", "blue-0"))
    search = {"sentence": "red", "like": str(like), "filter": {"cameras": ["gate"]}}
    approval = pending(export(console.admin, own, search=search, reason="two witnesses"))
    details = last_line(console)["details"]
    assert details["address"] == f"q=red&like={like}&camera=gate"
    assert (details["reason"], details["unblurred"]) == ("two witnesses", True)
    page = console.otto.get("/approvals").text
    assert ("<dd>two witnesses</dd>" in page, "Not blurred" in page) == (True, True)
    # Also the picture that was searched with.
    assert {*last_line(console)["ids"]} == {own, like}
    judge(console.otto, approval)
    about = exported(downloaded(console.admin, approval))["items.json"]
    assert {*last_line(console)["ids"]} == {own, like}
    assert json.loads(about)["blurred"] is False
    console.service.blur = False
    problem(downloaded(console.admin, approval), 409, "approval_outdated")


def test_all_pictures_of_a_request_can_be_looked_at(console, monkeypatch):
    monkeypatch.setattr(oversight_pages, "_FIRST_PICTURES", 2)
    monkeypatch.setattr(oversight_pages, "_PICTURES", 3)
    ids = [str(id_of(console, f"{colour}-0")) for colour in [*COLOURS][:4]]
    approval = pending(export(console.operator, *ids))

    def shown(address):
        page = console.otto.get(address).text
        following = re.search('href="([^"]+)" rel="next"', page)
        return re.findall('href="/people/([0-9]+)"', page), following and following[1]

    first, of = shown("/approvals")
    assert (first, of) == (ids[:2], f"/approvals?of={approval}")
    second, following = shown(of)
    assert second == ids[:3]
    assert shown(following.replace("&amp;", "&")) == (ids[3:], None)
    viewed = [str(id_) for line in log_lines(console)[1:] for id_ in line["ids"]]
    assert viewed == [*ids[:2], *ids]
    assert console.viewer.get(of).status_code == 403


def test_requests_survive_a_restart_and_have_checksums(console, make_guarded):
    approval = pending(export(console.operator, id_of(console, "red-0")))
    console.service.close()
    again = make_guarded(oversight=TWO)
    assert states(again) == {approval: "pending"}
    again.service.close()
    with sqlite3.connect(again.log.with_name("console.sqlite")) as file:
        file.execute("UPDATE approvals SET request = replace(request, 'olga', 'vera')")
    file.close()
    with refused("user_state_damaged"):
        make_guarded(oversight=TWO)
