"""Fresh processes for benchmarks: results, errors and the environment cross over."""

import os

import pytest

from upperson_bench.processes import call_in_fresh_process, run_python
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
