"""``upperson-rt bench query`` on a toy bundle."""

import json
import os
from functools import partial

import pytest

from tests.helpers.invoke import run_rt
from tests.helpers.toy_bundle import make_toy_bundle, replace_in_bundle
from upperson_rt.bench import processes
from upperson_rt.cli import bench

run = partial(run_rt, "bench", "query")


@pytest.fixture
def folders(bundle_and_crops, gallery_of_crops):
    return ("-b", bundle_and_crops / "bundle", "-g", gallery_of_crops)


def test_processes_are_timed_in_turns(folders, tmp_path, monkeypatch, capsys):
    log = tmp_path / "asked.log"
    monkeypatch.setenv("UPPERSON_QUERY_LOG", str(log))
    result = run("red", *folders, "--rounds", 2, "--threads", 1, "--json")
    assert result.exit_code == 0, result.stderr
    assert "processes, in turns: 3/3" in result.stderr
    found = json.loads(result.stdout)
    bench._show_query(found)
    *table, verdict = capsys.readouterr().out.splitlines()
    assert "int8 on onnxruntime" in table[2]
    assert "6 pictures" in table[2]
    assert [row.split("  ")[0] for row in table[4:]] == [
        "a process that does nothing",
        "a process that imports onnxruntime",
        "upperson-rt query, from start to end",
        "a query in a running process",
    ]
    timings = found["timings"]
    assert [timings[name]["runs"] for name in timings] == [2, 2, 2, 50]
    p50 = {name: timing["p50_ms"] for name, timing in timings.items()}
    assert all(milliseconds > 0 for milliseconds in p50.values())
    if os.name == "posix":
        cpu = {name: timing["cpu_ms"] for name, timing in timings.items()}
        # Counted in ticks of 10 ms: a process that does nothing may take none.
        assert 0 <= cpu["python"] < cpu["import"] < cpu["query"]
        assert found["beyond_import_cpu_s"] == pytest.approx((cpu["query"] - cpu["import"]) / 1000)
    beyond = (p50["query"] - p50["import"]) / 1000
    assert found["beyond_import_s"] == pytest.approx(beyond)
    assert verdict.startswith(f"beyond the import: {beyond:.2f} s")
    assert (found["backend"], found["variant"], found["items"]) == ("onnxruntime", "int8", 6)
    assert not log.exists(), "a benchmark is nobody's query"


def test_json(folders, monkeypatch):
    ran = []
    monkeypatch.setattr(processes, "run_python", lambda *arguments, **_: ran.append(arguments[2:]))
    result = run("red", *folders, "--rounds", 1, "--variant", "fp32", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["variant"] == "fp32"
    assert [arguments[:1] for arguments in ran].count(("query",)) == 2  # One is not timed.
    command = next(arguments for arguments in ran if arguments)
    assert command[command.index("--variant") + 1] == "fp32"
    assert command[command.index("--backend") + 1] == "onnxruntime"


def test_what_does_not_run_is_an_error_of_the_query(folders, tmp_path):
    result = run("red", *folders[:2], "-g", tmp_path / "nowhere")
    assert (result.exit_code, result.stdout) == (3, "")
    assert "no gallery at" in result.stderr
    other = make_toy_bundle(tmp_path / "other")
    another = make_toy_bundle(tmp_path / "another", seed=3)
    replace_in_bundle(other, "text.int8.onnx", (another / "text.int8.onnx").read_bytes())
    assert run("red", "-b", other, *folders[2:]).exit_code == 6
