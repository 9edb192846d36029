"""Detectors by what they are called on a command line."""

import importlib
import re
from pathlib import Path

from upperson_rt.arguments import check_name, check_path
from upperson_rt.camera.detectors.boxes_file import BoxesFile
from upperson_rt.camera.detectors.hog import HogDetector
from upperson_rt.camera.detectors.onnx_file import OnnxDetector
from upperson_rt.camera.detectors.protocol import Detector, anybodys_code, batch_of
from upperson_rt.errors import InputError, UsageError
from upperson_rt.printable import error_text, shortened, shown

__all__ = ["open_detector"]

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
