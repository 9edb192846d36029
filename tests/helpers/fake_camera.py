"""Sources, encoders and clocks that follow a script, and frames with a person in them.

Nothing here counts seconds: a test waits until something is so, within its own time limit.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_camera import CaptureRules, Pipeline, PipelineStats, Reader, Source
from upperson_camera.capture import Capture
from upperson_camera.settings import CameraSettings
from upperson_camera.source import Opener
from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError
from upperson_rt.gallery import Gallery

START = 1_800_000_000.0
LIVE = Source(address="rtsp://cam/s", kind="network")
FILE = Source(address="clip.avi", kind="file")
WANTS_TO_END = [SystemExit(0), KeyboardInterrupt(), GeneratorExit("enough")]
BOX = [100, 40, 160, 220]
"""Of the person in `person_frame`."""
ALL: dict[str, Any] = {"every_s": 0, "min_views": 1}
"""Options with which every box becomes a row."""


def person_frame(
    colour: tuple[int, int, int] = (40, 30, 200),
    size: tuple[int, int] = (240, 320),
    box: Sequence[int] = BOX,
) -> NDArray[np.uint8]:
    """Return a BGR frame with a coloured, textured figure in a box on grey."""
    frame = np.full((*size, 3), 120, np.uint8)
    x0, y0, x1, y1 = box
    frame[y0:y1, x0:x1] = colour
    frame[y0 + 4 : y1 - 4 : 12, x0 + 4 : x1 - 4] = 255
    return frame


def wait_for(condition: Callable[[], object]) -> None:
    while not condition():
        time.sleep(0.002)


def started(encoder: Encoder, gallery: Gallery, **options: Any) -> Pipeline:
    """Return a running pipeline with a camera ``gate``, of whose boxes every one becomes a row."""
    pipeline = Pipeline(encoder, gallery, **{**ALL, **options})
    pipeline.start()
    pipeline.add_camera("gate")
    return pipeline


def submit(pipeline: Pipeline, count: int = 1, first: int = 0, camera: str = "gate") -> None:
    """Submit frames of a person, a second apart, each as a track of its own and after the last."""
    for number in range(first, first + count):
        pipeline.submit(camera, person_frame(), [BOX], START + number, tracks=[number])
        wait_for(lambda: pipeline.stats().cameras[camera].frames_waiting == 0)


def pictures_of(gallery: Gallery) -> list[Path]:
    return sorted(path for path in gallery.crops_dir.rglob("*") if path.is_file())


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise self


def check_sums(stats: PipelineStats, *, ended: bool = True) -> None:
    """Check that all that came in was counted, and that nothing still waits."""
    for camera in stats.cameras.values():
        left_out = (*camera.frames_skipped.values(), *camera.frames_dropped.values())
        frames = camera.frames_processed + sum(left_out)
        assert camera.frames_read == frames + camera.frames_waiting
        crops = camera.committed + sum(camera.crops_dropped.values())
        assert camera.detections == crops + camera.crops_waiting
        if ended:
            assert camera.frames_waiting == camera.crops_waiting == 0


class FakeReader(Reader):
    """Plays frames, None for the end, errors to raise, events to wait for, functions to call."""

    def __init__(self, script: Sequence[Any]) -> None:
        self._script: Iterator[Any] = iter(script)
        self.frame_rate = 10.0
        self.closed = threading.Event()

    def read(self) -> NDArray[np.uint8] | None:
        step = next(self._script, None)
        if isinstance(step, threading.Event):
            step.wait()
            return None
        if isinstance(step, BaseException):
            raise step
        picture: NDArray[np.uint8] | None = step() if callable(step) else step
        return picture

    def close(self) -> None:
        self.closed.set()


class FakeOpener:
    """Gives one reader after the other; an `InputError` in their place is raised."""

    def __init__(self, *scripts: Sequence[Any] | InputError) -> None:
        self._scripts = list(scripts)
        self.readers: list[FakeReader] = []

    def __call__(self, source: Source, timeout_s: float) -> FakeReader:
        script = self._scripts.pop(0) if self._scripts else InputError("nobody there")
        if isinstance(script, InputError):
            raise script
        self.readers.append(FakeReader(script))
        return self.readers[-1]


class Gate:
    """Keeps a caller of `hold` until it is opened, at the latest where its context ends."""

    def __init__(self) -> None:
        opened = threading.Event()
        self.open, self._wait = opened.set, opened.wait
        self.entered = 0
        """Calls of `hold` so far."""

    def __enter__(self) -> "Gate":
        return self

    def __exit__(self, *error: object) -> None:
        self.open()

    def hold(self) -> None:
        self.entered += 1
        self._wait()


class FakeEncoder:
    """An encoder that waits at a gate before each batch, or fails."""

    def __init__(
        self, encoder: Encoder, gate: Gate | None = None, error: BaseException | None = None
    ) -> None:
        self._encoder, self._gate, self._error = encoder, gate, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._encoder, name)

    def encode_pixels(self, pixels: NDArray[np.uint8], batch_size: int) -> NDArray[np.float32]:
        if self._error is not None:
            raise self._error
        if self._gate is not None:
            self._gate.hold()
        return self._encoder.encode_pixels(pixels, batch_size)


class FakeTime:
    """The module `time`, set forward by seconds of all clocks, and of the wall clock alone."""

    more_s = wall_s = 0.0

    def monotonic(self) -> float:
        return time.monotonic() + self.more_s

    def time(self) -> float:
        return time.time() + self.more_s + self.wall_s

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


RULES = CaptureRules(stall_s=1000, first_wait_s=0.02, longest_wait_s=0.1)
"""A stall is what `FakeTime` says; losses cost little."""
PATIENT = CaptureRules(stall_s=1000, first_wait_s=1000, longest_wait_s=1000)


class Watched:
    def __init__(
        self, source: Source, opener: Opener, rules: CaptureRules = RULES,
        start_time: float | None = None, realtime: bool = False,
    ) -> None:  # fmt: skip
        self.frames: list[tuple[NDArray[np.generic], float, float]] = []
        """Picture, unix time and clock."""
        self.counts: list[str] = []
        """All but the decoder's errors, of which a stream may have some at its beginning."""
        self.decoder_errors = 0
        settings = CameraSettings(
            name="gate", source=source, detector=lambda frame: [], drop="oldest",
            start_time=start_time, realtime=realtime, opener=opener,
        )  # fmt: skip
        self.capture = Capture(settings, rules, self._deliver, self._count)
        self.capture.start()

    def _deliver(self, image: NDArray[np.generic], unix_time: float, clock: float) -> None:
        self.frames.append((image, unix_time, clock))

    def _count(self, what: str) -> None:
        if what == "decoder_errors":
            self.decoder_errors += 1
        else:
            self.counts.append(what)

    def stop(self, patience_s: float = 1000) -> None:
        self.capture.stop(patience_s)
        self.capture.join()
        assert self.capture.is_over
