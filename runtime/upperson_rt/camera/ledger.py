"""Counts of everything that enters, leaves or is dropped, and how long things take."""

import math
import threading
from bisect import bisect_left
from collections import Counter

__all__ = ["BOUNDS_S", "Durations", "Ledger"]

BOUNDS_S = tuple(0.001 * 2 ** (step / 4) for step in range(81))
"""Upper edges of the classes of `Durations`: 1 ms to 17 minutes, 19 % apart."""


class Durations:
    """A histogram of durations: constant memory, however many there are."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum_s = 0.0
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        """Count one duration; negative ones count as 0."""
        with self._lock:
            self._counts[bisect_left(BOUNDS_S, seconds)] += 1
            self._sum_s += max(0.0, seconds)

    def quantile_s(self, share: float) -> float | None:
        """Return the upper edge of the class that holds a quantile; None if nothing was counted.

        Durations beyond the last edge give infinity.
        """
        with self._lock:
            counts = list(self._counts)
        wanted, seen = share * sum(counts), 0
        if not sum(counts):
            return None
        for edge, count in zip((*BOUNDS_S, math.inf), counts, strict=True):
            seen += count
            if count and seen >= wanted:
                return edge
        raise AssertionError("a quantile lies within its histogram")

    def snapshot(self) -> tuple[list[int], float]:
        """Return the counts of the classes, the last one unbounded, and the sum in seconds."""
        with self._lock:
            return list(self._counts), self._sum_s


class Ledger:
    """Counters by camera and name; safe to use from all threads.

    Names of what is dropped are ``frames.dropped.<reason>`` and ``crops.dropped.<reason>``.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, Counter[str]] = {}

    def count(self, camera: str, name: str, number: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts.setdefault(camera, Counter())[name] += number

    def of(self, camera: str) -> Counter[str]:
        """Return a copy of a camera's counters as of one moment."""
        with self._lock:
            return Counter(self._counts.get(camera, Counter()))
