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

from upperson_rt.camera.access import Access
from upperson_rt.camera.detectors import (
    BatchDetector,
    BoxesFile,
    Detector,
    HogDetector,
    OnnxDetector,
    open_detector,
)
from upperson_rt.camera.pipeline import Pipeline
from upperson_rt.camera.settings import CaptureRules, PipelineSettings, QualityRules
from upperson_rt.camera.source import OpenCVReader, Reader, Source, parse_source
from upperson_rt.camera.stats import CameraStats, Latency, PipelineStats
from upperson_rt.camera.stream import StreamReader, open_source

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
