"""The layout of a file, by names, shapes, metadata and the outputs of one run.

An ambiguous file is refused: some layouts have the same shapes and differ in their inputs, and a
wrong one misses people without an error. So is a file of another kind, and one whose numbers no
detector gives.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_camera.detectors.graph import Graph
from upperson_camera.detectors.layouts import (
    LAYOUTS,
    NANODET_SIDES,
    TARGET_SIZES,
    Arrays,
    Layout,
    grid,
    is_dense,
)
from upperson_rt.errors import InputError, UsageError
from upperson_rt.printable import safe_repr
from upperson_rt.strict import suggestion

_LARGEST_SHARE = 2.0
"""Boxes that reach further are in pixels."""
_TASK = "detect"
_TASKS = (_TASK, "object-detection")
_ROUNDING = 0.01
_MARGIN = 0.25
"""How far a box may reach beyond the picture, in shares of its sides."""
_NEAR = 2.0
"""Median distance between a cell and its box, in strides."""


def recognise(graph: Graph, named: str | None = None) -> tuple[Layout, tuple[str, ...]]:
    """Return the layout of a file, or the one that the user named, and the outputs to read."""
    _require_detector(graph)
    if named is not None and named not in LAYOUTS:
        text = f"no detector layout {safe_repr(named)}, {suggestion(named, LAYOUTS)}"
        raise UsageError(text, code="unknown_layout", found=named)
    shapes = {name: array.shape for name, array in graph.answer.items()}
    fitting = {
        name: outputs
        for name, row in LAYOUTS.items()
        if row.wants_sizes == (TARGET_SIZES in graph.inputs)
        and (outputs := row.find(shapes, graph.size)) is not None
    }
    if named is not None:
        if named not in fitting:
            others = f", it may be {' or '.join(fitting)}" if fitting else ""
            text = f"{graph.path} has not the layout '{named}'{others}: found {graph.found}"
            raise InputError(text, code="other_layout", layout=named, fitting=list(fitting))
        return LAYOUTS[named], fitting[named]
    if not fitting:
        text = (
            f"{graph.path} has no layout that is known ({', '.join(LAYOUTS)}): found "
            f"{graph.found}; other detectors come in as  --detector MODULE:FACTORY"
        )
        raise InputError(text, code="no_known_layout")
    possible = _possible(graph, fitting)
    if len(possible) != 1:
        may_be = possible or list(fitting)
        why = "and nothing in it says so: if it is, name it"
        if len(may_be) > 1:
            why = "which have the same shapes and see pictures differently: say which"
        text = (
            f"{graph.path} may be {' or '.join(may_be)}, {why} with --detector-layout; found "
            f"{graph.found}"
        )
        raise InputError(text, code="ambiguous_layout", fitting=may_be)
    return LAYOUTS[possible[0]], fitting[possible[0]]


def _possible(graph: Graph, fitting: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return which of the layouts with fitting shapes it may be; none if evidence contradicts."""
    names = list(fitting)
    if "yolox" in names:
        return _possible_grid(graph, fitting["yolox"][0], "nanodet" in fitting)
    if "rf-detr" in names:
        boxes, logits = fitting["rf-detr"]
        return ["rf-detr"] if (boxes, logits) == ("dets", "labels") else names
    if "rt-detr-ultralytics" in names:
        return _possible_queries(graph, names, fitting["rt-detr-ultralytics"][0])
    return names


def _possible_queries(graph: Graph, names: list[str], output: str) -> list[str]:
    """Distinguish rows of box and classes from rows of box, score and class."""
    if "end-to-end" not in names:
        # Boxes and classes alone say too little about what goes in.
        return names if graph.is_rt_detr_of_ultralytics else []
    table = np.asarray(graph.answer[output], np.float64)[0]
    numbers = table[:, 5]
    if not ((numbers == numbers.round()).all() and (numbers >= 0).all()):
        return ["rt-detr-ultralytics"] if graph.is_rt_detr_of_ultralytics else []
    if graph.is_rt_detr_of_ultralytics:
        return ["rt-detr-chosen"]
    if graph.is_ultralytics or np.abs(table[:, :4]).max() > _LARGEST_SHARE:
        return ["end-to-end"]
    return ["end-to-end", "rt-detr-chosen"]


def _possible_grid(graph: Graph, output: str, may_be_nanodet: bool) -> list[str]:
    """Distinguish the layouts of one row a cell: does each row's box lie at its cell?"""
    table = np.asarray(graph.answer[output], np.float64)[0]
    found = grid(graph.size, len(table))
    assert found is not None  # `find` counted the cells.
    places, steps = found
    middles = (places + 0.5) * steps
    with np.errstate(over="ignore", invalid="ignore"):
        as_pixels = np.abs(table[:, :2] - middles) / steps
        as_offsets = np.abs(table[:, :2] - 0.5)
    if may_be_nanodet and not _are_scores(table[:, 4:]) and _are_scores(table[:, :-NANODET_SIDES]):
        return ["nanodet"]
    decoded = _is_near(as_pixels) and bool((table[:, 2:4] >= 0).all())
    relative = _is_near(as_offsets)
    if decoded == relative:
        return ["yolov5", "yolox", "yolox-decoded"] if decoded else []
    if relative:
        return ["yolox"]
    # The official export of YOLOv6 calls its output `outputs`; YOLOX's is `output`.
    if graph.is_ultralytics or output == "outputs":
        return ["yolov5"]
    return ["yolov5", "yolox-decoded"]


