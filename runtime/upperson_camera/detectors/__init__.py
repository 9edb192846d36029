"""Detectors of people.

``naming``        HOG, boxes from a file, and the makers by name
``onnx_file``     networks in files, with the next four
``graph``         inputs and outputs of a file
``recognition``   its layout, and files and numbers that are refused
``layouts``       the layouts: the meaning of outputs
``pixels``        from a frame to an input, and back
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
