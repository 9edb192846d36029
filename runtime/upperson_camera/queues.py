"""What a pipeline is built of: stages, each a thread, and bounded queues between them."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, Literal, TypeAlias, TypeVar, get_args

from upperson_rt.errors import UsageError
from upperson_rt.printable import shown

__all__ = [
    "DROP_POLICIES",
    "BoundedQueue",
    "DropPolicy",
    "LeftBehindError",
    "Stage",
    "check_policy",
]

T = TypeVar("T")

DropPolicy: TypeAlias = Literal["oldest", "newest", "block"]
"""What gives way when a queue is full: what waits longest, what comes, or nobody (wait)."""

DROP_POLICIES: tuple[DropPolicy, ...] = get_args(DropPolicy)


def check_policy(policy: str) -> DropPolicy:
    """Return the policy of that name; raise UsageError if there is none."""
    for known in DROP_POLICIES:
        if isinstance(policy, str) and policy == known:
            return known
    raise UsageError(f"no drop policy {shown(policy)}: it is one of {', '.join(DROP_POLICIES)}")


class BoundedQueue(Generic[T]):
    """First in, first out, for any number of threads; never holds more than ``capacity``.

    What was put in counts as unfinished until it was dropped or `done` was called for it, so that
    `is_idle` also covers what a consumer holds in its hands.
    """

    def __init__(self, capacity: int) -> None:
        assert capacity >= 1  # Checked with the settings.
        self.capacity = capacity
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._unfinished = 0
        self._closed = False

    def put(self, item: T, policy: DropPolicy) -> T | None:
        """Add an item; return what was dropped for it: nothing, an older item, or the item itself.

        After `close` it is always the item itself.
        """
        with self._changed:
            if policy == "block":
                while len(self._items) >= self.capacity and not self._closed:
                    self._changed.wait()
            if self._closed:
                return item
            dropped: T | None = None
            if len(self._items) >= self.capacity:
                if policy == "newest":
                    return item
                dropped = self._items.popleft()
                self._unfinished -= 1
            self._items.append(item)
            self._unfinished += 1
            self._changed.notify_all()
            return dropped

    def get(self, timeout_s: float | None = None) -> T | None:
        """Take the oldest item; None if there is none in time, or never will be any."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        with self._changed:
            while not self._items:
                left = None if until is None else until - time.monotonic()
                if self._closed or (left is not None and left <= 0):
                    return None
                self._changed.wait(left)
            item = self._items.popleft()
            self._changed.notify_all()
            return item

    def get_all(self, timeout_s: float) -> list[T]:
        """Take everything that waits, oldest first; nothing if nothing comes in time."""
        first = self.get(timeout_s)
        if first is None:
            return []
        with self._changed:
            items = [first, *self._items]
            self._items.clear()
            self._changed.notify_all()
            return items

    def done(self, count: int = 1) -> None:
        """Say that items that were taken out are dealt with."""
        with self._changed:
            self._unfinished -= count
            assert self._unfinished >= 0
            self._changed.notify_all()

    def close(self) -> None:
        """Let nothing in any more; what waits can still be taken out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def clear(self) -> list[T]:
        """Take everything out at once."""
        with self._changed:
            items = list(self._items)
            self._items.clear()
            self._unfinished -= len(items)
            self._changed.notify_all()
            return items

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits and nothing is being worked on."""
        return self._unfinished == 0

    @property
    def is_finished(self) -> bool:
        """Whether it is closed and empty."""
        return self._closed and not self._items

    def __len__(self) -> int:
        return len(self._items)


class LeftBehindError(BaseException):
    """Ends a thread whose call came back after it had been left behind; nobody else sees it."""


class Stage:
    """A thread that works until what it works on has ended; derive from it and write ``_run``.

    Detectors, sources, encoders, galleries and callbacks may never return, and no thread can be
    stopped from outside. They are called in `_calling`; while such a call lasts, `leave` gives its
    thread up. What that thread does afterwards has no effect any more: it ends.
    """

    def __init__(self, name: str, part: str, fail: Callable[[BaseException], None]) -> None:
        """Make the thread.

        Args:
            name: Of the thread.
            part: What it calls first, such as ``detector``.
            fail: Told the error that ends it, if one does.
        """
        self.part = part
        """What it called last."""
        self._name = name
        self._fail = fail
        self._thread: threading.Thread | None = self._new_thread()
        self._call_began: float | None = None
        self._turn = threading.Lock()  # Either a call comes back, or its thread is left behind.

    def start(self) -> None:
        """Begin to work."""
        assert self._thread is not None
        self._thread.start()

    def join(self, timeout_s: float | None = None) -> None:
        """Wait for the end, if it was started at all."""
        thread = self._thread
        if thread is not None and thread.ident is not None:
            thread.join(timeout_s)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs, and was not left behind."""
        thread = self._thread
        return thread is not None and thread.is_alive()

    @property
    def is_current(self) -> bool:
        """Whether the calling thread is the stage's."""
        return threading.current_thread() is self._thread

    def call_s(self, since: float) -> float:
        """Return for how long a call has lasted, counted from ``since`` on `time.monotonic`."""
        began = self._call_began
        return 0.0 if began is None else time.monotonic() - max(began, since)

    def _leave(self) -> bool:
        """Leave the thread behind if it is in a call; return whether it was."""
        with self._turn:
            if self._call_began is None:
                return False
            self._thread = self._call_began = None
            return True

    def _go_on(self) -> None:
        """Work on in another thread, after `_leave`."""
        self._thread = self._new_thread()
        self._thread.start()

    @contextmanager
    def _calling(self, part: str) -> Iterator[None]:
        """Mark a call of what is not ours.

        Raises:
            LeftBehindError: It came back, or raised something, after it had been left behind.
        """
        self.part, self._call_began = part, time.monotonic()
        try:
            yield
        finally:
            with self._turn:
                if not self.is_current:
                    raise LeftBehindError
                self._call_began = None

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._guarded, name=self._name, daemon=True)

    def _guarded(self) -> None:
        try:
            self._run()
        except LeftBehindError:
            return
        except BaseException as error:
            self._fail(error)

    def _run(self) -> None:
        raise NotImplementedError
