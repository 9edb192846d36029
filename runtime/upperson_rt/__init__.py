"""Torch-free runtime: find a person's pictures from a sentence.

    import upperson_rt

    encoder = upperson_rt.open("bundle")
    embeds = encoder.encode_texts(["a woman in a red coat"])

The names below are imported on first use, so that ``import upperson_rt`` costs nothing and
works without numpy, Pillow or any inference backend. It sets environment variables, unless the
user has, so that threads of libraries that are loaded later sleep while they wait, and that
ONNX Runtime sends nothing to its makers.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from upperson_camera import CameraStats, Pipeline, PipelineStats
    from upperson_log.query_log import QueryLog
    from upperson_phrases.evidence import Explanation
    from upperson_rt.bundle import Bundle
    from upperson_rt.bundle import open_encoder as open
    from upperson_rt.encoder import Encoder
    from upperson_rt.errors import (
        AccuracyGateError,
        BackendError,
        InputError,
        IntegrityError,
        UppersonError,
        UsageError,
    )
    from upperson_rt.gallery import Filter, Gallery, GalleryInfo, Hit, Item, TrackSpan
    from upperson_rt.ingest.boxes import QualityRules
    from upperson_rt.ingest.files import IndexReport, index_images
    from upperson_rt.manifest import Manifest
    from upperson_rt.preprocess import iter_image_files, load_image, resize_image
    from upperson_rt.retriever import Retriever
    from upperson_rt.search.notices import Notice
    from upperson_rt.search.query import SearchRequest
    from upperson_rt.search.service import SearchResult
    from upperson_rt.tokenizer import Tokenizer
    from upperson_scores.metrics import RetrievalMetrics, retrieval_metrics
    from upperson_sheet.sheet import save_sheet

__version__ = "0.1.0"

if os.environ.keys().isdisjoint(("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
    # Threads of OpenMP (torch, faiss) otherwise wait for each other in a loop, which keeps a busy
    # processor from the very thread that they wait for. A few thousand rounds of GNU's loop, some
    # ten microseconds, cost a busy machine nothing and save a third of a quiet one's time.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "5000", "KMP_BLOCKTIME": "0"}
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # numpy's: 2**4 cycles, its least.
# ONNX Runtime 1.32 otherwise names the device, keeps a database of what it ran in the user's cache
# folder, and sends it to Microsoft. It looks when it is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "AccuracyGateError",
    "BackendError",
    "Bundle",
    "CameraStats",
    "Encoder",
    "Explanation",
    "Filter",
    "Gallery",
    "GalleryInfo",
    "Hit",
    "IndexReport",
    "InputError",
    "IntegrityError",
    "Item",
    "Manifest",
    "Notice",
    "Pipeline",
    "PipelineStats",
    "QualityRules",
    "QueryLog",
    "RetrievalMetrics",
    "Retriever",
    "SearchRequest",
    "SearchResult",
    "Tokenizer",
    "TrackSpan",
    "UppersonError",
    "UsageError",
    "__version__",
    "index_images",
    "iter_image_files",
    "load_image",
    "open",
    "resize_image",
    "retrieval_metrics",
    "save_sheet",
]

_MODULES = {
    "bundle": "Bundle open",
    "encoder": "Encoder",
    "errors": "AccuracyGateError BackendError InputError IntegrityError UppersonError UsageError",
    "gallery": "Filter Gallery GalleryInfo Hit Item TrackSpan",
    "ingest.boxes": "QualityRules",
    "ingest.files": "IndexReport index_images",
    "manifest": "Manifest",
    "upperson_scores.metrics": "RetrievalMetrics retrieval_metrics",
    "preprocess": "iter_image_files load_image resize_image",
    "retriever": "Retriever",
    "search.notices": "Notice",
    "search.query": "SearchRequest",
    "search.service": "SearchResult",
    "upperson_phrases.evidence": "Explanation",
    "upperson_sheet.sheet": "save_sheet",
    "tokenizer": "Tokenizer",
    "upperson_log.query_log": "QueryLog",
    "upperson_camera": "CameraStats Pipeline PipelineStats",
}
_OWNERS = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    if name not in _OWNERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    owner = _OWNERS[name]
    # Names of the packages beside the core stay here for programs of earlier releases.
    module = import_module(owner if owner.startswith("upperson_") else f"{__name__}.{owner}")
    value: object = getattr(module, "open_encoder" if name == "open" else name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
