"""A server at a real socket: connections that ask nothing, and TLS with a certificate made here."""

import errno
import itertools
import os
import socket
import ssl
import time
import warnings
from contextlib import ExitStack, closing, contextmanager, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from tests.helpers.certificate import written
from tests.helpers.refused import refused
from tests.unit.runtime.serve.conftest import LOCAL
from upperson_console import connections, guard, side_pages
from upperson_console.accounts import COOKIE, Access, Accounts
from upperson_console.connections import Connection
from upperson_console.server import Server, listening, tls_context
from upperson_rt.errors import InputError

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sockets of POSIX")


@contextmanager
def answering(console, tls=None):
    """Where the server of a console that asks for tokens answers."""
    access = Access(Accounts(console.token_file), LOCAL)
    with listening("127.0.0.1", 0) as place:
        server = Server(console.service, access, place, tls=tls)
        server.start()
        try:
            yield server.url.rstrip("/"), place.getsockname()
        finally:
            server.end()


def connected(place, timeout=30):
    return closing(socket.create_connection(place, timeout=timeout))


def is_closed(connection):
    """Wait until the other side closes a connection."""
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


HEALTH = b"GET /api/v1/health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


@pytest.mark.parametrize(
    "sent", [b"", b"GET /login HTTP/1.1\r\nHost: 127.0.0.1\r\n", HEALTH + b"GET / HT"]
)
def test_a_request_has_a_deadline(guarded, monkeypatch, sent):
    """The first one of a connection, and the next."""
    monkeypatch.setattr(Connection, "request_within_s", 0.3)
    with answering(guarded) as (url, place), connected(place) as idle:
        idle.sendall(sent)
        answer = b"" if sent.startswith(HEALTH) else b'"ok"'
        while b'"ok"' not in answer:
            answer += idle.recv(4096)
        assert is_closed(idle)
        assert httpx.get(f"{url}/api/v1/health").status_code == 200


def trusting(certificate):
    return ssl.create_default_context(cafile=certificate)


@pytest.mark.parametrize("with_tls", [False, True])
def test_idle_connections_keep_no_client_out(guarded, tmp_path, monkeypatch, with_tls):
    monkeypatch.setattr(connections, "_HANDSHAKE_WITHIN_S", 120.0)
    monkeypatch.setattr(connections, "_MOST_IDLE", 80)
    certificate, key = written(tmp_path, bits=None)
    tls = tls_context(certificate, key) if with_tls else None
    with answering(guarded, tls) as (url, place), ExitStack() as stack:
        idle = [stack.enter_context(connected(place)) for _ in range(100)]
        with httpx.Client(base_url=url, verify=trusting(certificate), timeout=30) as client:
            form, headers = {"token": guarded.tokens["operator"]}, {"origin": url}
            answer = client.post("/login", data=form, headers=headers)
            assert (answer.status_code, answer.headers["location"]) == (303, "/")
            assert client.get("/api/v1/health").status_code == 200
        assert all(is_closed(one) for one in idle[:20])
        idle[-1].setblocking(False)
        with pytest.raises(BlockingIOError):
            idle[-1].recv(1)


def test_a_handshake_has_a_deadline(guarded, tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "_HANDSHAKE_WITHIN_S", 0.3)
    certificate, key = written(tmp_path, bits=None)
    with answering(guarded, tls_context(certificate, key)) as (url, place):
        with connected(place, timeout=5) as silent:  # asyncio's own deadline is a minute.
            assert is_closed(silent)
        assert httpx.get(f"{url}/login", verify=trusting(certificate)).status_code == 200


def test_clients_that_do_not_read_keep_no_account_out(guarded, monkeypatch):
    monkeypatch.setattr(guard, "_STALLED_S", 0.05)
    monkeypatch.setattr(guard, "_MOST_REQUESTS", 2)
    endless = itertools.repeat("x" * (64 << 10))
    monkeypatch.setattr(side_pages, "passing_lines", lambda *arguments: endless)
    ask = "GET /records/lines HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {}\r\n\r\n"
    headers = {"authorization": f"Bearer {guarded.tokens['viewer']}"}
    with answering(guarded) as (url, place), ExitStack() as stack:
        for _ in range(2):
            silent = stack.enter_context(connected(place))
            silent.sendall(ask.format(guarded.tokens["admin"]).encode())
            assert silent.recv(12) == b"HTTP/1.1 200"
        until = time.monotonic() + 60
        while (status := httpx.get(f"{url}/api/v1/cameras", headers=headers).status_code) == 429:
            assert time.monotonic() < until
        assert status == 200


class Full(socket.socket):
    """A socket that listens, in a process without descriptors for a while."""

    calls, is_full = 0, True

    def accept(self):
        type(self).calls += 1
        if self.is_full:
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_accepting_pauses_while_there_is_no_descriptor(guarded, caplog, monkeypatch):
    monkeypatch.setattr(connections, "_PAUSE_S", 0.2)
    monkeypatch.setattr(connections._SELDOM, "_last", {})
    monkeypatch.setattr(Full, "calls", 0)
    access = Access(Accounts(guarded.token_file), LOCAL)
    with listening("127.0.0.1", 0) as place, caplog.at_level("WARNING"):
        full = Full(fileno=os.dup(place.fileno()))
        server = Server(guarded.service, access, full)
        server.start()
        try:
            with connected(place.getsockname()) as early:
                early.sendall(HEALTH)
                while Full.calls < 3:
                    time.sleep(0.01)
                full.is_full = False
                assert early.recv(12) == b"HTTP/1.1 200"
        finally:
            server.end()
            full.close()
    assert Full.calls < 20
    (line,) = [record.getMessage() for record in caplog.records]
    assert ("Too many open files" in line, "\n" in line) == (True, False)


