"""Connections end when their time is up."""

import socket
import threading
from contextlib import closing

import pytest

from upperson_rt.deadline import LateError, ending


@pytest.fixture
def connection():
    own, other = socket.socketpair()
    with closing(own), closing(other):
        yield own


def test_it_is_late_when_the_limit_between_two_bytes_is_told_before_the_timer_runs(
    connection, monkeypatch
):
    started = threading.Timer
    monkeypatch.setattr(threading, "Timer", lambda _, call: started(60, call))  # A busy machine.
    connection.settimeout(0.05)
    told = r"it does not answer within 0\.05 s"
    with pytest.raises(LateError, match=told), ending(connection, 0.05):
        connection.recv(1)


def test_what_fails_in_time_is_told_as_it_is(connection):
    connection.settimeout(0.01)
    with pytest.raises(TimeoutError) as raised, ending(connection, 60):
        connection.recv(1)
    assert not isinstance(raised.value, LateError)


def test_who_reads_is_woken(connection):
    with pytest.raises(LateError), ending(connection, 0.05):
        assert connection.recv(1) == b""
