"""The thread that reads a source: reconnects, notices stalls, never waits for what comes after."""

import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.camera.source import Reader, Source, import_cv2
from upperson_rt.errors import InputError

__all__ = ["Capture", "CaptureRules", "CaptureState", "Opener"]

_log = logging.getLogger(__name__)

CaptureState: TypeAlias = Literal[
    "waiting", "connecting", "running", "reconnecting", "ended", "failed", "stopped"
]
Opener: TypeAlias = Callable[[Source, float], Reader]
"""Opens a source with a time limit in seconds; raises InputError if it cannot."""

_MOST_HANGING = 4
"""Threads that may hang in a dead source at a time; then nothing is opened until one comes back."""
_FAR_FROM_END = 0.02
_STALLED = 0.9
"""Share of the time for a stall after which the end of a stream counts as one."""
_STEP_S = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptureRules:
    """How patient a capture is."""

    stall_s: float = 10.0
    """A live source that gives nothing for so long is closed and opened again."""
    first_wait_s: float = 0.5
    """Before the first attempt to reconnect; doubles with each one that fails."""
    longest_wait_s: float = 30.0


class Capture:
    """Reads one source in a thread of its own and hands every picture on.

    A live source is opened again whenever it ends, fails or stalls. `VideoCapture.read` cannot be
    interrupted, so a reader that hangs is left alone, in a thread that ends when the call does.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        rules: CaptureRules,
        opener: Opener,
        deliver: Callable[[NDArray[np.uint8] | None, float, float], None],
        count: Callable[[str], None],
        start_time: float | None,
        realtime: bool,
    ) -> None:
        """Put a capture together; `start` begins.

        Args:
            name: Of the camera, for the log.
            source: What to read.
            rules: How patient to be.
            opener: Opens the source.
            deliver: Gets picture, unix time, and a clock that the wall clock's jumps do not touch;
                may block for a file, not for a live source.
            count: Told ``reconnects``, ``stalls`` and ``resolution_changes``.
            start_time: Unix time of a file's first frame.
            realtime: Read a file no faster than it was taken.
        """
        self.name = name
        self.source = source
        self.state: CaptureState = "waiting"
        self.error: str | None = None
        self._rules = rules
        self._opener = opener
        self._deliver = deliver
        self._count = count
        self._start_time = start_time or 0.0
        self._realtime = realtime
        self._stop = threading.Event()
        self._ended = threading.Event()
        self._hanging: list[threading.Thread] = []
        self._size: tuple[int, int] | None = None
        run = self._run_live if source.is_live else self._run_file
        self._thread = threading.Thread(target=run, name=f"capture {name}", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._thread.start()

    def stop(self) -> None:
        """Ask the thread to end."""
        self._stop.set()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread; one that hangs in its source is left behind."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)

    @property
    def is_over(self) -> bool:
        """Whether no picture will come any more."""
        return self._ended.is_set()

    def _run_file(self) -> None:
        cv2 = import_cv2()
        try:
            reader = self._opener(self.source, self._rules.stall_s)
        except InputError as error:
            self._fail(str(error))
            return
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")
            return
        self.state = "running"
        began = time.monotonic()
        frames = 0
        try:
            position, rate = 0.0, reader.get(cv2.CAP_PROP_FPS)
            expected = reader.get(cv2.CAP_PROP_FRAME_COUNT)
            for index in itertools.count():
                ok, image = reader.read()
                if not ok or self._stop.is_set():
                    break
                frames = index + 1
                told = reader.get(cv2.CAP_PROP_POS_MSEC) / 1000
                if index:  # Broken or missing time stamps: go by the frame rate.
                    position = told if told > position else position + 1 / (rate or 25.0)
                else:
                    position = max(0.0, told)
                if self._realtime and self._stop.wait(max(0, began + position - time.monotonic())):
                    break
                self._hand_on(image, self._start_time + position, position)
        except Exception as error:  # Such as a file that OpenCV cannot go on with.
            self._fail(f"{type(error).__name__}: {error}")
            return
        finally:
            reader.release()
        if self._stop.is_set():
            self._end("stopped")
        elif frames == 0:
            self._fail(f"{self.source.shown} holds no frame that can be read")
        else:
            if frames < expected * (1 - _FAR_FROM_END) and expected < 1e9:
                _log.warning(
                    "%s ends after %d of %d frames: the rest cannot be read",
                    self.source.shown,
                    frames,
                    expected,
                    extra={"camera": self.name, "event": "cut_short"},
                )
            self._end("ended")

    def _run_live(self) -> None:
        wait_s = 0.0
        for attempt in itertools.count():
            if attempt:
                self.state = "reconnecting"
                self._count("reconnects")
            else:
                self.state = "connecting"
            delivered = self._read_live()
            if self._stop.is_set():
                break
            if delivered:
                wait_s = 0.0
            wait_s = min(max(2 * wait_s, self._rules.first_wait_s), self._rules.longest_wait_s)
            self.state = "reconnecting"
            _log.warning(
                "camera %s: %s; opening it again in %.1f s",
                self.name,
                self.error,
                wait_s,
                extra={"camera": self.name, "event": "lost", "wait_s": wait_s},
            )
            if self._stop.wait(wait_s):
                break
        self._end("stopped")

    def _read_live(self) -> bool:
        """Read until the source ends or stalls; return whether it gave any picture."""
        self._hanging = [thread for thread in self._hanging if thread.is_alive()]
        if len(self._hanging) >= _MOST_HANGING:
            self.error = f"{len(self._hanging)} readers hang in {self.source.shown}"
            return False
        session = _Session()
        thread = threading.Thread(
            target=self._read, args=(session,), name=f"read {self.name}", daemon=True
        )
        thread.start()
        # Opening may take as long as a stall, and once more for the first picture.
        while thread.is_alive() and not self._stop.is_set():
            thread.join(_STEP_S)
            if time.monotonic() - session.alive > self._rules.stall_s:
                break
        with session.lock:
            session.abandoned = True
        if thread.is_alive():
            self._hanging.append(thread)
            if self._stop.is_set():
                thread.join(_STEP_S * 5)
            else:
                self._note_stall()
        elif session.stalled:
            self._note_stall()
        elif session.error is not None:
            self.error = session.error
        return session.frames > 0

    def _note_stall(self) -> None:
        self._count("stalls")
        self.error = f"no picture for {self._rules.stall_s:g} s"

    def _read(self, session: "_Session") -> None:
        try:
            reader = self._opener(self.source, self._rules.stall_s)
        except InputError as error:
            session.error = str(error)
            return
        except Exception as error:
            session.error = f"{type(error).__name__}: {error}"
            return
        try:
            session.alive = time.monotonic()
            while not self._stop.is_set():
                ok, image = reader.read()
                with session.lock:  # A reader that was given up must not deliver any more.
                    if session.abandoned or self._stop.is_set():
                        return
                    if not ok:
                        # OpenCV gives up a stream that hangs about when we would, and does not say.
                        silent_s = time.monotonic() - session.alive
                        session.stalled = silent_s >= _STALLED * self._rules.stall_s
                        session.error = "the stream ended"
                        return
                    if session.frames == 0:
                        self.state, self.error = "running", None
                        _log.info(
                            "camera %s: connected to %s",
                            self.name,
                            self.source.shown,
                            extra={"camera": self.name, "event": "connected"},
                        )
                    session.frames += 1
                    session.alive = time.monotonic()
                    self._hand_on(image, time.time(), session.alive)
        except Exception as error:
            session.error = f"{type(error).__name__}: {error}"
        finally:
            reader.release()

    def _hand_on(self, image: NDArray[np.uint8] | None, unix_time: float, clock: float) -> None:
        if image is not None and image.size and image.ndim >= 2:
            size = image.shape[1], image.shape[0]
            if self._size not in (None, size):
                self._count("resolution_changes")
                _log.info(
                    "camera %s: the picture is now %d x %d",
                    self.name,
                    *size,
                    extra={"camera": self.name, "event": "resolution"},
                )
            self._size = size
        self._deliver(image, unix_time, clock)

    def _fail(self, problem: str) -> None:
        self.error = problem
        _log.error(
            "camera %s: %s", self.name, problem, extra={"camera": self.name, "event": "failed"}
        )
        self._end("failed")

    def _end(self, state: CaptureState) -> None:
        self.state = state
        self._ended.set()


class _Session:
    """One connection to a live source."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.alive = time.monotonic()
        self.frames = 0
        self.error: str | None = None
        self.stalled = False
        self.abandoned = False
