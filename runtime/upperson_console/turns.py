"""Request queues: a few requests run, a few more wait, and any further one is refused.

Without a bound every waiting request would hold a thread and its picture, and answers would come
when no client waits for them any more. Clients take turns, so that one with many requests, or a
long one that pauses between its parts, delays another client by a part or two.
"""

import ipaddress
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = [
    "CLIENT",
    "BusyError",
    "Crowd",
    "Turns",
    "network_of",
]

CLIENT: ContextVar[str] = ContextVar("CLIENT", default="")
"""Whose request this thread or task works on."""

_USUAL_S = 0.1
"""What a turn takes until one has been measured."""


class BusyError(Exception):
    """No room to wait; says after how many seconds there may be."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the encoder is busy: try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Turns:
    """A bounded queue, round robin over clients. Safe to use from several threads."""

    def __init__(self, running: int = 1, waiting: int = 8) -> None:
        """Let so many run at a time, and so many wait."""
        self._free = running
        self._queue: OrderedDict[str, deque[threading.Event]] = OrderedDict()
        """The requests that wait, each for its event, by client; the next client comes first."""
        self._lock = threading.Lock()
        self._most = running + waiting
        self._there = 0
        self._usual_s = _USUAL_S
        self.taken = 0
        """Turns so far."""
        self.refused = 0
        """Those that were told to come back."""
        self.busy_s = 0.0
        """Seconds of all turns together."""

    @property
    def waiting(self) -> int:
        """How many have a turn or wait for one."""
        return self._there

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for a turn.

        Raises:
            BusyError: Too many wait already.
        """
        with self._lock:
            if self._there >= self._most:
                self.refused += 1
                raise BusyError(max(1, round(self._there * self._usual_s)))
            self._there += 1
            own = self._queued()
        own.wait()
        began = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - began
            with self._lock:
                self._there -= 1
                self.taken += 1
                self.busy_s += took
                self._usual_s += (took - self._usual_s) / 8
                self._free += 1
                self._go_on()

    def pause(self) -> None:
        """Let the requests of other clients pass between two parts of a turn."""
        with self._lock:
            client = CLIENT.get()
            if not self._queue.keys() - {client}:
                return
            if client in self._queue:
                self._queue.move_to_end(client)
            self._free += 1
            own = self._queued()
        began = time.monotonic()
        own.wait()
        with self._lock:
            self.busy_s -= time.monotonic() - began

    def _queued(self) -> threading.Event:
        """Return what is set when the turn has come."""
        own = threading.Event()
        self._queue.setdefault(CLIENT.get(), deque()).append(own)
        self._go_on()
        return own

    def _go_on(self) -> None:
        """Give free turns to those who wait: to one of each client, then to the next of each."""
        while self._free and self._queue:
            client, waiting = self._queue.popitem(last=False)
            waiting.popleft().set()
            self._free -= 1
            if waiting:
                self._queue[client] = waiting


# --- Those who are waited for without being known: a bounded number, and room for whoever comes
# next
#
# Where all places are taken, whoever has been waited for the longest gives way, of the network that
# most of them come from. So nobody is kept out by those who come first and never finish, from
# however many places they come, as long as he is quicker than they are many.

_IPV6_NETWORK_BITS = 64
"""Whoever has one address of IPv6 has so many bits of them."""


class Crowd:
    """Places for those who are waited for. Belongs to one event loop."""

    def __init__(self, most: int) -> None:
        """Have so many places."""
        self._most = most
        self._waiting: dict[object, tuple[str, Callable[[], None]]] = {}
        """By their order of coming: network, and what makes one leave."""
        self._settled: set[object] = set()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._settled)

    def enter(self, network: str, leave: Callable[[], None]) -> object | None:
        """Take a place; return what it is left with, or None if nobody gives way.

        Args:
            network: See `network_of`.
            leave: Called if somebody else needs the place; it is free by then.
        """
        if len(self) >= self._most:
            if not self._waiting:
                return None
            self._make_room()
        place = object()
        self._waiting[place] = network, leave
        return place

    def settle(self, place: object) -> None:
        """Say that one is not waited for any more: it keeps its place until it leaves."""
        if self._waiting.pop(place, None) is not None:
            self._settled.add(place)

    def leave(self, place: object) -> None:
        """Leave a place; it may be gone already."""
        self._waiting.pop(place, None)
        self._settled.discard(place)

    def _make_room(self) -> None:
        waiting = Counter(network for network, _ in self._waiting.values())
        busiest = max(waiting.values())
        last = next(
            place for place, (network, _) in self._waiting.items() if waiting[network] == busiest
        )
        _, leave = self._waiting.pop(last)
        leave()


def network_of(address: str) -> str:
    """Return what stands for whoever has an address: of IPv6 the network that one gets."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return address
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((int(found), _IPV6_NETWORK_BITS), strict=False))
