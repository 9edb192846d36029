"""Signals, in processes of their own: commands clean up, and end with an exit code of ours."""

import shutil
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest

from tests.helpers.command_line import TRACED_ONCE, environment, run_code, start_code
from tests.helpers.fake_camera import wait_for
from tests.helpers.invoke import snapshot
from upperson_rt.bundle import Bundle
from upperson_rt.files import new_folder

PROGRAM = """
import hashlib
import multiprocessing
import os
import signal
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Annotated
import typer
from importlib import import_module
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.files import new_folder

ending = import_module("upperson_rt.cli.app")
if sys.argv[1] not in ("clean", "lose"):
    ending._GRACE_S = 0.1
app = new_app("Work.", "test")

def print_when_the_main_thread_works():
    clock = time.pthread_getcpuclockid(threading.main_thread().ident)
    until = time.clock_gettime(clock) + 0.1
    while time.clock_gettime(clock) < until:
        time.sleep(0.01)
    print("working", flush=True)

def work_for_hours():
    threading.Thread(target=print_when_the_main_thread_works, daemon=True).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)

@app.command(cls=Command)
def fill() -> None:
    with new_folder(Path("out")) as folder:
        (folder / "half").write_text("half")
        work_for_hours()

@app.command(cls=Command)
def clean() -> None:
    with new_folder(Path("out")) as folder:
        try:
            (folder / "half").write_text("half")
            print("working", flush=True)
            sys.stdin.read()
        finally:
            print("cleaning", flush=True)
            sys.stdin.read(1)

class Thing:
    pass

@app.command(cls=Command)
def lose(number: int) -> None:
    def kill_in_callback(_):
        os.kill(os.getpid(), number)
        for _ in range(1000):
            pass

    with new_folder(Path("out")):
        thing = Thing()
        seen = weakref.ref(thing, kill_in_callback)
        del thing
        time.sleep(60)

@app.command(cls=Command)
def watch() -> None:
    with ending.ending_gently():
        work_for_hours()

@app.command(cls=Command)
def close() -> None:
    with ending.ending_gently() as received:
        print("working", flush=True)
        while not received:
            time.sleep(0.01)
    work_for_hours()

@app.command(cls=Command)
def hang() -> None:
    ending.leave_open(None)
    print("hanging", end="")  # Flushed all the same.
    threading.Thread(target=threading.Event().wait).start()
    raise KeyError("defect")

@app.command(cls=Command)
def load() -> None:
    loader = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,))
    loader.start()
    print(loader.pid, flush=True)
    work_for_hours()

@app.command(cls=Command)
def fork() -> None:
    if os.fork() == 0:
        assert signal.set_wakeup_fd(-1) == -1
        os.kill(os.getpid(), signal.SIGTERM)
    number = os.waitstatus_to_exitcode(os.wait()[1])
    print(number)

def kill(number):
    os.kill(os.getpid(), int(number))

def importing(**options):
    kill(sys.argv[2])

@app.command(cls=Command)
def read(number: Annotated[str, typer.Argument(callback=kill)]) -> None:
    print("not reached")

run_app(importing if sys.argv[1] == "import" else app, "test")
"""


TERM, INT = (signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")


def start(*command, stdin=subprocess.DEVNULL):
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, *map(str, command)],
        env=environment(),
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(("number", "code", "word"), [TERM, INT])
def test_a_signal_ends_a_command_in_an_orderly_way(work, number, code, word):
    with start("clean", stdin=subprocess.PIPE) as process:
        assert process.stdout.readline() == "working\n"
        assert len(list(work.glob(".out.*.tmp/half"))) == 1
        process.send_signal(number)
        assert process.stdout.readline() == "cleaning\n"
        if number == signal.SIGTERM:
            process.send_signal(number)  # A second one cuts nothing short.
        _, errors = process.communicate("x", timeout=30)
    assert (process.returncode, errors) == (code, f"error: {word}\n")
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    ("during", "number", "code", "word"), [("lose", *TERM), ("import", *TERM), ("read", *INT)]
)
def test_a_signal_in_a_callback_and_outside_of_a_command(work, during, number, code, word):
    with start(during, int(number)) as process:
        output, errors = process.communicate(timeout=50)
    assert (process.returncode, output, errors) == (code, "", f"error: {word}\n")
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(("command", "number", "code", "word"), [("fill", *INT), ("close", *TERM)])
def test_native_code_that_does_not_return_is_ended(work, command, number, code, word):
    with start(command) as process:
        assert process.stdout.readline() == "working\n"
        process.send_signal(number)
        _, errors = process.communicate(timeout=50)
    assert process.returncode == code, errors
    assert errors.startswith(f"error: {word}: it did not end within 5 s")
    assert len(errors.splitlines()) == 1
    left = [path.name for path in work.iterdir()]
    assert len(left) == (command == "fill")
    with new_folder(work / "out") as folder:  # The next one sweeps.
        assert [path.name for path in work.iterdir()] == [folder.name]


