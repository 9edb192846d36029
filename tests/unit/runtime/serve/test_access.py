"""Who gets in, what each may do, and what another site's page may not."""

import json
import stat

import pytest

from tests.helpers.console import ODD, Client, problem
from upperson_console.accounts import COOKIE, Accounts, add_token
from upperson_rt.errors import InputError, UsageError


def first_id(console, key):
    return console.desk.gallery.ids([key])[key]


def test_tokens_are_stored_hashed(guarded):
    text = guarded.token_file.read_text()
    assert all(token not in text for token in guarded.tokens.values())
    assert {line["name"] for line in json.loads(text)["tokens"]} == {"ada", "olga", "vera"}


def test_a_new_token_replaces_the_one_before(guarded):
    add_token(guarded.token_file, "vera", "viewer", None)
    accounts = Accounts(guarded.token_file)
    assert accounts.of_token(guarded.tokens["viewer"]) is None
    assert accounts.of_token(guarded.tokens["admin"]).name == "ada"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema_version": 1, "tokens": []}', "names nobody"),
        ('{"schema_version": 3, "tokens": []}', "update upperson-rt"),
        (
            '{"schema_version": 1, "tokens": [{"name": "a", "role": "boss", "sha256": "%s"}]}'
            % ("0" * 64),
            "role",
        ),
        (
            '{"schema_version": 1, "tokens": [{"name": "a", "role": "admin", "sha256": "0"}]}',
            "64 lower",
        ),
        ("", "not valid JSON.*; expected tokens of the console, as  upperson-rt token FILE NAME  "),
        ("\udcff", "no text in UTF-8; expected tokens"),
        ('{"schema_version": 3, "model": {}}', "holds something else, expected tokens"),
        ('{"schema_version": 1, "onvif_users": []}', "holds ONVIF users, expected tokens"),
    ],
)
def test_a_malformed_token_file_is_refused(tmp_path, content, message):
    file = tmp_path / "tokens.json"
    file.write_text(content, errors="surrogateescape")
    with pytest.raises(InputError, match=message):
        Accounts(file)


def test_only_viewers_are_kept_to_cameras(tmp_path):
    with pytest.raises(UsageError, match="sees all cameras"):
        add_token(tmp_path / "tokens.json", "x", "admin", ("gate",))
    assert not (tmp_path / "tokens.json").exists()


