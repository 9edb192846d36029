"""`upperson-rt token`: concurrent commands, lists, revocation and expiry."""

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.helpers.command_line import run_program
from tests.helpers.invoke import run_json, run_rt
from upperson_console.accounts import Accounts, add_token
from upperson_rt.cli import app
from upperson_rt.locks import locked_folder

DAY_S = 86400


def make(file, *arguments):
    return run_json("token", file, *arguments, app=app)


def listed(file, *arguments):
    return make(file, "--list", *arguments)["tokens"]


@pytest.mark.timeout(180)
def test_concurrent_commands_lose_no_token(work):
    names = [f"user{number}" for number in range(3)]

    def run(name):
        return run_program("upperson-rt", "token", "t.json", name, timeout_s=150)

    with ThreadPoolExecutor(len(names)) as pool:
        done = list(pool.map(run, names))
    assert [one.returncode for one in done] == [0] * len(names)
    assert sorted(entry["name"] for entry in listed("t.json")) == names
    accounts = Accounts(work / "t.json")
    assert [accounts.of_token(one.stdout.strip()).name for one in done] == names
    assert os.listdir(work) == ["t.json"]


def test_tokens_are_made_listed_and_revoked(work):
    ada = make("t.json", "ada", "--role", "admin")
    vera = make("t.json", "vera", "--camera", "gate", "--expires", "30d")
    assert list(vera) == ["name", "role", "cameras", "file", "token"]
    assert (vera["name"], vera["role"], vera["cameras"]) == ("vera", "viewer", ["gate"])
    assert Accounts(work / "t.json").of_token(vera["token"]).name == "vera"
    first, second = listed("t.json")
    assert list(first) == ["name", "role", "cameras", "created", "expires", "expired"]
    assert (first["name"], first["cameras"], first["expires"]) == ("ada", None, None)
    assert second["cameras"] == ["gate"]
    assert second["expires"] - second["created"] == pytest.approx(30 * DAY_S)
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


def test_options_that_contradict_each_other_are_refused(work):
    for arguments in (
        [],
        ["ada", "--list"],
        ["--list", "--revoke"],
        ["--list", "--role", "admin"],
        ["ada", "--revoke", "--expires", "1d"],
        ["ada", "--expires", "soon"],
    ):
        assert run_rt("token", "t.json", *arguments).exit_code == 2
    assert os.listdir(work) == []


def test_old_files_are_changed_and_expired_tokens_refused(work):
    old = {"name": "ada", "role": "admin", "sha256": "0" * 64, "cameras": None}
    (work / "t.json").write_text(json.dumps({"schema_version": 1, "tokens": [old]}))
    assert [(one["created"], one["expires"]) for one in listed("t.json")] == [(None, None)]
    token = make("t.json", "vera", "--expires", "1h")["token"]
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
    change = threading.Thread(target=add_token, args=(work / "t.json", "ada", "viewer", None))
    with locked_folder(work):  # As while another command writes.
        change.start()
        change.join(0.3)
        assert change.is_alive()
        assert all(path.exists() for path in beside)
        assert not (work / "t.json").exists()
    change.join(60)
    assert sorted(os.listdir(work)) == [".other.json.abcd_123", "t.json"]
