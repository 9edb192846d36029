"""A gallery in a folder: SQLite is the truth, durable per commit; a search index is derived."""

from upperson_rt.gallery.sqlite.store import SqliteGallery

__all__ = ["SqliteGallery"]
