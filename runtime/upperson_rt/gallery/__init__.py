"""The gallery: embeddings of pictures with where and when they were taken."""

from upperson_rt.gallery.records import Filter, GalleryInfo, GalleryStore, Hit, Item
from upperson_rt.gallery.sqlite import Gallery

__all__ = ["Filter", "Gallery", "GalleryInfo", "GalleryStore", "Hit", "Item"]
