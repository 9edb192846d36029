"""Limits on connections without a request: how many, and for how long.

`guard` limits requests. Connections that send none, half of one, or no TLS handshake would use up
the descriptors of this process. So each takes a place in a `ConcurrencyLimit` from its acceptance
until its request has arrived. Idle connections of accounts have places of their own. If descriptors
run out nevertheless, accepting pauses.
"""

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from upperson_console.guard import ABORT, KNOWN
from upperson_console.limits import ConcurrencyLimit, network_of
from upperson_rt.machine import trim_heap
from upperson_rt.printable import error_text, get_logger

_MOST_IDLE = 256
"""Idle connections, and as many more of accounts; fewer if few descriptors are allowed."""
_REQUEST_WITHIN_S = 15.0
"""Deadline for the head of a request; uvicorn has none."""
_HANDSHAKE_WITHIN_S = 5.0
_ACCEPTED_AT_ONCE = 32
_MANY = 64
"""Handshakes under way, after which the heap is trimmed."""
_PAUSE_S = 1.0
"""Pause of accepting after the last descriptor was used."""
_SELDOM_S = 10.0


class _Seldom(logging.Filter):
    """Pass each message once in `_SELDOM_S`, with the number of suppressed ones."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record is logged; count the others."""
        key, now = f"{record.name} {record.msg}"[:200], time.monotonic()
        last, more = self._last.get(key, (-_SELDOM_S, 0))
        if now - last < _SELDOM_S:
            self._last[key] = last, more + 1
            return False
        self._last[key] = now, 0
        if more:
            record.msg = f"{record.msg} ({more} more of these since the last line)"
        return True


_SELDOM = _Seldom()


def log_seldom(name: str) -> logging.Logger:
    """Return a logger whose messages are each logged once in ten seconds at most."""
    found = get_logger(name)
    if _SELDOM not in found.filters:
        found.filters.insert(0, _SELDOM)  # Before the message is formatted.
    return found


_LOG = log_seldom(__name__)


class Connection(H11Protocol):
    """A connection with a deadline for each request."""

    request_within_s = _REQUEST_WITHIN_S
    accepted: Callable[[], None] | None = None
    """Releases the place that it has held since it was accepted."""
    _timer: asyncio.TimerHandle | None = None
    _place: tuple[ConcurrencyLimit, object | None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        if self.accepted is not None:
            self.accepted()
        self._wait(self.transport.abort)

    def data_received(self, data: bytes) -> None:
        """Read bytes; a complete request head ends the wait."""
        super().data_received(data)
        self._check_request()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request, which may have arrived already."""
        self._wait(self.timeout_keep_alive_handler, bool(self.scope.get(KNOWN)))
        super().on_response_complete()
        self._check_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the wait."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self, evict: Callable[[], None], is_known: bool = False) -> None:
        self._stop_waiting()
        assert isinstance(self.loop, Loop)
        limit = self.loop.authenticated if is_known else self.loop.anonymous
        network = network_of(self.client[0] if self.client else "")
        self._place = limit, limit.acquire(network, evict)
        self._timer = self.loop.call_later(self.request_within_s, self.transport.abort)

    def _check_request(self) -> None:
        """End the wait if a request is being answered; the guard limits those."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
            self.scope[ABORT] = self.transport.abort  # type: ignore[literal-required]

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._place is not None:
            limit, place = self._place
            limit.release(place)
            self._place = None


class Loop(asyncio.SelectorEventLoop):
    """An event loop that serves with a `Listener`, and logs errors at a bounded rate."""

    def __init__(self) -> None:
        super().__init__()
        most = _most_idle()
        self.anonymous, self.authenticated = ConcurrencyLimit(most), ConcurrencyLimit(most)
        """Idle connections: of any client, and of those that sent a token before."""
        self.set_exception_handler(_log_error)

    async def create_server(  # type: ignore[override]
        self, make: Callable[[], Connection], *, sock: socket.socket, **more: Any
    ) -> "Listener":
        """Return the `Listener` of a socket."""
        return Listener(self, make, sock, more.get("ssl"))


class Listener:
    """Accepts connections, each of which takes a place among the idle ones.

    It has the methods of an asyncio server that uvicorn calls.
    """

    def __init__(
        self,
        loop: Loop,
        make: Callable[[], Connection],
        place: socket.socket,
        tls: ssl.SSLContext | None,
    ) -> None:
        self._loop, self._make, self._place, self._tls = loop, make, place, tls
        self._beginning: dict[asyncio.Task[None], socket.socket] = {}
        self._had_many = False
        self._pause: asyncio.TimerHandle | None = None
        place.setblocking(False)
        loop.add_reader(place, self._accept)

    def close(self) -> None:
        """Stop accepting, and close connections whose handshake is not complete."""
        if self._pause is not None:
            self._pause.cancel()
        self._loop.remove_reader(self._place)
        for connection in self._beginning.values():
            _shut(connection)

    async def wait_closed(self) -> None:
        """Wait until no handshake is under way."""
        await asyncio.gather(*self._beginning, return_exceptions=True)

    def _accept(self) -> None:
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                connection, address = self._place.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:  # Such as EMFILE: asyncio would log it again and again.
                _LOG.warning("no connection is accepted for a moment: %s", error_text(error))
                self._loop.remove_reader(self._place)
                self._pause = self._loop.call_later(
                    _PAUSE_S, self._loop.add_reader, self._place, self._accept
                )
                return
            connection.setblocking(False)
            self._begin(connection, network_of(str(address[0])))

    def _begin(self, connection: socket.socket, network: str) -> None:
        def evict() -> None:
            _LOG.warning("too many connections send no request: the oldest ones are closed")
            _shut(connection)

        place = self._loop.anonymous.acquire(network, evict)

        def make() -> Connection:
            made = self._make()
            made.accepted = lambda: self._loop.anonymous.release(place)
            return made

        async def connect() -> None:
            more = {} if self._tls is None else {"ssl_handshake_timeout": _HANDSHAKE_WITHIN_S}
            try:
                await self._loop.connect_accepted_socket(make, connection, ssl=self._tls, **more)
            except OSError as error:  # The client went, was too slow, or speaks no TLS.
                # Its frames refer to it in a circle, and hold 300 KiB until a full collection.
                error.__traceback__ = None

        def ended(task: asyncio.Task[None]) -> None:
            self._beginning.pop(task)
            self._loop.anonymous.release(place)
            if not self._beginning and self._had_many:
                self._had_many = False
                trim_heap()

        task = self._loop.create_task(connect())
        self._beginning[task] = connection
        self._had_many |= len(self._beginning) >= _MANY
        task.add_done_callback(ended)


def _shut(connection: socket.socket) -> None:
    """End both directions: the connection's reader sees the end and closes it."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _most_idle() -> int:
    """Return how many idle connections are allowed, a fifth of the descriptors at most."""
    try:
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    except (ImportError, OSError):  # Windows has no such limit; a system call may be forbidden.
        return _MOST_IDLE
    return _MOST_IDLE if limit < 0 else max(16, min(_MOST_IDLE, limit // 5))


def _log_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    why = "" if error is None else f": {error_text(error)}"
    _LOG.error("a connection failed: %s%s", context.get("message"), why)
