"""SIGTERM, in processes of their own: commands clean up and say so by their exit code."""

import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers.command_line import environment, start_program
from tests.helpers.invoke import snapshot
from upperson_rt.bundle import Bundle

FILLING = """
from pathlib import Path
import sys
from upperson_rt.files import new_folder
from upperson_rt.cli.app import Command, new_app, run_app

app = new_app("Fill a folder.")

@app.command(cls=Command)
def fill() -> None:
    with new_folder(Path("out")) as folder:
        try:
            (folder / "half").write_text("half")
            print("filling", flush=True)
            sys.stdin.read()
        finally:
            print("cleaning", flush=True)
            sys.stdin.read(1)

run_app(app, "test")
"""


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGTERM, 143, "error: terminated\n"),
        (signal.SIGINT, 130, "error: interrupted\n"),
    ],
)
def test_a_signal_ends_a_command_in_an_orderly_way(work, number, code, said):
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", FILLING],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "filling\n"
        assert len(list(work.glob(".out.*.tmp/half"))) == 1
        process.send_signal(number)
        assert process.stdout.readline() == "cleaning\n"
        if number == signal.SIGTERM:
            process.send_signal(number)  # A second one cuts nothing short.
        _, errors = process.communicate("x", timeout=30)
    assert process.returncode == code
    assert errors == said
    assert list(work.iterdir()) == []


@pytest.mark.timeout(180, func_only=True)
def test_exports_that_are_killed_or_terminated_leave_the_earlier_bundle(
    demo_folder, copied_run, work
):
    shutil.copytree(demo_folder / "bundle", work / "bundle")
    before = snapshot(work)
    killed, left = exporting(work, copied_run)
    killed.kill()
    killed.wait(timeout=30)
    assert snapshot(work / "bundle") == snapshot(demo_folder / "bundle")
    assert left.exists()
    terminated, folder = exporting(work, copied_run)
    assert folder != left
    assert not left.exists()
    terminated.terminate()
    assert terminated.wait(timeout=60) == 143
    assert snapshot(work) == before
    assert {path.name for path in work.iterdir()} == {"run", "bundle"}
    assert Bundle.open(work / "bundle").check_canaries()


def exporting(work, run):
    """Start an export; return it and its temporary folder when the first graph is there."""
    earlier = set(work.glob(".bundle.*"))
    program = start_program("upperson", "export", run, "--output", "bundle", cwd=work)
    deadline = time.monotonic() + 80
    while program.poll() is None and time.monotonic() < deadline:
        for graph in work.glob(".bundle.*/.building/*.onnx"):
            if graph.parents[1] not in earlier:
                return program, graph.parents[1]
        time.sleep(0.05)
    program.kill()
    raise AssertionError(sorted(path.name for path in work.iterdir()))