def test_a_process_ends_with_its_loaders_although_stderr_is_closed(work):
    with start("load") as process:
        loader = int(process.stdout.readline())
        assert process.stdout.readline() == "working\n"
        process.stderr.close()
        process.terminate()
        assert process.wait(timeout=50) == 143
        wait_for(lambda: not is_running(loader))


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"  # Ended, but not waited for.


def test_a_second_signal_ends_at_once_what_ends_gently_also_in_native_code(work):
    with start("watch") as process:
        assert process.stdout.readline() == "working\n"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)  # Which of the two comes second is the system's choice.
        _, errors = process.communicate(timeout=50)
    word = {130: "interrupted", 143: "terminated"}[process.returncode]
    assert errors.startswith(f"error: {word}: a second signal ended it at once")
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("same_s", "numbers"),
    [
        (0.0, [signal.SIGTERM, signal.SIGTERM]),
        (float("inf"), [signal.SIGTERM, signal.SIGTERM, signal.SIGTERM, signal.SIGINT]),
        (float("inf"), [signal.SIGINT, signal.SIGINT, signal.SIGTERM]),
    ],
)
def test_a_second_signal_of_the_same_kind_is_another_request_only_later(
    monkeypatch, same_s, numbers
):
    app, ended = import_module("upperson_rt.cli.app"), []
    monkeypatch.setattr(app, "_SAME_S", same_s)
    monkeypatch.setattr(app, "_end_now", lambda *words: ended.append(words))
    with app.ending_gently("all is kept") as received:
        for number in numbers:
            assert ended == []
            signal.raise_signal(number)
        assert received[0] == numbers[0]
    ((number, why),) = ended
    assert number == numbers[-1]
    assert why.endswith("; all is kept")


def test_threads_that_hang_and_forked_processes(work):
    with start("hang") as hanging, start("fork") as forking:
        output, errors = hanging.communicate(timeout=50)
        forked, problems = forking.communicate(timeout=50)
    assert (hanging.returncode, output) == (1, "hanging")
    assert errors.startswith("error: internal error: KeyError: 'defect'")
    assert (forking.returncode, forked) == (0, f"{-signal.SIGTERM}\n"), problems


@pytest.mark.timeout(180)
def test_exports_that_are_killed_or_terminated_leave_the_earlier_bundle(
    demo_folder, toy_run, shared_folder, work
):
    copied_run = shutil.copytree(toy_run, work / "run")
    shutil.copytree(demo_folder / "bundle", work / "bundle")
    before = snapshot(work)
    traces = shared_folder / "traces"
    killed, left = exporting(work, copied_run, traces)
    killed.kill()
    killed.wait(timeout=30)
    assert snapshot(work / "bundle") == snapshot(demo_folder / "bundle")
    assert left.exists()
    terminated, folder = exporting(work, copied_run, traces)
    assert folder != left
    assert not left.exists()
    terminated.terminate()
    assert terminated.wait(timeout=60) == 143
    assert snapshot(work) == before
    assert {path.name for path in work.iterdir()} == {"run", "bundle"}
    assert Bundle.open(work / "bundle").check_golden_samples()


def exporting(work, run, traces):
    """Start an export; return it and its temporary folder when the first graph is there."""
    earlier = set(work.glob(".bundle.*"))
    export = ("export", run, "--output", "bundle", "--force")
    program = start_code(TRACED_ONCE, traces, *export, cwd=work)
    deadline = time.monotonic() + 80
    while program.poll() is None and time.monotonic() < deadline:
        for graph in work.glob(".bundle.*/.building/*.onnx"):
            if graph.parents[1] not in earlier:
                return program, graph.parents[1]
        time.sleep(0.05)
    program.kill()
    raise AssertionError(sorted(path.name for path in work.iterdir()))


@pytest.mark.parametrize("program", ["upperson", "upperson_rt"])
def test_ctrl_c_while_modules_load_prints_no_traceback(program):
    """Typer, which both import first of all, is replaced by a module that gets the signal."""
    code = (
        "import signal, sys, types\n"
        "class Loader:\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'typer':\n"
        "            signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Loader())\n"
        f"from {program}.program import main\n"
        "main()\n"
    )
    done = run_code(code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "error: interrupted\n")
