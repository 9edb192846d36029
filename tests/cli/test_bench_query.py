"""``upperson-rt bench query`` on a toy bundle."""

import json
import os

import pytest
from typer.testing import CliRunner

from tests.helpers.toy_bundle import COLOURS, draw_person, make_toy_bundle, replace_in_bundle
from upperson_rt.bench import processes
from upperson_rt.bundle import open_encoder
from upperson_rt.cli import app
from upperson_rt.errors import BackendError
from upperson_rt.gallery import Gallery
from upperson_rt.indexer import index_images


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    encoder = open_encoder(make_toy_bundle(folder / "bundle"), threads=1)
    pictures = [draw_person(folder / f"{colour}.png", colour) for colour in COLOURS]
    with Gallery.open(folder / "gallery", encoder.fingerprint, 16, create=True) as gallery:
        index_images(encoder, gallery, pictures)
    return ("-b", folder / "bundle", "-g", folder / "gallery")


def run(*arguments):
    return CliRunner().invoke(app, ["bench", "query", *map(str, arguments)])


def test_processes_are_timed_in_turns(folders, tmp_path, monkeypatch):
    log = tmp_path / "asked.log"
    monkeypatch.setenv("UPPERSON_QUERY_LOG", str(log))
    result = run("red", *folders, "--rounds", 2, "--threads", 1)
    assert result.exit_code == 0, result.stderr
    assert "processes, in turns: 3/3" in result.stderr
    *table, verdict, line = result.stdout.splitlines()
    assert "int8 on onnxruntime" in table[2]
    assert "6 pictures" in table[2]
    assert [row.split("  ")[0] for row in table[4:]] == [
        "a process that does nothing",
        "a process that imports onnxruntime",
        "upperson-rt query, from start to end",
        "a query in a running process",
    ]
    found = json.loads(line)
    timings = found["timings"]
    assert [timings[name]["runs"] for name in timings] == [2, 2, 2, 50]
    p50 = {name: timing["p50_ms"] for name, timing in timings.items()}
    assert p50["python"] < p50["import"] < p50["query"]
    assert p50["running"] < p50["query"]
    if os.name == "posix":
        cpu = {name: timing["cpu_ms"] for name, timing in timings.items()}
        assert 0 < cpu["python"] < cpu["import"] < cpu["query"]
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


def test_a_process_that_fails_ends_the_benchmark():
    with pytest.raises(BackendError, match="a process ended with code 3: nothing works"):
        processes.run_python(
            "-c",
            "import sys; print('nothing works', file=sys.stderr); sys.exit(3)",
            called="a process",
        )
