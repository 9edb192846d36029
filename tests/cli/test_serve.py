"""`upperson-rt serve`, `token` and `log` as users run them."""

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import stat
import threading
from contextlib import suppress

import httpx
import pytest
from zeep import Client
from zeep.wsse.username import UsernameToken

import upperson_rt.cli
from tests.helpers.invoke import run_json, run_rt
from tests.helpers.served import served
from upperson_console.accounts import Accounts
from upperson_console.memory import Memory
from upperson_console.search import Search
from upperson_rt.log_chain import verify_log
from upperson_rt.query_log import QueryLog, process_user

KILLS = int(os.environ.get("UPPERSON_TEST_KILLS", "1"))


@pytest.fixture
def ready(work, bundle_and_crops, gallery_of_crops):
    """A working folder with ./bundle and ./gallery."""
    shutil.copytree(bundle_and_crops / "bundle", work / "bundle")
    shutil.copytree(gallery_of_crops, work / "gallery")
    return work


def test_it_answers_and_ends_cleanly(ready, monkeypatch):
    (ready / "browser").write_text('#!/bin/sh\necho "$1" > opened\n')
    (ready / "browser").chmod(0o700)
    monkeypatch.setenv("BROWSER", str(ready / "browser"))
    with served(ready, "--open") as running:
        assert running.url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{running.url}/api/v1/health").json() == {"status": "ok"}
        found = httpx.post(
            f"{running.url}/api/v1/search", json={"sentence": "red coat", "limit": 1}
        )
        (hit,) = found.json()["hits"]
        assert "red" in hit["key"]
        assert httpx.get(f"{running.url}{hit['picture']}").headers["content-type"] == "image/jpeg"
        assert httpx.get(f"{running.url}/static/console.js").status_code == 200
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0
    first, ending, last = running.output.with_name("serve.out.err").read_text().splitlines()
    assert first == "query log console/query.log: last chain none"
    assert ending == "ending: what has been asked is answered first"
    chain = last.removeprefix("query log console/query.log: last chain ")
    verified = run_rt("log", "verify", "console/query.log", "--expect", chain)
    assert verified.exit_code == 0
    assert f"last chain: {chain}" in verified.stdout
    assert not (ready / "gallery" / "gallery.sqlite-wal").exists()
    assert (ready / "opened").read_text().strip().rstrip("/") == running.url


def test_an_open_live_page_does_not_keep_it_from_ending(ready):
    with served(ready) as running:
        with httpx.stream("GET", f"{running.url}/live/events", timeout=60) as events:
            parts = events.iter_text()
            text = next(parts)
            assert text.startswith("data: ")
            running.process.send_signal(signal.SIGTERM)
            assert "No cameras yet" in text + "".join(parts)
        assert running.process.wait(30) == 0
    errors = running.output.with_name("serve.out.err").read_text().splitlines()
    assert [line for line in errors if "last chain" not in line] == [
        "ending: what has been asked is answered first"
    ]


def test_others_need_a_token(ready):
    made = run_rt("token", "tokens.json", "ada", "--role", "admin")
    assert made.exit_code == 0
    token = made.stdout.strip()
    assert token not in (ready / "tokens.json").read_text()
    with served(ready, "--host", "0.0.0.0", "--token-file", "tokens.json") as running:
        port = running.url.rpartition(":")[2]
        url = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{url}/api/v1/info").status_code == 401
        headers = {"authorization": f"Bearer {token}"}
        assert httpx.get(f"{url}/api/v1/info", headers=headers).json()["user"] == "ada"
    assert "in the clear" in running.output.with_name("serve.out.err").read_text()


