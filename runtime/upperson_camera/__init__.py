"""Camera pipelines: from frames to rows of a gallery.

A frame passes these modules, in this order:

``source``      devices, GStreamer; ``stream`` files and network streams, ``decoding`` their frames
``capture``     the thread that reads a source, and opens a lost one again
``camera``      numbers and times the frames
``queues``      bounded queues between threads, and the threads themselves
``worker``      the thread of a camera: detects, tracks, selects
``regions``     zones and masks: where people count
``detectors``   networks in ONNX files, HOG, boxes from a file
``tracker``     our own tracker, and those of the package ``trackers``
``crops``       selection of detections, crops, and the thread of the encoder
``commit``      the thread that saves pictures, see ``crop_folder``, and commits rows
``recorder``    the latest packets of a source, on disk
``clips``       the thread that saves whole frames, and clips of those packets
``buffered``    its like for a gallery on a server, behind ``disk_buffer``; ``late_gallery`` is one
                whose server is away

Around them: ``settings``, ``frames`` (the types), ``stats`` and ``prometheus`` (the counters),
``cameras`` (those that there are now), ``pipeline`` (all of it). ``access``, ``web`` and ``relay``
keep a stream at its host; ``reasons`` finds out why a source does not open. ``config`` reads the
file of cameras of `upperson-rt watch`; ``onvif`` and ``soap`` are for `upperson-rt cameras`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upperson_camera.access import Access
    from upperson_camera.detectors import BoxesFile, HogDetector, OnnxDetector, open_detector
    from upperson_camera.frames import SubmitResult
    from upperson_camera.pipeline import Pipeline
    from upperson_camera.settings import (
        CameraDetector,
        CameraOptions,
        CaptureRules,
        PipelineOptions,
        PipelineSettings,
    )
    from upperson_camera.source import OpenCVReader, Reader, Source, parse_source
    from upperson_camera.stats import CameraStats, Latency, PipelineStats
    from upperson_camera.stream import StreamReader, open_source
    from upperson_rt.ingest.boxes import QualityRules
    from upperson_rt.ingest.detector import BatchDetector, Detector

__all__ = [
    "Access",
    "BatchDetector",
    "BoxesFile",
    "CameraDetector",
    "CameraOptions",
    "CameraStats",
    "CaptureRules",
    "Detector",
    "HogDetector",
    "Latency",
    "OnnxDetector",
    "OpenCVReader",
    "Pipeline",
    "PipelineOptions",
    "PipelineSettings",
    "PipelineStats",
    "QualityRules",
    "Reader",
    "Source",
    "StreamReader",
    "SubmitResult",
    "open_detector",
    "open_source",
    "parse_source",
]

_MODULES = {
    "upperson_camera.access": ("Access",),
    "upperson_camera.detectors": ("BoxesFile", "HogDetector", "OnnxDetector", "open_detector"),
    "upperson_camera.frames": ("SubmitResult",),
    "upperson_camera.pipeline": ("Pipeline",),
    "upperson_camera.settings": (
        "CameraDetector",
        "CameraOptions",
        "CaptureRules",
        "PipelineOptions",
        "PipelineSettings",
    ),
    "upperson_camera.source": ("OpenCVReader", "Reader", "Source", "parse_source"),
    "upperson_camera.stats": ("CameraStats", "Latency", "PipelineStats"),
    "upperson_camera.stream": ("StreamReader", "open_source"),
    "upperson_rt.ingest.detector": ("BatchDetector", "Detector"),
    "upperson_rt.ingest.boxes": ("QualityRules",),
}
_OWNERS = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a public name on first use: commands load numpy only when they run."""
    if name not in _OWNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_OWNERS[name]), name)
    globals()[name] = value
    return value
