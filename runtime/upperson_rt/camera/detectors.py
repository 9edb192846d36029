"""What a detector is, and those that come with the runtime: HOG, YOLO, boxes from a file."""

import ast
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.backends.onnxruntime import session_options
from upperson_rt.camera.source import import_cv2
from upperson_rt.errors import BackendError, InputError, missing_extra
from upperson_rt.printable import one_line

__all__ = ["BoxesFile", "Detector", "HogDetector", "YoloDetector", "decode_yolo", "open_detector"]

Detector: TypeAlias = Callable[[NDArray[np.uint8]], Any]
"""Takes a frame, uint8 **BGR** [H, W, 3], and returns the people in it: rows of x0, y0, x1, y1 and
perhaps a score, in pixels of the frame. None or no rows mean nobody."""

_HOG_SHRINK = (0.2, 0.08)
"""Margins that HOG was trained with, to each side, as shares of width and height."""
_GREY = 114  # What YOLO models are trained to see around a letterboxed picture.


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
        return YoloDetector(path)
    if path.suffix.lower() == ".json":
        return BoxesFile(path)
    raise InputError(f"no detector '{name}': it is hog, FILE.onnx (YOLO), or FILE.json (boxes)")


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


@dataclass(frozen=True, slots=True)
class _Fit:
    """How a frame was fitted into the model's input: scaled, then moved."""

    scale: float
    left: int
    top: int


