"""`upperson-rt token`: concurrent commands, lists, revocation and expiry."""

import json
import os
import shutil
import stat
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.helpers.command_line import run_program, start_program
from tests.helpers.invoke import run_json, run_rt
from tests.helpers.served import served
from upperson_console.accounts import Accounts
from upperson_rt.cli import app
from upperson_rt.files import locked_folder

DAY_S = 86400


def listed(file, *arguments):
    return run_json("token", file, "--list", *arguments, app=app)["tokens"]


@pytest.mark.timeout(180)
def test_concurrent_commands_lose_no_token(work):
    names = [f"user{number}" for number in range(12)]

    def make(name):
        return run_program("upperson-rt", "token", "t.json", name, timeout_s=150)

    with ThreadPoolExecutor(len(names)) as pool:
        done = list(pool.map(make, names))
    assert [one.returncode for one in done] == [0] * len(names)
    assert sorted(entry["name"] for entry in listed("t.json")) == sorted(names)
    accounts = Accounts(work / "t.json")
    made = [accounts.of_token(one.stdout.strip()) for one in done]
    assert [account.name for account in made] == names
    assert os.listdir(work) == ["t.json"]


def test_tokens_are_made_listed_and_revoked(work):
    ada = run_json("token", "t.json", "ada", "--role", "admin", app=app)
    vera = run_json("token", "t.json", "vera", "--camera", "gate", "--expires", "30d", app=app)
    assert (vera["name"], vera["role"], vera["cameras"]) == ("vera", "viewer", ["gate"])
    assert Accounts(work / "t.json").of_token(vera["token"]).name == "vera"
    entries = {entry["name"]: entry for entry in listed("t.json")}
    assert entries["ada"]["expires"] is None
    assert entries["vera"]["cameras"] == ["gate"]
    assert entries["vera"]["expires"] - entries["vera"]["created"] == pytest.approx(30 * DAY_S)
    assert {tuple(entry) for entry in entries.values()} == {
        ("name", "role", "cameras", "created", "expires", "expired")
    }
    content = (work / "t.json").read_text()
    hashes = [entry["sha256"] for entry in json.loads(content)["tokens"]]
    shown = run_rt("token", "t.json", "--list").stdout
    assert "vera" in shown
    assert not any(secret in shown for secret in [ada["token"], vera["token"], *hashes])
    for arguments in (["x", "--role", "boss"], ["x", "--role", "admin", "--camera", "gate"], [""]):
        assert run_rt("token", "t.json", *arguments).exit_code == 2
    assert (work / "t.json").read_text() == content
    assert run_rt("token", "t.json", "vera", "--revoke").exit_code == 0
    assert [entry["name"] for entry in listed("t.json")] == ["ada"]
    assert run_rt("token", "t.json", "vera", "--revoke").exit_code == 3


def test_onvif_users_have_passwords_in_a_private_file(work):
    made = run_json("token", "o.json", "vms", "--onvif", "--camera", "gate", app=app)
    assert (made["name"], made["cameras"]) == ("vms", ["gate"])
    assert json.loads((work / "o.json").read_text())["onvif_users"][0]["password"] == made["token"]
    assert stat.S_IMODE((work / "o.json").stat().st_mode) == 0o600
    assert run_rt("token", "o.json", "ada", "--onvif", "--role", "admin").exit_code == 2
    assert run_rt("token", "o.json", "ada").exit_code == 3  # A file of the other kind.
    done = run_rt("token", "o.json", "--list", "--onvif")
    assert done.exit_code == 0
    assert "vms" in done.stdout
    assert made["token"] not in done.stdout
    assert run_rt("token", "o.json", "vms", "--revoke", "--onvif").exit_code == 0
    assert listed("o.json", "--onvif") == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["ada", "--list"],
        ["--list", "--revoke"],
        ["--list", "--role", "admin"],
        ["ada", "--revoke", "--expires", "1d"],
        ["ada", "--expires", "soon"],
    ],
)
def test_options_that_contradict_each_other_are_refused(work, arguments):
    assert run_rt("token", "t.json", *arguments).exit_code == 2
    assert os.listdir(work) == []


def test_old_files_are_changed_and_expired_tokens_refused(work):
    old = {"name": "ada", "role": "admin", "sha256": "0" * 64, "cameras": None}
    (work / "t.json").write_text(json.dumps({"schema_version": 1, "tokens": [old]}))
    assert [(one["created"], one["expires"]) for one in listed("t.json")] == [(None, None)]
    token = run_json("token", "t.json", "vera", "--expires", "1h", app=app)["token"]
    assert [one["name"] for one in listed("t.json")] == ["ada", "vera"]
    accounts = Accounts(work / "t.json")
    assert accounts.of_token(token).name == "vera"
    content = json.loads((work / "t.json").read_text())
    content["tokens"][1]["expires"] = time.time() - 1
    (work / "t.json").write_text(json.dumps(content))
    assert accounts.of_token(token) is None
    assert [one["expired"] for one in listed("t.json")] == [False, True]


@pytest.mark.skipif(os.name != "posix", reason="folders are locked on POSIX only")
def test_what_a_killed_command_left_goes_and_what_a_live_one_writes_stays(work):
    beside = [work / ".t.json.abcd_123", work / ".other.json.abcd_123"]
    for path in beside:
        path.write_text("half")
    with locked_folder(work):  # As while another command writes.
        waiting = start_program("upperson-rt", "token", "t.json", "ada")
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(3)
        assert all(path.exists() for path in beside)
        assert not (work / "t.json").exists()
    assert waiting.wait(60) == 0
    assert sorted(os.listdir(work)) == [".other.json.abcd_123", "t.json"]


@pytest.mark.timeout(180)
def test_a_running_console_follows_the_file(work, bundle_and_crops, gallery_of_crops):
    shutil.copytree(bundle_and_crops / "bundle", work / "bundle")
    shutil.copytree(gallery_of_crops, work / "gallery")
    token = run_json("token", "t.json", "ada", app=app)["token"]
    run_rt("token", "t.json", "olga")
    with served(work, "--token-file", "t.json") as running:
        info = f"{running.url}/api/v1/info"
        bearer = {"authorization": f"Bearer {token}"}
        with httpx.Client(base_url=running.url) as browser:
            assert browser.post("/login", data={"token": token}).status_code == 303
            assert browser.get("/api/v1/info").json()["user"] == "ada"
            with browser.stream("GET", "/live/events", timeout=60) as events:
                parts = events.iter_text()
                assert next(parts)
                assert run_rt("token", "t.json", "ada", "--revoke").exit_code == 0
                list(parts)  # The stream ends.
            assert browser.get("/api/v1/info").status_code == 401
        assert httpx.get(info, headers=bearer).status_code == 401
        bearer["authorization"] = f"Bearer {run_json('token', 't.json', 'eve', app=app)['token']}"
        assert httpx.get(info, headers=bearer).json()["user"] == "eve"
        (work / "t.json").write_text("{")  # A malformed file lets no client in.
        assert httpx.get(info, headers=bearer).status_code == 401
