"""Logins, what each role may do, and what another site's page may not."""

import asyncio
import html
import json
import re
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from types import SimpleNamespace

import httpx
import pytest

from tests.helpers.console import (
    BASE,
    ODD,
    Client,
    add_items,
    client_of,
    id_of,
    log_lines,
    problem,
    rows_of,
)
from tests.helpers.refused import refused
from tests.helpers.toy_bundle import draw_person
from upperson_console import accounts, side_pages
from upperson_console.accounts import COOKIE, Accounts, BrowserSessions, add_token
from upperson_rt.errors import InputError, UsageError
from upperson_rt.gallery import Item


def test_tokens_are_stored_hashed_and_replaced_by_name(guarded):
    text = guarded.token_file.read_text()
    assert all(token not in text for token in guarded.tokens.values())
    add_token(guarded.token_file, "vera", "viewer", None)
    known = Accounts(guarded.token_file)
    assert known.of_token(guarded.tokens["viewer"]) is None
    assert known.of_token(guarded.tokens["admin"]).name == "ada"
    with refused("admin_sees_all", UsageError):
        add_token(guarded.token_file, "x", "admin", ("gate",))
    for file in (guarded.log, guarded.log.with_name("query.log.head")):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def listed(kind, version=1, **entry):
    """The text of a credential file of that kind."""
    return json.dumps({"schema_version": version, kind: [entry] if entry else []})


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (listed("tokens"), "credentials_empty"),
        (listed("tokens", version=3), None),
        (listed("tokens", name="a", role="boss", sha256="0" * 64), None),
        (listed("tokens", name="a", role="admin", sha256="0"), None),
        ("\udcff", "credentials_unreadable"),
        ('{"schema_version": 3, "model": {}}', "credentials_of_other_kind"),
        ("[]", "credentials_of_other_kind"),
    ],
)
def test_a_malformed_credential_file_is_refused(tmp_path, content, code):
    file = tmp_path / "file.json"
    file.write_text(content, errors="surrogateescape")
    file.chmod(0o600)
    with pytest.raises(InputError) as found:
        Accounts(file)
    assert code is None or (found.value.code, found.value.fields["path"]) == (code, file)


@pytest.fixture
def quick_live(monkeypatch):
    """Live pages are renewed at once."""
    monkeypatch.setattr(side_pages, "_RENEWED_S", 0.02)
    monkeypatch.setattr(side_pages, "_POLLED_S", 0.01)


def watches(console, user):
    """Whether a live page of an account has begun: it is logged before it is sent."""
    lines = (one for one in log_lines(console) if one["user"] == user)
    return any(one["details"].get("page") == "live" for one in lines if "details" in one)


def logged_in(console, role, **more):
    """The answer to a login, and a browser with its session."""
    form = {"token": console.tokens[role], **more}
    answer = Client(console.app).post("/login", data=form)
    return answer, Client(console.app, cookie=answer.headers["set-cookie"].partition(";")[0])


def test_a_change_of_the_token_file_counts_at_once(guarded, quick_live):
    """A session and a live page end with their token; a malformed file lets no client in."""
    _, browser = logged_in(guarded, "operator")
    assert browser.get("/api/v1/info").json()["user"] == "olga"
    with ThreadPoolExecutor(1) as pool:
        events = pool.submit(browser.get, "/live/events")
        while not watches(guarded, "olga"):
            assert not events.done()
        Accounts.revoke(guarded.token_file, "olga")
        assert "data: " in events.result(30).text
    for client in (browser, guarded.operator):
        assert client.get("/api/v1/info").status_code == 401
    assert guarded.admin.get("/api/v1/info").status_code == 200
    guarded.token_file.write_text("{")
    assert guarded.admin.get("/api/v1/info").status_code == 401


def test_logins_of_one_account_end_no_session_of_another():
    sessions = BrowserSessions()
    ada = sessions.begin("ada")
    known = [sessions.begin("vera") for _ in range(1100)]
    assert sessions.find(ada) is not None
    assert [sessions.find(one) is None for one in known] == [True] * 1080 + [False] * 20


def test_live_pages_of_one_account_keep_no_other_one_out(guarded, quick_live):
    async def run():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded.app)) as client:

            def watch(role):
                headers = {"authorization": f"Bearer {guarded.tokens[role]}"}
                return asyncio.ensure_future(client.get(f"{BASE}/live/events", headers=headers))

            own = [watch("viewer") for _ in range(8)]
            for refused in asyncio.as_completed(own[4:], timeout=60):
                answer = await refused  # It may be refused after its response has begun.
                assert (answer.status_code, answer.text) == (200, "") or answer.status_code == 429
            other = watch("operator")
            while not watches(guarded, "olga"):
                await asyncio.sleep(0.01)
            assert not any(one.done() for one in (*own[:4], other))
            for name in ("vera", "olga"):  # Ends their streams.
                Accounts.revoke(guarded.token_file, name)
            left = await asyncio.wait_for(asyncio.gather(*own[:4], other), 60)
            assert [one.text[:6] for one in left] == ["data: "] * 5

    asyncio.run(run())


