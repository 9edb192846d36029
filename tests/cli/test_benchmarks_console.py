"""``python -m benchmarks.console`` on a small gallery, without a camera."""

import json

from typer.testing import CliRunner

from benchmarks import console
from upperson_rt.errors import InputError


def test_a_server_is_loaded_and_nothing_is_lost(bundle_and_crops):
    options = ["--clients", "2", "--seconds", "1", "--rows", "60", "--log-lines", "20"]
    command = ["-b", str(bundle_and_crops / "bundle"), *options, "--no-fill", "--json"]
    result = CliRunner().invoke(console.app, command)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    answered = found["answers"]
    assert answered.keys() == {"search 200", "picture 200"}
    assert answered["picture 200"] == 6 * answered["search 200"]
    assert found["lines in the log"] > 20 + answered["search 200"]
    lost = ("rows added meanwhile", "rows lost", "gallery problems", "log problems", "exit code")
    assert [found[name] for name in lost] == [0, 0, 0, 0, 0]
    (memory,) = (value for name, value in found.items() if name.startswith("memory at the start"))
    assert len(memory) == 5
    assert min(memory) > 0
    assert found["rows added until then"] == [0] * 5
    assert found["one client: other pages (ms)"].keys() >= {"a person", "records", "live"}


def test_no_server_is_left_behind_by_a_failure(bundle_and_crops, monkeypatch):
    started, start = [], console._start

    def fails(url):
        raise InputError(f"nobody asks {url}")

    monkeypatch.setattr(console, "_start", lambda *a: started.append(start(*a)) or started[-1])
    monkeypatch.setattr(console, "ask_alone", fails)
    result = CliRunner().invoke(
        console.app, ["-b", str(bundle_and_crops / "bundle"), "--rows", "6", "--no-fill"]
    )
    assert "nobody asks http://127.0.0.1" in result.stderr
    assert [server.poll() for server in started] == [0]
