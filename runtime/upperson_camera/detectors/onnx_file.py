"""Detectors in files: ONNX, and OpenVINO's IR."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from upperson_autotune.autotuner import Autotuner
from upperson_camera.detectors.graph import Graph, literal, read_graph
from upperson_camera.detectors.pixels import Fit, Pixels
from upperson_camera.detectors.recognition import recognise, require_sane
from upperson_camera.drawn_people import FIGURES, draw_figures, figures_found
from upperson_camera.source import import_cv2
from upperson_rt.backends import Choice, installed_backends, open_backend
from upperson_rt.errors import BackendError, InputError, IntegrityError, UsageError
from upperson_rt.files import sha256_of_file
from upperson_rt.printable import error_text, safe_repr
from upperson_rt.towers import Backend

if TYPE_CHECKING:
    from upperson_rt.preprocess import PixelArray

_MOST = 8
"""Frames at once, where a file takes any number."""
_PERSON = "person"
_COCO_91 = 91
"""Classes of a network that keeps COCO's own numbers, in which person is 1."""
_CLOSE = 0.05
"""Tolerance between two backends, for scores and for places in shares of the input's sides."""


class OnnxDetector:
    """A detector in an ONNX file or in OpenVINO's IR, in one of the `LAYOUTS`.

    It runs on the CPU in the backend that is measured as the fastest, once for each machine and
    file; IR runs in OpenVINO. A file with a batch that may change takes up to 8 frames at once.
    """

    def __init__(
        self,
        path: Path,
        layout: str | None = None,
        person: str | int | None = None,
        min_score: float | None = None,
        max_overlap: float = 0.6,
        backend: str = "auto",
        threads: int | None = None,
        pixels: str | None = None,
        graph: Graph | None = None,
        name: str | None = None,
    ) -> None:
        """Load a file, recognize its layout, and try it on the built-in picture.

        Args:
            path: The file, ``.onnx`` or ``.xml``.
            layout: A name in `LAYOUTS`; None recognizes it from names, shapes, metadata and a run.
            person: The class that is people, by its name in the file or its number from 0; None
                takes ``person``, or COCO's number in a file without names.
            min_score: Boxes below are left out; 0.4 if None.
            max_overlap: Of two boxes that overlap more (IoU), the one with the lower score goes.
            backend: ``auto``, ``onnxruntime`` or ``openvino``; IR has the last one only.
            threads: CPU threads; None lets the backend choose.
            pixels: What the layout's pixels are changed to, see `Pixels.with_input`.
            graph: The file where it was read before; None reads it.
            name: What it is called in descriptions; the path if None.

        Raises:
            InputError: No detector, of an unknown or another layout, or without this class, or one
                whose scores or boxes cannot be right.
            UsageError: There is no such layout or backend, or no such score or input.
            BackendError: onnxruntime or OpenCV is missing, or no backend runs it.
        """
        import_cv2()
        self.path = path
        self.name = str(path) if name is None else name
        self.min_score = 0.4 if min_score is None else min_score
        if not 0 <= self.min_score <= 1:
            text = (
                f"scores of {path} lie between 0 and 1, found a least score of {self.min_score:g} "
                "(--detector-score)"
            )
            raise UsageError(text, code="setting_out_of_range", setting="min_score")
        self.max_overlap = max_overlap
        graph = graph or read_graph(path, threads)
        self.layout, self._outputs = recognise(graph, layout)
        self._graph = graph = replace(graph, batch=1) if self.layout.one_picture else graph
        self.pixels = _pixels(graph, self.layout.pixels, pixels)
        """What the frames are made into."""
        answer = [np.asarray(graph.answer[name], np.float32) for name in self._outputs]
        classes = self.layout.classes([array.shape for array in answer])
        self.person, self.class_note = _person_class(graph, classes, person, self.layout.person)
        self.size = graph.size
        """Height and width of the input in pixels."""
        self.max_batch = graph.batch or _MOST
        """Frames at a time, see `BatchDetector`."""
        require_sane(graph, self.layout, answer, self.person, self.min_score)
        self.backend, self.choice = self._open(backend, threads, answer)
        self.figures_found = self._try()
        """Drawn people of the built-in picture that it finds."""

    def __str__(self) -> str:
        (height, width), running = self.size, self.backend
        return (
            f"{self.name}: {self.layout.name} ({self.layout.what}; {self.pixels}), "
            f"input {width} x {height}, batch {self._graph.batch or 'any'}, {self.class_note}, "
            f"scores from {self.min_score:g}; {running.name} {running.version} on "
            f"{running.device} ({self.choice.why})"
        )

    @property
    def warning(self) -> str | None:
        """The problem if it detects no person in the built-in picture."""
        if self.figures_found:
            return None
        return (
            f"the detector {self.name} finds none of the {FIGURES} drawn people of the built-in "
            "picture: try it on a photograph with  upperson-rt doctor --detector FILE --image "
            "FILE.jpg  and, if it misses people there, another --detector-input or -class"
        )

    @property
    def facts(self) -> dict[str, Any]:
        """Its properties as JSON values, for ``upperson-rt doctor``."""
        height, width = self.size
        return {
            "layout": self.layout.name,
            "input": {"height_px": height, "width_px": width},
            "class": self.person,
            "backend": self.backend.name,
        }

    @property
    def identity(self) -> str:
        """What its boxes depend on: the same for the same file on every machine."""
        return (
            f"sha256 {_sha256(self.path)[:12]} ({self.layout.name}, class {self.person}, "
            f"scores from {self.min_score:g}, overlap {self.max_overlap:g}, {self.pixels})"
        )

    def __call__(self, frame: "PixelArray") -> NDArray[np.float32]:
        """Return (N, 5) boxes of people with scores, in pixels of the frame."""
        return self.detect_many([frame])[0]

    def detect_many(self, frames: "Sequence[PixelArray]") -> list[NDArray[np.float32]]:
        """Return the boxes of each frame, see `__call__`.

        Raises:
            BackendError: The backend fails, or gives numbers that are not finite.
        """
        fitted = [self.pixels.prepare(frame, self.size) for frame in frames]
        pixels = np.stack([values for values, _ in fitted])
        arrays = self._graph.run(self.backend, pixels, self._outputs)
        boxes, scores = self.layout.read(arrays, self.person, self.size)
        if np.isnan(scores).any():
            text = f"the detector {self.path} gives scores that are no numbers"
            raise BackendError(text, code="detector_gives_nan", path=self.path)
        return [self._keep(boxes[i], scores[i], fit) for i, (_, fit) in enumerate(fitted)]

    def _try(self) -> int:
        """Return how many drawn people it finds in the built-in picture; its numbers must be sane.

        Raises:
            InputError: See `require_sane`.
        """
        picture, figures = draw_figures()
        pixels, fit = self.pixels.prepare(np.ascontiguousarray(picture[:, :, ::-1]), self.size)
        arrays = self._graph.run(self.backend, pixels[None], self._outputs)
        require_sane(self._graph, self.layout, arrays, self.person, self.min_score)
        boxes, scores = self.layout.read(arrays, self.person, self.size)
        return figures_found(figures, self._keep(boxes[0], scores[0], fit)[:, :4])

    def _summary(self, arrays: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Return what two backends must agree on: scores, and boxes with more than a low score.

        Sorted, because the order of boxes may differ.
        """
        boxes, scores = self.layout.read(arrays, self.person, self.size)
        table = np.column_stack([boxes[0] / max(self.size), scores[0]])
        table[scores[0] < _CLOSE, :4] = 0
        return np.sort(table, axis=0)

    def _keep(
        self, boxes: NDArray[np.float32], scores: NDArray[np.float32], fit: Fit
    ) -> NDArray[np.float32]:
        """Return (N, 5) in pixels of the frame: above the least score, after NMS."""
        cv2 = import_cv2()
        sure = (scores >= self.min_score) & np.isfinite(boxes).all(axis=1)
        boxes, scores = boxes[sure], scores[sure]
        if not len(boxes):
            return np.zeros((0, 5), np.float32)
        sides = np.column_stack([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]])
        kept = np.asarray(
            cv2.dnn.NMSBoxes(sides.tolist(), scores.tolist(), self.min_score, self.max_overlap),
            int,
        ).reshape(-1)
        return np.column_stack([fit.to_frame(boxes[kept]), scores[kept]]).astype(np.float32)

    def _open(
        self, name: str, threads: int | None, answer: Sequence[NDArray[np.float32]]
    ) -> tuple[Backend, Choice]:
        """Open the backend of that name, or the fastest; it must agree with the first run."""
        graph, outputs = self._graph, self._outputs
        pixels = graph.probe
        expected = self._summary([array[:1] for array in answer])

        def check(backend: Backend) -> None:
            found = self._summary(graph.run(backend, pixels, outputs))
            if not np.allclose(found, expected, rtol=_CLOSE, atol=_CLOSE, equal_nan=True):
                text = (
                    f"{backend.name} {backend.version} finds other boxes with {self.path} than "
                    "onnxruntime without optimization"
                )
                raise IntegrityError(text, code="backend_disagrees")

        if graph.backend is not None:
            if name not in ("auto", graph.backend.name):
                text = f"only {graph.backend.name} runs {self.path}, found the backend {name}"
                raise UsageError(text, code="backend_unfit", backend=name)
            return graph.backend, Choice(why="the only one that reads such a file")
        load = partial(open_backend, self.path, device="cpu", threads=threads)
        names = installed_backends("cpu") if name == "auto" else (name,)
        if len(names) == 1:
            backend = load(names[0])
            check(backend)
            why = "auto: the only one installed" if name == "auto" else "as asked for"
            return backend, Choice(why=why)
        autotuner = Autotuner(
            names=names,
            tower="detector",
            graph_sha256=sha256_of_file(self.path),
            threads=threads,
            inputs=pixels,
            load=load,
            check=check,
            run=lambda backend, rows: graph.run(backend, np.asarray(rows, np.float32), outputs),
            batch=min(self.max_batch, _MOST),
        )
        backend, _, choice = autotuner.decide()
        return backend, choice


def _sha256(path: Path) -> str:
    """Return the hash of a file; IR has its weights in a second one."""
    weights = path.with_suffix(".bin")
    if path.suffix.lower() != ".xml" or not weights.is_file():
        return sha256_of_file(path)
    both = sha256_of_file(path) + sha256_of_file(weights)
    return hashlib.sha256(both.encode()).hexdigest()


def _pixels(graph: Graph, usual: Pixels, text: str | None) -> Pixels:
    """Return the pixels of a layout, as a graph of bytes and the user want them."""
    if graph.dtype == np.uint8:  # It has the rest in itself.
        usual = replace(usual, largest=255, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    return usual if text is None else usual.with_input(text)


def _person_class(
    graph: Graph, classes: int | None, wanted: str | int | None, usual: int
) -> tuple[int, str]:
    """Return the number of the class for people, and the reason for it."""
    names = _names(graph)
    if isinstance(wanted, str) and wanted.isdecimal():
        wanted = int(wanted)
    if wanted is None and not names:
        number = 1 if classes == _COCO_91 else usual
        why = "it names none; --detector-class sets another"
    elif isinstance(wanted, int):
        number, why = wanted, "as asked for"
    else:
        name = _PERSON if wanted is None else wanted
        number = next((n for n, found in names.items() if found == name), -1)
        if number < 0:
            known = ", ".join(list(names.values())[:20])
            text = (
                f"knows no class '{name}', only {known}: choose with  --detector-class NAME|N"
                if names
                else f"names no classes, found '{name}': choose one by its number, from 0, with  "
                "--detector-class N"
            )
            raise InputError(
                f"the detector {graph.path} {text}", code="detector_class_unknown", name=name
            )
        why = name
    if classes is not None and number >= classes:
        text = f"the detector {graph.path} has {classes} classes, no class {number}"
        raise InputError(text, code="detector_class_unknown", name=number)
    return number, f"class {number} ({why if names.get(number) in (None, why) else names[number]})"


def _names(graph: Graph) -> dict[int, str]:
    """Return the classes that the file names, as Ultralytics and RF-DETR write them."""
    try:
        if (text := graph.metadata.get("names")) is not None:
            found = literal(text)
        elif (text := graph.metadata.get("rfdetr_inference")) is not None:
            found = json.loads(text)["class_id_to_name"]
        else:
            return {}
        pairs = found.items() if isinstance(found, dict) else enumerate(found)
        return {int(number): str(name) for number, name in pairs}
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
        raise InputError(
            f"the class names in {graph.path} cannot be read ({error_text(error)}): found "
            f"{safe_repr(text)}",
            code="detector_classes_unreadable",
        ) from error
