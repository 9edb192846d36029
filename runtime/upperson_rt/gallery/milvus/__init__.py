"""A gallery in Milvus, for when one machine is not enough."""

from upperson_rt.gallery.milvus.store import MilvusGallery

__all__ = ["MilvusGallery"]
