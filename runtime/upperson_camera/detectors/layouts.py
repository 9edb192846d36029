"""The layouts of detectors: their inputs, and the meaning of their outputs.

A layout is a row of `LAYOUTS`; ``graph`` recognizes the one of a file.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_camera.detectors.pixels import IMAGENET, Pixels

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
NANODET_SIDES = 32
"""Numbers of a box in one table: four distances, each a mean over 8 places."""
_LEVEL_SIDES = (NANODET_SIDES, 44)
"""Of a level; the larger models have 11 places."""


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
    """The output and its axis that have the classes, and how many other numbers that axis has."""
    scores: Callable[[Arrays], NDArray[np.float32]] | None = None
    """Returns all numbers that lie between 0 and 1; None where logits are read."""
    dense: bool = False
    """Every cell of the input has a box."""
    one_picture: bool = False
    """It takes one at a time: the rows of all are in one list."""
    person: int = 0
    """The class for people in a file that names none."""
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


def is_dense(rows: int, size: Size, per_cell: Sequence[int]) -> bool:
    """Whether there are so many rows for every cell of known levels."""
    return any(rows == count * cells(size, some) for some in _STRIDES for count in per_cell)


def _one(shapes: Shapes, fits: Callable[[tuple[int, ...]], bool]) -> tuple[str, ...] | None:
    """Return the only output with three dimensions, if it fits; masks and raw levels have more."""
    found = [name for name, shape in shapes.items() if len(shape) == 3]
    return (found[0],) if len(found) == 1 and fits(shapes[found[0]]) else None


def _find_rows(*per_cell: int) -> Callable[[Shapes, Size], tuple[str, ...] | None]:
    """Look for (N, cells, 5 + classes)."""
    return lambda shapes, size: _one(
        shapes, lambda shape: shape[2] > 5 and is_dense(shape[1], size, per_cell)
    )


def _find_columns(shapes: Shapes, size: Size) -> tuple[str, ...] | None:
    """Look for (N, 4 + classes, cells)."""
    return _one(shapes, lambda shape: shape[1] > 4 and is_dense(shape[2], size, (1,)))


def _find_chosen(shapes: Shapes, size: Size) -> tuple[str, ...] | None:
    """Look for (N, K, 6)."""
    return _one(shapes, lambda shape: shape[2] == 6 and not is_dense(shape[1], size, (1, 3)))


def _find_queries(shapes: Shapes, size: Size) -> tuple[str, ...] | None:
    """Look for (N, K, 4 + classes)."""
    return _one(
        shapes,
        lambda shape: (
            shape[2] > 4
            and not is_dense(shape[1], size, (1, 3))
            and not is_dense(shape[2], size, (1,))
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
    if any(is_dense(shape[1], size, (1, _ANCHORS)) for shape in tables.values()):
        return None
    boxes = [name for name, shape in tables.items() if shape[2] == 4]
    if len(boxes) == 2:
        boxes = [name for name in boxes if name in ("dets", "boxes", "pred_boxes")]
    if len(boxes) != 1:
        return None
    return boxes[0], next(name for name in tables if name != boxes[0])


def _find_nanodet(shapes: Shapes, size: Size) -> tuple[str, ...] | None:
    """Look for (N, cells, classes + 4 x bins)."""
    return _one(shapes, lambda shape: shape[2] > NANODET_SIDES and is_dense(shape[1], size, (1,)))


def _find_levels(shapes: Shapes, size: Size) -> tuple[str, ...] | None:
    """Look for (N, cells, classes) and (N, cells, 4 x bins) of every level, in this order."""
    strides = next((some for some in _STRIDES if 2 * len(some) == len(shapes)), ())
    pairs = []
    for step in strides:
        level = {
            name: shape[2]
            for name, shape in shapes.items()
            if len(shape) == 3 and shape[1] == cells(size, (step,))
        }
        distances = [name for name in level if level[name] in _LEVEL_SIDES]
        if len(level) != 2 or len(distances) != 1:
            return None
        pairs.append((next(name for name in level if name != distances[0]), distances[0]))
    return tuple(name for names in zip(*pairs, strict=True) for name in names) or None


def _find_rows_of_seven(shapes: Shapes, size: Size) -> tuple[str, ...] | None:
    """Look for (1, 1, K, 7)."""
    found = [name for name, shape in shapes.items() if len(shape) == 4]
    fits = len(shapes) == len(found) == 1 and shapes[found[0]][3] == 7 and shapes[found[0]][1] == 1
    return tuple(found) if fits else None


def _find_four(shapes: Shapes, size: Size) -> tuple[str, ...] | None:
    """Look for boxes (N, K, 4), classes (N, K), scores (N, K) and their number, by names."""
    if len(shapes) != 4:
        return None
    wanted = ("boxes", "classes", "scores", "num")
    found = [[name for name in shapes if word in name.lower()] for word in wanted]
    if any(len(names) != 1 for names in found):
        return None
    boxes, classes, scores, count = (names[0] for names in found)
    flat = shapes[classes]
    fits = len(flat) == 2 and shapes[scores] == flat and shapes[boxes] == (*flat, 4)
    return (boxes, classes, scores) if fits and len(shapes[count]) <= 2 else None


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


def _read_distances(scores: NDArray[np.float32], bins: NDArray[np.float32], size: Size) -> Found:
    """Read boxes whose sides are weighted means of whole strides from the middle of the cell."""
    found = grid(size, scores.shape[1])
    assert found is not None  # `find` counted the cells.
    places, steps = found
    # NanoDet-Plus, which has four levels, counts from the corner of the cell.
    middles = (places + (0.0 if len(np.unique(steps)) == 4 else 0.5)) * steps
    bins = bins.reshape(*bins.shape[:2], 4, -1)
    weights = np.exp(bins - bins.max(axis=3, keepdims=True))
    steps_away = weights @ np.arange(bins.shape[3], dtype=np.float32) / weights.sum(axis=3)
    sides = steps_away * steps
    corners = [middles - sides[..., :2], middles + sides[..., 2:]]
    return np.concatenate(corners, axis=-1).astype(np.float32), scores[..., 0]


def _read_nanodet(arrays: Arrays, person: int, size: Size) -> Found:
    table = arrays[0]
    return _read_distances(table[..., person : person + 1], table[..., -NANODET_SIDES:], size)


def _read_levels(arrays: Arrays, person: int, size: Size) -> Found:
    half = len(arrays) // 2
    scores, bins = (np.concatenate(part, axis=1) for part in (arrays[:half], arrays[half:]))
    return _read_distances(scores[..., person : person + 1], bins, size)


def _read_rows_of_seven(arrays: Arrays, person: int, size: Size) -> Found:
    """Read picture, class, score and corners in shares of it; a picture below 0 ends the list."""
    table = arrays[0][:, 0]
    mine = (table[..., 1].round() == person) & (table[..., 0] >= 0)
    return table[..., 3:7] * _sides(size), np.where(mine, table[..., 2], np.float32(0))


def _read_four(arrays: Arrays, person: int, size: Size) -> Found:
    """Read corners as y, x, y, x in shares of the picture."""
    boxes, classes, scores = arrays
    mine = np.where(classes.round() == person, scores, np.float32(0))
    return boxes[..., [1, 0, 3, 2]] * _sides(size), mine


_MIDDLE, _STRETCHED = Pixels(place="centre"), Pixels(place="stretch")
_YOLOX = Pixels(place="corner", channels="bgr", largest=255)
_RF_DETR = Pixels(place="stretch", mean=IMAGENET[0], std=IMAGENET[1])
_NANODET = Pixels(
    place="centre",  # Trained on stretched pictures; it finds more people in those of their shape.
    channels="bgr",
    largest=255,
    mean=(103.53, 116.28, 123.675),
    std=(57.375, 57.12, 58.395),
)
_SSD = Pixels(place="stretch", channels="bgr", largest=255)
_TENSORFLOW = Pixels(place="stretch", largest=255)


def _last(first: int) -> Callable[[Arrays], NDArray[np.float32]]:
    return lambda arrays: arrays[0][..., first:]


def _fifth(arrays: Arrays) -> NDArray[np.float32]:
    return arrays[0][..., 4]


def _third(arrays: Arrays) -> NDArray[np.float32]:
    return arrays[2]


_ROWS = (
    Layout("yolov5", _MIDDLE, _find_rows(_ANCHORS, 1), _read_rows, (0, 2, 5), _last(4), dense=True),
    Layout("yolov8", _MIDDLE, _find_columns, _read_columns, (0, 1, 4),
           lambda arrays: arrays[0][:, 4:], dense=True),
    Layout("end-to-end", _MIDDLE, _find_chosen, _read_chosen, scores=_fifth),
    Layout("yolox", _YOLOX, _find_rows(1), _read_grid, (0, 2, 5), _last(4), dense=True),
    Layout("yolox-decoded", _YOLOX, _find_rows(1), _read_rows, (0, 2, 5), _last(4), dense=True),
    Layout("rt-detr", _STRETCHED, _find_labels, _read_labels, scores=_third, wants_sizes=True),
    Layout("rt-detr-logits", _STRETCHED, _find_logits, _read_logits, (1, 2, 0)),
    Layout("rt-detr-ultralytics", _STRETCHED, _find_queries, _read_queries, (0, 2, 4), _last(4)),
    Layout("rt-detr-chosen", _STRETCHED, _find_chosen, _read_chosen_queries, scores=_fifth),
    Layout("rf-detr", _RF_DETR, _find_logits, _read_logits, (1, 2, 0)),
    Layout("nanodet", _NANODET, _find_nanodet, _read_nanodet, (0, 2, NANODET_SIDES),
           lambda arrays: arrays[0][..., : -NANODET_SIDES], dense=True),
    Layout("nanodet-levels", _NANODET, _find_levels, _read_levels, (0, 2, 0),
           lambda arrays: np.concatenate(arrays[: len(arrays) // 2], axis=1), dense=True),
    Layout("ssd", _SSD, _find_rows_of_seven, _read_rows_of_seven,
           scores=lambda arrays: arrays[0][..., 2], one_picture=True, person=1),
    Layout("ssd-tensorflow", _TENSORFLOW, _find_four, _read_four, scores=_third, person=1),
)  # fmt: skip
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
    "nanodet": "NanoDet: rows of classes and distances",
    "nanodet-levels": "NanoDet: classes and distances of each level",
    "ssd": "SSD of OpenVINO: rows of picture, class, score and corners",
    "ssd-tensorflow": "SSD of TensorFlow: boxes, classes, scores and their number",
}

LAYOUTS: Mapping[str, Layout] = {row.name: row for row in _ROWS}
"""By the names that ``--detector-layout`` takes."""
