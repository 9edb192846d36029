"""What every request passes first: whose page sent it, how large it is, how many there are.

Pages of other sites can make a browser send requests here, and a name of theirs can be made to
point here (DNS rebinding). So the Host must be one that this server is known by or a plain number,
which no name can be rebound to; what another site's page sends is refused by its Origin or by
Sec-Fetch-Site, except for following a link; and answers carry a policy that lets no other site show
or read them. Who has no token has a small body and places of its own, so that strangers do not keep
out those who have one; and a body that does not come to its end in time is not waited for.
"""

import asyncio
import ipaddress
import json
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from contextlib import suppress
from typing import Any, TypeAlias

from upperson_rt.serve.problems import MEDIA_TYPE, ProblemError

__all__ = ["MOST_BODY_BYTES", "Guard", "RefusedError", "is_loopback"]

_Message: TypeAlias = MutableMapping[str, Any]
_Receive: TypeAlias = Callable[[], Awaitable[_Message]]
_Send: TypeAlias = Callable[[_Message], Awaitable[None]]
_App: TypeAlias = Callable[[_Message, _Receive, _Send], Awaitable[None]]

MOST_BODY_BYTES = 20 << 20
_MOST_STRANGE_BYTES = 64 << 10
"""Of a body whose sender is nobody: a login is smaller."""
_BODY_WITHIN_S = 30.0
_MOST_DRAINED_BYTES = 128 << 20
"""Read and thrown away of what is too large: a browser shows an answer only after it has sent."""
_MOST_REQUESTS = 64
"""At a time, of those who are known; and as many of those who are not."""
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
        knows: Callable[[_Message], bool] = lambda scope: True,
        body_within_s: float = _BODY_WITHIN_S,
    ) -> None:
        """Guard an application.

        Args:
            app: Of ASGI.
            names: By which this server is called, besides its addresses, ``localhost`` and its own
                host name.
            knows: Tells from a request's scope whether somebody sends it who may send much.
            body_within_s: A whole body must be there after so long.
        """
        self._app = app
        self._knows = knows
        self._body_within_s = body_within_s
        own = socket.gethostname().lower()
        self._names = {"localhost", own, own.partition(".")[0], *(n.lower() for n in names)}
        self._requests = {True: 0, False: 0}  # Of those who are known, and of others.
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
        known = self._knows(scope)
        problem = self._problem(scope, headers, known)
        if problem is not None:
            if problem.status in (401, 413):
                await self._drain(receive)
            await _answer(problem, send)
            return
        counted = int(scope["path"] not in _ALWAYS)
        self._requests[known] += counted
        try:
            await self._limited(scope, receive, send, known)
        finally:
            self._requests[known] -= counted

    def _problem(
        self, scope: _Message, headers: dict[str, str], known: bool
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
        if not length.isdecimal() or len(length) > 19 or int(length) > _most_bytes(known):
            return _too_large(known)
        if scope["path"] not in _ALWAYS and self._requests[known] >= _MOST_REQUESTS:
            self.refused += 1
            return ProblemError(
                429,
                f"{_MOST_REQUESTS} requests are being answered already: try again in a moment",
                {"Retry-After": "1"},
            )
        return None

    def _is_known(self, host: str) -> bool:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        try:
            ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            return name.lower().rstrip(".") in self._names
        return True

    async def _limited(self, scope: _Message, receive: _Receive, send: _Send, known: bool) -> None:
        left = _most_bytes(known)
        until = time.monotonic() + self._body_within_s
        problem: ProblemError | None = None
        started = ended = False

        async def metered() -> _Message:
            nonlocal left, problem, ended
            if ended or started:  # What comes now is the end of the connection, however late.
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), until - time.monotonic())
            except asyncio.TimeoutError:
                problem = self._too_slow()
                raise RefusedError from None
            ended = not message.get("more_body")
            left -= len(message.get("body", b""))
            if left < 0:
                problem = _too_large(known)
                raise RefusedError
            return message

        async def sealed(message: _Message) -> None:
            nonlocal started
            if problem is not None and not started:
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

        # Told below: the frameworks turn it into an answer of their own, or let it pass.
        with suppress(RefusedError):
            await self._app(scope, metered, sealed)
        if problem is not None and not started:
            if problem.status != 408 and not ended:
                await self._drain(receive)
            await _answer(problem, send)

    async def _drain(self, receive: _Receive) -> None:
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_drain(receive), self._body_within_s)

    def _too_slow(self) -> ProblemError:
        return ProblemError(
            408,
            f"what was sent did not come to its end within {self._body_within_s:g} s: send it "
            "again, or something smaller",
            {"Connection": "close"},
        )


def _most_bytes(known: bool) -> int:
    return MOST_BODY_BYTES if known else _MOST_STRANGE_BYTES


def _too_large(known: bool) -> ProblemError:
    if not known:
        return ProblemError(
            401,
            f"log in, or send a token, to send more than {_MOST_STRANGE_BYTES >> 10} KiB:  "
            "Authorization: Bearer TOKEN",
            {"WWW-Authenticate": "Bearer", "Connection": "close"},
        )
    return ProblemError(
        413,
        f"what was sent is larger than {MOST_BODY_BYTES >> 20} MiB: send a smaller picture",
        {"Connection": "close"},
    )


async def _drain(receive: _Receive) -> None:
    left = _MOST_DRAINED_BYTES
    while left > 0:
        message = await receive()
        left -= len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body"):
            return


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
