"""Turns at the encoder: a few at a time, a few more wait, and who comes then is told to come back.

Without a bound every waiting request would hold a thread and its picture, and answers would come
when nobody waits for them any more.
"""

import ipaddress
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = [
    "BusyError",
    "Crowd",
    "Turns",
    "network_of",
]

_USUAL_S = 0.1
"""What a turn takes until one has been measured."""


class BusyError(Exception):
    """No room to wait; says after how many seconds there may be."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the encoder is busy: try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Turns:
    """A bounded queue: who comes first is first. Safe to use from several threads."""

    def __init__(self, running: int = 1, waiting: int = 8) -> None:
        """Let so many run at a time, and so many wait."""
        self._free = running
        self._queue: deque[threading.Event] = deque()
        """Those who wait, each for its event; a semaphore would let others pass them."""
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
            own = threading.Event()
            if self._free:
                self._free -= 1
                own.set()
            else:
                self._queue.append(own)
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
                if self._queue:
                    self._queue.popleft().set()  # The turn goes on; it is never free between.
                else:
                    self._free += 1


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
