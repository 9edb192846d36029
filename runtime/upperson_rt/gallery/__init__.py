"""The gallery: embeddings of pictures with where and when they were taken."""

from upperson_rt.gallery.base import Gallery, is_remote
from upperson_rt.gallery.records import Filter, GalleryInfo, Hit, IndexInfo, Item, TrackSpan
from upperson_rt.gallery.sqlite import SqliteGallery

__all__ = [
    "Filter",
    "Gallery",
    "GalleryInfo",
    "Hit",
    "IndexInfo",
    "Item",
    "SqliteGallery",
    "TrackSpan",
    "is_remote",
]
