"""The thread that reads a source: reconnects, notices stalls, never waits for what comes after."""

import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_camera.decoding import ERRORS_EVERY_S
from upperson_camera.frames import as_bgr
from upperson_camera.queues import Stage, log_camera
from upperson_camera.recorder import Recorder
from upperson_camera.settings import CameraSettings, CaptureRules
from upperson_camera.source import Reader, import_cv2
from upperson_rt.errors import InputError
from upperson_rt.printable import count_of, error_text, get_logger

_log = get_logger(__name__)

CaptureState: TypeAlias = Literal[
    "waiting", "connecting", "running", "reconnecting", "ended", "failed", "stopped"
]

_MOST_HANGING = 4
"""Readers that may be stuck at a time; then nothing is opened until one returns."""
_FAR_FROM_END = 0.02
_STALLED = 0.9
"""Share of ``stall_s`` of silence from which the end of a stream counts as a stall."""
_STEP_S = 0.1
_PATIENCE_S = 3.0
"""Longest call of a source after `Capture.stop`; then it is abandoned."""
_USUAL_RATE = 25.0
"""Pictures a second of a file without times and rate."""
_BLANK_S = 10.0
"""Frames of one colour for so long are reported."""
_BLANK_LEVELS = 2
"""Most difference from the first pixel's values in a frame of one colour."""