def test_requests_without_a_token_are_refused(guarded):
    client = Client(guarded.app)
    for path in ("/api/v1/info", "/api/v1/items/1", "/api/v1/cameras", "/api/v1/metrics"):
        answer = client.get(path)
        problem(answer, 401, "login_required")
        assert answer.headers["www-authenticate"] == "Bearer"
    problem(client_of(guarded, "wrong").search(sentence="red"), 401)
    assert client.get("/api/v1/health").json() == {"status": "ok"}
    page = client.get("/people/3?q=a")
    assert page.status_code == 303
    assert page.headers["location"].endswith("/login?next=%2Fpeople%2F3%3Fq%3Da")


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_lost_session_leads_to_the_login_and_back(guarded, size):
    client = Client(guarded.app, cookie=f"{COOKIE}=ended", referer=f"{BASE}/?q=red&camera=gate")
    for path in ("/marks", "/export", "/delete", "/saved", "/picture", "/records/prune"):
        answer = client.post(path, data={"address": "x" * size})
        assert answer.status_code == 303, path
        place = "/login?next=%2F%3Fq%3Dred%26camera%3Dgate"
        assert (answer.headers["location"], "Bearer" in answer.text) == (place, False)
    elsewhere = {"referer": "https://evil.example/?q=1"}
    place = client.post("/marks", data={"address": ""}, headers=elsewhere).headers["location"]
    assert place == "/login?next=%2F"
    problem(client.post("/api/v1/search", json={"sentence": "x" * size}), 401)
    opened = client.get("/api/v1/items/1/clip", headers={"sec-fetch-mode": "navigate"})
    assert opened.status_code == 303
    events = client.get("/live/events", headers={"accept": "text/event-stream"})
    problem(events, 401, "login_required")  # A page would be an error in the browser's console.


def test_a_browser_logs_in_and_out(guarded, monkeypatch):
    wrong = Client(guarded.app).post("/login", data={"token": "wrong", "next": "/"})
    assert (wrong.status_code, "set-cookie" in wrong.headers) == (401, False)
    right, browser = logged_in(guarded, "operator", next="/?q=red")
    assert (right.status_code, right.headers["location"]) == (303, "/?q=red")
    cookie = right.headers["set-cookie"]
    assert re.match(rf"{COOKIE}=.*; HttpOnly; .*SameSite=strict", cookie)
    assert guarded.tokens["operator"] not in cookie
    assert "olga" in browser.get("/").text
    late = SimpleNamespace(monotonic=lambda: time.monotonic() + 13 * 3600, time=time.time)
    with monkeypatch.context() as patch:
        patch.setattr(accounts, "time", late)
        assert browser.get("/").status_code == 303
    assert browser.post("/logout").headers["location"] == "/login"
    assert browser.get("/").status_code == 303
    for place in ("//evil.example", "https://evil.example", "/\\evil", "/\t/evil"):
        assert logged_in(guarded, "viewer", next=place)[0].headers["location"] == "/"


def test_a_viewer_sees_only_its_cameras(guarded):
    """Neither others nor pictures without a camera, by any way to them."""
    draw_person(guarded.service.gallery.crops_dir / "none.png", "red", seed=1)
    loose = add_items(guarded, Item(key="no-camera", track="loose", crop="none.png"))
    hidden = [id_of(guarded, "red-2"), *loose]
    for by_track, where in product((True, False), ({}, {"cameras": ["gate", ODD]})):
        query = {"sentence": "red", "limit": 100, "by_track": by_track, "filter": where}
        assert {hit["camera"] for hit in guarded.viewer.search(**query).json()["hits"]} == {"gate"}
    found = guarded.viewer.search(sentence="red", filter={"cameras": [ODD]}).json()
    assert (found["hits"], found["total"]) == ([], 0)
    assert [camera["name"] for camera in guarded.viewer.get("/api/v1/cameras").json()] == ["gate"]
    for id_ in hidden:
        for path in ("", "/picture", "/clip"):
            path = f"/api/v1/items/{id_}{path}"
            problem(guarded.viewer.get(path), 404, "picture_not_found")
            seen = guarded.operator.get(path)
            assert seen.status_code == 200 or problem(seen, 404, "clip_not_kept")
        for page in (f"/people/{id_}", f"/people/{id_}/picture", f"/people/{id_}/frame"):
            assert guarded.viewer.get(page).status_code == 404
        problem(guarded.viewer.search(like=str(id_)), 404, "picture_not_found")
    for track in ({"track": "red-True", "camera": ODD}, {"track": "loose"}):
        problem(guarded.viewer.get("/api/v1/tracks", params=track), 404, "track_not_found")
        assert guarded.operator.get("/api/v1/tracks", params=track).status_code == 200
    before = [guarded.viewer.get(f"/api/v1/{path}").json() for path in ("info", "cameras")]
    assert before[0]["pictures"] == 12
    add_items(guarded, Item(key="new", camera="yard"))
    guarded.service.current.last.has_changed()
    assert before == [guarded.viewer.get(f"/api/v1/{path}").json() for path in ("info", "cameras")]
    page = f"/people/{id_of(guarded, 'red-0')}"
    assert ODD not in html.unescape(guarded.viewer.get(page).text)
    assert ODD in html.unescape(guarded.operator.get(page).text)


