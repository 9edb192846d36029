"""Fresh processes for benchmarks: results, errors and the environment cross over."""

import os

import pytest

from upperson_bench.processes import (
    call_in_fresh_process,
    run_python,
    time_processes,
)
from upperson_rt.errors import BackendError, UsageError, install_command
from upperson_rt.machine import resident_bytes


def who_and_where(name: str) -> list[object]:
    return [os.getpid(), os.environ.get(name)]


def refuse(text: str) -> None:
    raise UsageError(f"{text}\non two lines")


def test_a_function_runs_elsewhere_and_its_result_comes_back():
    assert call_in_fresh_process(install_command, "cpu") == install_command("cpu")
    pid, value = call_in_fresh_process(who_and_where, "SET", environment={"SET": "there"})
    assert (pid != os.getpid(), value) == (True, "there")


def test_errors_of_the_toolkit_keep_their_kind():
    with pytest.raises(UsageError, match=r"^no, on two lines$"):
        call_in_fresh_process(refuse, "no,")


def test_a_process_that_fails_is_an_error_in_one_line():
    code = "import sys; print('nothing works', file=sys.stderr); sys.exit(3)"
    with pytest.raises(BackendError, match=r"^its process ended with code 3: nothing works$"):
        run_python("-c", code)
    with pytest.raises(BackendError, match=r"^a process ended with code 3: nothing works$"):
        time_processes({"x": ("-c", code)}, rounds=1, progress=lambda *_: None)


def test_queries_of_a_process_are_not_logged(monkeypatch):
    monkeypatch.setenv("UPPERSON_QUERY_LOG", "asked.log")
    code = "import os; print(os.environ.get('UPPERSON_QUERY_LOG'))"
    assert run_python("-c", code) == "None\n"


def test_processes_take_turns_after_one_that_is_not_timed(tmp_path):
    log = tmp_path / "order"
    code = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"
    told = []
    timings = time_processes(
        {name: ("-c", code, str(log), name) for name in "ab"},
        rounds=2,
        progress=lambda *progress: told.append(progress[1:]),
    )
    assert log.read_text() == "abbaab"
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert [len(timing.seconds) for timing in timings.values()] == [2, 2]


def test_memory_is_told_on_linux():
    now, peak = resident_bytes("VmRSS"), resident_bytes("VmHWM")
    assert (now is None and peak is None) or 1e6 < now <= peak
