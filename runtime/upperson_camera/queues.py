"""What a pipeline is built of: stages, each a thread, and bounded queues between them."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, Literal, TypeAlias, TypeVar, get_args

from upperson_rt.errors import UsageError
from upperson_rt.printable import safe_repr

T = TypeVar("T")

DropPolicy: TypeAlias = Literal["oldest", "newest", "block"]
"""What a full queue drops: the item that waits longest, the new one, or none (the caller waits)."""

DROP_POLICIES: tuple[DropPolicy, ...] = get_args(DropPolicy)


def known_name(name: object, known: Sequence[T], what: str, code: str) -> T:
    """Return the one of the known names that is given; raise UsageError if none is."""
    for one in known:
        if isinstance(name, str) and name == one:
            return one
    text = f"no {what} {safe_repr(name)}: it is one of {', '.join(map(str, known))}"
    raise UsageError(text, code=code, found=name)


def check_policy(policy: str) -> DropPolicy:
    """Return the policy of that name."""
    return known_name(policy, DROP_POLICIES, "drop policy", "unknown_policy")


def log_camera(
    log: logging.Logger, level: int, camera: str, event: str, text: str, *values: Any, **fields: Any
) -> None:
    """Log a line about a camera, with its name, an event and other fields as data."""
    extra = {"camera": camera, "event": event, **fields}
    log.log(level, f"camera %s: {text}", camera, *values, extra=extra, stacklevel=2)


class BoundedQueue(Generic[T]):
    """First in, first out, for any number of threads; never holds more than ``capacity``.

    An item counts as unfinished until it is dropped or `done` is called for it: `is_idle` also
    covers the items that a consumer works on.
    """

    def __init__(self, capacity: int) -> None:
        assert capacity >= 1  # Checked with the settings.
        self.capacity = capacity
        self._items: deque[T] = deque()
        self._changed = threading.Condition()
        self._unfinished = 0
        self._closed = False

    def put(self, item: T, policy: DropPolicy, wait_s: float | None = None) -> T | None:
        """Add an item; return the dropped one: none, an older item, or the item itself.

        ``wait_s`` is the longest wait for room before the policy decides, for ever if None and the
        policy is ``block``. After `close` it is always the item itself.
        """
        if wait_s is None:
            wait_s = math.inf if policy == "block" else 0.0
        until = time.monotonic() + wait_s
        with self._changed:
            while len(self._items) >= self.capacity and not self._closed:
                left_s = until - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(min(left_s, threading.TIMEOUT_MAX))
            if self._closed:
                return item
            dropped: T | None = None
            if len(self._items) >= self.capacity:
                if policy != "oldest":
                    return item
                dropped = self._items.popleft()
                self._unfinished -= 1
            self._items.append(item)
            self._unfinished += 1
            self._changed.notify_all()
            return dropped

    def get(self, timeout_s: float | None = None) -> T | None:
        """Take the oldest item; None if none comes in time, or the queue is finished."""
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
        """Take all items, oldest first; an empty list if none comes in time."""
        first = self.get(timeout_s)
        if first is None:
            return []
        with self._changed:
            items = [first, *self._items]
            self._items.clear()
            self._changed.notify_all()
            return items

    def done(self, count: int = 1) -> None:
        """Mark taken items as finished."""
        with self._changed:
            self._unfinished -= count
            assert self._unfinished >= 0
            self._changed.notify_all()

    def close(self) -> None:
        """Accept no more items; those that wait can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def clear(self) -> list[T]:
        """Remove and return all items."""
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
        """Whether no item waits or is worked on."""
        return self._unfinished == 0

    @property
    def is_finished(self) -> bool:
        """Whether it is closed and empty."""
        return self._closed and not self._items

    def __len__(self) -> int:
        return len(self._items)


class AbandonedError(BaseException):
    """Ends a detached worker: a thread whose call returned after it had been abandoned."""


class Stage:
    """A thread that works until its input has ended; a subclass implements ``_run``.

    Detectors, sources, encoders, galleries and callbacks may never return, and no thread can be
    stopped from outside. They are called within `_calling`; while such a call lasts, `_abandon`
    detaches the thread. It has no effect after that, and ends when its call returns.
    """

    def __init__(self, name: str, part: str, fail: Callable[[BaseException], None]) -> None:
        """Make the thread."""
        self.part = part
        """What it called last."""
        self._name = name
        self._fail = fail
        self._thread: threading.Thread | None = self._new_thread()
        self._call_began: float | None = None
        self._turn = threading.Lock()  # A call returns, or its thread is detached.

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
        """Whether the thread runs, and was not detached."""
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

    def _abandon(self) -> bool:
        """Detach the thread if it is in a call; return whether it was."""
        with self._turn:
            if self._call_began is None:
                return False
            self._thread = self._call_began = None
            return True

    def _go_on(self) -> None:
        """Continue in another thread, after `_abandon`."""
        self._thread = self._new_thread()
        self._thread.start()

    @contextmanager
    def _calling(self, part: str) -> Iterator[None]:
        """Mark a call of a plug-in."""
        self.part, self._call_began = part, time.monotonic()
        try:
            yield
        finally:
            with self._turn:
                if not self.is_current:
                    raise AbandonedError
                self._call_began = None

    def _new_thread(self) -> threading.Thread:
        return threading.Thread(target=self._guarded, name=self._name, daemon=True)

    def _guarded(self) -> None:
        try:
            self._run()
        except AbandonedError:
            return
        except BaseException as error:
            self._fail(error)

    def _run(self) -> None:
        raise NotImplementedError
