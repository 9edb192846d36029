"""Connections to strangers that end when their time is up, whatever still comes in.

The time limit of a socket counts from one byte to the next: who sends one now and then could go on
for ever.
"""

import http.client
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

__all__ = ["LateError", "ending", "http_connection", "http_target"]


class LateError(TimeoutError):
    """The time was up."""


@contextmanager
def ending(connection: socket.socket, seconds: float) -> Iterator[None]:
    """Shut a connection when its time is up; whoever reads from it then gets no more.

    Args:
        connection: It is open; reading may go on after it was closed, as `http.client` does.
        seconds: From now.

    Raises:
        LateError: The time was up.
    """
    late = threading.Event()

    def shut() -> None:
        late.set()
        with suppress(OSError):  # It has ended just now.
            connection.shutdown(socket.SHUT_RDWR)

    until = time.monotonic() + seconds
    timer = threading.Timer(seconds, shut)
    timer.daemon = True
    timer.start()
    try:
        yield
    except Exception:
        # The limit from one byte to the next may be as long, and be told before the timer runs.
        if not late.is_set() and time.monotonic() < until:
            raise
        late.set()
    finally:
        timer.cancel()
    if late.is_set():
        raise LateError(f"it does not answer within {seconds:g} s")


def http_connection(
    address: str, timeout_s: float, context: ssl.SSLContext | None = None
) -> http.client.HTTPConnection:
    """Return a connection to an address of HTTP, not yet open; it uses no proxy.

    Args:
        address: With a scheme and a host.
        timeout_s: From one byte to the next.
        context: Of TLS, where the address asks for it.

    Raises:
        ValueError: Its port is none.
    """
    parts = urlsplit(address)
    host = parts.hostname or ""
    if parts.scheme.lower() == "https":  # The port is always named: IPv6 has colons of its own.
        port = parts.port or http.client.HTTPS_PORT
        return http.client.HTTPSConnection(host, port, timeout=timeout_s, context=context)
    return http.client.HTTPConnection(host, parts.port or http.client.HTTP_PORT, timeout=timeout_s)


def http_target(address: str) -> str:
    """Return what of an address is asked of its server."""
    return urlsplit(address)._replace(scheme="", netloc="", fragment="").geturl() or "/"
