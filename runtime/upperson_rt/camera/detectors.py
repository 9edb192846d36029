"""Detectors that come with the runtime, and the one form all detectors have."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.camera.source import import_cv2
from upperson_rt.errors import InputError

__all__ = ["BoxesFile", "Detector", "HogDetector", "open_detector"]

Detector: TypeAlias = Callable[[NDArray[np.uint8]], Any]
"""Takes a frame, uint8 **BGR** [H, W, 3], and returns the people in it: rows of x0, y0, x1, y1 and
perhaps a score, in pixels of the frame. None or no rows mean nobody."""

_HOG_SHRINK = (0.2, 0.08)
"""Margins that HOG was trained with, to each side, as shares of width and height."""


class HogDetector:
    """OpenCV's people detector: histograms of gradients, no download, no GPU, many misses.

    Frames are scaled to at most ``width_px``; people lower than 128 pixels there are not found.
    """

    def __init__(self, width_px: int = 640, min_score: float = 0.3) -> None:
        cv2 = import_cv2()
        self.width_px = width_px
        self.min_score = min_score
        self._hog = cv2.HOGDescriptor()
        self._hog.setSVMDetector(cv2.HOGDescriptor_getDefaultPeopleDetector())

    def __call__(self, frame: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return (N, 5) boxes with scores (distances from the separating plane)."""
        cv2 = import_cv2()
        scale = min(1.0, self.width_px / frame.shape[1])
        small = frame if scale == 1.0 else cv2.resize(frame, None, fx=scale, fy=scale)
        if small.shape[0] < 128 or small.shape[1] < 64:
            return np.zeros((0, 5), np.float32)
        found, weights = self._hog.detectMultiScale(
            small, winStride=(8, 8), padding=(8, 8), scale=1.05
        )
        if len(found) == 0:
            return np.zeros((0, 5), np.float32)
        scores = np.asarray(weights, np.float32).reshape(-1)
        kept = cv2.dnn.NMSBoxes(found.tolist(), scores.tolist(), self.min_score, 0.5)
        x, y, width, height = np.asarray(found, np.float32)[np.asarray(kept, int)].T
        across, down = _HOG_SHRINK
        edges = np.stack(
            [
                x + across * width,
                y + down * height,
                x + (1 - across) * width,
                y + (1 - down) * height,
            ],
            axis=1,
        )
        boxes = np.column_stack([edges / scale, scores[np.asarray(kept, int)]])
        return boxes.astype(np.float32)


class BoxesFile:
    """Boxes from a file instead of a detector: for videos whose people are known.

    The file is what  upperson data synthesize-video  writes beside a video: a JSON object whose
    ``frames`` holds for each frame a list of objects with a ``box``.
    """

    def __init__(self, path: Path) -> None:
        try:
            frames = json.loads(path.read_text("utf-8"))["frames"]
            self._frames = [[person["box"] for person in frame] for frame in frames]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"cannot read boxes from {path} ({type(error).__name__}: {error}): expected the "
                "JSON file that  upperson data synthesize-video  writes beside a video"
            ) from error

    def boxes_at(self, index: int) -> list[list[float]]:
        """Return the boxes of a frame by its number."""
        return self._frames[index] if index < len(self._frames) else []

    def __call__(self, frame: NDArray[np.uint8]) -> list[list[float]]:
        """Refuse: a file of boxes goes by the number of the frame."""
        raise InputError("boxes from a file belong to the frames of one video, by their number")


def open_detector(name: str) -> Detector:
    """Return a detector by what it is called on a command line.

    Args:
        name: ``hog``, a YOLO model ``FILE.onnx``, or ``FILE.json`` with the boxes of a video.

    Raises:
        InputError: No such detector or file, or a model of another kind.
        BackendError: OpenCV or onnxruntime is missing.
    """
    if name == "hog":
        return HogDetector()
    path = Path(name)
    if path.suffix.lower() == ".onnx":
        from upperson_rt.camera.yolo import YoloDetector

        return YoloDetector(path)
    if path.suffix.lower() == ".json":
        return BoxesFile(path)
    raise InputError(f"no detector '{name}': it is hog, FILE.onnx (YOLO), or FILE.json (boxes)")