class Capture(Stage):
    """Reads the source of a camera in a thread of its own and delivers every picture.

    A live source is opened again whenever it ends, fails or stalls. `Reader.read` cannot be
    interrupted: a stuck reader is abandoned in a thread that ends when the call returns.
    """

    def __init__(
        self,
        camera: CameraSettings,
        rules: CaptureRules,
        deliver: Callable[[NDArray[np.generic], float, float], None],
        count: Callable[[str], None],
        recorder: Recorder | None = None,
    ) -> None:
        super().__init__(
            f"capture {camera.name}", "source", lambda error: self._give_up(_problem(error))
        )
        assert camera.source is not None
        self.state: CaptureState = "waiting"
        self.error: str | None = None
        self._camera = camera
        self._source = camera.source
        self._rules = rules
        self._deliver = deliver
        self._count = count
        self._recorder = recorder
        self._stop = threading.Event()
        self._patience_s = _PATIENCE_S
        self._ended = threading.Event()
        self._hanging: list[threading.Thread] = []
        self._outage: _Outage | None = None
        self._size: tuple[int, int] | None = None
        self._only_blank = True
        self._blank_since: float | None = None
        """Clock of the first of the frames of one colour in a row."""
        self._blank_reported = False
        self._errors_logged: dict[int, float] = {}
        """Clock of the last line about the decoder, by level."""
        self._errors_since = self._errors_total = 0

    def stop(self, patience_s: float = _PATIENCE_S) -> None:
        """Ask the thread to end; one that is stuck in its source is abandoned."""
        self._patience_s = min(patience_s, _PATIENCE_S)
        self._stop.set()

    def abandon_stuck(self, stopped: float) -> None:
        """Abandon a stuck file; ``stopped`` is on `time.monotonic`.

        A live source has threads of its own for calls that may be stuck.
        """
        if not self._source.is_live and self.call_s(stopped) > self._patience_s and self._abandon():
            self._give_up(f"{self._source.shown} did not answer at the end", "source_stuck")

    @property
    def is_over(self) -> bool:
        """Whether it delivers no more pictures."""
        return self._ended.is_set()

    def _run(self) -> None:
        if self._source.is_live:
            self._run_live()
        else:
            self._run_file()

    def _run_file(self) -> None:
        with self._calling("source"):
            reader = self._camera.opener(self._source, self._rules.stall_s)
        try:
            self.state = "running"
            with self._recording(reader):
                frames, unreadable, last_error = self._play(reader)
        finally:
            with self._calling("source"):
                reader.close()
        if self._stop.is_set():
            self._end("stopped")
        elif frames == 0:
            text = f"{self._source.shown} holds no frame that can be read"
            self._give_up(f"{text}: {last_error}" if last_error else text)
        elif self._only_blank:
            which = "the only frame" if frames == 1 else f"each of the {frames} frames"
            text = f"{which} of {self._source.shown} has one colour only, such as black"
            self._give_up(text, "source_blank")
        else:
            is_short = frames < reader.frame_count * (1 - _FAR_FROM_END)
            if is_short and (self._errors_total or not reader.is_count_estimated):
                text = "%s ends after %d of %d frames: the rest cannot be read"
                shown, count = self._source.shown, reader.frame_count
                self._log(logging.WARNING, "cut_short", text, shown, frames, count)
            if self._errors_total:
                self._log_damage(unreadable, frames + unreadable)
            self._end("ended")

    def _play(self, reader: Reader) -> tuple[int, int, str | None]:
        """Deliver the frames of a file.

        Returns:
            The number of frames that can be decoded, that of the others, and the last error.
        """
        began, position_s, frames, readable = time.monotonic(), 0.0, 0, 0
        last_error: str | None = None
        while not self._stop.is_set():
            with self._calling("source"):
                image = reader.read()
                given_s = 0.0 if image is None else reader.position_s
                errors = reader.take_errors()
            last_error = self._note_errors(errors, bool(readable)) or last_error
            if image is None:
                break
            readable += image.size > 0
            if frames == 0:
                position_s = max(0.0, given_s)
            elif given_s > position_s:
                position_s = given_s
            else:  # Broken or missing time stamps: go by the frame rate.
                position_s += 1 / (reader.frame_rate or _USUAL_RATE)
            frames += 1
            if self._camera.realtime:
                early_s = began + position_s - time.monotonic()
                if self._stop.wait(max(0.0, early_s)):
                    break
            self._deliver_frame(image, (self._camera.start_time or 0.0) + position_s, position_s)
        return readable, frames - readable, last_error

    def _log_damage(self, unreadable: int, frames: int) -> None:
        text = "%s may be damaged: %s of the decoder, %d of %d frames cannot be decoded"
        errors = count_of(self._errors_total, "error")
        given = self._source.shown, errors, unreadable, frames
        fields = {"errors": self._errors_total, "unreadable": unreadable}
        self._log(logging.WARNING, "damaged", text, *given, **fields)

    def _run_live(self) -> None:
        wait_s = 0.0
        for attempt in itertools.count():
            self.state = "reconnecting" if attempt else "connecting"
            if attempt:
                self._count("reconnects")
            delivered = self._read_live()
            if self._stop.is_set():
                break
            if delivered:
                wait_s = 0.0
                self._count("outages")
            wait_s = min(max(2 * wait_s, self._rules.first_wait_s), self._rules.longest_wait_s)
            self.state = "reconnecting"
            self._log_loss(wait_s)
            if self._stop.wait(wait_s):
                break
        if any(thread.is_alive() for thread in self._hanging):
            self.error = f"{self._source.shown} did not answer at the end"
            self._count("failures.source_stuck")
            self._log(logging.ERROR, "stuck", "%s", self.error)
        self._end("stopped")

    def _log_loss(self, wait_s: float) -> None:
        """Warn once that the source is lost, and again if the reason changes."""
        reason, outage = self.error or "nothing came", self._outage
        if outage is None:
            outage = self._outage = _Outage(time.monotonic())
            text = "%s; it is opened again until it is back, the first time in %.1f s"
        else:
            text = "%s; opening it again in %.1f s"
        level = logging.INFO if reason == outage.reason else logging.WARNING
        outage.reason = reason
        outage.attempts += 1
        self._log(level, "lost", text, reason, wait_s, wait_s=wait_s)

    def _log_connection(self) -> None:
        """Log that the source is connected, or is back."""
        outage, self._outage = self._outage, None
        if outage is None:
            self._log(logging.INFO, "connected", "connected to %s", self._source.shown)
            return
        lasted_s = time.monotonic() - outage.began
        text = "is back after %.0f s, at attempt %d"
        level = logging.WARNING  # That of the loss.
        self._log(level, "back", text, lasted_s, outage.attempts, lasted_s=lasted_s)

    def _log(self, level: int, event: str, text: str, *values: object, **fields: object) -> None:
        log_camera(_log, level, self._camera.name, event, text, *values, **fields)

    def _read_live(self) -> bool:
        """Read until the source ends or stalls; return whether there was a picture."""
        self._hanging = [thread for thread in self._hanging if thread.is_alive()]
        if len(self._hanging) >= _MOST_HANGING:
            self.error = f"{len(self._hanging)} readers hang in {self._source.shown}"
            return False
        session = _Session(time.monotonic())
        thread = threading.Thread(
            target=self._read, args=(session,), name=f"read {self._camera.name}", daemon=True
        )
        thread.start()
        # Opening may take as long as a stall, and once more for the first picture.
        while thread.is_alive() and not self._stop.is_set():
            thread.join(_STEP_S)
            if time.monotonic() - session.alive > self._rules.stall_s:
                break
        if self._stop.is_set():  # A new call may return; an old one hardly will.
            silent_s = time.monotonic() - session.alive
            thread.join(max(min(5 * _STEP_S, self._patience_s), self._patience_s - silent_s))
        with session.lock:
            session.abandoned = True
        if thread.is_alive():
            self._hanging.append(thread)
            if not self._stop.is_set():
                self._note_stall(session)
        elif session.end is not None:
            raise session.end  # Such as SystemExit: the camera fails.
        elif session.stalled:
            self._note_stall(session)
        elif session.error is not None:
            self.error = session.error
        return session.frames > 0

    @contextmanager
    def _recording(self, reader: Reader) -> Iterator[None]:
        """Keep the packets of a reader meanwhile, if clips are wanted."""
        if self._recorder is None:
            yield
            return
        recording = self._recorder.begin()
        reader.on_packet = recording.put
        try:
            yield
        finally:
            recording.end()

    def _note_stall(self, session: "_Session") -> None:
        self._count("stalls")
        self.error = f"no picture for {self._rules.stall_s:g} s"
        if session.undecodable:
            self.error += ", only some that could not be decoded"

    def _read(self, session: "_Session") -> None:
        try:
            reader = self._camera.opener(self._source, self._rules.stall_s)
            try:
                session.alive = time.monotonic()
                with self._recording(reader):
                    while not self._stop.is_set() and self._read_one(reader, session):
                        pass
            finally:
                reader.close()
        except Exception as error:
            session.error = _problem(error)
        except BaseException as error:
            session.end = error

    def _read_one(self, reader: Reader, session: "_Session") -> bool:
        """Read and deliver one picture; return whether to go on."""
        image, errors = reader.read(), reader.take_errors()
        with session.lock:  # An abandoned reader delivers nothing more.
            if session.abandoned or self._stop.is_set():
                return False
            self._note_errors(errors, bool(session.frames))
            silent_s = time.monotonic() - session.alive
            if image is None:
                # A reader may itself give up a silent stream, shortly before we would.
                session.stalled = silent_s >= _STALLED * self._rules.stall_s
                session.error = "the stream ended"
                return False
            if not image.size:  # No sign of life: a camera may send only undecodable pictures.
                session.undecodable += 1
                session.stalled = silent_s > self._rules.stall_s
                self._deliver_frame(image, time.time(), time.monotonic())
                return not session.stalled
            if session.frames == 0:
                self.state, self.error = "running", None
                self._log_connection()
            session.frames += 1
            session.alive = time.monotonic()
            self._deliver_frame(image, time.time(), session.alive)
            return True

    def _deliver_frame(self, image: NDArray[np.generic], unix_time: float, clock: float) -> None:
        if image.size and image.ndim >= 2:
            size = image.shape[1], image.shape[0]
            if self._size not in (None, size):
                self._count("resolution_changes")
                self._log(logging.INFO, "resolution", "the picture is now %d x %d", *size)
            self._size = size
            self._note_blank(image, clock)
        self._deliver(image, unix_time, clock)

    def _note_blank(self, image: NDArray[np.generic], clock: float) -> None:
        """Count a frame of one colour; warn once when they last, and again when they end."""
        if not _is_blank(image):
            self._only_blank = False
            if self._blank_reported:
                lasted_s = clock - (self._blank_since or 0.0)
                text = "has pictures again, after %.0f s of one colour"
                self._log(logging.WARNING, "not_blank", text, lasted_s, lasted_s=lasted_s)
            self._blank_since, self._blank_reported = None, False
            return
        self._count("blank_frames")
        if self._blank_since is None:
            self._blank_since = clock
        elif clock - self._blank_since >= _BLANK_S and not self._blank_reported:
            self._blank_reported = True
            text = "has had nothing but frames of one colour for %.0f s: check the camera"
            self._log(logging.WARNING, "blank", text, clock - self._blank_since)

    def _note_errors(self, lines: Sequence[str], had_pictures: bool) -> str | None:
        """Count what the decoder reports, log one line a minute and level; return the last one.

        Errors before the first picture are usual, at INFO: a stream begins between two key frames.
        """
        if not lines:
            return None
        for _ in lines:
            self._count("decoder_errors")
        self._errors_since += len(lines)
        self._errors_total += len(lines)
        now = time.monotonic()
        level = logging.WARNING if had_pictures else logging.INFO
        if now - self._errors_logged.get(level, -math.inf) >= ERRORS_EVERY_S:
            more = self._errors_since - 1
            text = "decoder: %s" + (f" (and {more} more)" if more else "")
            self._log(level, "decoder_error", text, lines[0], lines=self._errors_since)
            self._errors_logged[level], self._errors_since = now, 0
        return f"decoder: {lines[-1]}"

    def _give_up(self, problem: str, reason: str = "source_error") -> None:
        self.error = problem
        self._count(f"failures.{reason}")
        self._log(logging.ERROR, "failed", "%s", problem)
        self._end("failed")

    def _end(self, state: CaptureState) -> None:
        self.state = state
        self._ended.set()


@dataclass(slots=True)
class _Outage:
    """From the loss of a source, or the first failed attempt, to the next picture."""

    began: float
    attempts: int = 0
    reason: str | None = None
    """The one that was logged last."""


@dataclass(slots=True)
class _Session:
    """One connection to a live source."""

    alive: float
    """Time of its last sign of life."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    frames: int = 0
    undecodable: int = 0
    error: str | None = None
    end: BaseException | None = None
    stalled: bool = False
    abandoned: bool = False


def _is_blank(image: NDArray[np.generic]) -> bool:
    """Whether all pixels have the colour of the first; of most pictures a few say that they do not.

    About 0.1 ms for a picture of 1080p, and 3 ms for one of one colour.
    """
    for step in (16, 1):
        part = as_bgr(image[::step, ::step])
        if not part.size:  # Not a picture at all.
            return False
        bounds = (part[0, 0].astype(float) + levels for levels in (-_BLANK_LEVELS, _BLANK_LEVELS))
        if not import_cv2().inRange(part, *bounds).all():
            return False
    return True


def _problem(error: BaseException) -> str:
    return str(error) if isinstance(error, InputError) else error_text(error)
