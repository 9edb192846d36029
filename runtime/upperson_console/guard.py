"""What every request passes first: whose page sent it, how large it is, how many there are.

Pages of other sites can make a browser send requests here, and a name of theirs can be made to
point here (DNS rebinding). So the Host must be one that this server is known by or a plain number,
which no name can be rebound to; what another site's page sends is refused by its Origin or by
Sec-Fetch-Site, except for following a link; and answers carry a policy that lets no other site show
or read them. Who has no token has a small body, little time and places of its own, so that
strangers do not keep out those who have one; and among strangers whoever is waited for the longest
gives way (`turns`), so that somebody can log in whoever else is there.
"""

import asyncio
import ipaddress
import json
import socket
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, MutableMapping
from contextlib import AsyncExitStack, ExitStack, suppress
from typing import Any, TypeAlias

from upperson_console.problems import MEDIA_TYPE, ProblemError
from upperson_console.turns import CLIENT, Crowd, network_of

__all__ = ["KNOWN", "MOST_BODY_BYTES", "MOST_SMALL_BYTES", "Guard", "RefusedError", "is_loopback"]

KNOWN = "upperson_known"
"""Of a request's scope: whether it came with a valid token or session."""

_Message: TypeAlias = MutableMapping[str, Any]
_Receive: TypeAlias = Callable[[], Awaitable[_Message]]
_Send: TypeAlias = Callable[[_Message], Awaitable[None]]
_App: TypeAlias = Callable[[_Message, _Receive, _Send], Awaitable[None]]

