"""The bin of the console: delete, undo, restore, delete permanently, retention."""

import threading
import time

import pytest

from tests.helpers.console import add_items, client_of, id_of, last_line, log_lines, logged, problem
from tests.helpers.refused import refused
from upperson_console import bin as console_bin
from upperson_console.accounts import BIN_USER, Account, add_token
from upperson_console.bin import emptying, require_no_loss
from upperson_console.oversight import Oversight
from upperson_console.search import Search
from upperson_rt.gallery import Item

DAY = 86400.0
ADA = Account(name="ada", role="admin")


@pytest.fixture
def console(make_console):
    made = make_console()
    made.service.bin_s = 7 * DAY
    return made


@pytest.fixture
def guarded(make_guarded):
    made = make_guarded()
    made.service.bin_s = 7 * DAY
    return made


def delete(client, *ids, **more):
    """Delete on the page; return its text."""
    data = {"ids": " ".join(map(str, ids)), "reason": "a test", **more}
    answer = client.post("/delete", data=data)
    assert answer.status_code == 200, answer.text
    return answer.text


def binned(client):
    answer = client.get("/api/v1/bin")
    assert answer.status_code == 200, answer.text
    return answer.json()


def actions(console):
    return [(line["action"], [*map(str, line["ids"])]) for line in log_lines(console)]


def test_a_deleted_picture_is_in_the_bin_alone(console):
    service, client = console.service, console.client
    id_, sentence = id_of(console, "red-0"), Search(sentence="red")
    service.mark(ADA, sentence, {id_: True})
    assert 'action="/bin/restore"' in delete(client, id_)
    for path in ("", "/picture", "/alike?min_score=-1"):
        method = "DELETE" if "alike" in path else "GET"
        problem(client(method, f"/api/v1/items/{id_}{path}"), 404, "picture_not_found")
    hits = client.search(sentence="red", by_track=False, limit=100).json()["hits"]
    assert str(id_) not in [hit["id"] for hit in hits]
    assert client.post("/api/v1/export", json={"ids": [str(id_)]}).status_code == 404
    assert client.get("/api/v1/info").json()["pictures"] == 17
    (entry,) = binned(client)
    about = {"id": str(id_), "key": "red-0", "user": "local", "reason": "a test"}
    assert entry.items() >= about.items()
    assert client.get(entry["picture"]).headers["content-type"] == "image/jpeg"
    assert f"/api/v1/bin/{id_}/picture" in client.get("/bin").text
    ((_, kept),) = service.binned()
    # Undone, it is there with its id and its mark.
    assert client.post("/bin/restore", data={"ids": str(id_)}).status_code == 200
    assert (service.gallery.count(), id_of(console, "red-0")) == (18, id_)
    assert service.marks(ADA, sentence) == {id_: True}
    assert client.get(f"/api/v1/items/{id_}/picture").status_code == 200
    assert binned(client) == []
    problem(client.get(entry["picture"]), 404, "picture_not_found")
    (line,) = [line for line in log_lines(console) if line["action"] == "restore"]
    assert line["details"]["deletions"] == [
        {"user": "local", "deleted": kept.deleted, "reason": "a test", "ids": [str(id_)]}
    ]
    named = [line for line in actions(console) if line[0] in ("bin", "restore", "delete")]
    assert named == [("bin", [str(id_)]), ("restore", [str(id_)])]


def test_a_permanent_deletion_takes_one_step_from_everywhere(console):
    client, gallery = console.client, console.service.gallery
    first, second, third = (id_of(console, f"red-{n}") for n in range(3))
    assert 'action="/bin/restore"' not in delete(client, first, permanent="true")
    path = f"/api/v1/items/{second}?reason=why&permanent=true"
    assert client("DELETE", path).json() == {"deleted": 1, "dry_run": False}
    delete(client, third)
    assert [entry["id"] for entry in binned(client)] == [str(third)]
    asked = {"ids": [str(third)], "reason": "at her request"}
    assert client.post("/api/v1/bin/delete", json=asked).json()["deleted"] == 1
    problem(client.post("/api/v1/bin/delete", json=asked), 404, "picture_not_found")
    # A page of the bin may be outdated: what was restored since keeps its id, and stays.
    restored = {"ids": [str(id_of(console, "blue-0"))], "reason": "why"}
    problem(client.post("/api/v1/bin/delete", json=restored), 404, "picture_not_found")
    assert gallery.ids(["blue-0"])
    assert binned(client) == []
    assert gallery.ids(["red-0", "red-1", "red-2"]) == {}
    assert not [*console.folder.glob("**/red*")]
    deletions = [line for line in actions(console) if line[0] in ("bin", "delete")]
    assert deletions == [
        ("delete", [str(first)]), ("delete", [str(second)]), ("bin", [str(third)]),
        ("delete", [str(third)]),
    ]  # fmt: skip


