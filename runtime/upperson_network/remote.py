"""Talking to other machines: connections that end when their time is up, and passwords.

The time limit of a socket counts from one byte to the next: who sends one now and then could go on
for ever. Looking up a name knows no limit at all, and each address of a host would get the whole.
"""

import base64
import hashlib
import http.client
import os
import queue
import re
import socket
import ssl
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from upperson_rt.errors import InputError


class Limit:
    """How long one connection may take, from looking up its host to the last byte."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds
        self._connection: socket.socket | None = None
        self._is_over = threading.Event()

    def left_s(self) -> float:
        """Return how many seconds are left; raises TimeoutError if none are."""
        left_s = self._until - time.monotonic()
        if left_s <= 0 or self._is_over.is_set():
            raise TimeoutError
        return left_s

    def connect(self, host: str, port: int, context: ssl.SSLContext | None = None) -> socket.socket:
        """Return the one connection of this limit.

        Raises OSError, TimeoutError, or ValueError for a name.
        """
        found = self._looked_up(host, port)
        failure = OSError("the host has no address")
        for number, (family, kind, protocol, _, place) in enumerate(found):
            try:
                left_s = self.left_s() / (len(found) - number)
                connection = _connected(socket.socket(family, kind, protocol), place, left_s)
            except OSError as error:
                failure = error
                continue
            if context is None:
                return self._kept(connection)
            with closing(connection):  # Of which nothing is left once it is wrapped.
                wrapped = context.wrap_socket(
                    connection, server_hostname=host, do_handshake_on_connect=False
                )
            self._kept(wrapped)
            wrapped.do_handshake()
            return wrapped
        raise failure

    def _looked_up(self, host: str, port: int) -> list[Any]:
        """Return the addresses of a host; a look-up that takes too long ends by itself, later."""
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def ask() -> None:
            try:
                answers.put(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
            except (OSError, ValueError) as error:
                answers.put(error)

        threading.Thread(target=ask, daemon=True).start()
        try:
            answer = answers.get(timeout=self.left_s())
        except queue.Empty:
            raise TimeoutError from None
        if isinstance(answer, Exception):
            raise answer
        return list(answer)

    def _kept(self, connection: socket.socket) -> socket.socket:
        self._connection = connection  # Before asking what is left: `end` does it the other way.
        connection.settimeout(self.left_s())
        return connection

    def end(self) -> None:
        """Shut the connection: a reader gets no more."""
        self._is_over.set()
        if self._connection is not None:
            with suppress(OSError):  # It has ended just now.
                self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the connection; `http.client` may still read from it."""
        if self._connection is not None:
            self._connection.close()


def _connected(connection: socket.socket, place: Any, seconds: float) -> socket.socket:
    try:
        connection.settimeout(seconds)
        connection.connect(place)
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def opening_within(seconds: float) -> Iterator[Limit]:
    """Give the time limit of opening one connection, which stays open; raises TimeoutError."""
    limit = Limit(seconds)
    timer = threading.Timer(seconds, limit.end)
    timer.daemon = True
    timer.start()
    try:
        yield limit
        limit.left_s()
    except BaseException as error:
        limit.close()
        if isinstance(error, Exception):
            try:  # The limit from one byte to the next may end before the timer.
                limit.left_s()
            except TimeoutError:
                raise TimeoutError(f"it does not answer within {seconds:g} s") from error
        raise
    finally:
        timer.cancel()


@contextmanager
def within(seconds: float) -> Iterator[Limit]:
    """Give the time limit of one connection, which is closed at the end; raises TimeoutError."""
    with opening_within(seconds) as limit, closing(limit):
        yield limit


class _Connection(http.client.HTTPConnection):
    """Of HTTP or, with a context, HTTPS; it opens with its first request."""

    def __init__(
        self, host: str, port: int | None, limit: Limit, context: ssl.SSLContext | None
    ) -> None:
        self.default_port = http.client.HTTP_PORT if context is None else http.client.HTTPS_PORT
        # The port is always named: IPv6 has colons of its own.
        super().__init__(host, port or self.default_port)
        self._limit, self._context = limit, context

    def connect(self) -> None:
        self.sock = self._limit.connect(self.host, self.port, self._context)


@contextmanager
def http_within(
    seconds: float, address: str, context: ssl.SSLContext | None = None
) -> Iterator[http.client.HTTPConnection]:
    """Give an HTTP(S) connection, without a proxy, that ends when its time is up (TimeoutError)."""
    with within(seconds) as limit, closing(http_connection(limit, address, context)) as connection:
        yield connection


def http_connection(
    limit: Limit, address: str, context: ssl.SSLContext | None = None
) -> http.client.HTTPConnection:
    """Return a connection to an address of HTTP within a limit; see `http_within`."""
    parts = urlsplit(address)
    if parts.scheme.lower() != "https":
        context = None
    elif context is None:
        context = ssl.create_default_context()
    return _Connection(parts.hostname or "", parts.port, limit, context)


def is_http_address(address: str) -> bool:
    """Whether an address of HTTP(S) has a usable host, and no login or blanks."""
    try:
        parts = urlsplit(address)
        has_host = bool(parts.hostname) and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        return False
    is_plain = address.isascii() and address.isprintable() and " " not in address
    return has_host and is_plain and parts.scheme in ("http", "https")


def http_target(address: str) -> str:
    """Return the part of an address that its server gets."""
    return urlsplit(address)._replace(scheme="", netloc="", fragment="").geturl() or "/"


# --- Passwords that two sides know: where they stand, and proof without sending them

_NUMBER = re.compile(r"(\d{1,3}(\.\d{1,3}){3}|\[[^\]]*\])(:\d*)?")
"""A host that is no user's name, with its port."""


def may_hide_login(address: str) -> bool:
    """Whether an address may have a password that is taken for something else.

    A / ends the host: ``rtsp://admin:12/x@camera`` is read as a host ``admin``, the port ``12`` and
    a path. The same holds for a / in a user's name.
    """
    rest = address.partition("://")[2]
    place = re.split(r"[/?#]", rest, maxsplit=1)[0]
    if _NUMBER.fullmatch(place.rpartition("@")[2]):
        return False
    behind = rest[len(place) :]
    return "@" in behind if ":" in place else re.search(r":[^/?#]*@", behind) is not None


def require_private(path: Path) -> None:
    """Refuse a file of passwords that others than its owner may use, on POSIX systems."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise InputError(
            f"{path} holds passwords, and others may read it: keep it to its owner with  "
            f"chmod 600 {path}"
        )


def password_digest(nonce: bytes, created: str, password: str) -> str:
    """Return the digest of WS-Security's UsernameToken profile, in Base64."""
    digest = hashlib.sha1(nonce + created.encode() + password.encode(), usedforsecurity=False)
    return base64.b64encode(digest.digest()).decode("ascii")
