"""The page of accounts, and operators that are limited to cameras."""

import json
import re
import time
from dataclasses import replace
from itertools import product

from tests.helpers.console import client_of, log_lines
from tests.helpers.refused import refused
from upperson_console.accounts import Accounts, add_token
from upperson_rt.errors import UsageError


def entry(console, name):
    """Return the entry of an account in the token file, or None."""
    return next((one for one in Accounts.read(console.token_file) if one.name == name), None)


def token_in(answer):
    assert answer.status_code == 200, answer.text
    return re.search(r'<code class="token">([^<]+)</code>', answer.text)[1]


def info(client):
    return client.get("/api/v1/info")


def test_accounts_are_created_changed_renewed_and_revoked_without_a_restart(guarded):
    admin = guarded.admin
    form = {"name": "otto", "role": "operator", "camera": ["gate", ""], "expires": ""}
    created = admin.post("/accounts", data=form)
    assert created.headers["cache-control"] == "no-store"
    token = token_in(created)
    otto = client_of(guarded, token)
    assert (info(otto).json()["user"], info(otto).json()["role"]) == ("otto", "operator")
    assert [one["name"] for one in otto.get("/api/v1/cameras").json()] == ["gate"]
    assert token not in admin.get("/accounts").text + guarded.token_file.read_text()
    assert (entry(guarded, "otto").cameras, entry(guarded, "otto").expires) == (("gate",), None)
    # Role, cameras and expiry change under a token that stays the same.
    change = {"name": "otto", "role": "viewer", "expires": "2099-01-02T03:04:05"}
    assert admin.post("/accounts/change", data=change).headers["location"] == "/accounts"
    assert (info(otto).json()["role"], info(otto).json()["pictures"]) == ("viewer", 18)
    assert "2099-01-02 03:04:05" in admin.get("/accounts").text
    renewed = client_of(guarded, token_in(admin.post("/accounts/renew", data={"name": "otto"})))
    assert (info(otto).status_code, info(renewed).status_code) == (401, 200)
    assert entry(guarded, "otto").expires > time.time()
    past = {**change, "expires": "2026-01-01T00:00"}
    assert admin.post("/accounts/change", data=past).status_code == 422
    # An expired account gets a later expiry before a new token.
    Accounts.put(guarded.token_file, replace(entry(guarded, "otto"), expires=1.0))
    assert info(renewed).status_code == 401
    assert admin.post("/accounts/renew", data={"name": "otto"}).status_code == 422
    admin.post("/accounts/change", data=change)
    token = token_in(admin.post("/accounts/renew", data={"name": "otto"}))
    assert info(client_of(guarded, token)).status_code == 200
    assert admin.post("/accounts/revoke", data={"name": "otto"}).status_code == 303
    assert entry(guarded, "otto") is None
    lines = [one for one in log_lines(guarded) if one["action"].startswith("account-")]
    did = " ".join(one["action"].removeprefix("account-") for one in lines)
    assert did == "create change renew change renew revoke"
    assert {(one["user"], one["details"]["account"]) for one in lines} == {("ada", "otto")}
    about = {"account": "otto", "role": "operator", "cameras": ["gate"], "expires": None}
    assert lines[0]["details"] == about
    assert token not in json.dumps(lines)


