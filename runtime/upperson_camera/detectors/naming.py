"""HOG, boxes from a file, and the makers of detectors by name."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from upperson_camera.detectors.onnx_file import OnnxDetector
from upperson_camera.source import import_cv2
from upperson_rt.arguments import check_path
from upperson_rt.errors import InputError
from upperson_rt.files import read_bounded
from upperson_rt.ingest.detector import refuse_options

if TYPE_CHECKING:
    from upperson_rt.preprocess import PixelArray

# --- OpenCV's own detector

_MOST_BYTES = 256 << 20
"""Of a file of boxes: those of a day."""
_SHRINK = np.array([0.2, 0.08], np.float32)
"""Margins of HOG's boxes on each side, as shares of width and height."""


class HogDetector:
    """OpenCV's people detector: histograms of gradients, no download, no GPU, many misses.

    Frames are scaled to at most ``width_px``; people lower than 128 pixels there are not found.
    """

    warning = (
        "hog misses many people and has false detections: install a network, "
        "see docs/how-to/detectors.md"
    )

    def __init__(self, width_px: int = 640, min_score: float = 0.3) -> None:
        cv2 = import_cv2()
        self.width_px = width_px
        self.min_score = min_score
        self._hog = cv2.HOGDescriptor()
        self._hog.setSVMDetector(cv2.HOGDescriptor_getDefaultPeopleDetector())

    @property
    def facts(self) -> dict[str, Any]:
        """Its properties as JSON values, for ``upperson-rt doctor``."""
        return {"width_px": self.width_px, "min_score": self.min_score}

    def __str__(self) -> str:
        return f"{self.identity}, OpenCV's"

    @property
    def identity(self) -> str:
        """What its boxes depend on."""
        return f"hog (width {self.width_px}, scores from {self.min_score:g})"

    def __call__(self, frame: "PixelArray") -> NDArray[np.float32]:
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
        corner, size = np.split(np.asarray(found, np.float32)[np.asarray(kept, int)], 2, axis=1)
        edges = np.hstack([corner + _SHRINK * size, corner + (1 - _SHRINK) * size])
        boxes = np.column_stack([edges / scale, scores[np.asarray(kept, int)]])
        return boxes.astype(np.float32)


# --- Boxes from a file


class BoxesFile:
    """Boxes from a file instead of a detector, for videos with known people.

    The file is what  upperson data synthesize-video  writes beside a video: a JSON object whose
    ``frames`` holds for each frame a list of objects with a ``box``.
    """

    of_one_video = True

    def __init__(self, path: Path) -> None:
        try:
            frames = json.loads(read_bounded(path, _MOST_BYTES))["frames"]
            self._frames = [[person["box"] for person in frame] for frame in frames]
        except (InputError, ValueError, KeyError, TypeError, RecursionError) as error:
            text = (
                f"cannot read boxes from {path} ({type(error).__name__}: {error}): expected the "
                "JSON file that  upperson data synthesize-video  writes beside a video"
            )
            raise InputError(text, code="boxes_unreadable", path=path) from error

    def boxes_at(self, index: int) -> list[list[float]]:
        """Return the boxes of a frame by its number."""
        return self._frames[index] if index < len(self._frames) else []

    def __call__(self, frame: "PixelArray") -> list[list[float]]:
        """Refuse: a file of boxes goes by the number of the frame."""
        raise InputError(
            "boxes from a file belong to the frames of one video, by their number: try them with  "
            "upperson-rt watch VIDEO --detector FILE.json",
            code="boxes_of_a_video",
        )


# --- Makers, found by the entry points ``upperson.detectors``


def make_hog(name: str, **options: Any) -> HogDetector:
    """Make OpenCV's detector; takes ``min_score``."""
    min_score = options.pop("min_score")
    refuse_options(name, options)
    return HogDetector() if min_score is None else HogDetector(min_score=min_score)


def make_file(name: str, **options: Any) -> OnnxDetector:
    """Make a detector from an ONNX file or OpenVINO's IR; takes all options."""
    return OnnxDetector(Path(check_path(name, "the detector")), **options)


def make_boxes(name: str, **options: Any) -> BoxesFile:
    """Read the boxes of a video from a file; takes no option."""
    refuse_options(name, options)
    return BoxesFile(Path(check_path(name, "the detector")))
