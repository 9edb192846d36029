"""Search sessions, each from the start of a search until its client ends it or falls silent.

A session stores no results, only the keys of those that it returned. Each request searches again
for the best others, so that new recordings are found. All of this runs in the server's event loop,
and searches in threads.
"""

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal, TypeAlias
from xml.etree.ElementTree import Element

from starlette.concurrency import run_in_threadpool

from upperson_console.accounts import Account
from upperson_console.limits import BusyError
from upperson_console.onvif.soap import FaultError, invalid
from upperson_console.search import MOST_HITS
from upperson_rt.gallery import Hit

MOST_SESSIONS = 32
_MOST_OF_ONE = 16
"""Sessions of one user."""
LONGEST_S = 3600.0
"""Longest keep-alive and wait time, whatever a client requests."""
_POLL_S = 1.0
"""Interval at which a waiting request searches again."""

Kind: TypeAlias = Literal["recordings", "events", "sentence", "image"]
State: TypeAlias = Literal["Queued", "Searching", "Completed"]


@dataclass(frozen=True)
class SessionResult:
    """A result of a session."""

    key: bytes
    """Of the recording, event or track, the same in every search."""
    element: Element
    hit: Hit | None = None


Find: TypeAlias = Callable[[Collection[bytes], int], tuple[list[SessionResult], bool]]
"""Returns the next results without some keys, up to a number, and whether there may be more."""


@dataclass(kw_only=True)
class SearchSession:
    """A search under way."""

    account: Account
    kind: Kind
    keep_s: float
    search: Find
    note: Callable[[list[SessionResult], int], None]
    """Log the results that are about to be returned, and the number requested."""
    reached: Callable[[], float]
    """Return how far the search has come, in unix seconds."""
    start: float
    """Unix seconds."""
    until: float | None = None
    """End of its time range; None if it covers what exists when it searches."""
    most: int = MOST_HITS
    """Maximum number of results."""
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    given: set[bytes] = field(default_factory=set)
    state: State = "Queued"
    last_heard: float = 0.0
    asking: int = 0
    """Requests under way."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while results are chosen, so that no two requests return the same one."""
    called: asyncio.Event = field(default_factory=asyncio.Event)
    """Wakes the waiting request."""
    has_ended: bool = False


def no_room(reason: str) -> FaultError:
    """Return the fault for a search that cannot start now."""
    return FaultError("Receiver", ("Action", "ResourceProblem"), reason)


class SearchSessions:
    """The search sessions of a server."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        """Keep sessions until ``is_over`` returns that the server ends."""
        self.clock: Callable[[], float] = time.monotonic
        """Monotonic seconds, for the age of sessions."""
        self.now: Callable[[], float] = time.time
        """Unix seconds, for the end of time ranges."""
        self.poll_s = _POLL_S
        """Seconds between two searches of a waiting request."""
        self._is_over = is_over
        self._sessions: dict[str, SearchSession] = {}

    def begin(self, session: SearchSession) -> None:
        """Add a session; raises FaultError if there are too many.

        If all places are taken, the user with the most searches loses the one that was not heard of
        for longest, unless the new search would give this user as many.
        """
        self._drop_expired()
        counts = Counter(other.account for other in self._sessions.values())
        own, most = counts[session.account], max(counts.values(), default=0)
        is_full = len(self._sessions) >= MOST_SESSIONS
        if own >= _MOST_OF_ONE or (is_full and own + 1 >= most):
            raise no_room(f"{own} searches of {session.account.name} are going on: end some")
        if is_full:
            of_most = (one for one in self._sessions.values() if counts[one.account] == most)
            self.end(min(of_most, key=lambda one: (one.asking > 0, one.last_heard)))
        session.last_heard = self.clock()
        self._sessions[session.token] = session

    @contextmanager
    def answering(self, session: SearchSession) -> Iterator[None]:
        """Keep a session during a request, and for its keep-alive time afterwards."""
        session.asking += 1
        try:
            yield
        finally:
            session.asking -= 1
            session.last_heard = self.clock()

    async def results(
        self,
        session: SearchSession,
        least: int,
        most: int,
        wait_s: float,
        is_gone: Callable[[], Awaitable[bool]],
    ) -> tuple[State, list[SessionResult]]:
        """Return state and results that were not returned yet, best first.

        Waits until there are ``least`` of them, no more can come, another request for the session
        arrives or ends it, or for ``wait_s``. A client that has disconnected gets no results, and
        they are returned to the next request.
        """
        session.called.set()  # A waiting request is answered now.
        loop = asyncio.get_running_loop()
        end = loop.time() + min(wait_s, LONGEST_S)
        with self.answering(session):
            async with session.lock:
                count = min(most, session.most - len(session.given))
                while True:
                    session.called.clear()
                    state, found = await self._search_again(session, count)
                    left = end - loop.time()
                    if state == "Completed" or len(found) >= min(least, count) or left <= 0:
                        break
                    if session.asking > 1 or session.has_ended or self._is_over():
                        break
                    with suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(session.called.wait(), min(left, self.poll_s))
                    if await is_gone():
                        return state, []
                if found:
                    await run_in_threadpool(session.note, found, count)
                session.given.update(one.key for one in found)
                session.state = state
                return state, found

    async def _search_again(
        self, session: SearchSession, count: int
    ) -> tuple[State, list[SessionResult]]:
        """Return the results that can be returned now, and the state after that."""
        if session.state == "Completed":
            return session.state, []
        is_through = session.until is None or self.now() > session.until
        try:
            found, has_more = await run_in_threadpool(session.search, session.given, count)
        except BusyError:
            return session.state, []
        is_all = is_through and not has_more
        has_most = len(session.given) + len(found) >= session.most
        return "Completed" if is_all or has_most else "Searching", found

    def find(self, account: Account, token: str, kind: Kind | None = None) -> SearchSession:
        """Return an account's session by its token; raises FaultError if there is none."""
        self._drop_expired()
        session = self._sessions.get(token)
        if session is None or session.account != account or kind not in (None, session.kind):
            raise invalid("there is no such search, or not any more", "InvalidToken")
        return session

    def end(self, session: SearchSession) -> None:
        """End a session, and answer its waiting request."""
        self._sessions.pop(session.token, None)
        session.has_ended = True
        session.called.set()

    def _drop_expired(self) -> None:
        now = self.clock()
        self._sessions = {
            token: session
            for token, session in self._sessions.items()
            if session.asking or now - session.last_heard <= session.keep_s
        }
