"""Camera pipelines: sources, detectors, tracks, and the best crops of each track in a gallery."""

from upperson_rt.camera.capture import CaptureRules
from upperson_rt.camera.detectors import BoxesFile, Detector, HogDetector, open_detector
from upperson_rt.camera.pipeline import Pipeline
from upperson_rt.camera.selection import QualityRules
from upperson_rt.camera.source import Source, parse_source
from upperson_rt.camera.stats import CameraStats, Latency, PipelineStats

__all__ = [
    "BoxesFile",
    "CameraStats",
    "CaptureRules",
    "Detector",
    "HogDetector",
    "Latency",
    "Pipeline",
    "PipelineStats",
    "QualityRules",
    "Source",
    "open_detector",
    "parse_source",
]