MOST_BODY_BYTES = 20 << 20
"""Of a request with pictures."""
MOST_SMALL_BYTES = (1 << 20) + (64 << 10)
"""Of any other request."""
_MOST_STRANGE_BYTES = 64 << 10
"""Of a body whose sender is nobody: a login is smaller."""
_BODY_WITHIN_S = 30.0
_STRANGE_BODY_WITHIN_S = 10.0
_MOST_DRAINED_BYTES = 128 << 20
"""Read and thrown away of what is too large: a browser shows an answer only after it has sent."""
_MOST_REQUESTS = 64
"""At a time, of those who are known; and as many of those who are not."""
_MOST_EACH = 32
"""Of these, requests of one account."""
_MOST_RUNNING = 4
"""Requests of one account at a time, until an answer begins; its further ones wait. Fewer than the
threads of the server and than the places at the encoder, so that others find some free."""
_MOST_LARGE = 3
"""Bodies above `MOST_SMALL_BYTES` at a time, one of each account; others wait unread."""
_LARGE_BYTES_PER_S = 40 << 20
_ALWAYS = {"/api/v1/health", "/api/v1/ready"}
"""Answered however many requests there are: who watches the server asks there."""
_SAFE = {"GET", "HEAD", "OPTIONS"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
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
"""Of every answer; one that says more of its own, such as how long a picture keeps, goes first."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class RefusedError(Exception):
    """The body of a request is not read to its end; the guard answers."""


class Guard:
    """Stands in front of an application."""

    def __init__(
        self,
        app: _App,
        names: Iterable[str] = (),
        sender: Callable[[_Message], str | None] = lambda scope: "",
        body_within_s: tuple[float, float] = (_BODY_WITHIN_S, _STRANGE_BODY_WITHIN_S),
        apart: str | None = None,
        large: Collection[str] | None = None,
    ) -> None:
        """Guard an application.

        Args:
            app: Of ASGI.
            names: By which this server is called, besides its addresses, ``localhost`` and its own
                host name.
            sender: Returns from a request's scope the name of the account that sends it, None for
                a client without a valid token or session.
            body_within_s: A whole body must be there after so long, of those who are known, and
                of others.
            apart: Below this path the application itself tells who sends, as it reads: requests
                may be large, and have places of their own, where strangers give way as above.
            large: Paths that take bodies above `MOST_SMALL_BYTES`; by default all do.
        """
        self._app = app
        self._sender = sender
        self._large = large
        self._large_bodies = asyncio.Semaphore(_MOST_LARGE)
        self._shares: dict[str, _Share] = {}
        self._body_within_s = body_within_s
        own = socket.gethostname().lower()
        self._names = {"localhost", own, own.partition(".")[0], *(n.lower() for n in names)}
        self._known, self._strangers = Crowd(_MOST_REQUESTS), Crowd(_MOST_REQUESTS)
        self._apart, self._others = apart, Crowd(_MOST_REQUESTS)
        self.refused = 0
        """Requests that were told to come back."""

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {
            name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]
        }
        is_apart = self._apart is not None and scope["path"].startswith(f"{self._apart}/")
        sender = None if is_apart else self._sender(scope)
        known = is_apart or sender is not None
        scope[KNOWN] = sender is not None
        network = network_of((scope.get("client") or ("",))[0])
        CLIENT.set(f"network {network}" if sender is None else f"account {sender}")
        most_bytes = self._most_bytes(scope["path"], known, is_apart)
        body = _Body(receive, known, self._body_within_s[0 if known else 1], most_bytes)
        problem = self._problem(scope, headers, body)
        if scope["path"] in _ALWAYS:
            await self._limited(scope, body, send, problem)
            return
        crowd = self._others if is_apart else self._known if known else self._strangers
        share = None if sender is None else self._shares.setdefault(sender, _Share())
        is_full = share is not None and share.there >= _MOST_EACH
        place = None if is_full else crowd.enter(network, body.give_way)
        if place is None:
            self.refused += 1
            await _answer(_busy(), send)
            return
        body.settled = lambda: crowd.settle(place)
        if (known and not is_apart) or not _has_body(headers):
            body.settled()
        try:
            if share is None or sender is None:
                await self._limited(scope, body, send, problem)
            else:
                await self._shared(scope, body, send, problem, sender)
        finally:
            crowd.leave(place)

    async def _shared(
        self,
        scope: _Message,
        body: "_Body",
        send: _Send,
        problem: ProblemError | None,
        sender: str,
    ) -> None:
        """Answer a request of an account when its share allows."""
        share = self._shares[sender]
        share.there += 1
        try:
            async with AsyncExitStack() as stack:
                await share.running.acquire()
                running = stack.enter_context(ExitStack())
                running.callback(share.running.release)

                async def starting(message: _Message) -> None:
                    running.close()
                    await send(message)

                body.places = stack, (share.large, self._large_bodies)
                await self._limited(scope, body, starting, problem)
        finally:
            share.there -= 1
            if not share.there:
                self._shares.pop(sender, None)

    def _problem(
        self, scope: _Message, headers: dict[str, str], body: "_Body"
    ) -> ProblemError | None:
        host = headers.get("host", "")
        if not self._is_known(host):
            return ProblemError(
                421,
                "this server is not known by the name in the header Host: start it with  "
                "--name NAME  if it should be",
            )
        origin = headers.get("origin")
        own = f"{scope['scheme']}://{host}"
        unsafe = scope["method"] not in _SAFE
        if origin is not None and origin.lower() != own.lower() and (unsafe or origin != "null"):
            return ProblemError(403, f"a page of another site sent this; only {own} may")
        site = headers.get("sec-fetch-site", "none")
        follows_link = headers.get("sec-fetch-mode") == "navigate" and not unsafe
        if site not in ("same-origin", "none") and not follows_link:
            return ProblemError(403, f"a page of another site sent this; only {own} may")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 19 or int(length) > body.most_bytes:
            return body.too_large()
        return None

    def _most_bytes(self, path: str, known: bool, is_apart: bool) -> int:
        if not known:
            return _MOST_STRANGE_BYTES
        is_large = is_apart or self._large is None or path in self._large
        return MOST_BODY_BYTES if is_large else MOST_SMALL_BYTES

    def _is_known(self, host: str) -> bool:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name.lower().rstrip(".") in self._names
        return True

    async def _limited(
        self, scope: _Message, body: "_Body", send: _Send, problem: ProblemError | None
    ) -> None:
        """Answer a request, or with the problem that it has."""
        started = False

        async def sealed(message: _Message) -> None:
            nonlocal started
            if body.problem is not None and not started:
                return
            if message["type"] == "http.response.start":
                started = True
                there = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(
                        (name.encode(), value.encode())
                        for name, value in _HEADERS.items()
                        if name.encode() not in there
                    ),
                ]
            await send(message)

        async def metered() -> _Message:
            # What comes after the answer has begun is the end of the connection, however late.
            return await (body.receive() if started else body.next())

        # Told below: the frameworks turn it into an answer of their own, or let it pass.
        with suppress(RefusedError):
            if problem is None:
                await self._app(scope, metered, sealed)
        problem = problem or body.problem
        if problem is not None and not started:
            if problem.status in (401, 413):
                await body.drain()
            await _answer(problem, send)


class _Share:
    """What the requests of one account have of the server."""

    def __init__(self) -> None:
        self.there = 0
        self.running = asyncio.Semaphore(_MOST_RUNNING)
        self.large = asyncio.Semaphore(1)


class _Body:
    """A body as it comes: in time, not too large, and as long as nobody else needs its place."""

    def __init__(self, receive: _Receive, known: bool, within_s: float, most_bytes: int) -> None:
        self.receive = receive
        self.most_bytes = most_bytes
        self.places: tuple[AsyncExitStack, Iterable[asyncio.Semaphore]] | None = None
        """Taken by a large body, and left with the stack."""
        self.problem: ProblemError | None = None
        """Why it is not read to its end."""
        self.settled: Callable[[], None] = lambda: None
        """Called when its end is there."""
        self._known = known
        self._within_s = within_s
        self._until = time.monotonic() + within_s
        self._left = most_bytes
        self._read_bytes = 0
        self._ended = False
        self._gone: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def give_way(self) -> None:
        """Stop to wait for it."""
        if not self._gone.done():
            self._gone.set_result(None)

    async def next(self) -> _Message:
        """Return the next part.

        Raises:
            RefusedError: There is a `problem`.
        """
        if self._ended:  # Such as a framework that looks whether the client is still there.
            return await self.receive()
        message = await self._next()
        if message is None:
            self.problem = self._not_waited_for()
            raise RefusedError
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            self.problem = self.too_large()
            raise RefusedError
        if self.places is not None and self.most_bytes - self._left > MOST_SMALL_BYTES:
            stack, places = self.places
            self.places = None
            await self._take(stack, places)
        return message

    async def _take(self, stack: AsyncExitStack, places: Iterable[asyncio.Semaphore]) -> None:
        """Take the places of a large body; what comes meanwhile stays unread.

        Raises:
            RefusedError: There were none for long.
        """
        began = time.monotonic()
        for place in places:
            try:
                await asyncio.wait_for(place.acquire(), began + self._within_s - time.monotonic())
            except asyncio.TimeoutError as error:
                self.problem = _busy()
                raise RefusedError from error
            stack.callback(place.release)
        self._until += time.monotonic() - began

    async def drain(self) -> None:
        """Read what is left and throw it away: a browser shows an answer only after it has sent."""
        left = _MOST_DRAINED_BYTES
        while left > 0 and not self._ended:
            message = await self._next()
            if message is None:
                return
            left -= len(message.get("body", b""))

    async def _next(self) -> _Message | None:
        """Return the next part, or None if there is no more time for it."""
        reading: asyncio.Future[Any] = asyncio.ensure_future(self.receive())
        try:
            timeout_s = max(0.0, self._until - time.monotonic())
            await asyncio.wait(
                {reading, self._gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not reading.done():
                return None
        finally:
            if not reading.done():
                reading.cancel()
        message: _Message = reading.result()
        size_bytes = len(message.get("body", b""))
        self._read_bytes += size_bytes
        if self._read_bytes > MOST_SMALL_BYTES:  # Other requests are answered between the parts.
            await asyncio.sleep(size_bytes / _LARGE_BYTES_PER_S)
        if message["type"] != "http.request" or not message.get("more_body"):
            self._ended = True
            self.settled()
        return message

    def too_large(self) -> ProblemError:
        """Return the problem of a body beyond its bound."""
        if not self._known:
            return ProblemError(
                401,
                f"log in, or send a token, to send more than {_MOST_STRANGE_BYTES >> 10} KiB:  "
                "Authorization: Bearer TOKEN",
                {"WWW-Authenticate": "Bearer", "Connection": "close"},
            )
        is_large = self.most_bytes == MOST_BODY_BYTES
        return ProblemError(
            413,
            f"what was sent is larger than {self.most_bytes >> 20} MiB: send "
            f"{'a smaller picture' if is_large else 'less at a time'}",
            {"Connection": "close"},
        )

    def _not_waited_for(self) -> ProblemError:
        why = f"what was sent did not come to its end within {self._within_s:g} s"
        if self._gone.done():
            why = "others came before what was sent had come to its end"
        return ProblemError(
            408, f"{why}: send it again, or something smaller", {"Connection": "close"}
        )


def _has_body(headers: dict[str, str]) -> bool:
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _busy() -> ProblemError:
    return ProblemError(
        429,
        f"{_MOST_REQUESTS} requests are being answered already: try again in a moment",
        {"Retry-After": "1"},
    )


async def _answer(problem: ProblemError, send: _Send) -> None:
    body = json.dumps(problem.as_dict()).encode()
    headers = {
        **_HEADERS,
        "content-type": MEDIA_TYPE,
        "content-length": str(len(body)),
        **problem.headers,
    }
    await send(
        {
            "type": "http.response.start",
            "status": problem.status,
            "headers": [(n.lower().encode(), v.encode()) for n, v in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
