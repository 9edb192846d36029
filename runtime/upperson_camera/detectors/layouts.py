"""The layouts of detectors: their inputs, and the meaning of their outputs.

A layout is a row of `LAYOUTS`; ``graph`` recognizes the one of a file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_camera.source import import_cv2

# --- From a frame to the input of a network, and back for boxes

_GREY = 114  # What YOLO models are trained to see around a picture of another shape.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's pixels as R, G, B from 0 to 1."""

_PLACES = {
    "centre": "grey on two sides",
    "corner": "grey to the right and below",
    "stretch": "stretched",
}


@dataclass(frozen=True, slots=True)
class Fit:
    """Where a frame lies in the input: scaled, then moved."""

    scale_x: float
    scale_y: float
    left: int
    top: int

    def to_frame(self, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return (N, 4) corners in pixels of the frame for corners in pixels of the input."""
        offset: NDArray[np.float32] = np.array([self.left, self.top] * 2, np.float32)
        scale: NDArray[np.float32] = np.array([self.scale_x, self.scale_y] * 2, np.float32)
        moved: NDArray[np.float32] = (boxes - offset) / scale
        return moved


@dataclass(frozen=True, kw_only=True, slots=True)
class Pixels:
    """The pixels that a network was trained on."""

    place: Literal["centre", "corner", "stretch"]
    """A frame of another shape is padded with grey on two sides, padded below and to the right, or
    stretched."""
    channels: Literal["rgb", "bgr"] = "rgb"
    largest: Literal[1, 255] = 1
    """The value of white."""
    imagenet: bool = False
    """Less ImageNet's mean, over its standard deviation."""

    def __str__(self) -> str:
        name = "ImageNet's mean and deviation" if self.imagenet else f"0 to {self.largest}"
        return f"{self.channels.upper()}, {name}, {_PLACES[self.place]}"

    def prepare(
        self, frame: NDArray[np.uint8], size: tuple[int, int]
    ) -> tuple[NDArray[np.float32], Fit]:
        """Return a BGR frame of any size as float32 [3, H, W], and where it is in that input."""
        picture, fit = self._fit(frame, size)
        ordered = picture if self.channels == "bgr" else picture[:, :, ::-1]
        values = np.ascontiguousarray(ordered.transpose(2, 0, 1), dtype=np.float32)
        if self.largest == 1:
            values /= 255
        if self.imagenet:
            values -= np.array(_MEAN, np.float32)[:, None, None]
            values /= np.array(_STD, np.float32)[:, None, None]
        return values, fit

    def _fit(
        self, frame: NDArray[np.uint8], size: tuple[int, int]
    ) -> tuple[NDArray[np.uint8], Fit]:
        cv2 = import_cv2()
        (height, width), (tall, wide) = frame.shape[:2], size
        if self.place == "stretch":
            picture = cv2.resize(frame, (wide, tall), interpolation=cv2.INTER_LINEAR)
            return picture, Fit(wide / width, tall / height, 0, 0)
        scale = min(tall / height, wide / width)
        across = min(wide, max(1, round(width * scale)))
        down = min(tall, max(1, round(height * scale)))
        left, top = 0, 0
        if self.place == "centre":
            left, top = (wide - across) // 2, (tall - down) // 2
        small = cv2.resize(frame, (across, down), interpolation=cv2.INTER_LINEAR)
        padded = np.full((tall, wide, 3), _GREY, np.uint8)
        padded[top : top + down, left : left + across] = small
        return padded, Fit(scale, scale, left, top)


# --- Layouts


Arrays: TypeAlias = Sequence[NDArray[np.float32]]
Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Of the outputs, by name, for one picture."""
Found: TypeAlias = tuple[NDArray[np.float32], NDArray[np.float32]]
"""(N, M, 4) corners in pixels of the input, and (N, M) scores for a class."""
Size: TypeAlias = tuple[int, int]
"""Height and width of the input."""

TARGET_SIZES = "orig_target_sizes"
"""The second input of RT-DETR and D-FINE: width and height that boxes are wanted in."""

_STRIDES = ((8, 16, 32), (8, 16, 32, 64), (4, 8, 16, 32))
"""Of three levels, and of the larger models that have a fourth one."""
_ANCHORS = 3


@dataclass(frozen=True)
class Layout:
    """One kind of detector."""

    name: str
    pixels: Pixels
    find: Callable[[Shapes, Size], tuple[str, ...] | None]
    """Returns the outputs that are read, in the order that ``read`` wants them in; None if the
    shapes are not such ones."""
    read: Callable[[Arrays, int, Size], Found]
    classes_at: tuple[int, int, int] | None = None
    """The output and its axis that have the classes, and how many numbers come before them."""
    wants_sizes: bool = False
    """It has the input `TARGET_SIZES`."""

    @property
    def what(self) -> str:
        """The models that have it, and their outputs."""
        return _WHAT[self.name]

    def classes(self, shapes: Sequence[tuple[int, ...]]) -> int | None:
        """Return the number of classes by the shapes of the outputs; None if unknown."""
        if self.classes_at is None:
            return None
        output, axis, before = self.classes_at
        return shapes[output][axis] - before


def cells(size: Size, strides: Sequence[int]) -> int:
    """Return the number of cells of all levels."""
    return sum((size[0] // step) * (size[1] // step) for step in strides)


def grid(size: Size, rows: int) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
    """Return (rows, 2) columns and rows of the cells, and (rows, 1) their strides.

    None if no known levels have so many cells.
    """
    strides = next((some for some in _STRIDES if cells(size, some) == rows), None)
    if strides is None:
        return None
    places, steps = [], []
    for step in strides:
        down, across = np.mgrid[: size[0] // step, : size[1] // step].astype(np.float32)
        places.append(np.stack([across.ravel(), down.ravel()], axis=1))
        steps.append(np.full((len(places[-1]), 1), step, np.float32))
    return np.concatenate(places), np.concatenate(steps)


def _is_dense(rows: int, size: Size, per_cell: Sequence[int]) -> bool:
    return any(rows == count * cells(size, some) for some in _STRIDES for count in per_cell)


def _one(shapes: Shapes, fits: Callable[[tuple[int, ...]], bool]) -> tuple[str, ...] | None:
    """Return the only output with three dimensions, if it fits; masks and raw levels have more."""
    found = [name for name, shape in shapes.items() if len(shape) == 3]
    return (found[0],) if len(found) == 1 and fits(shapes[found[0]]) else None


def _find_rows(*per_cell: int) -> Callable[[Shapes, Size], tuple[str, ...] | None]:
    """Look for (N, cells, 5 + classes)."""
    return lambda shapes, size: _one(
        shapes, lambda shape: shape[2] > 5 and _is_dense(shape[1], size, per_cell)
    )


def _find_columns(shapes: Shapes, size: Size) -> tuple[str, ...] | None:
    """Look for (N, 4 + classes, cells)."""
    return _one(shapes, lambda shape: shape[1] > 4 and _is_dense(shape[2], size, (1,)))


def _find_chosen(shapes: Shapes, size: Size) -> tuple[str, ...] | None:
    """Look for (N, K, 6)."""
    return _one(shapes, lambda shape: shape[2] == 6 and not _is_dense(shape[1], size, (1, 3)))


def _find_queries(shapes: Shapes, size: Size) -> tuple[str, ...] | None:
    """Look for (N, K, 4 + classes)."""
    return _one(
        shapes,
        lambda shape: (
            shape[2] > 4
            and not _is_dense(shape[1], size, (1, 3))
            and not _is_dense(shape[2], size, (1,))
        ),
    )


def _find_labels(shapes: Shapes, size: Size) -> tuple[str, ...] | None:
    """Look for labels (N, K), boxes (N, K, 4) and scores (N, K)."""
    if set(shapes) != {"labels", "boxes", "scores"}:
        return None
    flat, boxes = shapes["labels"], shapes["boxes"]
    fits = len(flat) == 2 and shapes["scores"] == flat and boxes == (*flat, 4)
    return ("labels", "boxes", "scores") if fits else None


def _find_logits(shapes: Shapes, size: Size) -> tuple[str, ...] | None:
    """Look for boxes (N, K, 4) and logits (N, K, classes), by name where both may be either."""
    tables = {name: shape for name, shape in shapes.items() if len(shape) == 3}
    if len(tables) != 2 or len({shape[:2] for shape in tables.values()}) != 1:
        return None
    boxes = [name for name, shape in tables.items() if shape[2] == 4]
    if len(boxes) == 2:
        boxes = [name for name in boxes if name in ("dets", "boxes", "pred_boxes")]
    if len(boxes) != 1:
        return None
    return boxes[0], next(name for name in tables if name != boxes[0])


def _corners(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return corners of (..., 4) centres and sizes."""
    centre, half = boxes[..., :2], boxes[..., 2:4] / 2
    return np.concatenate([centre - half, centre + half], axis=-1)


def _sides(size: Size) -> NDArray[np.float32]:
    return np.array([size[1], size[0]] * 2, np.float32)


def _read_rows(arrays: Arrays, person: int, size: Size) -> Found:
    table = arrays[0]
    return _corners(table[..., :4]), table[..., 5 + person] * table[..., 4]


def _read_grid(arrays: Arrays, person: int, size: Size) -> Found:
    """Read offsets from cells in strides, and logarithms of sizes in strides."""
    table = arrays[0]
    found = grid(size, table.shape[1])
    assert found is not None  # `find` counted the cells.
    places, steps = found
    with np.errstate(over="ignore"):  # Cells without a person may overflow; their score is low.
        boxes = np.concatenate(
            [(table[..., :2] + places) * steps, np.exp(table[..., 2:4]) * steps], axis=-1
        )
    return _corners(boxes), table[..., 5 + person] * table[..., 4]


def _read_columns(arrays: Arrays, person: int, size: Size) -> Found:
    table = arrays[0].transpose(0, 2, 1)
    return _corners(table[..., :4]), table[..., 4 + person]


def _read_chosen(arrays: Arrays, person: int, size: Size) -> Found:
    table = arrays[0]
    mine = table[..., 5].round() == person
    return table[..., :4], np.where(mine, table[..., 4], np.float32(0))


def _read_queries(arrays: Arrays, person: int, size: Size) -> Found:
    table = arrays[0]
    return _corners(table[..., :4]) * _sides(size), table[..., 4 + person]


def _read_chosen_queries(arrays: Arrays, person: int, size: Size) -> Found:
    boxes, scores = _read_chosen(arrays, person, size)
    return _corners(boxes) * _sides(size), scores


def _read_labels(arrays: Arrays, person: int, size: Size) -> Found:
    labels, boxes, scores = arrays
    return boxes, np.where(labels.round() == person, scores, np.float32(0))


def _read_logits(arrays: Arrays, person: int, size: Size) -> Found:
    boxes, logits = arrays
    scores = 1 / (1 + np.exp(-np.clip(logits[..., person], -60, 60)))
    return _corners(boxes) * _sides(size), scores.astype(np.float32)


_MIDDLE, _STRETCHED = Pixels(place="centre"), Pixels(place="stretch")
_YOLOX = Pixels(place="corner", channels="bgr", largest=255)
_IMAGENET = Pixels(place="stretch", imagenet=True)

_ROWS = (
    Layout("yolov5", _MIDDLE, _find_rows(_ANCHORS, 1), _read_rows, (0, 2, 5)),
    Layout("yolov8", _MIDDLE, _find_columns, _read_columns, (0, 1, 4)),
    Layout("end-to-end", _MIDDLE, _find_chosen, _read_chosen),
    Layout("yolox", _YOLOX, _find_rows(1), _read_grid, (0, 2, 5)),
    Layout("yolox-decoded", _YOLOX, _find_rows(1), _read_rows, (0, 2, 5)),
    Layout("rt-detr", _STRETCHED, _find_labels, _read_labels, wants_sizes=True),
    Layout("rt-detr-logits", _STRETCHED, _find_logits, _read_logits, (1, 2, 0)),
    Layout("rt-detr-ultralytics", _STRETCHED, _find_queries, _read_queries, (0, 2, 4)),
    Layout("rt-detr-chosen", _STRETCHED, _find_chosen, _read_chosen_queries),
    Layout("rf-detr", _IMAGENET, _find_logits, _read_logits, (1, 2, 0)),
)
_WHAT = {
    "yolov5": "YOLOv5 to v7: rows of box, objectness and classes",
    "yolov8": "YOLOv8 to v12: columns of box and classes",
    "end-to-end": "YOLOv10 and others end to end: chosen boxes with score and class",
    "yolox": "YOLOX: boxes relative to a grid",
    "yolox-decoded": "YOLOX exported with its grid: rows of box, objectness and classes",
    "rt-detr": "RT-DETR or D-FINE: labels, boxes and scores",
    "rt-detr-logits": "RT-DETR or D-FINE without its last step: boxes and logits",
    "rt-detr-ultralytics": "RT-DETR as Ultralytics exports it: rows of box and classes, in shares "
    "of the picture",
    "rt-detr-chosen": "RT-DETR as newer Ultralytics exports it: middle, size, score and class, in "
    "shares",
    "rf-detr": "RF-DETR: boxes and logits",
}

LAYOUTS: Mapping[str, Layout] = {row.name: row for row in _ROWS}
"""By the names that ``--detector-layout`` takes."""