def test_the_page_restores_and_deletes_many_at_once(console, monkeypatch):
    monkeypatch.setattr(console_bin, "_MOST", 2)
    client = console.client
    ids = [id_of(console, f"red-{n}") for n in range(3)]
    for id_ in ids:
        delete(client, id_)
    newest_first = [*map(str, ids[::-1])]
    for start, has_next in ((0, True), (1, False), (2, False)):
        page = client.get(f"/bin?start={start}").text
        found = client.get(f"/api/v1/bin?limit=2&start={start}").json()
        shown = newest_first[start : start + 2]
        assert [one["id"] for one in found] == shown
        assert [one for one in newest_first if one in page] == shown
        assert ('rel="next"' in page) == has_next
    nothing = client.post("/bin/restore", data={})
    assert (nothing.status_code, nothing.headers["location"]) == (303, "/bin")
    assert client.post("/bin/delete", data={"ids": [str(ids[0])]}).status_code == 422
    data = {"ids": [str(ids[0]), str(ids[1])]}
    assert client.post("/bin/restore", data=data).status_code == 200
    data = {"ids": [str(ids[2])], "reason": "why"}
    assert client.post("/bin/delete", data=data).status_code == 200
    assert client.post("/bin/delete", data=data).status_code == 404
    assert client.post("/bin/restore", data={"ids": "1 x"}).status_code == 422
    assert len(console.service.gallery.ids([f"red-{n}" for n in range(3)])) == 2


def test_a_key_that_came_again_is_not_replaced(console):
    id_ = id_of(console, "red-0")
    delete(console.client, id_)
    (new,) = add_items(console, Item(key="red-0"))
    answer = console.client.post("/api/v1/bin/restore", json={"ids": [str(id_)]})
    problem(answer, 422, "key_taken")
    assert [entry["id"] for entry in binned(console.client)] == [str(id_)]
    delete(console.client, new, permanent="true")
    # The same key: a request to delete it also holds for the bin.
    assert binned(console.client) == []


def test_only_administrators_see_the_bin_and_each_view_is_logged(guarded):
    id_ = id_of(guarded, "red-0")
    delete(guarded.admin, id_)
    paths = ("/bin", "/api/v1/bin", f"/api/v1/bin/{id_}/picture")
    for client in (guarded.viewer, guarded.operator):
        assert [client.get(path).status_code for path in paths] == [403] * 3
        body = {"ids": [str(id_)], "reason": "why"}
        assert client.post("/api/v1/bin/delete", json=body).status_code == 403
        assert client.post("/bin/restore", data={"ids": str(id_)}).status_code == 403
    assert len(guarded.service.binned()) == 1
    before = len(log_lines(guarded))
    for path in paths:
        assert guarded.admin.get(path).status_code == 200
    lines = log_lines(guarded)[before:]
    assert [(line["action"], line["ids"]) for line in lines] == [("view", [id_])] * 2
    guarded.service.view_log.quota = 1
    delete(guarded.admin, *(id_of(guarded, key) for key in ("red-1", "red-2")))
    problem(guarded.admin.get("/api/v1/bin"), 429, "view_quota_exceeded")