def _is_near(distances: NDArray[np.float64]) -> bool:
    return bool(np.isfinite(distances).all() and np.median(distances.max(axis=1)) <= _NEAR)


def _are_scores(values: NDArray[Any]) -> bool:
    """Whether all numbers lie between 0 and 1, as far as float16 has them right."""
    with np.errstate(invalid="ignore"):
        return bool(((values >= -_ROUNDING) & (values <= 1 + _ROUNDING)).all())


# --- Files of another kind


def _require_detector(graph: Graph) -> None:
    """Refuse a file whose metadata or outputs are those of another model.

    Ultralytics writes its task.
    """
    kind = graph.metadata.get("task", _TASK)
    why = f"its metadata name the task {safe_repr(kind)}"
    if kind in _TASKS:
        kind = next((name for name, fits in _OTHERS.items() if fits(graph)), _TASK)
        of = "a segmentation model" if kind == "segment" else kind
        why = f"its outputs are those of {of}"
    if kind not in _TASKS:
        text = (
            f"{graph.path} is no detector that is known: {why}. Export a model "
            f"for detection, or call it from your own code with  --detector MODULE:FACTORY; found "
            f"{graph.found}"
        )
        raise InputError(text, code="detector_other_kind", kind=kind)


def _shapes(graph: Graph, dimensions: int) -> list[tuple[int, ...]]:
    return [array.shape for array in graph.answer.values() if array.ndim == dimensions]


def _is_dense_pair(graph: Graph) -> bool:
    tables = _shapes(graph, 3)
    return (
        len(tables) == 2
        and all(is_dense(shape[1], graph.size, (1, 3)) for shape in tables)
        and 4 in (tables[0][2], tables[1][2])
    )


_OTHERS: Mapping[str, Callable[[Graph], bool]] = {
    "YOLOv4": lambda graph: any(shape[2:] == (1, 4) for shape in _shapes(graph, 4)),
    "segment": lambda graph: (
        len(_shapes(graph, 3)) > 0 and any(shape[1] == 32 for shape in _shapes(graph, 4))
    ),
    "YOLO-NAS or DAMO-YOLO": _is_dense_pair,
    "YOLO-NAS": lambda graph: "num_predictions" in graph.answer,
}
"""Models that are recognized by their outputs and refused."""


# --- Numbers that a detector gives


def require_sane(
    graph: Graph, layout: Layout, arrays: Arrays, person: int, min_score: float
) -> None:
    """Refuse outputs that no detector of this layout gives.

    Args:
        graph: The file.
        layout: Its layout, recognized or named.
        arrays: What its outputs are for some picture.
        person: The class for people.
        min_score: The least score of a box.

    Raises:
        InputError: Scores lie outside 0 to 1, or boxes outside the picture or not at their cells.
    """
    hint = (
        "it is a model of another kind, such as one for poses or masks, or another layout: see "
        "docs/how-to/detectors.md"
    )
    if layout.scores is not None and not _are_scores(values := layout.scores(arrays)):
        finite = values[np.isfinite(values)]
        low, high = (float(f(finite)) if finite.size else None for f in (np.min, np.max))
        if finite.size < values.size:
            gives = (
                f"scores that are NaN or infinite ({values.size - finite.size} of {values.size})"
            )
            hint = f"its weights are damaged, it overflows in fp16, or {hint}"
        else:
            gives = f"scores from {low:.3g} to {high:.3g}"
        text = f"{graph.path} read as {layout.name} gives {gives}, expected 0 to 1: {hint}"
        raise InputError(
            text, code="detector_scores_out_of_range", layout=layout.name, low=low, high=high
        )
    boxes, scores = (part.astype(np.float64) for part in layout.read(arrays, person, graph.size))
    height, width = graph.size
    sides = np.array([width, height])
    with np.errstate(invalid="ignore"):
        inside = (boxes[..., :2] >= -_MARGIN * sides) & (boxes[..., 2:] <= (1 + _MARGIN) * sides)
        inside &= boxes[..., 2:] >= boxes[..., :2]
    is_inside = inside.all(axis=2)
    middles = (boxes[..., :2] + boxes[..., 2:]) / 2 / sides
    spread = float(np.ptp(middles, axis=1).min()) if np.isfinite(middles).all() else 0.0
    misplaced = int((~is_inside & (scores >= min_score)).sum())
    problems = []
    if layout.dense and spread < 0.5:
        problem = f"their centres span {spread:.0%} of its width or height, expected 50% or more"
        if not np.isfinite(boxes).all():
            problem = "some coordinates are NaN or infinite"
        problems.append(problem if boxes.any() else "all coordinates are 0")
    if is_inside.mean() < 0.5:
        problems.append(
            f"{1 - is_inside.mean():.0%} of all lie outside it or have no valid corners"
        )
    if misplaced:
        problems.append(f"{misplaced} with a score of {min_score:g} or more lie outside it")
    if problems:
        text = (
            f"{graph.path} read as {layout.name} gives boxes that do not fit the picture: "
            f"{'; '.join(problems)}: {hint}"
        )
        raise InputError(
            text,
            code="detector_boxes_out_of_place",
            layout=layout.name,
            inside=float(is_inside.mean()),
            span=spread,
        )
