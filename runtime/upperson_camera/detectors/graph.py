"""Inputs and outputs of an ONNX file, and its layout by shapes, names and one run."""

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_camera.detectors.layouts import LAYOUTS, TARGET_SIZES, Layout, grid
from upperson_camera.source import import_extra
from upperson_rt.backends.onnxruntime import session_options
from upperson_rt.errors import InputError, UsageError
from upperson_rt.onnx_file import require_no_loops
from upperson_rt.printable import error_text, one_line, safe_repr
from upperson_rt.strict import suggestion
from upperson_rt.towers import Backend

_PICTURES: Mapping[str, np.dtype[Any]] = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
}
_MOST_PIXELS = 1 << 25
"""At once: 80 pictures of 640 x 640, one of 5,792 x 5,792."""
_LONGEST_LITERAL = 1_000_000
"""Characters; the names of 10,000 classes have a tenth of them."""
_USUAL_SIDE_PX = 640
"""Of a file that takes any size and does not name one."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A file that takes pictures."""

    path: Path
    picture: str
    """The input that takes them."""
    dtype: np.dtype[Any]
    inputs: Mapping[str, tuple[object, ...]]
    """Shapes by name; names and None stand for sizes that may change."""
    metadata: Mapping[str, str]
    batch: int | None
    """Pictures that it takes at once; None for any number."""
    size: tuple[int, int]
    """Height and width of the pictures."""
    answer: Mapping[str, NDArray[Any]]
    """All outputs for `probe`."""

    @property
    def is_ultralytics(self) -> bool:
        """Whether Ultralytics' own export has written it."""
        return "names" in self.metadata and "stride" in self.metadata

    @property
    def is_rt_detr_of_ultralytics(self) -> bool:
        """Whether that export names RT-DETR, as its head or, in older files, its description."""
        said = (self.metadata.get("head", ""), self.metadata.get("description", ""))
        return self.is_ultralytics and "rtdetr" in " ".join(said).lower()

    @property
    def found(self) -> str:
        """Inputs and outputs in one line."""
        inputs = ", ".join(f"{name} {_shape(shape)}" for name, shape in self.inputs.items())
        outputs = ", ".join(f"{name} {_shape(array.shape)}" for name, array in self.answer.items())
        return f"inputs {inputs}; outputs {outputs}"

    def run(
        self, backend: Backend, pixels: NDArray[np.float32], outputs: Sequence[str]
    ) -> list[NDArray[np.float32]]:
        """Return outputs for float32 [N, 3, H, W], whatever the batch that the file takes."""
        total = len(pixels)
        most = min(self.batch or total, backend.max_batch or total)
        parts = []
        for first in range(0, total, most):
            piece = pixels[first : first + most]
            if self.batch is not None and len(piece) < self.batch:  # Filled up with the last one.
                piece = np.concatenate([piece, np.repeat(piece[-1:], self.batch - len(piece), 0)])
            answer = backend.run(_inputs(self.picture, self.dtype, self.inputs, piece))
            parts.append([np.asarray(answer[name], np.float32) for name in outputs])
        return [np.concatenate(arrays)[:total] for arrays in zip(*parts, strict=True)]


