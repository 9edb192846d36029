"""Checks on every request: origin, size, and limits per client.

Pages of other sites can make a browser send requests here, and their names can be made to resolve
to this server (DNS rebinding). So the Host must be a configured name or an IP address, which cannot
be rebound. Requests of another site's page are refused by Origin or Sec-Fetch-Site, except for
followed links, and the headers of each response keep other sites from embedding or reading it.

Requests without a valid token have small bodies, short deadlines and a concurrency limit of their
own, so that they cannot block requests with one. Among them the oldest unfinished one gives way
(`limits`), so that logging in is always possible. So does a response whose client does not read.
"""

import asyncio
import ipaddress
import json
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Hashable, Iterable
from contextlib import AsyncExitStack, ExitStack, suppress
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from upperson_console.accounts import is_of_programs, login_place
from upperson_console.limits import CLIENT, ConcurrencyLimit, Turns, network_of
from upperson_console.problems import MEDIA_TYPE, ProblemError
from upperson_console.reported import problem_text

KNOWN = "upperson_known"
"""Key in a request's scope: whether it has a valid token or session."""
ABORT = "upperson_abort"
"""Key in a request's scope: what closes its connection at once, if the server can."""

MOST_BODY_BYTES = 20 << 20
"""Of a request with pictures."""
MOST_SMALL_BYTES = (1 << 20) + (64 << 10)
"""Of any other request."""
_MOST_ANONYMOUS_BYTES = 64 << 10
"""Of a body without a valid token: a login is smaller."""
_BODY_WITHIN_S = 30.0
_ANONYMOUS_BODY_WITHIN_S = 10.0
_MOST_DRAINED_BYTES = 128 << 20
"""Read and discarded of a body that is too large: browsers read the response after sending."""
_MOST_REQUESTS = 64
"""At a time, with a valid token; as many with pictures, and as many without a token."""
_MOST_AT_ONCE = 10
"""Requests of all accounts that run at a time, until their responses begin; each account in turn.
No more than the encoder's queue takes, and fewer than the server's threads."""
_MOST_EACH = 32
"""Of these, of one account: with pictures, and as many others."""
_MOST_RUNNING = {False: 4, True: 2}
"""Requests of one account that run at a time, until their responses begin: without pictures, and
with. They read their bodies meanwhile."""
_MOST_LARGE = 3
"""Bodies above `MOST_SMALL_BYTES` at a time, one of each account; others wait unread."""
_STALLED_S = 1.0
"""A response whose client reads nothing for so long gives way to another account's request."""
_LARGE_BYTES_PER_S = 4 << 20
"""Of a large body, so that searches of others take at most twice their time meanwhile."""
_DRAINED_BYTES_PER_S = 40 << 20
_ALWAYS = {"/api/v1/health", "/api/v1/ready"}
"""Exempt from the limits: monitoring polls them."""
_SAFE = {"GET", "HEAD", "OPTIONS"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; media-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # Without any, browsers would send forms without Origin.
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}
"""Of every response that does not set them itself."""


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class BodyRefusedError(Exception):
    """The guard reads no more of a body, and answers the request itself."""