def test_a_client_of_onvif_is_served(ready):
    made = run_rt("token", "onvif.json", "vms", "--onvif")
    assert "the ONVIF password of vms" in made.stderr
    with served(ready, "--onvif", "onvif.json") as running:
        (place,) = re.findall(r"onvif: (\S+)\n", running.output.read_text())
        assert place == f"{running.url}/onvif/device_service"
        search = Client(f"{running.url}/onvif/search.wsdl").create_service(
            "{http://www.onvif.org/ver10/search/wsdl}SearchBinding", place
        )
        search._client.wsse = UsernameToken("vms", made.stdout.strip(), use_digest=True)
        token = search.FindRecordings(Scope={}, KeepAliveTime="PT9S")
        assert search.GetRecordingSearchResults(token).SearchState == "Completed"
        search._client.transport.session.close()
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(30) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--onvif", "none.json"], 3, "cannot read none.json: No such file or directory\n"),
        (["--onvif", "tokens.json"], 3, "tokens.json holds tokens of the console, expected ONVIF"),
        (["--host", "0.0.0.0"], 2, "lets others in: make tokens with"),
        (["--tls-cert", "x.pem"], 2, "go together"),
        (["--tls-cert", "x.pem", "--tls-key", "y.pem"], 3, "--tls-cert x.pem cannot be read: No"),
        (["--token-file", "none.json"], 3, "cannot read none.json: No such file or directory\n"),
        (["--watch", "ftp://x"], 2, "takes a metrics file or an address"),
        (["-g", "none"], 3, "no gallery at none"),
        (["-b", "none"], 3, "none"),
        (["--state", "bundle/bundle.json"], 3, "cannot write bundle/bundle.json"),
        (["--query-log", "nowhere/log"], 3, "cannot write the query log"),
        (["--host", "192.0.2.1", "--token-file", "tokens.json"], 3, "cannot listen at 192.0.2.1"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(ready, arguments, code, words):
    run_rt("token", "tokens.json", "ada")
    before = sorted(ready.iterdir())
    done = run_rt("serve", "--port", "0", *arguments)
    assert done.exit_code == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(ready.iterdir()) == before  # No state is left behind.


def test_a_port_that_is_taken_is_told(ready):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run_rt("serve", "--port", str(port))
    assert done.exit_code == 3
    assert not (ready / "console").exists()
    reason = "Address already in use; choose another with  --port"
    assert f"cannot listen at 127.0.0.1 port {port}: {reason}" in done.stderr


def test_a_token_for_machines(work):
    made = run_json("token", "t.json", "vera", "--camera", "gate", app=upperson_rt.cli.app)
    assert (made["name"], made["role"], made["cameras"]) == ("vera", "viewer", ["gate"])
    assert Accounts(work / "t.json").of_token(made["token"]).name == "vera"


def test_a_password_for_onvif(work):
    made = run_json(
        "token", "o.json", "vms", "--onvif", "--camera", "gate", app=upperson_rt.cli.app
    )
    assert (made["name"], made["cameras"]) == ("vms", ["gate"])
    assert json.loads((work / "o.json").read_text())["onvif_users"][0]["password"] == made["token"]
    assert stat.S_IMODE((work / "o.json").stat().st_mode) == 0o600
    done = run_rt("token", "o.json", "ada", "--onvif", "--role", "admin")
    assert done.exit_code == 2
    assert "can only search" in done.stderr
    done = run_rt("token", "o.json", "ada")  # A file of the other kind.
    assert done.exit_code == 3
    assert "o.json holds ONVIF users, expected tokens of the console" in done.stderr


def test_a_token_file_is_not_spoilt(work):
    assert run_rt("token", "t.json", "vera", "--camera", "gate").exit_code == 0
    before = (work / "t.json").read_text()
    assert json.loads(before)["tokens"][0]["cameras"] == ["gate"]
    for arguments, words in (
        (["ada", "--role", "boss"], "must be one of viewer, operator, admin"),
        (["ada", "--role", "admin", "--camera", "gate"], "sees all cameras"),
        ([""], "is empty"),
    ):
        done = run_rt("token", "t.json", *arguments)
        assert done.exit_code == 2
        assert words in done.stderr
    assert (work / "t.json").read_text() == before
    assert stat.S_IMODE((work / "t.json").stat().st_mode) & 0o077 in (0, 0o044)


def test_a_log_is_verified(work):
    with QueryLog(work / "log", user="ann") as log:
        for number in range(3):
            log.write(f"sentence {number}", [], k=1)
    done = run_rt("log", "verify", "log")
    assert done.exit_code == 0
    assert "3 lines as they were written" in done.stdout
    (work / "log").write_text((work / "log").read_text().replace("sentence 1", "sentence x"))
    done = run_rt("log", "verify", "log")
    assert done.exit_code == 6
    assert "wrong: line 2 is not what was written" in done.stdout
    report = json.loads(run_rt("log", "verify", "log", "--json").stdout)
    assert (report["ok"], report["lines"], len(report["problems"])) == (False, 3, 1)
    assert run_rt("log", "verify", "none").exit_code == 3


def test_a_log_that_was_cut_is_told_by_every_command_until_it_is_acknowledged(ready):
    query = ("query", "red coat", "--query-log", "log")
    for _ in range(3):
        assert run_rt(*query).exit_code == 0
    lines = (ready / "log").read_bytes().splitlines(keepends=True)
    (ready / "log").write_bytes(b"".join(lines[:1]))
    assert run_rt("log", "verify", "log").exit_code == 6
    done = run_rt(*query)  # Answered and logged, in a new file.
    assert done.exit_code == 0
    assert "warning: the query log log was cut" in done.stderr
    assert (ready / "log.broken-1").read_bytes() == lines[0]
    assert run_rt("log", "verify", "log").exit_code == 6
    assert run_rt("doctor", "--query-log", "log").exit_code == 6
    with served(ready, "--query-log", "log") as running:
        assert "log acknowledge" in httpx.get(f"{running.url}/api/v1/info").json()["log_problem"]
    assert "was cut" in (ready / "serve.out.err").read_text()
    done = run_rt("log", "acknowledge", "log", "--reason", "a test")
    assert "acknowledged" in done.stdout
    entry = json.loads((ready / "log").read_text().splitlines()[-1])
    assert (entry["user"], entry["details"]["reason"]) == (process_user(), "a test")
    assert run_rt("log", "verify", "log").exit_code == 0
    assert run_rt(*query).stderr.count("warning: the query log") == 0
    assert "nothing to acknowledge" in run_rt("log", "acknowledge", "log").stdout
    assert run_rt("log", "acknowledge", "none").exit_code == 3
    assert not (ready / "none").exists()


def test_a_log_is_compared_with_a_chain_that_was_noted(work):
    with QueryLog(work / "log", user="ann") as log:
        log.write("one", [], k=1)
        noted = log.last_chain()
        log.write("two", [], k=1)
    done = run_rt("log", "verify", "log", "--expect", noted.upper())
    assert done.exit_code == 0
    assert "the expected chain is that of line 1" in done.stdout
    assert json.loads(run_rt("log", "verify", "log", "--expect", noted, "--json").stdout)[
        "expected"
    ] == {noted: 1}
    done = run_rt("log", "verify", "log", "--expect", "0" * 64)
    assert done.exit_code == 6
    assert f"wrong: no line has the expected chain {'0' * 64}" in done.stdout
    done = run_rt("log", "verify", "log", "--expect", noted[:12])
    assert done.exit_code == 2
    assert "64 digits" in done.stderr


@pytest.mark.timeout(180)  # Two servers start; a busy machine takes its time.
@pytest.mark.parametrize("kill_after", range(KILLS))
def test_what_was_acknowledged_outlives_a_kill(ready, kill_after):
    """Marks, saved searches and exports of several clients, and SIGKILL in the middle."""
    marked, exported, stop = [], [], threading.Event()
    with served(ready) as running:
        ids = [hit["id"] for hit in ask(running, sentence="red", limit=6).json()["hits"]]

        def mark(number):
            with suppress(httpx.HTTPError):
                for turn in itertools.count():
                    yes = ids[turn % len(ids)]
                    asked = {"sentence": f"client {number}", "yes": [yes]}
                    if httpx.put(f"{running.url}/api/v1/marks", json=asked, timeout=30).is_success:
                        marked.append((number, turn, yes))

        def export():
            with suppress(httpx.HTTPError):
                while True:
                    asked = {"ids": ids}
                    answer = httpx.post(f"{running.url}/api/v1/export", json=asked, timeout=30)
                    exported.append(hashlib.sha256(answer.content).hexdigest())

        threads = [threading.Thread(target=mark, args=(n,)) for n in range(2)]
        threads.append(threading.Thread(target=export))
        for thread in threads:
            thread.start()
        while len(marked) < 4 + 3 * kill_after or not exported:
            assert running.process.poll() is None
            stop.wait(0.01)
        running.process.kill()
        for thread in threads:
            thread.join(60)
    report = verify_log(ready / "console" / "query.log")
    assert report.problems == []
    text = (ready / "console" / "query.log").read_text()
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    for number in range(2):
        there = sum(line["sentence"] == f"client {number}" for line in lines)
        told = [yes for client, _, yes in marked if client == number]
        assert there >= len(told)
        memory = Memory(ready / "console" / "console.sqlite")
        question = Search(sentence=f"client {number}").question
        kept, _ = memory.marks(process_user(), question)
        memory.close()
        # The last one that was told, or one that was under way after it.
        assert not told or str(kept[0]) in (told[-1], ids[len(told) % len(ids)])
    hashes = {line["details"]["sha256"] for line in lines if line["action"] == "export"}
    assert set(exported) <= hashes
    with served(ready) as running:
        assert ask(running, sentence="red", limit=1).status_code == 200


def ask(running, **asked):
    return httpx.post(f"{running.url}/api/v1/search", json=asked, timeout=30)
