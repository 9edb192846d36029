"""A gallery in Milvus, for when one machine is not enough."""

from upperson_milvus.store import MilvusGallery

__all__ = ["MilvusGallery"]