def test_a_change_that_is_refused_or_cannot_be_logged_is_not_made(guarded, full_disk):
    before = guarded.token_file.read_bytes()
    for path, form, code in (
        ("", {"name": "vera"}, "account_exists"),
        ("", {"name": "\uff36ERA"}, "account_exists"),
        ("", {"name": "ve\u200bra"}, "name_not_printable"),
        ("", {"name": "(Bin)"}, "name_reserved"),
        ("", {"name": " "}, "no_name"),
        ("", {"name": "\u3164"}, "no_name"),
        ("", {"name": "x", "role": "boss"}, "request_invalid"),
        ("", {"name": "x", "role": "admin", "camera": "gate"}, "admin_sees_all"),
        ("", {"name": "x", "expires": "soon"}, "time_malformed"),
        ("", {"name": "x", "expires": "2026-01-01T00:00"}, "expires_past"),
        ("/change", {"name": "vera", "role": "admin", "camera": "gate"}, "admin_sees_all"),
        ("/change", {"name": "ada", "role": "viewer"}, "own_account"),
        ("/change", {"name": "nobody", "role": "viewer"}, "account_not_found"),
        ("/renew", {"name": "ada"}, "own_account"),
        ("/revoke", {"name": "ada"}, "own_account"),
        ("/revoke", {"name": "nobody"}, "account_not_found"),
    ):
        status = 404 if code == "account_not_found" else 422
        assert guarded.admin.post(f"/accounts{path}", data=form).status_code == status, code
        assert guarded.token_file.read_bytes() == before
    assert log_lines(guarded) == []
    with full_disk():
        for path, form in (("", {"name": "x"}), ("/revoke", {"name": "vera"})):
            assert guarded.admin.post(f"/accounts{path}", data=form).status_code == 507
    assert guarded.token_file.read_bytes() == before


def test_accounts_of_older_releases_keep_their_names(guarded):
    content = json.loads(guarded.token_file.read_text())
    for entry_, name in zip(content["tokens"], ("ada", "ADA", "ve\u200bra"), strict=True):
        entry_["name"] = name
    guarded.token_file.write_text(json.dumps(content))
    assert info(guarded.viewer).json()["user"] == "ve\u200bra"
    renewed = guarded.admin.post("/accounts/renew", data={"name": "ve\u200bra"})
    assert info(client_of(guarded, token_in(renewed))).status_code == 200
    add_token(guarded.token_file, "ADA", "viewer", None)
    assert [one.name for one in Accounts.read(guarded.token_file)] == ["ada", "ve\u200bra", "ADA"]
    with refused("account_exists", UsageError):
        add_token(guarded.token_file, "Ada", "viewer", None)


def test_an_admin_who_was_revoked_meanwhile_changes_nothing(guarded, monkeypatch):
    """Two admins who revoke each other at once: one of them remains."""
    file, known = guarded.token_file, Accounts.of_token
    add_token(file, "adam", "admin", None)
    content, before = file.read_bytes(), entry(guarded, "adam")
    for how, path in product(("revoke", "expire", "demote"), ("", "/change", "/renew", "/revoke")):
        found = []

        def of_token(accounts, token, how=how, found=found):
            if found:  # The request was authenticated before.
                return found[0]
            found.append(known(accounts, token))
            if how == "revoke":
                Accounts.revoke(file, "ada")
            else:
                more = {"expires": 1.0} if how == "expire" else {"role": "viewer"}
                Accounts.put(file, replace(entry(guarded, "ada"), **more))
            return found[0]

        form = {"name": "otto" if path == "" else "adam", "role": "viewer"}
        with monkeypatch.context() as patch:
            patch.setattr(Accounts, "of_token", of_token)
            answer = guarded.admin.post(f"/accounts{path}", data=form)
        assert (answer.status_code, len(found)) == (403, 1), (how, path)
        assert (entry(guarded, "adam"), entry(guarded, "otto")) == (before, None)
        file.write_bytes(content)
    assert {line["action"] for line in log_lines(guarded)} == {"forbidden"}


def test_only_admins_reach_the_page_and_only_with_a_token_file(guarded, reader):
    for client in (guarded.viewer, guarded.operator):
        assert client.get("/accounts").status_code == 403
        for path in ("", "/change", "/renew", "/revoke"):
            form = {"name": "olga", "role": "admin"}
            assert client.post(f"/accounts{path}", data=form).status_code == 403
        assert "/accounts" not in client.get("/").text
    assert 'href="/accounts"' in guarded.admin.get("/").text
    assert reader.client.get("/accounts").status_code == 404
    assert 'href="/accounts"' not in reader.client.get("/").text
