"""What a detector is, how cameras that share one call it, and what it may raise."""

import operator
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError, UppersonError, UsageError
from upperson_rt.printable import error_text, shown

__all__ = ["BatchDetector", "Detector", "Turns", "anybodys_code", "batch_of"]

Detector: TypeAlias = Callable[[NDArray[np.uint8]], Any]
"""Takes a frame, uint8 **BGR** [H, W, 3], and returns the people in it: rows of x0, y0, x1, y1 and
perhaps a score, in pixels of the frame. None or no rows mean nobody."""


@runtime_checkable
class BatchDetector(Protocol):
    """A detector that also looks at several frames at once, such as those of several cameras."""

    max_batch: int
    """Most frames that it takes at once, from 1."""

    def __call__(self, frame: NDArray[np.uint8]) -> Any:
        """Look at one frame; see `Detector`."""

    def detect_many(self, frames: Sequence[NDArray[np.uint8]]) -> Sequence[Any]:
        """Look at 1 to `max_batch` frames, which may differ in size; one answer for each."""


def batch_of(detector: Detector) -> int:
    """Return how many frames a detector takes at once: 1, but for a `BatchDetector`.

    Raises:
        InputError: It says something else than a whole number from 1.
    """

    def told(error: BaseException) -> InputError:
        return InputError(
            f"max_batch of a detector must be a whole number from 1: {error_text(error)}"
        )

    with anybodys_code(told):  # It may be a property.
        most = operator.index(detector.max_batch) if isinstance(detector, BatchDetector) else 1
    if most < 1:
        raise InputError(
            f"max_batch of a detector must be a whole number from 1, found {shown(most)}"
        )
    return most


class Turns:
    """Cameras that share a detector take turns; a `BatchDetector` takes all that wait at once.

    Nobody waits for a batch to fill up: while the detector works, frames of other cameras come in,
    and the next turn takes them together.
    """

    def __init__(self, detector: Detector) -> None:
        """Have a detector called.

        Raises:
            InputError: See `batch_of`.
        """
        self._detector = detector
        self._most = batch_of(detector)
        self._running = threading.Lock()
        self._lock = threading.Lock()
        self._waiting: list[tuple[NDArray[np.uint8], Future[Any]]] = []
        self._closed = False

    def close(self) -> None:
        """Have nobody call the detector any more, not even who waits for a turn."""
        self._closed = True

    def detect(self, frame: NDArray[np.uint8]) -> Any:
        """Return what the detector finds in a frame; any thread may call.

        What the detector raises is raised for every frame of its batch.

        Raises:
            UsageError: It was closed meanwhile.
        """
        detector = self._detector
        if self._most == 1 or not isinstance(detector, BatchDetector):
            with self._running:
                self._check_open()
                return detector(frame)
        answer: Future[Any] = Future()
        with self._lock:
            self._waiting.append((frame, answer))
        while not answer.done():
            with self._running:  # Whoever comes first works for all who wait.
                if not answer.done():
                    self._check_open()
                    self._run(detector)
        return answer.result()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("the detector is not used any more: the pipeline has ended")

    def _run(self, detector: BatchDetector) -> None:
        with self._lock:
            batch = self._waiting[: self._most]
            del self._waiting[: self._most]
        try:
            found = detector.detect_many([frame for frame, _ in batch])
            for (_, answer), boxes in zip(batch, found, strict=True):
                answer.set_result(boxes)
        except BaseException as error:
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)


@contextmanager
def anybodys_code(told: Callable[[BaseException], UppersonError]) -> Iterator[None]:
    """Call what is not ours: whatever it raises comes out as the error that ``told`` returns.

    That holds for ``SystemExit`` and ``KeyboardInterrupt``, too: a detector does not end the
    program. A signal that does come meanwhile does what it always does.
    """
    with _noted_signals() as came:
        try:
            yield
        except BaseException as error:
            if came or (refusal := told(error)) is error:
                raise
            raise refusal from error


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Give a list of the signals that come; only the main thread ever raises what they mean."""
    came: list[int] = []
    handlers: dict[signal.Signals, tuple[Any, Any]] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.getsignal(number)
            if callable(before):
                handlers[number] = before, _noting(came, before)
    for number, (_, noting) in handlers.items():
        signal.signal(number, noting)
    try:
        yield came
    finally:
        for number, (before, noting) in handlers.items():
            if signal.getsignal(number) is noting:  # Else a handler has set another one.
                signal.signal(number, before)


def _noting(came: list[int], handler: Callable[..., Any]) -> Callable[..., Any]:
    def note(number: int, frame: FrameType | None) -> Any:
        came.append(number)
        return handler(number, frame)

    return note
