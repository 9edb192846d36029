"""Search sessions: what was asked, until its client ends it or is not heard of any more.

A session keeps no results. Each request looks anew for the best that were not handed out yet, so
what is recorded meanwhile counts, and a session is no larger than the names of what it gave.
Everything here happens in the server's event loop; what takes long is done in threads.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal, TypeAlias
from xml.etree.ElementTree import Element

from starlette.concurrency import run_in_threadpool

from upperson_console.accounts import Account
from upperson_console.onvif.soap import FaultError, invalid
from upperson_console.search import MOST_HITS
from upperson_console.turns import BusyError
from upperson_rt.gallery import Hit

__all__ = ["LONGEST_S", "MOST_SESSIONS", "Found", "Kind", "Session", "Sessions", "no_room"]

MOST_SESSIONS = 32
_MOST_OF_ONE = 16
"""Sessions of one user: whoever forgets to end them keeps nobody else out."""
LONGEST_S = 3600.0
"""A session is kept so long between two requests, and a request waits, whatever is asked for."""
_LOOK_S = 1.0
"""How often a request that waits looks for what was recorded meanwhile."""

Kind: TypeAlias = Literal["recordings", "sentence", "image"]
State: TypeAlias = Literal["Queued", "Searching", "Completed"]


@dataclass(frozen=True)
class Found:
    """A result."""

    key: bytes
    """The same for the same recording or person."""
    element: Element
    hit: Hit | None = None


@dataclass(kw_only=True)
class Session:
    """A search that goes on."""

    account: Account
    kind: Kind
    keep_s: float
    look: Callable[[Collection[bytes], int], list[Found]]
    """Returns the best results but for some keys, and so many at most."""
    note: Callable[[list[Found], int], None]
    """Writes into the log what is about to be shown, and how many were asked for."""
    reached: Callable[[], float]
    """Returns how far a search has come that has looked, in unix seconds."""
    start: float
    """Unix seconds."""
    until: float | None = None
    """When nothing new can come any more; None if what is there when it looks is all."""
    most: int = MOST_HITS
    """Results altogether."""
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    given: set[bytes] = field(default_factory=set)
    state: State = "Queued"
    last_heard: float = 0.0
    asking: int = 0
    """Requests that are being answered."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Results are given to one request at a time, else two could get the same."""
    called: asyncio.Event = field(default_factory=asyncio.Event)
    """Wakes the request that waits."""
    has_ended: bool = False


def no_room(reason: str) -> FaultError:
    """Return the fault of a search that cannot be begun now."""
    return FaultError("Receiver", ("Action", "ResourceProblem"), reason)


class Sessions:
    """All sessions of a server."""

    def __init__(
        self,
        is_over: Callable[[], bool] = lambda: False,
    ) -> None:
        """Keep sessions.

        Args:
            is_over: Whether the server is about to end.
        """
        self.clock: Callable[[], float] = time.monotonic
        """Tells seconds, by which sessions grow old."""
        self.now: Callable[[], float] = time.time
        """Tells unix seconds, by which ranges come to their end."""
        self.look_s = _LOOK_S
        """Seconds between two looks of a request that waits."""
        self._is_over = is_over
        self._sessions: dict[str, Session] = {}

    def begin(self, session: Session) -> None:
        """Keep a session.

        Raises:
            FaultError: There are too many.
        """
        self._forget_lost()
        own = sum(other.account == session.account for other in self._sessions.values())
        if len(self._sessions) >= MOST_SESSIONS or own >= _MOST_OF_ONE:
            raise no_room(f"{own} searches of {session.account.name} are going on: end some")
        session.last_heard = self.clock()
        self._sessions[session.token] = session

    @contextmanager
    def answering(self, session: Session) -> Iterator[None]:
        """Keep a session while a request of it is answered, and for its time from then on."""
        session.asking += 1
        try:
            yield
        finally:
            session.asking -= 1
            session.last_heard = self.clock()

    async def results(
        self,
        session: Session,
        least: int,
        most: int,
        wait_s: float,
        is_gone: Callable[[], Awaitable[bool]],
    ) -> tuple[State, list[Found]]:
        """Return the state and results that were not handed out yet, best first.

        Waits until there are ``least`` of them, nothing more can come, somebody else asks for
        results of the session or ends it, or for ``wait_s``. Nothing is handed to somebody who is
        gone meanwhile.
        """
        session.called.set()  # Whoever waits is answered, and does not keep out this one.
        with self.answering(session):
            async with session.lock:
                return await self._results(session, least, most, wait_s, is_gone)

    async def _results(
        self,
        session: Session,
        least: int,
        most: int,
        wait_s: float,
        is_gone: Callable[[], Awaitable[bool]],
    ) -> tuple[State, list[Found]]:
        loop = asyncio.get_running_loop()
        end = loop.time() + min(wait_s, LONGEST_S)
        count = min(most, session.most - len(session.given))
        while True:
            session.called.clear()
            state, found = await self._look(session, count)
            left = end - loop.time()
            if state == "Completed" or len(found) >= min(least, count) or left <= 0:
                break
            if session.asking > 1 or session.has_ended or self._is_over():
                break
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(session.called.wait(), min(left, self.look_s))
            if await is_gone():
                return state, []
        if found:
            await run_in_threadpool(session.note, found, count)
        session.given.update(one.key for one in found)
        session.state = state
        return state, found

    async def _look(self, session: Session, count: int) -> tuple[State, list[Found]]:
        """Return what there is to hand out now, and the state after that."""
        if session.state == "Completed":
            return session.state, []
        is_through = session.until is None or self.now() > session.until
        try:
            # One more than is handed out tells whether that was all.
            found = await run_in_threadpool(session.look, session.given, count + 1)
        except BusyError:
            return session.state, []
        is_all = is_through and len(found) <= count
        has_most = len(session.given) + min(count, len(found)) >= session.most
        return "Completed" if is_all or has_most else "Searching", found[:count]

    def find(self, account: Account, token: str, kind: Kind | None = None) -> Session:
        """Return somebody's session, of a kind if one is asked for.

        Raises:
            FaultError: There is none, or not any more.
        """
        self._forget_lost()
        session = self._sessions.get(token)
        if session is None or session.account != account or kind not in (None, session.kind):
            raise invalid("there is no such search, or not any more", "InvalidToken")
        return session

    def end(self, session: Session) -> None:
        """End a session, and answer who waits for it."""
        self._sessions.pop(session.token, None)
        session.has_ended = True
        session.called.set()

    def _forget_lost(self) -> None:
        now = self.clock()
        self._sessions = {
            token: session
            for token, session in self._sessions.items()
            if session.asking or now - session.last_heard <= session.keep_s
        }
