"""Connections end when their time is up, whatever it was spent on."""

import socket
import ssl
import threading
from contextlib import ExitStack, closing, contextmanager
from types import SimpleNamespace

import pytest

from tests.helpers.small_servers import dripping_server, no_server, other_server
from upperson_network import remote
from upperson_network.remote import http_within, within


@contextmanager
def silent_server():
    """Give the port of a server that takes connections, and says nothing."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        yield server.getsockname()[1]


@contextmanager
def full_server():
    """Give the port of a server that takes no more connections: who connects waits."""
    with ExitStack() as opened:
        server = opened.enter_context(closing(socket.create_server(("127.0.0.1", 0), backlog=0)))
        for _ in range(64):
            connection = opened.enter_context(closing(socket.socket()))
            connection.settimeout(0.5)
            try:
                connection.connect(server.getsockname())
            except TimeoutError:
                break
        else:
            pytest.skip("this system takes any number of connections")
        yield server.getsockname()[1]


def late():
    return pytest.raises(TimeoutError, match=r"it does not answer within 0\.2 s")


def test_it_is_late_when_the_limit_between_two_bytes_ends_before_the_timer_runs(monkeypatch):
    started = threading.Timer
    monkeypatch.setattr(threading, "Timer", lambda _, call: started(60, call))  # A busy machine.
    with silent_server() as port, late(), within(0.2) as limit:
        limit.connect("127.0.0.1", port).recv(1)


def test_a_reader_is_woken():
    with silent_server() as port, late(), within(0.2) as limit:
        connection = limit.connect("127.0.0.1", port)
        connection.settimeout(None)
        assert connection.recv(1) == b""


def test_a_host_that_is_looked_up_for_ever_has_its_time(monkeypatch):
    answered = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: answered.wait())
    try:
        with late(), within(0.2) as limit:
            limit.connect("camera.local", 80)
    finally:
        answered.set()


def test_connecting_is_within_the_limit():
    with full_server() as port, late(), http_within(0.2, f"http://127.0.0.1:{port}/") as connection:
        connection.request("GET", "/")


def test_what_came_before_is_no_longer_left(monkeypatch):
    """Looking up, connecting and reading share the time; none of them gets all of it again."""
    now = [0.0]
    # Not of the module time: servers of other tests run in this process.
    monkeypatch.setattr(remote, "time", SimpleNamespace(monotonic=lambda: now[0]))
    looked_up = socket.getaddrinfo

    def slowly(*arguments, **options):
        now[0] += 40
        return looked_up(*arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slowly)
    with silent_server() as port, within(60) as limit:
        assert limit.connect("127.0.0.1", port).gettimeout() == 20
        now[0] += 15
        assert limit.left_s() == 5


def test_an_address_that_does_not_answer_leaves_time_for_the_next(monkeypatch):
    with full_server() as full, other_server(b"here") as port, no_server() as refusing:
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", one))
            for one in (refusing, full, port)
        ]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **options: found)
        with within(2) as limit:
            connection = limit.connect("camera.local", 80)
            connection.sendall(b"?")
            assert connection.recv(4) == b"here"


def test_a_handshake_that_drips_has_its_time():
    long_record = b"\x16\x03\x03\x40\x00"  # Of TLS, with 16 KiB to come.
    with dripping_server(long_record) as (port, cut):
        address, context = f"https://127.0.0.1:{port}/", ssl.create_default_context()
        with late(), http_within(0.2, address, context) as connection:
            connection.request("GET", "/")
        assert cut.wait(25)
