"""Connections: how many there may be, and for how long one without a request is waited for.

`guard` sees requests. Connections that send none, half of one, or no handshake of TLS would take
the descriptors of this process until no other client gets in. So each has a place in a `Crowd` from
the moment it is accepted until its request is there. Idle connections of accounts have places of
their own. Where descriptors run out nevertheless, accepting pauses.
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

from upperson_console.guard import KNOWN
from upperson_console.turns import Crowd, network_of
from upperson_rt.machine import return_freed
from upperson_rt.printable import error_text, get_logger

__all__ = ["Connection", "Listener", "Loop", "log_seldom"]

_MOST_IDLE = 256
"""Connections without a request, and as many more of accounts; fewer where this process may have
few descriptors."""
_REQUEST_WITHIN_S = 15.0
"""The head of a request must be there after so long; uvicorn waits for ever."""
_HANDSHAKE_WITHIN_S = 5.0
_ACCEPTED_AT_ONCE = 32
_MANY = 64
"""Handshakes under way, after which their memory is worth returning."""
_PAUSE_S = 1.0
"""Without accepting, when there is no descriptor for one more connection."""
_SELDOM_S = 10.0


class _Seldom(logging.Filter):
    """Lets each message pass once in `_SELDOM_S`, with the number of those that did not."""

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Tell whether a record is logged."""
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
    """Return a logger as `get_logger` does, each of whose messages comes once in ten seconds."""
    found = get_logger(name)
    if _SELDOM not in found.filters:
        found.filters.insert(0, _SELDOM)  # Before a message is put together.
    return found


_LOG = log_seldom(__name__)


class Connection(H11Protocol):
    """One connection."""

    request_within_s = _REQUEST_WITHIN_S
    accepted: Callable[[], None] | None = None
    """Leaves the place that it has had since it was accepted."""
    _timer: asyncio.TimerHandle | None = None
    _place: tuple[Crowd, object | None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a request."""
        super().connection_made(transport)  # type: ignore[arg-type]
        if self.accepted is not None:
            self.accepted()
        self._wait(self.transport.abort)

    def data_received(self, data: bytes) -> None:
        """Take what comes."""
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        """Begin to wait for the next request, which may be there already."""
        self._wait(self.timeout_keep_alive_handler, bool(self.scope.get(KNOWN)))
        super().on_response_complete()
        self._look()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self, leave: Callable[[], None], is_known: bool = False) -> None:
        self._stop_waiting()
        assert isinstance(self.loop, Loop)
        crowd = self.loop.known if is_known else self.loop.strangers
        self._place = crowd, crowd.enter(network_of(self.client[0] if self.client else ""), leave)
        self._timer = self.loop.call_later(self.request_within_s, self.transport.abort)

    def _look(self) -> None:
        """Wait no longer if a request is being answered; who sends it is the guard's business."""
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._place is not None:
            crowd, place = self._place
            crowd.leave(place)
            self._place = None


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose servers are a `Listener`, and that logs errors seldom and in a line."""

    def __init__(self) -> None:
        super().__init__()
        most = _most_idle()
        self.strangers, self.known = Crowd(most), Crowd(most)
        """Connections without a request: of any client, and of those that sent a token before."""
        self.set_exception_handler(_log_error)

    async def create_server(  # type: ignore[override]
        self, make: Callable[[], Connection], *, sock: socket.socket, **more: Any
    ) -> "Listener":
        """Return what accepts connections from a socket that listens, see asyncio."""
        return Listener(self, make, sock, more.get("ssl"))


class Listener:
    """Accepts connections, each of which has a place among those without a request.

    It has what uvicorn uses of a server of asyncio.
    """

    def __init__(
        self,
        loop: Loop,
        make: Callable[[], Connection],
        place: socket.socket,
        tls: ssl.SSLContext | None,
    ) -> None:
        """Begin to accept."""
        self._loop, self._make, self._place, self._tls = loop, make, place, tls
        self._beginning: dict[asyncio.Task[None], socket.socket] = {}
        self._had_many = False
        self._pause: asyncio.TimerHandle | None = None
        place.setblocking(False)
        loop.add_reader(place, self._accept)

    def close(self) -> None:
        """Accept no more, and close what has not shaken hands."""
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
        def leave() -> None:
            _LOG.warning("too many connections send no request: the oldest ones are closed")
            _shut(connection)

        place = self._loop.strangers.enter(network, leave)

        def make() -> Connection:
            made = self._make()
            made.accepted = lambda: self._loop.strangers.leave(place)
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
            self._loop.strangers.leave(place)
            if not self._beginning and self._had_many:
                self._had_many = False
                return_freed()

        task = self._loop.create_task(connect())
        self._beginning[task] = connection
        self._had_many |= len(self._beginning) >= _MANY
        task.add_done_callback(ended)


def _shut(connection: socket.socket) -> None:
    """Let whatever reads from a connection see its end; that closes it, too."""
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def _most_idle() -> int:
    """Return how many idle connections leave descriptors for requests and files."""
    try:
        import resource
    except ImportError:  # Windows has no such limit.
        return _MOST_IDLE
    try:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    except OSError:  # A filter of system calls does not let it tell.
        return _MOST_IDLE
    return _MOST_IDLE if limit < 0 else max(16, min(_MOST_IDLE, limit // 5))


def _log_error(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    why = "" if error is None else f": {error_text(error)}"
    _LOG.error("a connection failed: %s", f"{context.get('message')}{why}")