def test_a_message_comes_seldom_with_the_number_of_those_left_out(caplog, monkeypatch):
    now = [0.0]
    # Not of the module time: servers of other tests run in this process.
    monkeypatch.setattr(connections, "time", SimpleNamespace(monotonic=lambda: now[0]))
    logger = connections.log_seldom("tests.seldom")
    with caplog.at_level("WARNING"):
        for passed in (0.0, 1.0, 2.0, 11.0):
            now[0] = passed
            logger.warning("bad request of %s", f"client {passed}")
            logger.warning("other %g", passed) if passed == 1 else None
    assert [record.getMessage() for record in caplog.records] == [
        "bad request of client 0.0",
        "other 1",
        "bad request of client 11.0 (2 more of these since the last line)",
    ]


@contextmanager
def piped(content):
    """The path of a pipe that gives this once, as the shell's ``<(...)`` does."""
    out, into = os.pipe()
    try:
        os.write(into, content)
        os.close(into)
        yield Path(f"/dev/fd/{out}")
    finally:
        os.close(out)


def test_a_browser_logs_in_over_tls(guarded, tmp_path):
    certificate, key = written(tmp_path, bits=None)
    with piped(certificate.read_bytes()) as first, piped(key.read_bytes()) as second:
        tls = tls_context(first, second)
    with answering(guarded, tls) as (url, place):
        assert url.startswith("https://127.0.0.1:")
        with httpx.Client(base_url=url, verify=trusting(certificate)) as client:
            form = {"token": guarded.tokens["operator"], "next": "/?q=red"}
            answer = client.post("/login", data=form, headers={"origin": url})
            assert answer.headers["location"] == "/?q=red"
            assert "; Secure" in answer.headers["set-cookie"]
            assert COOKIE in client.cookies
            assert "olga" in client.get("/?q=red").text
            other = client.post("/logout", headers={"origin": url.replace("https", "http")})
            assert other.status_code == 403
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{url}/login")
        with connected(place) as plain:  # Nothing is answered in the clear.
            plain.sendall(HEALTH)
            assert is_closed(plain)


@pytest.mark.parametrize(
    ("version", "ciphers", "taken"),
    [
        ("TLSv1_3", None, True),
        ("TLSv1_2", "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256", True),
        ("TLSv1_2", "AES128-GCM-SHA256:AES256-SHA256:ECDHE-RSA-AES256-SHA384", False),
        ("TLSv1_1", "ALL", False),
    ],
)
def test_old_versions_and_ciphers_are_refused(tmp_path, version, ciphers, taken):
    server = tls_context(*written(tmp_path))
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname, client.verify_mode = False, ssl.CERT_NONE
    if ciphers is not None:
        client.set_ciphers(f"@SECLEVEL=0:{ciphers}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # TLS 1.1 is, which is tried here.
        client.minimum_version = client.maximum_version = ssl.TLSVersion[version]
    into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = client.wrap_bio(into, out), server.wrap_bio(out, into, server_side=True)
    with nullcontext() if taken else pytest.raises(ssl.SSLError):
        for end in ends * 4:
            with suppress(ssl.SSLWantReadError):
                end.do_handshake()
        assert ends[0].version() == version.replace("_", ".")


def test_a_missing_weak_encrypted_or_wrong_key_or_certificate_is_refused(tmp_path):
    certificate, key = written(tmp_path, bits=None)
    (text := tmp_path / "text").write_bytes(b"hello")
    (der := tmp_path / "der").write_bytes(b"\x30\x82\x01\x0a")
    for cert, key_, option, wrong, code in (
        (tmp_path / "none", key, "--tls-cert", tmp_path / "none", "tls_file_unreadable"),
        (certificate, tmp_path, "--tls-key", tmp_path, "tls_file_unreadable"),
        (text, key, "--tls-cert", text, "tls_file_not_pem"),
        (certificate, der, "--tls-key", der, "tls_file_not_pem"),
    ):
        with refused(code, InputError, option=option, path=wrong):
            tls_context(cert, key_)
    other = written(tmp_path, bits=None, name="other")[1]
    with refused("tls_unusable", InputError):
        tls_context(certificate, other)
    cut = b"-----BEGIN CERTIFICATE-----\n-----BEGIN PRIVATE KEY-----\nAA"
    other.write_bytes(cut)
    with refused("tls_unusable", InputError):
        tls_context(other, other)
    with piped(cut) as key, refused("tls_unusable", InputError):
        tls_context(certificate, key)
    for code, made in (
        ("tls_unusable", {"bits": 1024}),
        ("tls_key_encrypted", {"bits": None, "password": b"secret"}),
    ):
        with refused(code, InputError):
            tls_context(*written(tmp_path, **made))
