"""Detectors of people.

``naming``        HOG, boxes from a file, and the makers by name
``onnx_file``     networks in ONNX files, with the next two
``graph``         inputs and outputs of a file, and its layout
``layouts``       the layouts: inputs, and the meaning of outputs
"""

from upperson_camera.detectors.layouts import LAYOUTS
from upperson_camera.detectors.naming import BoxesFile, HogDetector
from upperson_camera.detectors.onnx_file import OnnxDetector
from upperson_rt.ingest.detector import BatchDetector, Detector, SharedDetector, open_detector

__all__ = [
    "LAYOUTS",
    "BatchDetector",
    "BoxesFile",
    "Detector",
    "HogDetector",
    "OnnxDetector",
    "SharedDetector",
    "open_detector",
]
