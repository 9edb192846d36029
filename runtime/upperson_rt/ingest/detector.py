"""What a detector is, how cameras share one, what it may raise, and how it is opened by name."""

import importlib
import operator
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from upperson_rt.arguments import check_name
from upperson_rt.errors import InputError, UppersonError, UsageError
from upperson_rt.extensions import extension_names, load_extension
from upperson_rt.printable import error_text, safe_repr, shortened

Detector: TypeAlias = Callable[[NDArray[np.uint8]], Any]
"""Takes a frame, uint8 **BGR** [H, W, 3], and returns the people in it: rows of x0, y0, x1, y1 and
perhaps a score, in pixels of the frame. None or no rows mean that it finds none."""


@runtime_checkable
class BatchDetector(Protocol):
    """A detector that also takes several frames at once, such as those of several cameras."""

    max_batch: int
    """Most frames that it takes at once, from 1."""

    def __call__(self, frame: NDArray[np.uint8]) -> Any:
        """Detect people in one frame; see `Detector`."""

    def detect_many(self, frames: Sequence[NDArray[np.uint8]]) -> Sequence[Any]:
        """Detect people in 1 to `max_batch` frames, which may differ in size; rows for each."""


def batch_of(detector: Detector) -> int:
    """Return how many frames a detector takes at once: 1, but for a `BatchDetector`."""

    def refusal(found: str) -> InputError:
        message = f"max_batch of a detector must be a whole number from 1: found {found}"
        return InputError(message, code="max_batch_malformed")

    with plugin_boundary(lambda error: refusal(error_text(error))):  # It may be a property.
        most = operator.index(detector.max_batch) if isinstance(detector, BatchDetector) else 1
    if most < 1:
        raise refusal(safe_repr(most))
    return most


class SharedDetector:
    """A detector that cameras call one at a time; a `BatchDetector` takes all waiting frames.

    No frame waits for a batch to fill up: frames that arrive while the detector works form the next
    batch.
    """

    def __init__(self, detector: Detector) -> None:
        self._detector = detector
        self._most = batch_of(detector)
        self._running = threading.Lock()
        self._lock = threading.Lock()
        self._waiting: list[tuple[NDArray[np.uint8], Future[Any]]] = []
        self._closed = False

    def close(self) -> None:
        """Refuse all further calls, also those that wait."""
        self._closed = True

    def detect(self, frame: NDArray[np.uint8]) -> Any:
        """Return the detector's rows for a frame; any thread may call.

        An error of the detector is raised for every frame of its batch.
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
            with self._running:  # The first one works for all that wait.
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
def plugin_boundary(refusal_of: Callable[[BaseException], UppersonError]) -> Iterator[None]:
    """Call a plug-in: whatever it raises comes out as the error that ``refusal_of`` returns.

    That holds for ``SystemExit`` and ``KeyboardInterrupt``, too: a plug-in does not end the
    program. A signal that does come meanwhile does what it always does.
    """
    with _noted_signals() as came:
        try:
            yield
        except BaseException as error:
            if came or (refusal := refusal_of(error)) is error:
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


# --- Detectors by the name that a command line or a program gives them

_FACTORY = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)")
_OPTIONS = {
    "layout": "--detector-layout",
    "person": "--detector-class",
    "min_score": "--detector-score",
    "pixels": "--detector-input",
}


def open_detector(
    name: str,
    layout: str | None = None,
    person: str | None = None,
    min_score: float | None = None,
    threads: int | None = None,
    pixels: str | None = None,
) -> Detector:
    """Return a detector by its name.

    A detector may have the attributes ``identity`` (what its boxes depend on), ``facts`` (for
    ``doctor``; its `str` is shown then), ``warning`` (shown when it is opened) and ``of_one_video``
    (it knows the frames of one video only).

    The name is an extension's (``auto``), a file with an extension's suffix (``FILE.onnx``), or
    ``package.module:factory``, which is called without arguments and returns a detector. Layout,
    the class that is people, the lowest score of a box and the pixels are of networks in files.
    """
    check_name(name, "a detector")
    options: dict[str, Any] = {"layout": layout, "person": person, "min_score": min_score}
    if pixels is not None:  # Extensions of before it may not know it.
        options["pixels"] = pixels
    known = extension_names("detectors")
    kind = name if name in known else Path(name).suffix.lower().removeprefix(".")
    if kind in known:
        made: Detector = load_extension("detectors", kind)(name, **options, threads=threads)
        return made
    factory = _FACTORY.fullmatch(name)
    refuse_options(name, options)
    if factory:
        return _call(*factory.groups())
    expected = f"one of {', '.join(known) or 'those of extensions'}, a file that ends in one of "
    expected += "these, or MODULE:FACTORY of your own"
    message = f"no detector {safe_repr(name)}: expected {expected}"
    raise InputError(message, code="unknown_detector", found=name)


def refuse_options(name: str, options: Mapping[str, object]) -> None:
    """Refuse options that a detector does not take."""
    for option, given in options.items():
        if given is not None and option in _OPTIONS:
            message = f"the detector {safe_repr(name)} does not take {_OPTIONS[option]}"
            raise UsageError(message, code="detector_option_refused", option=_OPTIONS[option])


def _call(module: str, factory: str) -> Detector:
    entry = shortened(f"{module}:{factory}")

    def not_there(error: BaseException) -> InputError:
        message = f"cannot import the detector {entry} ({error_text(error)}): install its package,"
        message += " or name the folder of the module in $PYTHONPATH"
        return InputError(message, code="detector_not_imported", detector=entry)

    def failed(error: BaseException) -> InputError:
        message = f"the detector {entry} fails: {error_text(error)}"
        return InputError(message, code="detector_failed", detector=entry)

    with plugin_boundary(not_there):
        found: Any = importlib.import_module(module)
        for part in factory.split("."):
            found = getattr(found, part)
    with plugin_boundary(failed):
        detector: Detector = found()
    try:
        batch_of(detector)
    except InputError as error:
        message = f"the detector {entry}: {error}"
        raise InputError(message, code=error.code, detector=entry) from error
    if not callable(detector):
        message = (
            f"the detector {entry} makes a {type(detector).__name__}: expected something that is "
            "called with a frame, uint8 BGR [H, W, 3], and returns rows of x0, y0, x1, y1, score"
        )
        raise InputError(message, code="detector_not_callable", detector=entry)
    return detector
