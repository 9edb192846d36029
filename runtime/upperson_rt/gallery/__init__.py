"""The gallery: embeddings of pictures with where and when they were taken."""

from upperson_rt.gallery.protocol import Gallery
from upperson_rt.gallery.records import (
    CameraInfo,
    Filter,
    GalleryInfo,
    Hit,
    IndexInfo,
    Item,
    TrackSpan,
)

__all__ = [
    "CameraInfo",
    "Filter",
    "Gallery",
    "GalleryInfo",
    "Hit",
    "IndexInfo",
    "Item",
    "TrackSpan",
]