def test_nobody_gets_in_without_a_token(guarded):
    nobody = Client(guarded.app)
    for path in ("/api/v1/info", "/api/v1/items/1", "/api/v1/cameras", "/api/v1/metrics"):
        answer = nobody.get(path)
        assert "log in" in problem(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"
    problem(Client(guarded.app, authorization="Bearer wrong").search(sentence="red"), 401)
    assert nobody.get("/api/v1/health").json() == {"status": "ok"}
    page = nobody.get("/people/3?q=a")
    assert page.status_code == 303
    assert page.headers["location"].endswith("/login?next=%2Fpeople%2F3%3Fq%3Da")


def test_a_browser_logs_in_and_out(guarded):
    nobody = Client(guarded.app)
    wrong = nobody.post("/login", data={"token": "wrong", "next": "/"})
    assert wrong.status_code == 401
    assert "not known" in wrong.text
    assert "set-cookie" not in wrong.headers
    right = nobody.post("/login", data={"token": guarded.tokens["operator"], "next": "/?q=red"})
    assert (right.status_code, right.headers["location"]) == (303, "/?q=red")
    cookie = right.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "samesite=strict" in cookie.lower()
    value = cookie.partition("=")[2].partition(";")[0]
    assert value not in str(guarded.tokens.values())
    browser = Client(guarded.app, cookie=f"{COOKIE}={value}")
    assert "olga" in browser.get("/").text
    assert browser.post("/logout").headers["location"] == "/login"
    assert browser.get("/").status_code == 303


@pytest.mark.parametrize("place", ["//evil.example", "https://evil.example", "/\\evil", "/\t/evil"])
def test_a_login_leads_nowhere_else(guarded, place):
    data = {"token": guarded.tokens["viewer"], "next": place}
    assert Client(guarded.app).post("/login", data=data).headers["location"] == "/"


def test_a_viewer_sees_only_its_cameras(guarded):
    other = first_id(guarded, "red-2")
    for by_track in (True, False):
        hits = guarded.viewer.search(sentence="red", limit=100, by_track=by_track).json()["hits"]
        assert {hit["camera"] for hit in hits} == {"gate"}
    asked = guarded.viewer.search(sentence="red", filter={"cameras": [ODD]})
    assert asked.json()["hits"] == []
    assert asked.json()["total"] == 0
    assert [camera["name"] for camera in guarded.viewer.get("/api/v1/cameras").json()] == ["gate"]
    for path in (f"/api/v1/items/{other}", f"/api/v1/items/{other}/picture"):
        assert "there is no picture" in problem(guarded.viewer.get(path), 404)
    problem(guarded.viewer.search(like=str(other)), 404)
    track = {"track": "red-True", "camera": ODD}
    problem(guarded.viewer.get("/api/v1/tracks", params=track), 404)
    assert guarded.operator.get("/api/v1/tracks", params=track).status_code == 200
    assert guarded.viewer.get("/api/v1/info").json()["pictures"] == 12
    assert ODD not in guarded.viewer.get(f"/people/{first_id(guarded, 'red-0')}").text


def test_each_role_may_do_what_it_may(guarded):
    id_ = str(first_id(guarded, "red-0"))
    marks = {"sentence": "red", "yes": [id_]}
    problem(guarded.viewer("PUT", "/api/v1/marks", json=marks), 403)
    problem(guarded.viewer.post("/api/v1/export", json={"ids": [id_]}), 403)
    assert guarded.operator("PUT", "/api/v1/marks", json=marks).status_code == 200
    assert guarded.operator.post("/api/v1/export", json={"ids": [id_]}).status_code == 200
    for client in (guarded.viewer, guarded.operator):
        why = problem(client("DELETE", f"/api/v1/items/{id_}?reason=x"), 403)
        assert "needs the role admin" in why
        problem(client.post("/api/v1/prune", json={"keep_newest": 0}), 403)
        assert client.get(f"/people/{id_}/delete").status_code == 403
    assert guarded.desk.gallery.count() == 18
    assert guarded.admin("DELETE", f"/api/v1/items/{id_}?reason=x").json()["deleted"] == 1


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8480", 200), ("localhost", 200), ("[::1]:8480", 200), ("10.1.2.3:80", 200),
        ("cam.example:8480", 200), ("evil.example", 421), ("127.0.0.1.evil.example", 421),
        ("", 421),
    ],
)  # fmt: skip
def test_a_name_that_was_made_to_point_here_is_refused(reader, host, status):
    answer = reader.client.get("/api/v1/health", headers={"host": host})
    assert answer.status_code == status


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "http://127.0.0.1:8480"}, 200),
        ({"origin": "http://127.0.0.1:9999"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "cors"}, 403),
        ({"sec-fetch-site": "same-origin"}, 200),
    ],
)
def test_another_sites_page_may_send_nothing(reader, headers, status):
    answer = reader.client.post("/api/v1/search", json={"sentence": "red"}, headers=headers)
    assert answer.status_code == status


def test_a_link_of_another_site_may_be_followed_but_not_embedded(reader):
    follows = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}
    assert reader.client.get("/?q=red", headers=follows).status_code == 200
    embeds = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "no-cors"}
    assert reader.client.get("/people/1/picture", headers=embeds).status_code == 403


def test_every_answer_carries_the_policy(console, guarded):
    for client in (console.client, Client(guarded.app)):
        for path in ("/", "/?q=red", "/nowhere", "/api/v1/health", "/api/v1/nowhere", "/login"):
            headers = client.get(path).headers
            policy = headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["cache-control"] == "no-store"


def test_a_browser_keeps_a_picture_for_whoever_got_it(guarded, red_jpeg):
    sent = guarded.viewer.post("/api/v1/pictures", files={"picture": ("x", red_jpeg)})
    id_ = first_id(guarded, "red-0")
    for path in (
        f"/people/{id_}/picture",
        f"/api/v1/items/{id_}/picture",
        f"/asked/{sent.json()['picture']}",
    ):
        headers = guarded.viewer.get(path).headers
        assert headers["cache-control"] == "private, max-age=3600"
        assert headers["vary"] == "Cookie, Authorization"


def test_pages_have_no_script_or_style_of_their_own(reader):
    id_ = first_id(reader, "red-0")
    for path in ("/", "/?q=red", f"/people/{id_}", f"/people/{id_}/delete?what=alike", "/login"):
        page = reader.client.get(path)
        assert page.status_code == 200
        for bad in (
            "<script>",
            "<style",
            " style=",
            " onclick=",
            " onload=",
            "javascript:",
            "http:",
        ):
            assert bad not in page.text, (path, bad)


def test_the_state_is_for_its_owner_alone(console):
    for file in (console.log, console.log.with_name("query.log.head")):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