def read_graph(path: Path) -> Graph:
    """Read a file, and run it once."""
    onnxruntime = import_extra("onnxruntime", "onnxruntime", "cpu", "a detector in an ONNX file")
    if not path.is_file():
        text = f"no detector file {path}: docs/detectors.md names some to take"
        raise InputError(text, code="detector_not_found", path=path)
    require_no_loops(path)
    options = session_options(onnxruntime, None)
    # It runs once here: what optimizing takes would not be won back.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime has one class for each status, no common base.
        text = f"onnxruntime cannot load the detector {path}: {one_line(error)}"
        raise InputError(text, code="detector_unreadable", path=path) from error
    inputs = {found.name: tuple(found.shape) for found in session.get_inputs()}
    types = {found.name: found.type for found in session.get_inputs()}
    pictures = [name for name, shape in inputs.items() if len(shape) == 4 and shape[1] == 3]
    others = set(inputs) - {*pictures, TARGET_SIZES}
    if len(pictures) != 1 or others or types[pictures[0]] not in _PICTURES:
        found = ", ".join(f"{name} {_shape(inputs[name])} {types[name]}" for name in inputs)
        text = (
            f"{path} is no detector that is known: expected one input [N, 3, H, W] of floats, and "
            f"{TARGET_SIZES} if it has a second one, found {found}"
        )
        raise InputError(text, code="detector_inputs_unknown", path=path)
    (picture,) = pictures
    batch, _, *sides = inputs[picture]
    metadata = session.get_modelmeta().custom_metadata_map
    size = _size(sides, metadata)
    count = batch if isinstance(batch, int) else 1
    if min(count, *size) < 1 or count * size[0] * size[1] > _MOST_PIXELS:
        text = (
            f"{path} is no detector that is known: it takes {count} x {size[0]} x {size[1]} "
            f"pixels at once, expected 1 to {_MOST_PIXELS:,}"
        )
        raise InputError(text, code="detector_size_out_of_range", size=size)
    dtype = _PICTURES[types[picture]]
    rows = np.repeat(probe(size), count, axis=0)
    names = [output.name for output in session.get_outputs()]
    try:
        arrays = session.run(names, _inputs(picture, dtype, inputs, rows))
    except Exception as error:  # As above.
        text = f"the detector {path} does not run on {size}: {one_line(error)}"
        raise InputError(text, code="detector_does_not_run", path=path) from error
    return Graph(
        path=path,
        picture=picture,
        dtype=dtype,
        inputs=inputs,
        metadata=metadata,
        batch=batch if isinstance(batch, int) else None,
        size=size,
        answer={name: np.asarray(array) for name, array in zip(names, arrays, strict=True)},
    )


def _inputs(
    picture: str,
    dtype: np.dtype[Any],
    inputs: Mapping[str, object],
    pixels: NDArray[np.float32],
) -> dict[str, NDArray[Any]]:
    given: dict[str, NDArray[Any]] = {picture: pixels.astype(dtype, copy=False)}
    if TARGET_SIZES in inputs:  # Boxes in pixels of the input, as those of other layouts are.
        height, width = pixels.shape[2:]
        given[TARGET_SIZES] = np.tile(np.array([[width, height]], np.int64), (len(pixels), 1))
    return given


def probe(size: tuple[int, int]) -> NDArray[np.float32]:
    """Return a picture [1, 3, H, W] that is always the same, dark and light from 0 to 1."""
    height, width = size
    blocks = np.random.default_rng(0).random((1, 3, -(-height // 16), -(-width // 16)))
    pixels = np.repeat(np.repeat(blocks, 16, axis=2), 16, axis=3)[:, :, :height, :width]
    return np.ascontiguousarray(pixels, dtype=np.float32)


def _size(sides: Sequence[object], metadata: Mapping[str, str]) -> tuple[int, int]:
    height, width = sides
    if isinstance(height, int) and isinstance(width, int):
        return height, width
    if "imgsz" not in metadata:
        return _USUAL_SIDE_PX, _USUAL_SIDE_PX
    try:
        height, width = literal(metadata["imgsz"])
        return int(height), int(width)
    except (ValueError, TypeError, OverflowError) as error:
        text = (
            f"the detector's size of pictures cannot be read ({error_text(error)}): found imgsz "
            f"{safe_repr(metadata['imgsz'])}"
        )
        raise InputError(text, code="detector_size_unreadable") from error


def literal(text: str) -> Any:
    """Return the value of a text of metadata in Python's notation."""
    if len(text) > _LONGEST_LITERAL:
        raise ValueError(f"it has {len(text)} characters")
    try:
        return ast.literal_eval(text)
    except (SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _shape(shape: Sequence[object]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


# --- The layout of a file, by names, shapes, metadata and the outputs of one run
#
# An ambiguous file is refused: some layouts have the same shapes and differ in their inputs, and a
# wrong one misses people without an error.

_LARGEST_SHARE = 2.0
"""Boxes that reach further are in pixels."""
_NEAR = 2.0
"""Median distance between a cell and its box, in strides."""


def recognise(graph: Graph, named: str | None = None) -> tuple[Layout, tuple[str, ...]]:
    """Return the layout of a file, or the one that the user named, and the outputs to read."""
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
        return _possible_grid(graph, fitting["yolox"][0])
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


def _possible_grid(graph: Graph, output: str) -> list[str]:
    """Distinguish the layouts of one row a cell: does each row's box lie at its cell?"""
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
