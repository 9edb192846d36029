"""Nothing of a person is shown unless the query log names it, and not more than the quota."""

import base64
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.console import id_of, last_line, log_lines, logged, problem
from upperson_console.accounts import Account
from upperson_console.live import Live
from upperson_console.problems import ProblemError
from upperson_console.view_log import PERIOD_S

ITEM = "/api/v1/items"


@pytest.fixture
def ids(console):
    gallery = console.service.gallery
    return [*gallery.ids([item.key for item in gallery.items()]).values()]


def named(console):
    """Return the ids of all lines, in their order."""
    return [id_ for line in log_lines(console) for id_ in line["ids"]]


def an_hour_later(console, passed_s=PERIOD_S + 1):
    clock = console.service.view_log.clock
    console.service.view_log.clock = lambda: clock() + passed_s


@pytest.mark.parametrize(
    "address",
    [ITEM + "/{}", ITEM + "/{}/picture", "/people/{}/picture", "/people/{}/picture?size=thumb"],
)
def test_reading_items_one_by_one_leaves_a_line_each(console, ids, address):
    console.service.view_log.quota = 0  # Any number.
    for _ in range(2):
        for id_ in ids:
            assert console.client.get(address.format(id_)).status_code == 200
    assert named(console) == ids
    assert {line["action"] for line in log_lines(console)} == {"view"}
    an_hour_later(console)
    cached = {"if-none-match": '"x"', "if-modified-since": "Fri, 01 Jan 2100 00:00:00 GMT"}
    assert console.client.get(address.format(ids[0]), headers=cached).status_code == 200
    assert named(console) == [*ids, ids[0]]


def test_a_line_of_a_search_covers_its_hits_for_an_hour(console):
    hits = console.client.search(sentence="red", limit=3)
    first, *_ = shown = [hit["id"] for hit in hits.json()["hits"]]
    for id_ in shown:
        for address in (f"{ITEM}/{id_}", f"{ITEM}/{id_}/picture", f"/people/{id_}/picture"):
            assert console.client.get(address).status_code == 200
    assert len(log_lines(console)) == 1
    # A timeline covers nothing, as it shows only counts.
    assert console.client.get("/timeline?q=red").status_code == 200
    other = next(str(id_) for id_ in log_lines(console)[-1]["ids"] if str(id_) not in shown)
    console.client.get(f"{ITEM}/{other}")
    assert last_line(console)["details"] == {"picture": other}
    an_hour_later(console)
    console.client.get(f"{ITEM}/{first}/picture")
    assert [*map(str, last_line(console)["ids"])] == [first]
    assert len(log_lines(console)) == 4


def test_without_a_log_only_what_it_names_is_shown(console, ids, red_jpeg, full_disk, monkeypatch):
    client, (seen, unseen, *_) = console.client, ids
    client.get(f"{ITEM}/{seen}/picture")
    url = "data:image/jpeg;base64," + base64.b64encode(red_jpeg).decode()
    body = {"input": ["red", "a blue coat", url]}
    assert client.post("/v1/embeddings", json=body).status_code == 200
    logged(console, action="embed", details={"sentences": 2, "pictures": 1})
    for name in ("_POLLED_S", "_RENEWED_S"):
        monkeypatch.setattr(f"upperson_console.side_pages.{name}", 0.001)
    with full_disk():
        problem(client.post("/v1/embeddings", json=body), 507, "log_not_writable")
        picture = f"/people/{unseen}/picture?size="
        for address in (f"{picture}thumb", f"{picture}view", "/live"):
            assert client.get(address).status_code == 507
        for address in (f"{ITEM}/{unseen}", f"{ITEM}/{unseen}/picture"):
            detail = problem(client.get(address), 507, "log_not_writable")
            assert str(console.log) not in detail
        stream = client.get("/live/events")
        assert (stream.status_code, stream.text) == (200, "")
        assert client.get(f"{ITEM}/{seen}/picture").status_code == 200
    assert client.get(f"{ITEM}/{unseen}").status_code == 200