def test_each_role_may_do_what_it_may(guarded):
    id_ = str(id_of(guarded, "red-0"))
    marks = {"sentence": "red", "yes": [id_]}
    problem(guarded.viewer("PUT", "/api/v1/marks", json=marks), 403, "role_missing")
    problem(guarded.viewer.post("/api/v1/export", json={"ids": [id_]}), 403)
    assert guarded.operator("PUT", "/api/v1/marks", json=marks).status_code == 200
    assert guarded.operator.post("/api/v1/export", json={"ids": [id_]}).status_code == 200
    for client in (guarded.viewer, guarded.operator):
        problem(client("DELETE", f"/api/v1/items/{id_}?reason=x"), 403, "role_missing")
        problem(client.post("/api/v1/prune", json={"keep_newest": 0}), 403)
        assert client.get(f"/people/{id_}/delete").status_code == 403
    # An operator of some cameras marks and exports only what they saw.
    otto = client_of(guarded, add_token(guarded.token_file, "otto", "operator", ("gate",)))
    hidden = str(id_of(guarded, "red-2"))

    def mark(id_, how="yes"):
        return otto("PUT", "/api/v1/marks", json={"sentence": "red", how: [id_]})

    assert problem(mark(hidden), 404, "picture_not_found") == problem(mark("12345"), 404)
    assert mark(id_).status_code == 200
    assert mark(hidden, "remove").json() == mark("12345", "remove").json()
    rows = rows_of(otto.post("/api/v1/export", json={"ids": [hidden, id_]}))
    assert [row["id"] for row in rows] == [id_]
    assert guarded.admin("DELETE", f"/api/v1/items/{id_}?reason=x").json()["deleted"] == 1


def test_a_name_that_was_made_to_point_here_is_refused(reader):
    """Also one that begins or ends like a known one."""

    def ask(host):
        return reader.client.get("/api/v1/health", headers={"host": host})

    own = "127.0.0.1:8480 localhost [::1]:8480 10.1.2.3:80 cam.example:8480 CAM.example."
    for host in own.split():
        assert ask(host).status_code == 200
    for host in (
        "", "evil.example", "127.0.0.1.evil.example", "evilcam.example", "evil.cam.example",
        "cam.example.evil", "evil-localhost", "x.localhost:8480",
    ):  # fmt: skip
        problem(ask(host), 421, "host_unknown")


def test_another_sites_page_may_send_nothing(reader):
    def search(headers):
        return reader.client.post("/api/v1/search", json={"sentence": "red"}, headers=headers)

    for own in ({"origin": "http://127.0.0.1:8480"}, {"sec-fetch-site": "same-origin"}):
        assert search(own).status_code == 200
    for foreign in (
        {"origin": "http://127.0.0.1:9999"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"},
        {"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"},
    ):
        problem(search(foreign), 403, "cross_site_request")
    # A link may be followed, but nothing may be embedded.
    follows = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert reader.client.get("/?q=red", headers=follows).status_code == 200
    for embeds in (
        {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"},
        {"origin": "https://evil.example"},
    ):
        assert reader.client.get("/people/1/picture", headers=embeds).status_code == 403


def test_responses_carry_the_policy_and_cache_only_pictures(guarded, red_jpeg):
    for client in (guarded.viewer, Client(guarded.app)):
        for path in ("/", "/?q=red", "/nowhere", "/api/v1/health", "/api/v1/nowhere", "/login"):
            headers = client.get(path).headers
            policy = headers["content-security-policy"]
            assert ("default-src 'none'" in policy, "unsafe" in policy) == (True, False)
            kept = headers["x-content-type-options"], headers["cache-control"]
            assert kept == ("nosniff", "no-store")
    sent = guarded.viewer.post("/api/v1/pictures", files={"picture": ("x", red_jpeg)}).json()
    shown = [f"{path}/{id_of(guarded, 'red-0')}/picture" for path in ("/people", "/api/v1/items")]
    for path in (*shown, f"/query-pictures/{sent['picture']}"):
        headers = guarded.viewer.get(path).headers
        assert headers["cache-control"] == "private, max-age=3600"
        assert headers["vary"] == "Cookie, Authorization"  # Not for the next account.
