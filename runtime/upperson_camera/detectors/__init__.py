"""Detectors: who is in a frame.

``protocol``      what a detector is, and how cameras share one
``naming``        detectors by what they are called on a command line: OpenCV's own, boxes that are
                  known beforehand, any other
``onnx_file``     networks in ONNX files, made of the next two
``graph``         what a file takes and gives, and which layout it has
``layouts``       the layouts: what goes in and what comes out
``look``          what a detector finds in one picture
"""

from upperson_camera.detectors.layouts import LAYOUTS
from upperson_camera.detectors.naming import BoxesFile, HogDetector
from upperson_camera.detectors.onnx_file import OnnxDetector
from upperson_rt.ingest.detector import BatchDetector, Detector, Turns
from upperson_rt.ingest.named_detector import open_detector

__all__ = [
    "LAYOUTS",
    "BatchDetector",
    "BoxesFile",
    "Detector",
    "HogDetector",
    "OnnxDetector",
    "Turns",
    "open_detector",
]
