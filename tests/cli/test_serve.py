"""`upperson-rt serve` and `log` as users run them."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import socket
import threading
from contextlib import closing, suppress

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from tests.helpers.fake_camera import wait_for
from tests.helpers.invoke import refusal, run_json, run_rt, run_rt_json
from tests.helpers.served import served
from tests.helpers.signing_keys import write_keys
from upperson_console.accounts import BIN_USER
from upperson_console.search import Search
from upperson_console.user_state import UserState
from upperson_log.chain import verify_log
from upperson_log.query_log import QueryLog
from upperson_log.writer import process_user
from upperson_rt.cli import app
from upperson_rt.gallery import Gallery

KILLS = int(os.environ.get("UPPERSON_TEST_KILLS", "1"))


@pytest.fixture
def ready(work, bundle_and_crops, gallery_of_crops):
    """A working folder with ./bundle and ./gallery."""
    shutil.copytree(bundle_and_crops / "bundle", work / "bundle")
    shutil.copytree(gallery_of_crops, work / "gallery")
    return work


def test_it_answers_and_ends_cleanly(ready, monkeypatch):
    """An open live page does not keep it from ending."""
    (ready / "browser").write_text('#!/bin/sh\necho "$1" > opened\n')
    (ready / "browser").chmod(0o700)
    monkeypatch.setenv("BROWSER", str(ready / "browser"))
    with served(ready, "--open", "--view-quota", 2) as running:
        url = running.url
        assert url.startswith("http://127.0.0.1:")
        assert httpx.get(f"{url}/api/v1/health").json() == {"status": "ok"}
        (hit,) = search(running, sentence="red coat", limit=1).json()["hits"]
        assert "red" in hit["key"]
        assert httpx.get(f"{url}{hit['picture']}").headers["content-type"] == "image/jpeg"
        assert search(running, sentence="red coat", limit=3).status_code == 429
        assert httpx.get(f"{url}/static/console.js").status_code == 200
        with httpx.stream("GET", f"{url}/live/events", timeout=60) as events:
            parts = events.iter_text()
            text = next(parts)
            running.process.send_signal(signal.SIGTERM)
            assert "No cameras yet" in text + "".join(parts)
        assert running.process.wait(30) == 0
    first, ending, last = running.errors.read_text().splitlines()
    assert first == "query log console/query.log: last chain none"
    assert ending.startswith("ending: ")
    chain = last.removeprefix("query log console/query.log: last chain ")
    verified = run_rt("log", "verify", "console/query.log", "--expect", chain)
    assert verified.exit_code == 0
    assert f"last chain: {chain}" in verified.stdout
    assert not (ready / "gallery" / "gallery.sqlite-wal").exists()
    assert (ready / "opened").read_text().strip().rstrip("/") == url


def test_it_prunes_by_itself(ready):
    with Gallery.open(ready / "gallery") as gallery:
        count = gallery.count()
    with served(ready, "--keep-bytes", "1", "--keep", "gate=7d") as running:
        pruned = f"upperson_serve_pruned_total {count}.0"
        wait_for(lambda: pruned in httpx.get(f"{running.url}/api/v1/metrics").text)
        assert search(running, sentence="red coat", limit=1).json()["hits"] == []
    assert (ready / "gallery" / "erasures.log").exists()


def test_others_need_a_token(ready):
    token = run_rt("token", "t.json", "ada").stdout.strip()
    with QueryLog(ready / "log") as log:
        log.write("red", [], k=1)
    (ready / "log").write_bytes(b"")
    options = ("--token-file", "t.json", "--query-log", "log")
    with served(ready, "--host", "0.0.0.0", *options) as running:
        url = f"http://127.0.0.1:{running.url.rpartition(':')[2]}"
        assert httpx.get(f"{url}/api/v1/info").status_code == 401
        headers = {"authorization": f"Bearer {token}"}
        info = httpx.get(f"{url}/api/v1/info", headers=headers).json()
        assert info["user"] == "ada"
        assert "log acknowledge" in info["log_problem"]


def test_its_exports_are_signed_and_blurred_and_verified_on_another_machine(ready):
    write_keys(ready, "site", ec.generate_private_key(ec.SECP256R1()))
    with served(ready, "--sign-exports", "site.pem", "--blur") as running:
        (hit,) = search(running, sentence="red coat", limit=1).json()["hits"]
        body = {"ids": [hit["id"]], "search": {"sentence": "red coat"}}
        answer = httpx.post(f"{running.url}/api/v1/export", json=body, timeout=30)
    (ready / "export.zip").write_bytes(answer.content)
    command = ["evidence", "verify", "export.zip", "--trust", "site.pub"]
    found = run_rt_json(*command, "--log", "console/query.log")
    assert (found["signature"], found["log_line"]) == ("trusted", 2)
    facts = found["facts"]
    assert (facts["blurred"], facts["bundle_signed_by"]) == (True, None)


def test_what_cannot_be_served_is_refused_and_leaves_no_files(ready):
    run_rt("token", "tokens.json", "ada")
    (ready / "two.yaml").write_text("two_persons: [export]")
    (ready / "two.json").write_text("{}")
    before = sorted(ready.iterdir())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for exit_code, code, *arguments in (
            (3, "credentials_of_other_kind", "--token-file", "two.json"),
            (2, "token_file_missing", "--host", "0.0.0.0"),
            (3, "key_unusable", "--sign-exports", "tokens.json"),
            (2, "tls_incomplete", "--tls-cert", "x.pem"),
            (2, "age_malformed", "--bin", "7"),
            (2, "age_malformed", "--keep", "30"),
            (2, "timestamp_url_missing", "--timestamp-required"),
            (2, "address_malformed", "--timestamp-url", "tsa"),
            (3, "certificate_unreadable", "--timestamp-url", "http://127.0.0.1/", "--tsa-cert",
             "tokens.json"),
            (3, "tls_file_unreadable", "--tls-cert", "x.pem", "--tls-key", "y.pem"),
            (3, "credentials_unreadable", "--token-file", "none.json"),
            (3, "key_unknown", "--oversight", "tokens.json"),
            (2, "token_file_missing", "--oversight", "two.yaml"),
            (2, "watch_source_invalid", "--watch", "ftp://x"),
            (3, None, "-g", "none"),
            (3, None, "-b", "none"),
            (3, None, "--state", "bundle/bundle.json"),
            (3, None, "--query-log", "nowhere/log"),
            (3, "cannot_listen", "--host", "192.0.2.1", "--token-file", "tokens.json"),
            (3, "cannot_listen", "--port", taken.getsockname()[1]),
        ):  # fmt: skip
            refusal(run_rt("serve", "--json", "--port", 0, *arguments), exit_code, code)
            assert sorted(ready.iterdir()) == before, arguments


def test_a_log_is_verified_and_compared_with_a_noted_chain(work):
    with QueryLog(work / "log", user="ann") as log:
        log.write("sentence 0", [], k=1)
        noted = log.last_chain()
        for number in (1, 2):
            log.write(f"sentence {number}", [], k=1)
    assert run_rt("log", "verify", "log", "--expect", noted.upper()).exit_code == 0
    report = run_json("log", "verify", "log", "--expect", noted, app=app)
    assert report["expected"] == {noted: 1}
    assert run_rt("log", "verify", "log", "--expect", "0" * 64).exit_code == 6
    assert run_rt("log", "verify", "log", "--expect", noted[:12]).exit_code == 2
    (work / "log").write_text((work / "log").read_text().replace("sentence 1", "sentence x"))
    done = run_rt("log", "verify", "log", "--json")
    assert done.exit_code == 6
    report = json.loads(done.stdout)
    assert (report["ok"], report["lines"], len(report["problems"])) == (False, 3, 1)
    assert report["code"] == "log_altered"
    assert run_rt("log", "verify", "none").exit_code == 3
    (work / "empty").touch()
    done = run_rt("log", "verify", "empty", "--json")
    assert (done.exit_code, json.loads(done.stdout)["code"]) == (6, "no_query_log")


def test_every_command_reports_a_cut_log_until_it_is_acknowledged(ready):
    query = ("query", "red coat", "--query-log", "log")
    for _ in range(3):
        assert run_rt(*query).exit_code == 0
    lines = (ready / "log").read_bytes().splitlines(keepends=True)
    (ready / "log").write_bytes(b"".join(lines[:1]))
    assert run_rt("log", "verify", "log").exit_code == 6
    done = run_rt(*query)  # Answered and logged, in a new file.
    assert done.exit_code == 0
    assert "warning: the query log" in done.stderr
    assert (ready / "log.broken-1").read_bytes() == lines[0]
    assert run_rt("log", "verify", "log").exit_code == 6
    assert run_rt("doctor", "--query-log", "log").exit_code == 6
    assert run_rt("log", "acknowledge", "log", "--reason", "a test").exit_code == 0
    entry = json.loads((ready / "log").read_text().splitlines()[-1])
    assert (entry["user"], entry["details"]["reason"]) == (process_user(), "a test")
    assert run_rt("log", "verify", "log").exit_code == 0
    assert run_rt(*query).stderr.count("warning: the query log") == 0
    assert "nothing to acknowledge" in run_rt("log", "acknowledge", "log").stdout
    assert run_rt("log", "acknowledge", "none").exit_code == 3
    assert not (ready / "none").exists()


def test_the_bin_keeps_deletions_for_a_week_or_not_at_all(ready):
    with served(ready) as running:
        (hit,) = search(running, sentence="red coat", limit=1).json()["hits"]
        address = f"{running.url}/api/v1"
        assert httpx.delete(f"{address}/items/{hit['id']}?reason=x").json()["deleted"] == 1
        (entry,) = httpx.get(f"{address}/bin").json()
        assert entry["id"] == hit["id"]
    # Without a bin nothing that it holds is deleted.
    done = run_rt("serve", "--json", "--port", "0", "--bin", "0")
    assert refusal(done, 3, "bin_not_empty")["fields"]["pictures"] == 1
    with served(ready, "--bin", "1s"), Gallery.open(ready / "gallery") as gallery:
        wait_for(lambda: gallery.bin.entries() == [])
    *_, line = (json.loads(one) for one in (ready / "console/query.log").read_text().splitlines())
    assert (line["action"], line["user"], line["keys"]) == ("delete", BIN_USER, [hit["key"]])


@pytest.mark.parametrize("kill_after", range(KILLS))
def test_what_was_acknowledged_outlives_a_kill(ready, kill_after):
    """Marks, saved searches and exports of several clients, and SIGKILL in the middle."""
    marked, exported, stop = [], [], threading.Event()
    with served(ready) as running:
        ids = [hit["id"] for hit in search(running, sentence="red", limit=6).json()["hits"]]

        def mark(number):
            with suppress(httpx.HTTPError):
                for turn in itertools.count():
                    yes, last = (ids[at % len(ids)] for at in (turn, turn - 1))
                    query = {"sentence": f"client {number}", "yes": [yes], "remove": [last]}
                    if httpx.put(f"{running.url}/api/v1/marks", json=query, timeout=30).is_success:
                        marked.append((number, turn, yes))

        def export():
            with suppress(httpx.HTTPError):
                while True:
                    query = {"ids": ids}
                    answer = httpx.post(f"{running.url}/api/v1/export", json=query, timeout=30)
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
    with closing(UserState(ready / "console" / "console.sqlite")) as state:
        for number in range(2):
            known = [yes for client, _, yes in marked if client == number]
            logged = sum(line["sentence"] == f"client {number}" for line in lines)
            assert logged >= len(known)
            kept = state.marks(process_user(), Search(sentence=f"client {number}").marks_key)
            # The last acknowledged one, or one that was under way after it.
            assert not known or str(*kept) in (known[-1], ids[len(known) % len(ids)])
    hashes = {line["details"]["sha256"] for line in lines if line["action"] == "export"}
    assert set(exported) <= hashes
    with served(ready) as running:
        assert search(running, sentence="red", limit=1).status_code == 200


def search(running, **query):
    return httpx.post(f"{running.url}/api/v1/search", json=query, timeout=30)
