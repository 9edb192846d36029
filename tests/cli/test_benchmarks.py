"""``python -m benchmarks``, what it has to do with the documents, and starting on a toy bundle."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from benchmarks import __main__ as runner
from benchmarks import startup
from tests.helpers.command_line import ROOT, environment

NAMES = list(dict.fromkeys(name for name, *_ in runner.commands([])))


def test_one_is_run_by_name_and_all_without_one():
    assert runner.commands([]) == [line.split() for line in runner.DOCUMENTED]
    assert NAMES == [
        "training", "towers", "gallery", "startup", "console", "marks", "asking", "words",
        "kernels", "likelihood", "losses", "pretraining", "augmentation", "loader", "ranking",
        "bases", "tracking",
    ]  # fmt: skip
    assert [line[2] for line in runner.commands(["gallery"])] == ["100000", "999000", "1000000"]
    assert runner.commands(["gpu"]) == [["gpu"]]
    assert runner.commands(["gallery", "--rows", "5000"]) == [["gallery", "--rows", "5000"]]
    with pytest.raises(SystemExit, match="no benchmark 'galery': expected one of training, towers"):
        runner.commands(["galery"])


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_names_all_and_runs_none(option, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", option])
    monkeypatch.setattr(runner.subprocess, "run", None)
    runner.main()
    told = capsys.readouterr().out
    assert "python -m benchmarks [NAME [OPTIONS]]" in told
    assert f"{', '.join(NAMES)}, gpu. NAME --help tells its options." in told


def test_the_exit_code_is_the_first_failures(tmp_path, monkeypatch):
    codes = iter((0, 6, 3, *[0] * len(runner.DOCUMENTED)))
    ran = []

    def run(command, env):
        ran.append((command[2], env["OMP_NUM_THREADS"]))
        return subprocess.CompletedProcess(command, next(codes))

    monkeypatch.setattr(runner.subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["benchmarks"])
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="run  make demo  first"):
        runner.main()
    assert ran == []
    (tmp_path / "demo/bundle").mkdir(parents=True)
    with pytest.raises(SystemExit) as end:
        runner.main()
    assert end.value.code == 6
    assert ran == [(f"benchmarks.{line.split()[0]}", "1") for line in runner.DOCUMENTED]


@pytest.mark.parametrize("line", runner.DOCUMENTED)
def test_what_is_documented_parses_and_is_in_the_documents(line):
    name, *options = shlex.split(line)
    app = importlib.import_module(f"benchmarks.{name}").app
    typer.main.get_command(app).make_context(name, options)
    documents = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(path.read_text("utf-8") for path in documents)
    written = set(re.findall(r"python -m benchmarks\.([a-z]+(?: --?[\w-]+(?: [\w/-]+)?)*)", text))
    assert re.sub(r"\d{3,}", "N", line) in {re.sub(r"\d{3,}", "N", other) for other in written}


@pytest.mark.parametrize("name", [*NAMES, *runner.ON_A_GPU])
def test_every_benchmark_has_help_with_an_example(name):
    result = CliRunner().invoke(importlib.import_module(f"benchmarks.{name}").app, ["--help"])
    assert result.exit_code == 0, result.output
    assert f"Example: python -m benchmarks.{name}" in result.stdout


def test_a_benchmark_is_a_script():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "startup", "--help"],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "python -m benchmarks.startup --help\n"
    assert "Usage: python -m benchmarks.startup" in done.stdout


def test_make_bench_runs_them():
    for arguments, expected in (
        ([], "python -m benchmarks"),
        (["NAME=gallery"], "python -m benchmarks gallery"),
        (["NAME=gallery", "ARGS=--rows 5000"], "python -m benchmarks gallery --rows 5000"),
    ):
        done = subprocess.run(
            ["make", "-n", "-C", str(ROOT), "-o", ".venv/.installed", "bench", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, "MAKEFLAGS": ""},  # `make test ARGS=...` has its own.
        )
        assert done.returncode == 0, done.stderr
        assert any(line.rstrip().endswith(expected) for line in done.stdout.splitlines())


@pytest.fixture
def folders(bundle_and_crops, gallery_of_crops):
    return ("-b", str(bundle_and_crops / "bundle"), "-g", str(gallery_of_crops))


def test_starting_is_compared_with_bare_onnxruntime(folders, capsys):
    result = CliRunner().invoke(startup.app, [*folders, "--rounds", "1", "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    startup._show(found)
    *_, verdict = capsys.readouterr().out.splitlines()
    processes = found["processes"]
    assert list(processes) == [
        startup.NOTHING, startup.IMPORT, startup.BARE, startup.READY, startup.QUERY
    ]  # fmt: skip
    assert processes[startup.BARE]["ratio"] == 1
    beyond = (processes[startup.QUERY]["p50_ms"] - processes[startup.IMPORT]["p50_ms"]) / 1000
    assert found["beyond_import_s"] == pytest.approx(beyond)
    assert found["goal_met"] == (beyond <= found["goal_s"])
    assert ("met" if found["goal_met"] else "missed") in verdict


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        (("-b", "nowhere"), 3, "nowhere is not a bundle"),
        (("--variant", "int4"), 2, "did you mean 'int8'"),
        (("-g", "nowhere"), 5, "no gallery at nowhere"),
    ],
)
def test_what_cannot_start_is_an_error_in_one_line(folders, changes, code, message):
    result = CliRunner().invoke(startup.app, [*folders, *changes, "--rounds", "1"])
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in " ".join(result.stderr.split())