def test_without_a_log_nothing_moves(console, full_disk):
    id_, other = id_of(console, "red-0"), id_of(console, "red-1")
    delete(console.client, other)
    body = {"ids": [str(other)], "reason": "why"}
    with full_disk():
        for method, path in (
            ("DELETE", f"items/{id_}?reason=why"), ("POST", "bin/restore"), ("POST", "bin/delete"),
            ("GET", "bin"),
        ):  # fmt: skip
            answer = console.client(method, f"/api/v1/{path}", json=body)
            problem(answer, 507, "log_not_writable")
    assert [one for one, _ in console.service.binned()] == [other]
    assert id_of(console, "red-0") == id_


def test_a_second_person_approves_a_permanent_deletion(make_guarded):
    console = make_guarded(oversight=Oversight(two_persons=("delete",)))
    console.service.bin_s = DAY
    adam = client_of(console, add_token(console.token_file, "adam", "admin", None))
    id_ = id_of(console, "red-0")
    picture, body = f"/api/v1/bin/{id_}/picture", {"ids": [str(id_)], "reason": "why"}

    def ask(method, path):
        answer = console.admin(method, path, json=body)
        problem(answer, 202, "approval_pending")
        return answer.json()["approval"]

    def approve(id_):
        return adam.post(f"/approvals/{id_}/approve", data={}).status_code

    approve(ask("DELETE", f"/api/v1/items/{id_}?reason=why"))
    assert [one for one, _ in console.service.binned()] == [id_]
    first = ask("POST", "/api/v1/bin/delete")
    assert f'href="{picture}"' in adam.get("/approvals").text
    assert last_line(console)["ids"] == [id_]
    assert adam.get(picture).status_code == 200
    # It holds for this deletion alone, not for a later one of the same picture.
    assert console.admin.post("/api/v1/bin/restore", json=body).status_code == 200
    approve(ask("DELETE", f"/api/v1/items/{id_}?reason=why"))
    before = log_lines(console)
    assert (approve(first), log_lines(console)) == (409, before)
    assert len(console.service.binned()) == 1
    approve(ask("POST", "/api/v1/bin/delete"))
    assert console.service.binned() == []


def test_the_bin_empties_itself(console, monkeypatch):
    service = console.service
    first, second = id_of(console, "red-0"), id_of(console, "red-1")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 8 * DAY)
    delete(console.client, first)
    monkeypatch.setattr(time, "time", lambda: now)
    delete(console.client, second)
    with refused("bin_not_empty", pictures=2) as found:
        require_no_loss(service.gallery, 0.0)
    assert "--bin 15d" in str(found.value)  # A shorter time would delete the first at once.
    service.empty_bin()
    service.empty_bin()
    assert [id_ for id_, _ in service.binned()] == [second]
    line = logged(console, action="delete", ids=[first], keys=["red-0"])
    assert (line["user"], "deleted_before" in line["details"]) == (BIN_USER, True)
    service.bin_s = 0.0  # Started with --bin 0.
    monkeypatch.setattr(time, "time", lambda: now + 1)
    service.empty_bin()
    assert len(service.gallery.bin.entries()) == 1
    assert 'action="/bin/restore"' not in delete(console.client, id_of(console, "red-2"))
    # A gallery on Milvus has none.
    monkeypatch.setattr(service.gallery, "bin", None, raising=False)
    service.bin_s = DAY
    assert 'action="/bin/restore"' not in delete(console.client, id_of(console, "blue-0"))
    service.empty_bin()
    assert (binned(console.client), service.gallery.ids(["blue-0"])) == ([], {})
    assert [line["action"] for line in log_lines(console)].count("delete") == 3


def test_the_thread_goes_on_after_a_full_disk(console, monkeypatch):
    monkeypatch.setattr(console_bin, "_EMPTIED_EVERY_S", 0.01)
    delete(console.client, id_of(console, "red-0"))
    console.service.bin_s = 1e-9
    failed, put = threading.Event(), console.service.log._put

    def full(line):
        if not failed.is_set():
            failed.set()
            raise OSError(28, "No space left on device")
        return put(line)

    monkeypatch.setattr(console.service.log, "_put", full)
    with emptying(console.service):
        end = time.monotonic() + 60
        while console.service.gallery.bin.entries() and time.monotonic() < end:
            threading.Event().wait(0.01)
    assert failed.is_set()
    assert console.service.gallery.bin.entries() == []
