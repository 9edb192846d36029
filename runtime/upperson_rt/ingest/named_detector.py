"""Detectors by the name that a command line or a program gives them."""

import importlib
import re
from collections.abc import Mapping
from pathlib import Path

from upperson_rt.arguments import check_name
from upperson_rt.errors import InputError, UsageError
from upperson_rt.extensions import extension_names, load_extension
from upperson_rt.ingest.detector import Detector, anybodys_code, batch_of
from upperson_rt.printable import error_text, shortened, shown

__all__ = ["open_detector", "refuse_options"]

_FACTORY = re.compile(r"([A-Za-z_][\w.]*):([A-Za-z_][\w.]*)")
_OPTIONS = {
    "layout": "--detector-layout",
    "person": "--detector-class",
    "min_score": "--detector-score",
}


def open_detector(
    name: str,
    layout: str | None = None,
    person: str | None = None,
    min_score: float | None = None,
    threads: int | None = None,
) -> Detector:
    """Return a detector by its name.

    A detector may have the attributes ``identity`` (what its boxes depend on), ``facts`` (for
    ``doctor``; its `str` is shown then), ``warning`` (shown when it is opened) and ``of_one_video``
    (it knows the frames of one video only).

    Args:
        name: An extension's (``hog``), a file with an extension's suffix (``FILE.onnx``), or
            ``package.module:factory``, which is called without arguments and returns a detector.
        layout: Of an ONNX file, as for the next one.
        person: The class that is people, by name or number.
        min_score: Lowest score of a box.
        threads: CPU threads.

    Raises:
        InputError: No such detector or file, a file of another kind, or a factory that fails.
        UsageError: An option that this detector does not take.
        BackendError: A package that it needs is missing.
    """
    check_name(name, "a detector")
    options = {"layout": layout, "person": person, "min_score": min_score}
    known = extension_names("detectors")
    kind = name if name in known else Path(name).suffix.lower().removeprefix(".")
    if kind in known:
        made: Detector = load_extension("detectors", kind)(name, **options, threads=threads)
        return made
    factory = _FACTORY.fullmatch(name)
    refuse_options(name, options)
    if factory:
        return _call(*factory.groups())
    raise InputError(
        f"no detector {shown(name)}: expected one of {', '.join(known) or 'those of extensions'}, "
        "a file that ends in one of these, or MODULE:FACTORY of your own"
    )


def refuse_options(name: str, options: Mapping[str, object]) -> None:
    """Refuse options that a detector does not take.

    Raises:
        UsageError: One is given.
    """
    for option, given in options.items():
        if given is not None and option in _OPTIONS:
            raise UsageError(f"the detector {shown(name)} does not take {_OPTIONS[option]}")


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
