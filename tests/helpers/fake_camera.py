"""Sources that do what they are told, and frames with a person-sized box in them."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.camera.source import Source
from upperson_rt.errors import InputError


class FakeReader:
    """A ``cv2.VideoCapture`` that plays a script.

    The script's entries are frames, None for the end of the stream, an exception to raise, or an
    event that `read` waits for, as a dead network connection does.
    """

    def __init__(self, script: Sequence[Any], fps: float = 10.0) -> None:
        self._script: Iterator[Any] = iter(script)
        self._fps = fps
        self.released = threading.Event()

    def read(self) -> tuple[bool, NDArray[np.uint8] | None]:
        step = next(self._script, None)
        if isinstance(step, threading.Event):
            step.wait()
            return False, None
        if isinstance(step, Exception):
            raise step
        return step is not None, step

    def get(self, property_id: int) -> float:
        import cv2

        return self._fps if property_id == cv2.CAP_PROP_FPS else 0.0

    def release(self) -> None:
        self.released.set()


class FakeOpener:
    """Gives one reader after the other; an `InputError` in their place is raised."""

    def __init__(self, *scripts: Sequence[Any] | InputError) -> None:
        self._scripts = list(scripts)
        self.readers: list[FakeReader] = []
        self.opened: list[Source] = []

    def __call__(self, source: Source, timeout_s: float) -> FakeReader:
        self.opened.append(source)
        script = self._scripts.pop(0) if self._scripts else InputError("nobody there")
        if isinstance(script, InputError):
            raise script
        self.readers.append(FakeReader(script))
        return self.readers[-1]


def person_frame(
    colour: tuple[int, int, int] = (40, 30, 200),
    size: tuple[int, int] = (240, 320),
    box: tuple[int, int, int, int] = (100, 40, 160, 220),
) -> NDArray[np.uint8]:
    """Return a BGR frame with a coloured, textured figure in a box on grey."""
    frame = np.full((*size, 3), 120, np.uint8)
    x0, y0, x1, y1 = box
    frame[y0:y1, x0:x1] = colour
    frame[y0 + 4 : y1 - 4 : 12, x0 + 4 : x1 - 4] = 255
    return frame
