"""Camera pipelines: from pictures to rows in a gallery.

The files in the order in which a frame comes by them:

``settings``    what pipeline and cameras are told, checked once
``source``      what can be read, and what OpenCV reads of it; ``stream`` reads from networks;
                names and passwords by host, from a file
``access``      which hosts and certificates a stream may have; ``web`` and ``relay`` see to it
``capture``     the thread that reads a source, and opens a lost one again
``frames``      what travels: frames, boxes, views of people, crops
``camera``      where the frames of a camera come in and get number and time
``worker``      the thread of a camera, which does the next three
``detectors``   who is in the frame
``tracker``     which boxes are one person, by our own tracker or by others
``crops``       which view of a person is best, what is kept of it, and its embedding
``queues``      what lies between threads, bounded, and what a stage is
``commit``      pictures to disk, rows to the gallery
``stats``       what came in, went out and was dropped; ``prometheus`` publishes it
``pipeline``    all of them together

And before any of that, for `upperson-rt cameras`:

``onvif``       which cameras the local network has and which streams they have; ``soap`` how they
                are asked
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upperson_camera.access import Access
    from upperson_camera.detectors import BoxesFile, HogDetector, OnnxDetector, open_detector
    from upperson_camera.pipeline import Pipeline
    from upperson_camera.settings import CaptureRules, PipelineSettings
    from upperson_camera.source import OpenCVReader, Reader, Source, parse_source
    from upperson_camera.stats import CameraStats, Latency, PipelineStats
    from upperson_camera.stream import StreamReader, open_source
    from upperson_rt.ingest.detector import BatchDetector, Detector
    from upperson_rt.ingest.quality import QualityRules

__all__ = [
    "Access",
    "BatchDetector",
    "BoxesFile",
    "CameraStats",
    "CaptureRules",
    "Detector",
    "HogDetector",
    "Latency",
    "OnnxDetector",
    "OpenCVReader",
    "Pipeline",
    "PipelineSettings",
    "PipelineStats",
    "QualityRules",
    "Reader",
    "Source",
    "StreamReader",
    "open_detector",
    "open_source",
    "parse_source",
]

_OWNERS = {
    "Access": "upperson_camera.access",
    "BatchDetector": "upperson_rt.ingest.detector",
    "BoxesFile": "upperson_camera.detectors",
    "CameraStats": "upperson_camera.stats",
    "CaptureRules": "upperson_camera.settings",
    "Detector": "upperson_rt.ingest.detector",
    "HogDetector": "upperson_camera.detectors",
    "Latency": "upperson_camera.stats",
    "OnnxDetector": "upperson_camera.detectors",
    "OpenCVReader": "upperson_camera.source",
    "Pipeline": "upperson_camera.pipeline",
    "PipelineSettings": "upperson_camera.settings",
    "PipelineStats": "upperson_camera.stats",
    "QualityRules": "upperson_rt.ingest.quality",
    "Reader": "upperson_camera.source",
    "Source": "upperson_camera.source",
    "StreamReader": "upperson_camera.stream",
    "open_detector": "upperson_camera.detectors",
    "open_source": "upperson_camera.stream",
    "parse_source": "upperson_camera.source",
}


def __getattr__(name: str) -> object:
    """Import a public name on first use: commands load numpy only when they run."""
    if name not in _OWNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_OWNERS[name]), name)
    globals()[name] = value
    return value
