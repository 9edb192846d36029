"""Those who are waited for without being known: a bounded number, and room for whoever comes next.

Where all places are taken, whoever has been waited for the longest gives way, of the network that
most of them come from. So nobody is kept out by those who come first and never finish, from however
many places they come, as long as he is quicker than they are many.
"""

import ipaddress
from collections import Counter
from collections.abc import Callable

__all__ = ["Crowd", "network_of"]

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
