"""Which layout a file has: by names, shapes and metadata, and by what it answers once.

What cannot be told apart is refused. Some layouts have the same shapes and differ in what must go
in, and a wrong one finds nobody, or half of the people, without an error.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from upperson_rt.camera.detectors.graph import Graph
from upperson_rt.camera.detectors.layouts import LAYOUTS, TARGET_SIZES, Layout, grid
from upperson_rt.errors import InputError, UsageError
from upperson_rt.printable import shown
from upperson_rt.strict import suggestion

__all__ = ["recognise"]

_LARGEST_SHARE = 2.0
"""Boxes that reach further are in pixels."""
_NEAR = 2.0
"""Strides between a cell and the box it answers for, in the median: networks look around, not
far."""


def recognise(graph: Graph, named: str | None = None) -> tuple[Layout, tuple[str, ...]]:
    """Return the layout of a file, and the outputs that are read.

    Args:
        graph: What it says about itself, and what it answered.
        named: The layout that the user named, or None.

    Raises:
        UsageError: No layout has this name.
        InputError: It has not the named layout, none that is known, or one of several.
    """
    if named is not None and named not in LAYOUTS:
        raise UsageError(f"no detector layout {shown(named)}, {suggestion(named, LAYOUTS)}")
    shapes = {name: array.shape for name, array in graph.answer.items()}
    fitting = {
        name: outputs
        for name, row in LAYOUTS.items()
        if row.wants_sizes == (TARGET_SIZES in graph.inputs)
        and (outputs := row.find(shapes, graph.size)) is not None
    }
    if named is not None:
        if named not in fitting:
            raise InputError(
                f"{graph.path} has not the layout '{named}'{_alternatives(list(fitting))}: found "
                f"{graph.found}"
            )
        return LAYOUTS[named], fitting[named]
    if not fitting:
        raise InputError(
            f"{graph.path} has no layout that is known ({', '.join(LAYOUTS)}): found "
            f"{graph.found}; other detectors come in as  --detector MODULE:FACTORY"
        )
    told = _tell(graph, fitting)
    if len(told) != 1:
        may_be = told or list(fitting)
        why = "and nothing in it says so: if it is, name it"
        if len(may_be) > 1:
            why = "which have the same shapes and see pictures differently: say which"
        raise InputError(
            f"{graph.path} may be {' or '.join(may_be)}, {why} with --detector-layout; found "
            f"{graph.found}"
        )
    return LAYOUTS[told[0]], fitting[told[0]]


def _tell(graph: Graph, fitting: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Return which of the layouts with fitting shapes it may be; none if evidence contradicts."""
    names = list(fitting)
    if "yolox" in names:
        return _tell_grid(graph, fitting["yolox"][0])
    if "rf-detr" in names:
        boxes, logits = fitting["rf-detr"]
        return ["rf-detr"] if (boxes, logits) == ("dets", "labels") else names
    if "rt-detr-ultralytics" in names:
        return _tell_queries(graph, names, fitting["rt-detr-ultralytics"][0])
    return names


def _tell_queries(graph: Graph, names: list[str], output: str) -> list[str]:
    """Tell rows of box and classes from rows of box, score and class, in pixels or in shares."""
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


def _tell_grid(graph: Graph, output: str) -> list[str]:
    """Tell the layouts of one row a cell apart: does each row's box lie at its cell?"""
    table = np.asarray(graph.answer[output], np.float64)[0]
    found = grid(graph.size, len(table))
    assert found is not None  # `find` counted the cells.
    places, steps = found
    middles = (places + 0.5) * steps
    with np.errstate(over="ignore", invalid="ignore"):
        as_pixels = np.abs(table[:, :2] - middles) / steps
        as_offsets = np.abs(table[:, :2] - 0.5)
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


def _alternatives(fitting: Sequence[str]) -> str:
    return f", it may be {' or '.join(fitting)}" if fitting else ""
