"""Turns at the encoder: a few at a time, a few more wait, and who comes then is told to come back.

Without a bound every waiting request would hold a thread and its picture, and answers would come
when nobody waits for them any more.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["BusyError", "Turns"]

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