class Guard:
    """Middleware in front of the application."""

    def __init__(
        self,
        app: ASGIApp,
        names: Iterable[str] = (),
        sender: Callable[[Scope], str | None] = lambda scope: "",
        large: Collection[str] | None = None,
    ) -> None:
        """Guard an application.

        Args:
            app: The application.
            names: Host names of this server, besides its addresses, ``localhost`` and the name of
                the machine.
            sender: Returns the name of the account of a request's scope; None without a valid
                token or session.
            large: Paths that take bodies above `MOST_SMALL_BYTES`; by default all.
        """
        self._app = app
        self._sender = sender
        self._large = large
        self._large_bodies = asyncio.Semaphore(_MOST_LARGE)
        self._shares: dict[tuple[str, bool], _Share] = {}
        """By account, and whether its requests may have pictures."""
        self.body_within_s = _BODY_WITHIN_S, _ANONYMOUS_BODY_WITHIN_S
        """Deadlines for a whole body, with and without a valid token."""
        own = socket.gethostname().lower()
        self._names = {"localhost", own, own.partition(".")[0], *(n.lower() for n in names)}
        self._authenticated, self._uploads, self._anonymous = (
            ConcurrencyLimit(_MOST_REQUESTS) for _ in range(3)
        )
        self._turns = Turns(_MOST_AT_ONCE)
        self.refused = 0
        """Requests refused by a concurrency limit."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sender = self._sender(scope)
        scope[KNOWN] = sender is not None
        network = network_of((scope.get("client") or ("",))[0])
        CLIENT.set(f"network {network}" if sender is None else f"account {sender}")
        most_bytes = _MOST_ANONYMOUS_BYTES
        is_large = self._large is None or scope["path"] in self._large
        if sender is not None:
            most_bytes = MOST_BODY_BYTES if is_large else MOST_SMALL_BYTES
        within_s = self.body_within_s[1 if sender is None else 0]
        body = _Body(receive, within_s, most_bytes)
        problem = self._problem(scope, headers, body)
        if scope["path"] in _ALWAYS:
            await self._limited(scope, body, send, problem)
            return
        limit = self._uploads if is_large else self._authenticated
        limit = self._anonymous if sender is None else limit
        owner = "" if sender is None else sender, is_large
        share = None if sender is None else self._shares.setdefault(owner, _Share(is_large))
        is_full = share is not None and share.there >= _MOST_EACH
        place = None if is_full else limit.acquire(sender or network, body.evict)
        if place is None:
            self.refused += 1
            await _answer(_busy(), scope, receive, send)
            return
        body.pin = lambda: limit.pin(place)
        if (abort := scope.get(ABORT)) is not None:
            body.unpin = lambda: limit.unpin(place, sender or network, abort)
        has_body = headers.get("content-length", "0") != "0" or "transfer-encoding" in headers
        if share is None and not has_body:
            body.pin()
        try:
            if share is None:
                await self._limited(scope, body, send, problem)
            else:
                await self._shared(share, owner, scope, body, send, problem, has_body)
        finally:
            limit.release(place)
            if share is not None and not share.there:
                self._shares.pop(owner, None)

    async def _shared(
        self,
        share: "_Share",
        owner: Hashable,
        scope: Scope,
        body: "_Body",
        send: Send,
        problem: ProblemError | None,
        has_body: bool,
    ) -> None:
        share.there += 1
        try:
            async with AsyncExitStack() as stack:
                if not await body.wait_for(share.running):
                    self.refused += 1
                    await _answer(_busy(), scope, body.receive, send)
                    return
                running = stack.enter_context(ExitStack())
                running.callback(share.running.release)

                async def starting(message: Message) -> None:
                    running.close()
                    await send(message)

                async def begin() -> None:
                    await self._turns.begin(owner)
                    running.callback(self._turns.end)

                body.places = stack, (share.large, self._large_bodies)
                if has_body:
                    body.completed = begin
                else:
                    await begin()
                await self._limited(scope, body, starting, problem)
        finally:
            share.there -= 1

    def _problem(self, scope: Scope, headers: Headers, body: "_Body") -> ProblemError | None:
        host = headers.get("host", "")
        if not self._is_known(host):
            what = "this server is not known by the name in the header Host"
            advice = "start it with  --name NAME  if it should be"
            return ProblemError(421, f"{what}: {advice}", code="host_unknown")
        origin = headers.get("origin")
        own = f"{scope['scheme']}://{host}"
        unsafe = scope["method"] not in _SAFE
        if origin is not None and origin.lower() != own.lower() and (unsafe or origin != "null"):
            return _cross_site(own)
        site = headers.get("sec-fetch-site", "none")
        follows_link = headers.get("sec-fetch-mode") == "navigate" and not unsafe
        if site not in ("same-origin", "none") and not follows_link:
            return _cross_site(own)
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 19 or int(length) > body.most_bytes:
            return body.too_large()
        return None

    def _is_known(self, host: str) -> bool:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name.lower().rstrip(".") in self._names
        return True

    async def _limited(
        self, scope: Scope, body: "_Body", send: Send, problem: ProblemError | None
    ) -> None:
        """Answer a request, or report its problem."""
        started = False

        async def sealed(message: Message) -> None:
            nonlocal started
            if body.problem is not None and not started:
                return
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            stalled = asyncio.get_running_loop().call_later(_STALLED_S, body.unpin)
            try:
                await send(message)
            finally:
                stalled.cancel()
                body.pin()

        async def metered() -> Message:
            # After the response has begun, only the end of the connection can come.
            return await (body.receive() if started else body.next())

        # Reported below: frameworks may turn it into a response of their own, or let it pass.
        with suppress(BodyRefusedError):
            if problem is None:
                await self._app(scope, metered, sealed)
        problem = problem or body.problem
        if problem is not None and not started:
            if problem.status in (401, 413):
                await body.drain()
            await _answer(problem, scope, body.receive, send)


class _Share:
    """Limits of one account."""

    def __init__(self, is_large: bool) -> None:
        self.there = 0
        self.running = asyncio.Semaphore(_MOST_RUNNING[is_large])
        self.large = asyncio.Semaphore(1)


class _Body:
    """A body as it arrives: within a deadline and a size, until it is evicted."""

    def __init__(self, receive: Receive, within_s: float, most_bytes: int) -> None:
        self.receive = receive
        self.most_bytes = most_bytes
        self.places: tuple[AsyncExitStack, Iterable[asyncio.Semaphore]] | None = None
        """Semaphores that a large body acquires, and the stack that releases them."""
        self.problem: ProblemError | None = None
        """Why it is not read to its end."""
        self.pin: Callable[[], None] = lambda: None
        """Keeps it from being evicted, once all of it has arrived or its account runs it."""
        self.unpin: Callable[[], None] = lambda: None
        """Lets its response be aborted where places are short."""
        self.completed: Callable[[], Awaitable[None]] | None = None
        """Awaited before its last part is returned."""
        self._within_s = within_s
        self._until = time.monotonic() + within_s
        self._left = most_bytes
        self._read_bytes = 0
        self._bytes_per_s = _LARGE_BYTES_PER_S
        self._ended = False
        self._evicted: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def evict(self) -> None:
        """Wait for it no longer."""
        if not self._evicted.done():
            self._evicted.set_result(None)

    async def wait_for(self, place: asyncio.Semaphore) -> bool:
        """Acquire a semaphore, and begin the deadline; return False if it was evicted before."""
        waiting = asyncio.ensure_future(place.acquire())
        try:
            await asyncio.wait({waiting, self._evicted}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not waiting.done():
                waiting.cancel()
        if self._evicted.done():
            if waiting.done():
                place.release()
            return False
        self.pin()
        self._until = time.monotonic() + self._within_s
        return True

    async def next(self) -> Message:
        """Return the next part."""
        if self._ended:  # Frameworks poll whether the client is still connected.
            return await self.receive()
        message = await self._next()
        if message is None:
            is_evicted = self._evicted.done()
            why = f"not all of the request arrived within {self._within_s:g} s"
            if is_evicted:
                why = "newer requests took the place of this one before all of it had arrived"
            self.problem = ProblemError(
                408,
                f"{why}: send it again, or something smaller",
                {"Connection": "close"},
                code="body_evicted" if is_evicted else "body_timeout",
            )
            raise BodyRefusedError
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self.problem = self.too_large()
            raise BodyRefusedError
        if self.places is not None and self.most_bytes - self._left > MOST_SMALL_BYTES:
            stack, places = self.places
            self.places = None
            await self._take(stack, places)
        if self._ended and self.completed is not None:
            await self.completed()
        return message

    async def _take(self, stack: AsyncExitStack, places: Iterable[asyncio.Semaphore]) -> None:
        """Acquire the semaphores of a large body, which stays unread meanwhile."""
        began = time.monotonic()
        for place in places:
            try:
                await asyncio.wait_for(place.acquire(), began + self._within_s - time.monotonic())
            except asyncio.TimeoutError as error:
                self.problem = _busy()
                raise BodyRefusedError from error
            stack.callback(place.release)
        self._until += time.monotonic() - began

    async def drain(self) -> None:
        """Read and discard the rest: browsers show a response only after they have sent all."""
        left, self._bytes_per_s = _MOST_DRAINED_BYTES, _DRAINED_BYTES_PER_S
        while left > 0 and not self._ended:
            message = await self._next()
            if message is None:
                return
            left -= len(message.get("body", b""))

    async def _next(self) -> Message | None:
        """Return the next part, or None after the deadline or an eviction."""
        reading: asyncio.Future[Any] = asyncio.ensure_future(self.receive())
        try:
            timeout_s = max(0.0, self._until - time.monotonic())
            await asyncio.wait(
                {reading, self._evicted}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not reading.done():
                return None
        finally:
            if not reading.done():
                reading.cancel()
        message: Message = reading.result()
        size_bytes = len(message.get("body", b""))
        self._read_bytes += size_bytes
        if self._read_bytes > MOST_SMALL_BYTES:  # Let other requests run between the parts.
            await asyncio.sleep(size_bytes / self._bytes_per_s)
        if message["type"] != "http.request" or not message.get("more_body"):
            self._ended = True
            self.pin()
        return message

    def too_large(self) -> ProblemError:
        """Return the problem of a body beyond its limit."""
        if self.most_bytes == _MOST_ANONYMOUS_BYTES:
            return ProblemError(
                401,
                f"log in, or send a token, to send more than {_MOST_ANONYMOUS_BYTES >> 10} KiB:  "
                "Authorization: Bearer TOKEN",
                {"WWW-Authenticate": "Bearer", "Connection": "close"},
            )
        advice = "a smaller picture" if self.most_bytes == MOST_BODY_BYTES else "less at a time"
        return ProblemError(
            413,
            f"the request is larger than {self.most_bytes >> 20} MiB: send {advice}",
            {"Connection": "close"},
        )


def _cross_site(own: str) -> ProblemError:
    return ProblemError(
        403, f"a page of another site sent this; only {own} may", code="cross_site_request"
    )


def _busy() -> ProblemError:
    return ProblemError(
        429,
        "too many requests are being answered already: try again in a moment",
        {"Retry-After": "1"},
    )


async def _answer(problem: ProblemError, scope: Scope, receive: Receive, send: Send) -> None:
    headers, status = {**_HEADERS, **problem.headers}, problem.status
    shown = problem.as_dict()
    if not is_of_programs(request := Request(scope)):
        shown["detail"] = problem_text(problem)
    content = json.dumps(shown)
    if status == 401 and not is_of_programs(request):
        status, content, headers["location"] = 303, "", login_place(request)
    await Response(content, status, headers, MEDIA_TYPE)(scope, receive, send)
