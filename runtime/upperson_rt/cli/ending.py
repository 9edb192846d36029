"""How a process ends: on a first and a second signal, and beside threads that never return.

Python runs the handlers of signals in the main thread, between two steps of its own. A step of
training, an export or a search may spend minutes in native code until then, so a thread listens as
well, and ends the process where the main thread does not. Results appear by renaming and rows by
transactions: ending at any moment leaves no half of either. Temporary folders go the next time.
"""

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

__all__ = ["end", "ending_gently", "how_it_ended", "leave_open", "listen"]

_GRACE_S = 5.0
"""How long a command may clean up; service managers wait ten seconds and more."""
_LATE = f"it did not end by itself within {_GRACE_S:g} s"
_AT_ONCE = "a second signal ended it at once, and what was not finished is lost"
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_SHOW_CURSOR = b"\n\x1b[?25h"

_left_open: list[object] = []
_saying = threading.Lock()


class _Terminated(KeyboardInterrupt):
    """SIGTERM: a command cleans up after it as after Ctrl-C."""


class _State:
    """What the listening thread has to know."""

    def __init__(self) -> None:
        self.listening = False
        self.gentle = False
        """Whether the first signal is a request that takes its time."""


_state = _State()


def how_it_ended(error: KeyboardInterrupt) -> tuple[str, int]:
    """Return the word for what ended a command, and its exit code: 128 + the signal's number."""
    number = signal.SIGTERM if isinstance(error, _Terminated) else signal.SIGINT
    return _WORDS[number], 128 + number


def listen() -> None:
    """Have SIGTERM end this process as Ctrl-C does, and both in time, whatever it is doing."""
    signal.signal(signal.SIGTERM, _terminate)
    if sys.platform == "win32":  # Pipes cannot be told of signals there.
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=_forget)
    _state.listening = True
    threading.Thread(target=_watch, args=(reading,), name="signals", daemon=True).start()


@contextmanager
def ending_gently() -> Iterator[list[int]]:
    """Give a list that the first SIGINT or SIGTERM is put into; the second ends the process.

    That happens at once, also while the main thread is in native code.
    """
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            _end_now(number, _AT_ONCE)

    before = {number: signal.signal(number, note) for number in _WORDS}
    _state.gentle = True
    try:
        yield received
    finally:
        _state.gentle = False
        for number, handler in before.items():
            signal.signal(number, handler)
        if received and _state.listening:  # What is left to do has its time, too.
            rest = threading.Timer(_GRACE_S, _end_now, (received[0], _LATE))
            rest.daemon = True
            rest.start()


def leave_open(*hanging: object) -> None:
    """Have the process end without closing what hangs, and without waiting for its threads."""
    _left_open.append(hanging)


def end(code: int) -> NoReturn:
    """End the process.

    After a signal, and beside what was left open, that happens without Python's own end: it would
    wait for threads, may crash beside them, and takes seconds to free a model.
    """
    if not _left_open and code - 128 not in _WORDS:
        sys.exit(code)
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # Who reads it may have gone.
            stream.flush()
    _leave(code)


def _leave(code: int) -> NoReturn:
    # Processes that load pictures would notice within seconds; nobody else's are among them.
    if (multiprocessing := sys.modules.get("multiprocessing")) is not None:
        for child in multiprocessing.active_children():
            child.terminate()
    os._exit(code)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # A second one would cut the cleaning up short.
    raise _Terminated


def _watch(reading: int) -> None:
    """Count signals as they come in; end the process when its time is up."""
    until, ending, gentle = float("inf"), 0, 0
    while True:
        left = None if until == float("inf") else max(0.0, until - time.monotonic())
        if not select.select([reading], [], [], left)[0]:
            _end_now(ending, _LATE)
        number = os.read(reading, 1)[0]
        if number not in _WORDS:
            continue
        gentle = gentle + 1 if _state.gentle else 0
        if gentle > 1:
            _end_now(number, _AT_ONCE)
        if not gentle and until == float("inf"):
            until, ending = time.monotonic() + _GRACE_S, number


def _end_now(number: int, why: str) -> NoReturn:
    if _saying.acquire(blocking=False):
        _say(number, why)
    else:
        time.sleep(1)  # Another thread says it, and ends the process then.
    _leave(128 + number)


def _say(number: int, why: str) -> None:
    said = f"error: {_WORDS[signal.Signals(number)]}: {why}\n".encode()
    if os.isatty(2):
        said = _SHOW_CURSOR + said  # A progress display may have hidden it.
    with suppress(OSError):  # Who reads it may have gone,
        if select.select([], [2], [], 0)[1]:  # or hang, too.
            os.write(2, said)


def _forget() -> None:
    """Let a forked process, such as one that loads pictures, end by signals as usual."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
