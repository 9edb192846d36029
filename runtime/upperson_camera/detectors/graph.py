"""Inputs and outputs of a detector's file: an ONNX file, or OpenVINO's IR."""

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray

from upperson_camera.detectors.layouts import TARGET_SIZES
from upperson_camera.source import import_extra
from upperson_onnxruntime.backend import session_options
from upperson_rt.backends import open_backend
from upperson_rt.errors import BackendError, InputError
from upperson_rt.onnx_file import require_no_loops
from upperson_rt.printable import error_text, one_line, safe_repr
from upperson_rt.towers import Backend

_TYPES = {"tensor(float)": "float32", "tensor(float16)": "float16", "tensor(uint8)": "uint8"}
"""ONNX Runtime's names of the types that a picture may have; another type is named as it is."""
_REPEATING = {"Loop", "TensorIterator"}
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
    """float32, float16 or uint8."""
    channels_last: bool
    """It takes [N, H, W, 3], not [N, 3, H, W]."""
    inputs: Mapping[str, tuple[object, ...]]
    """Shapes by name; names and None stand for sizes that may change."""
    metadata: Mapping[str, str]
    batch: int | None
    """Pictures that it takes at once; None for any number."""
    size: tuple[int, int]
    """Height and width of the pictures."""
    answer: Mapping[str, NDArray[Any]]
    """All outputs for `probe`."""
    backend: Backend | None
    """What has opened it, where nothing else can run such a file."""

    @property
    def probe(self) -> NDArray[np.float32]:
        """A picture [1, 3, H, W] that is always the same, dark and light from 0 to 1 or 255."""
        height, width = self.size
        blocks = np.random.default_rng(0).random((1, 3, -(-height // 16), -(-width // 16)))
        pixels = np.repeat(np.repeat(blocks, 16, axis=2), 16, axis=3)[:, :, :height, :width]
        white = 255 if self.dtype == np.uint8 else 1
        return np.ascontiguousarray(pixels * white, dtype=np.float32)

    @property
    def is_ultralytics(self) -> bool:
        """Whether Ultralytics' own export has written it."""
        return "names" in self.metadata and "stride" in self.metadata

    @property
    def is_rt_detr_of_ultralytics(self) -> bool:
        """Whether that export names RT-DETR, as its head or, in older files, its description."""
        texts = (self.metadata.get("head", ""), self.metadata.get("description", ""))
        return self.is_ultralytics and "rtdetr" in " ".join(texts).lower()

    @property
    def found(self) -> str:
        """Inputs and outputs in one line."""
        inputs = ", ".join(f"{name} {_text(shape)}" for name, shape in self.inputs.items())
        outputs = ", ".join(f"{name} {_text(array.shape)}" for name, array in self.answer.items())
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
            answer = backend.run(self._inputs(piece))
            parts.append([np.asarray(answer[name], np.float32) for name in outputs])
        return [np.concatenate(arrays)[:total] for arrays in zip(*parts, strict=True)]

    def _inputs(self, pixels: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        ordered = pixels.transpose(0, 2, 3, 1) if self.channels_last else pixels
        given: dict[str, NDArray[Any]] = {
            self.picture: np.ascontiguousarray(ordered).astype(self.dtype, copy=False)
        }
        if TARGET_SIZES in self.inputs:  # Boxes in pixels of the input, as other layouts have them.
            height, width = pixels.shape[2:]
            given[TARGET_SIZES] = np.tile(np.array([[width, height]], np.int64), (len(pixels), 1))
        return given


_Run: TypeAlias = Callable[[Mapping[str, NDArray[Any]]], Mapping[str, NDArray[Any]]]


def read_graph(path: Path, threads: int | None = None) -> Graph:
    """Read an ONNX file, or OpenVINO's IR (``.xml``), and run it once."""
    if not path.is_file():
        text = f"no detector file {path}: docs/how-to/detectors.md names some to take"
        raise InputError(text, code="detector_not_found", path=path)
    if path.suffix.lower() == ".xml":
        if repeating := _REPEATING & _layers(path):
            text = f"the detector {path} has the layer {min(repeating)}, which may run for ever: "
            text += "export the network without loops"
            raise InputError(text, code="detector_repeats", path=path)
        return read_openvino(path, threads)
    onnxruntime = import_extra("onnxruntime", "onnxruntime", "cpu", "a detector in an ONNX file")
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
    inputs = {
        found.name: (tuple(found.shape), _TYPES.get(found.type, found.type))
        for found in session.get_inputs()
    }
    names = [output.name for output in session.get_outputs()]
    return _graph(
        path,
        inputs,
        lambda given: dict(zip(names, session.run(names, given), strict=True)),
        session.get_modelmeta().custom_metadata_map,
    )


def read_openvino(
    path: Path, threads: int | None = None, size: tuple[int, int] | None = None
) -> Graph:
    """Read a file that OpenVINO alone reads, and run it once; loops in it are not looked for.

    Args:
        path: IR, or a frozen graph of TensorFlow.
        threads: CPU threads; None lets OpenVINO choose.
        size: Height and width of the pictures, where the file takes any.
    """
    try:
        backend: Any = open_backend(path, "openvino", threads=threads)
    except BackendError as error:
        if error.code != "graph_not_loaded":
            raise
        raise InputError(str(error), code="detector_unreadable", path=path) from error
    inputs = {name: (shape, dtype.name) for name, (shape, dtype) in backend.inputs.items()}
    return _graph(path, inputs, backend.run, {}, backend, size)


def _layers(path: Path) -> set[str]:
    """Return the types of all layers of an IR, also of those inside others."""
    try:
        return {found.get("type", "") for _, found in ElementTree.iterparse(path)}
    except (ElementTree.ParseError, ValueError, OSError) as error:
        text = f"the detector {path} is not OpenVINO's IR: {error_text(error)}"
        raise InputError(text, code="detector_unreadable", path=path) from error


def _graph(
    path: Path,
    inputs: Mapping[str, tuple[tuple[object, ...], str]],
    run: _Run,
    metadata: Mapping[str, str],
    backend: Backend | None = None,
    size: tuple[int, int] | None = None,
) -> Graph:
    """Find the input for pictures, and run the graph on `probe`."""
    pictures = [
        name for name, (shape, _) in inputs.items() if len(shape) == 4 and 3 in (shape[1], shape[3])
    ]
    others = set(inputs) - {*pictures, TARGET_SIZES}
    if len(pictures) != 1 or others or inputs[pictures[0]][1] not in _TYPES.values():
        found = ", ".join(f"{name} {_text(shape)} {kind}" for name, (shape, kind) in inputs.items())
        found = found or "no input"
        text = (
            f"{path} is no detector that is known: expected one input [N, 3, H, W] or [N, H, W, 3] "
            f"of floats or bytes, and {TARGET_SIZES} if it has a second one, found {found}"
        )
        raise InputError(text, code="detector_inputs_unknown", path=path)
    (picture,) = pictures
    shape, kind = inputs[picture]
    channels_last = shape[1] != 3
    batch, *sides = (shape[0], *(shape[1:3] if channels_last else shape[2:]))
    size = size or _size(sides, metadata)
    count = batch if isinstance(batch, int) else 1
    if min(count, *size) < 1 or count * size[0] * size[1] > _MOST_PIXELS:
        text = (
            f"{path} is no detector that is known: it takes {count} x {size[0]} x {size[1]} "
            f"pixels at once, expected 1 to {_MOST_PIXELS:,}"
        )
        raise InputError(text, code="detector_size_out_of_range", size=size)
    graph = Graph(
        path=path,
        picture=picture,
        dtype=np.dtype(kind),
        channels_last=channels_last,
        inputs={name: shape for name, (shape, _) in inputs.items()},
        metadata=metadata,
        batch=batch if isinstance(batch, int) else None,
        size=size,
        answer={},
        backend=backend,
    )
    try:
        answer = run(graph._inputs(np.repeat(graph.probe, count, axis=0)))
    except Exception as error:  # As above.
        text = f"the detector {path} does not run on {size}: {one_line(error)}"
        raise InputError(text, code="detector_does_not_run", path=path) from error
    return replace(graph, answer={name: np.asarray(array) for name, array in answer.items()})


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


def _text(shape: Sequence[object]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"