class YoloDetector:
    """People found by a YOLO model in ONNX format.

    Three output layouts are known: v5 (1, N, 5 + classes) with an objectness, v8 and later
    (1, 4 + classes, N) without, and the end-to-end (1, N, 6) of corners, score and class. The class
    named ``person`` in the file's metadata is used, else class 0, which is COCO's person.
    """

    def __init__(
        self,
        path: Path,
        min_score: float = 0.4,
        max_overlap: float = 0.6,
        threads: int | None = None,
    ) -> None:
        """Load a model.

        Args:
            path: The file.
            min_score: Boxes below are left out.
            max_overlap: Of two boxes that overlap more (IoU), the one with the lower score goes.
            threads: CPU threads; None lets ONNX Runtime choose.

        Raises:
            InputError: Not a model with one picture as input.
            BackendError: onnxruntime is missing.
        """
        try:
            import onnxruntime
        except ImportError as error:
            raise missing_extra("onnxruntime", "cpu", "a YOLO detector") from error
        if not path.is_file():
            raise InputError(f"no detector file {path}")
        try:
            self._session = onnxruntime.InferenceSession(
                str(path),
                session_options(onnxruntime, threads),
                providers=["CPUExecutionProvider"],
            )
        except Exception as error:  # onnxruntime has one class for each status, no common base.
            raise InputError(
                f"onnxruntime cannot load the detector {path}: {one_line(error)}"
            ) from error
        inputs = self._session.get_inputs()
        if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].shape[1] != 3:
            raise InputError(
                f"{path} is no YOLO detector: expected one input [1, 3, H, W], found "
                f"{[(i.name, i.shape) for i in inputs]}"
            )
        self.path = path
        self.min_score = min_score
        self.max_overlap = max_overlap
        self._input = inputs[0].name
        self._dtype = np.float16 if inputs[0].type == "tensor(float16)" else np.float32
        metadata = self._session.get_modelmeta().custom_metadata_map
        self.height_px, self.width_px = _input_size(inputs[0].shape[2:], metadata)
        self.person = _person_class(metadata)

    def __call__(self, frame: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return (N, 5) boxes of people with scores, in pixels of the frame."""
        cv2 = import_cv2()
        picture, fit = self._letterbox(frame)
        rgb = picture[:, :, ::-1].transpose(2, 0, 1)[None]
        pixels = np.ascontiguousarray(rgb, dtype=np.float32) / 255
        try:
            output = self._session.run(None, {self._input: pixels.astype(self._dtype)})[0]
        except Exception as error:  # As above.
            raise BackendError(f"the detector {self.path} fails: {one_line(error)}") from error
        found: NDArray[np.float32] = decode_yolo(
            np.asarray(output, np.float32), self.person, (self.height_px, self.width_px)
        )
        found = found[found[:, 4] >= self.min_score]
        if not len(found):
            return found
        sides = np.column_stack([found[:, :2], found[:, 2:4] - found[:, :2]])
        kept = cv2.dnn.NMSBoxes(
            sides.tolist(), found[:, 4].tolist(), self.min_score, self.max_overlap
        )
        found = found[np.asarray(kept, int)]
        found[:, [0, 2]] = (found[:, [0, 2]] - fit.left) / fit.scale
        found[:, [1, 3]] = (found[:, [1, 3]] - fit.top) / fit.scale
        return found

    def _letterbox(self, frame: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], _Fit]:
        cv2 = import_cv2()
        height, width = frame.shape[:2]
        scale = min(self.height_px / height, self.width_px / width)
        size = (
            min(self.width_px, max(1, round(width * scale))),
            min(self.height_px, max(1, round(height * scale))),
        )
        fit = _Fit(scale, (self.width_px - size[0]) // 2, (self.height_px - size[1]) // 2)
        picture = np.full((self.height_px, self.width_px, 3), _GREY, np.uint8)
        picture[fit.top : fit.top + size[1], fit.left : fit.left + size[0]] = cv2.resize(
            frame, size, interpolation=cv2.INTER_LINEAR
        )
        return picture, fit


def decode_yolo(
    output: NDArray[np.float32], person: int, size: tuple[int, int]
) -> NDArray[np.float32]:
    """Read the boxes of one class from the output of a YOLO model.

    Args:
        output: (1, A, B) in one of the layouts of `YoloDetector`.
        person: The class.
        size: Height and width of the model's input; tells how many rows each layout has.

    Returns:
        (N, 5) corners in pixels of the model's input, and scores.

    Raises:
        InputError: The layout is none of them.
    """
    if output.ndim != 3 or output.shape[0] != 1:
        raise InputError(f"a YOLO output must be (1, A, B), found shape {output.shape}")
    cells = sum((size[0] // step) * (size[1] // step) for step in (8, 16, 32))
    table = output[0]
    if table.shape[1] == cells and table.shape[0] > 4:
        boxes, scores = table[:4].T, table[4:].T
    elif table.shape[0] in (3 * cells, cells) and table.shape[1] > 5:
        boxes, scores = table[:, :4], table[:, 5:] * table[:, 4:5]
    elif table.shape[1] == 6:
        mine: NDArray[np.float32] = table[table[:, 5].round() == person]
        return mine[:, :5].copy()
    else:
        raise InputError(
            f"a YOLO output of shape {output.shape} is unknown: for an input of {size[0]} x "
            f"{size[1]} expected (1, {3 * cells}, 5 + classes) as v5 gives, (1, 4 + classes, "
            f"{cells}) as v8 gives, or (1, N, 6) with boxes already chosen"
        )
    if person >= scores.shape[1]:
        raise InputError(f"the detector has {scores.shape[1]} classes, no class {person}")
    centre, half = boxes[:, :2], boxes[:, 2:4] / 2
    return np.column_stack([centre - half, centre + half, scores[:, person]]).astype(np.float32)


def _input_size(shape: list[Any], metadata: dict[str, str]) -> tuple[int, int]:
    if all(isinstance(side, int) for side in shape):
        return int(shape[0]), int(shape[1])
    try:
        height, width = ast.literal_eval(metadata.get("imgsz", "[640, 640]"))
        return int(height), int(width)
    except (ValueError, SyntaxError, TypeError):
        return 640, 640


def _person_class(metadata: dict[str, str]) -> int:
    """Return the number of the class ``person``; 0 where the file names no classes."""
    if "names" not in metadata:
        return 0
    try:
        names = dict(ast.literal_eval(metadata["names"]))
        return next(int(number) for number, name in names.items() if name == "person")
    except (ValueError, SyntaxError, TypeError) as error:
        raise InputError(f"the detector's class names cannot be read: {error}") from error
    except StopIteration:
        raise InputError(
            f"the detector knows no class 'person', only {metadata['names'][:200]}"
        ) from None
