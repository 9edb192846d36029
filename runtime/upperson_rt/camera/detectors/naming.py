"""Detectors by what they are called on a command line, with the two that need no ONNX file."""

import importlib
import json
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from upperson_rt.arguments import check_name, check_path
from upperson_rt.camera.detectors.onnx_file import OnnxDetector
from upperson_rt.camera.detectors.protocol import Detector, anybodys_code, batch_of
from upperson_rt.camera.source import import_cv2
from upperson_rt.errors import InputError, UsageError
from upperson_rt.files import read_bounded
from upperson_rt.printable import error_text, shortened, shown

__all__ = [
    "BoxesFile",
    "HogDetector",
    "open_detector",
]

# --- OpenCV's own detector

_MOST_BYTES = 256 << 20
"""Of a file of boxes: those of a day."""
_SHRINK = (0.2, 0.08)
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

    @property
    def identity(self) -> str:
        """What its boxes depend on."""
        return f"hog (width {self.width_px}, scores from {self.min_score:g})"

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
        across, down = _SHRINK
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


# --- Boxes that are known beforehand, from a file


class BoxesFile:
    """Boxes from a file instead of a detector: for videos whose people are known.

    The file is what  upperson data synthesize-video  writes beside a video: a JSON object whose
    ``frames`` holds for each frame a list of objects with a ``box``.
    """

    def __init__(self, path: Path) -> None:
        try:
            frames = json.loads(read_bounded(path, _MOST_BYTES))["frames"]
            self._frames = [[person["box"] for person in frame] for frame in frames]
        except (InputError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"cannot read boxes from {path} ({type(error).__name__}: {error}): expected the "
                "JSON file that  upperson data synthesize-video  writes beside a video"
            ) from error

    def boxes_at(self, index: int) -> list[list[float]]:
        """Return the boxes of a frame by its number."""
        return self._frames[index] if index < len(self._frames) else []

    def __call__(self, frame: NDArray[np.uint8]) -> list[list[float]]:
        """Refuse: a file of boxes goes by the number of the frame."""
        raise InputError(
            "boxes from a file belong to the frames of one video, by their number: try them with  "
            "upperson-rt watch VIDEO --detector FILE.json"
        )


# --- Names


_ENTRY = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)")


def open_detector(
    name: str,
    layout: str | None = None,
    person: str | None = None,
    min_score: float | None = None,
    threads: int | None = None,
) -> Detector:
    """Return a detector by what it is called on a command line.

    Args:
        name: ``hog``, ``FILE.onnx``, ``FILE.json`` with the boxes of a video, or
            ``package.module:factory``, which is called without arguments and returns a detector.
        layout: Of an ONNX file; see `OnnxDetector`, as for the next two.
        person: The class that is people, by name or number.
        min_score: Of an ONNX file or HOG.
        threads: CPU threads of an ONNX file.

    Raises:
        InputError: No such detector or file, a file of another kind, or a factory that fails.
        UsageError: An option that this detector has no use for.
        BackendError: OpenCV or onnxruntime is missing.
    """
    check_name(name, "a detector")
    path, entry = Path(name), _ENTRY.fullmatch(name)
    suffix = path.suffix.lower()
    for option, given, used in (
        ("--detector-layout", layout, suffix == ".onnx"),
        ("--detector-class", person, suffix == ".onnx"),
        ("--detector-score", min_score, suffix == ".onnx" or name == "hog"),
    ):
        if given is not None and not used:
            raise UsageError(f"{option} is for detectors in ONNX files, not for {shown(name)}")
    if name == "hog":
        return HogDetector() if min_score is None else HogDetector(min_score=min_score)
    if suffix in (".onnx", ".json"):
        check_path(name, "the detector")
    if suffix == ".onnx":
        return OnnxDetector(path, layout, person, min_score, threads=threads)
    if suffix == ".json":
        return BoxesFile(path)
    if entry:
        return _call(*entry.groups())
    raise InputError(
        f"no detector {shown(name)}: it is hog, FILE.onnx, FILE.json (boxes of a video), or "
        "MODULE:FACTORY of your own"
    )


def _call(module: str, factory: str) -> Detector:
    """Return what a factory makes.

    Raises:
        InputError: It is not there, fails or ends (``sys.exit``), or makes nothing that can be
            called.
    """
    entry = shortened(f"{module}:{factory}")

    def not_there(error: BaseException) -> InputError:
        return InputError(
            f"cannot import the detector {entry} ({error_text(error)}): install its package, or "
            "name the folder of the module in $PYTHONPATH"
        )

    with anybodys_code(not_there):
        found = importlib.import_module(module)
        for part in factory.split("."):
            found = getattr(found, part)
    with anybodys_code(
        lambda error: InputError(f"the detector {entry} fails: {error_text(error)}")
    ):
        detector = found()  # type: ignore[operator]
    try:
        batch_of(detector)
    except InputError as error:
        raise InputError(f"the detector {entry}: {error}") from error
    if not callable(detector):
        raise InputError(
            f"the detector {entry} makes a {type(detector).__name__}: expected something that is "
            "called with a frame, uint8 BGR [H, W, 3], and returns rows of x0, y0, x1, y1, score"
        )
    made: Detector = detector
    return made