def test_the_live_page_logs_its_new_thumbnails_in_one_line(console, ids):
    console.service.view_log.quota = 1
    _, cameras = Live(()).now(console.service, Account(name="local", role="admin"))
    newest = {id_ for camera in cameras for id_, _ in camera.newest}
    for _ in range(2):
        for address in ("/live", *(f"/people/{id_}/picture?size=thumb" for id_ in newest)):
            assert console.client.get(address).status_code == 200
    (line,) = log_lines(console)
    assert {*line["ids"]} == newest
    assert 1 < len(newest) < len(ids)
    first, second, *_ = newest  # Larger ones are chosen: they are logged, and count.
    assert console.client.get(f"/people/{first}/picture").status_code == 200
    assert last_line(console)["ids"] == [first]
    assert console.client.get(f"/people/{second}/picture").status_code == 429


def test_bulk_reading_ends_at_the_quota_of_an_account(guarded):
    guarded.service.view_log.quota = 4
    ids = [id_of(guarded, f"{colour}-{n}") for colour in ("red", "blue", "white") for n in (0, 1)]
    for _ in range(2):  # The same items again are no more.
        for id_ in ids[:4]:
            assert guarded.viewer.get(f"{ITEM}/{id_}/picture").status_code == 200
    for address in (f"{ITEM}/{ids[4]}", f"{ITEM}/{ids[5]}/picture"):
        answer = guarded.viewer.get(address)
        problem(answer, 429, "view_quota_exceeded")
        assert 3590 < int(answer.headers["retry-after"]) <= 3600
    problem(guarded.viewer.search(sentence="red", limit=9), 429, "view_quota_exceeded")
    page = guarded.viewer.get("/?q=red&by=picture")
    assert (page.status_code, "retry-after" in page.headers) == (429, True)
    assert guarded.viewer.get(f"{ITEM}/{ids[0]}").status_code == 200
    (line,) = [line for line in log_lines(guarded) if line["action"] == "quota"]
    about = {"user": "vera", "ids": [], "details": {"refused": "view", "quota": 4}}
    assert {name: line[name] for name in about} == about
    assert "upperson_serve_quota_refusals_total 4.0" in guarded.admin.get("/api/v1/metrics").text
    assert "vera wanted to see more" in guarded.admin.get("/records").text
    assert guarded.operator.get(f"{ITEM}/{ids[4]}").status_code == 200
    an_hour_later(guarded)
    assert guarded.viewer.get(f"{ITEM}/{ids[4]}").status_code == 200


def test_the_quota_frees_places_as_views_grow_old_and_deletions_need_none(console, ids):
    console.service.view_log.quota = 3
    for id_ in ids[:3]:
        assert console.client.get(f"{ITEM}/{id_}").status_code == 200
        an_hour_later(console, 600)
    answer = console.client.get(f"{ITEM}/{ids[3]}")
    problem(answer, 429, "view_quota_exceeded")  # Administrators have one, too.
    wait_s = int(answer.headers["retry-after"])
    assert 1790 < wait_s <= 1800
    an_hour_later(console, wait_s + 1)
    assert console.client.get(f"{ITEM}/{ids[3]}").status_code == 200
    problem(console.client.get(f"{ITEM}/{ids[4]}"), 429)
    console.service.view_log.quota = 2
    alike = f"{ITEM}/{ids[0]}/alike?min_score=-1"
    assert console.client("DELETE", alike).json()["deleted"] == len(ids)
    done = console.client("DELETE", f"{alike}&dry_run=false&reason=old")
    assert done.json()["deleted"] == len(ids)


def test_many_requests_at_once_do_not_pass_the_quota(console, ids):
    console.service.view_log.quota = 5
    account = Account(name="local", role="admin")

    def view(id_):
        item, _ = console.service.item(account, id_)
        try:
            console.service.note_view(account, id_, item, "picture")
        except ProblemError as error:
            return error.code
        return "shown"

    with ThreadPoolExecutor(8) as pool:
        found = [*pool.map(view, ids)]
    assert Counter(found) == {"shown": 5, "view_quota_exceeded": len(ids) - 5}
    assert len(named(console)) == 5
    assert [line["action"] for line in log_lines(console)].count("quota") == 1
