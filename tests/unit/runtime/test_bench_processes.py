"""Fresh processes for benchmarks: results, errors and the environment cross over."""

import os

import pytest

from upperson_bench.processes import call_in_fresh_process, run_python, time_processes
from upperson_machine.description import resident_bytes
from upperson_rt.errors import BackendError, UsageError


def who_and_where(*names: str) -> list[object]:
    return [os.getpid(), *map(os.environ.get, names)]


def refuse(text: str) -> None:
    raise UsageError(f"{text}\non two lines")


def test_functions_and_code_run_elsewhere(monkeypatch):
    monkeypatch.setenv("UPPERSON_QUERY_LOG", "queries.log")  # Queries there are not logged.
    names = ("SET", "UPPERSON_QUERY_LOG")
    pid, *values = call_in_fresh_process(who_and_where, *names, environment={"SET": "there"})
    assert (pid != os.getpid(), values) == (True, ["there", None])
    with pytest.raises(UsageError, match=r"^no, on two lines$"):
        call_in_fresh_process(refuse, "no,")
    code = "import sys; print('nothing works', file=sys.stderr); sys.exit(3)"
    with pytest.raises(BackendError, match=r"code 3: nothing works$"):
        run_python("-c", code)
    with pytest.raises(BackendError, match=r"code 3: nothing works$"):
        time_processes({"x": ("-c", code)}, rounds=1, progress=lambda *_: None)


def test_processes_take_turns_after_one_that_is_not_timed(tmp_path):
    log = tmp_path / "order"
    code = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"
    shown = []
    timings = time_processes(
        {name: ("-c", code, str(log), name) for name in "ab"},
        rounds=2,
        progress=lambda *progress: shown.append(progress[1:]),
    )
    assert log.read_text() == "abbaab"
    assert shown == [(1, 3), (2, 3), (3, 3)]
    assert [len(timing.seconds) for timing in timings.values()] == [2, 2]


def test_memory_is_known_on_linux():
    now, peak = resident_bytes("VmRSS"), resident_bytes("VmHWM")
    assert (now is None and peak is None) or 1e6 < now <= peak
