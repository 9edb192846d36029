"""Request queue of the encoder, and concurrency limits of connections and requests.

A few requests run, a few more wait, and any further one is refused: otherwise every waiting request
would hold a thread and its picture, and its client would give up first. The queue is round robin
over clients, so that one with many requests, or a long one, delays another by a request or two. In
a full queue the client with most waiting requests gives way to one with fewer.
"""

import asyncio
import ipaddress
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

CLIENT: ContextVar[str] = ContextVar("CLIENT", default="")
"""The client whose request this thread or task works on."""

_USUAL_S = 0.1
"""Expected duration of a request until one was measured."""


class BusyError(Exception):
    """The queue is full; says after how many seconds to try again."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"the encoder is busy: try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class _Waiting(threading.Event):
    """A request that waits; set when it may run, or is refused."""

    is_refused = False

    def __init__(self, is_new: bool) -> None:
        super().__init__()
        self.is_new = is_new
        """Whether it has not begun; `RequestQueue.pause` interrupts others."""


class RequestQueue:
    """A bounded queue, round robin over clients. Safe to use from several threads."""

    def __init__(self, running: int = 1, waiting: int = 9) -> None:
        self._free, self._most = running, running + waiting
        self._queue: OrderedDict[str, deque[_Waiting]] = OrderedDict()
        """Waiting requests by client; the client whose turn is next comes first."""
        self._lock = threading.Lock()
        self.waiting = 0
        """Requests that run or wait."""
        self._usual_s = _USUAL_S
        self.served = 0
        """Requests that had a slot."""
        self.refused = 0
        """Requests refused because the queue was full."""
        self.busy_s = 0.0
        """Seconds of all slots together."""

    @contextmanager
    def slot(self) -> Iterator[None]:
        """Wait for a slot, and hold it."""
        with self._lock:
            if self.waiting >= self._most and not self._evict():
                raise self._refusal()
            self.waiting += 1
            own = self._enqueue(is_new=True)
        own.wait()
        if own.is_refused:
            raise self._refusal()
        began = time.monotonic()
        try:
            yield
        finally:
            took = time.monotonic() - began
            with self._lock:
                self.waiting -= 1
                self.served += 1
                self.busy_s += took
                self._usual_s += (took - self._usual_s) / 8
                self._free += 1
                self._dispatch()

    def pause(self) -> None:
        """Let other clients' requests run between two parts of a long one."""
        with self._lock:
            client = CLIENT.get()
            if not self._queue.keys() - {client}:
                return
            if client in self._queue:
                self._queue.move_to_end(client)
            self._free += 1
            own = self._enqueue(is_new=False)
        began = time.monotonic()
        own.wait()
        with self._lock:
            self.busy_s -= time.monotonic() - began

    def _refusal(self) -> BusyError:
        self.refused += 1
        return BusyError(max(1, round(self.waiting * self._usual_s)))

    def _evict(self) -> bool:
        """Refuse the newest request of the client with most waiting ones, if this one has fewer."""
        most = max(self._queue.values(), key=len, default=deque())
        newest = next((one for one in reversed(most) if one.is_new), None)
        if newest is None or len(most) <= len(self._queue.get(CLIENT.get(), ())) + 1:
            return False
        most.remove(newest)
        self.waiting -= 1
        newest.is_refused = True
        newest.set()
        return True

    def _enqueue(self, is_new: bool) -> _Waiting:
        """Return the event that is set when a slot is free."""
        own = _Waiting(is_new)
        self._queue.setdefault(CLIENT.get(), deque()).append(own)
        self._dispatch()
        return own

    def _dispatch(self) -> None:
        """Give free slots to waiting requests, one client after the other."""
        while self._free and self._queue:
            client, waiting = self._queue.popitem(last=False)
            waiting.popleft().set()
            self._free -= 1
            if waiting:
                self._queue[client] = waiting


class Turns:
    """Requests that run at a time, round robin over clients. Belongs to one event loop."""

    def __init__(self, running: int) -> None:
        self._free = running
        self._queue: OrderedDict[Hashable, deque[asyncio.Future[None]]] = OrderedDict()

    async def begin(self, client: Hashable) -> None:
        """Wait until a request of a client may run; `end` gives its place to the next one."""
        own = asyncio.get_running_loop().create_future()
        self._queue.setdefault(client, deque()).append(own)
        self._dispatch()
        try:
            await own
        except asyncio.CancelledError:
            if own.done() and not own.cancelled():  # Its turn came meanwhile.
                self.end()
            raise

    def end(self) -> None:
        """End a request."""
        self._free += 1
        self._dispatch()

    def _dispatch(self) -> None:
        while self._free and self._queue:
            client, waiting = self._queue.popitem(last=False)
            if not (own := waiting.popleft()).done():  # Its client may have gone.
                own.set_result(None)
                self._free -= 1
            if waiting:
                self._queue[client] = waiting


_IPV6_NETWORK_BITS = 64
"""A subscriber gets a network of this length."""


class ConcurrencyLimit:
    """A bounded number of places, fair to networks. Belongs to one event loop.

    Where all are taken, the oldest holder that is not pinned is evicted, of the network that holds
    most of them. So clients that begin requests and never finish them keep no other client out.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: dict[object, tuple[str, Callable[[], None]]] = {}
        """Oldest first: network, and what evicts the holder."""
        self._pinned: set[object] = set()

    def __len__(self) -> int:
        return len(self._waiting) + len(self._pinned)

    def acquire(self, network: str, evict: Callable[[], None]) -> object | None:
        """Take a place for a network; return its handle, or None if every holder is pinned.

        ``evict`` is called when another client takes the place.
        """
        if len(self) >= self._most:
            if not self._waiting:
                return None
            waiting = Counter(network for network, _ in self._waiting.values())
            busiest = max(waiting.values())
            oldest = next(
                one for one, (name, _) in self._waiting.items() if waiting[name] == busiest
            )
            self._waiting.pop(oldest)[1]()
        place = object()
        self._waiting[place] = network, evict
        return place

    def pin(self, place: object) -> None:
        """Keep a holder from being evicted until it releases its place."""
        if self._waiting.pop(place, None) is not None:
            self._pinned.add(place)

    def unpin(self, place: object, network: str, evict: Callable[[], None]) -> None:
        """Let a pinned holder be evicted again, as if it took its place now."""
        if place in self._pinned:
            self._pinned.discard(place)
            self._waiting[place] = network, evict

    def release(self, place: object) -> None:
        """Release a place; an evicted one is ignored."""
        self._waiting.pop(place, None)
        self._pinned.discard(place)


def network_of(address: str) -> str:
    """Return the network that counts as one client: an IPv4 address, or an IPv6 /64."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return address
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((int(found), _IPV6_NETWORK_BITS), strict=False))
