"""The gallery at its location: opened again after it was replaced."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from upperson_console.opaque_ids import IdPermutation, with_opaque_ids
from upperson_console.pictures import GalleryPictures
from upperson_rt.errors import IntegrityError
from upperson_rt.gallery import Gallery
from upperson_rt.search.service import SearchService

_COUNTS_FOR_S = 5.0
_COUNTING_SHARE = 200
"""Counts are reused for so many times their duration, which is 0.1 s for the cameras of a million
rows."""
_CHECKED_EVERY_S = 1.0
_Counts = TypeVar("_Counts")


class _Counted(Generic[_Counts]):
    """Counts that are made again when they are too old."""

    def __init__(self, count: Callable[[], _Counts]) -> None:
        self._count = count
        self._lock = threading.Lock()
        self._kept: tuple[_Counts, float] | None = None
        """The counts, and the time at which they are too old."""

    def __call__(self) -> _Counts:
        with self._lock:
            began = time.monotonic()
            if self._kept is None or began > self._kept[1]:
                counts = self._count()
                now = time.monotonic()
                until = now + max(_COUNTS_FOR_S, _COUNTING_SHARE * (now - began))
                self._kept = counts, until
            return self._kept[0]

    def forget(self) -> None:
        with self._lock:  # Waits for a count under way, which is outdated, too.
            self._kept = None


class OpenGallery:
    """An open gallery, with its pictures, search service and counts."""

    def __init__(self, rows: Gallery, gallery: Gallery, search: SearchService) -> None:
        self.rows, self.gallery, self.search = rows, gallery, search
        """The gallery with its row ids, with opaque ids, and the search service of the latter."""
        self.pictures = GalleryPictures(gallery.crops_dir)
        self.binned = GalleryPictures(getattr(getattr(rows, "bin", None), "crops_dir", None))
        """Pictures of what is in the bin."""
        self.identity = _identity(gallery.location)
        self.cameras = _Counted(lambda: gallery.by_camera())
        """Return the cameras, some seconds old at most."""
        self.info = _Counted(lambda: gallery.info())
        """Return the summary of the gallery, some seconds old at most."""

    def has_changed(self) -> None:
        """Drop cached pictures and counts after a deletion."""
        self.pictures.clear_cache()
        self.binned.clear_cache()
        self.cameras.forget()
        self.info.forget()


class CurrentGallery:
    """A gallery that is opened again after it was replaced. Safe for several threads."""

    def __init__(
        self,
        open_gallery: Callable[[], Gallery],
        ids: IdPermutation,
        search_of: Callable[[Gallery], SearchService],
    ) -> None:
        """Open what is at the location; ``search_of`` returns the search service of a gallery."""
        self._open_gallery, self._ids = open_gallery, ids
        self._search_of = search_of
        self._lock = threading.Lock()
        self._checked = time.monotonic()
        self.last = self._open()
        """The gallery that was opened last, without a check whether it was replaced."""

    def now(self) -> OpenGallery:
        """Return the gallery at the location."""
        with self._lock:
            now = time.monotonic()
            if now - self._checked < _CHECKED_EVERY_S:
                return self.last
            if self._was_replaced():
                # The former one stays open: other threads may search it.
                self.last = self._open()
            self._checked = now
            return self.last

    def _was_replaced(self) -> bool:
        identity = _identity(self.last.gallery.location)
        if identity != self.last.identity or identity is None:
            return identity != self.last.identity
        try:
            self.last.gallery.count()
        except IntegrityError:  # Perhaps another database with the inode of the deleted one.
            return True
        return False

    def _open(self) -> OpenGallery:
        rows = self._open_gallery()
        gallery = with_opaque_ids(rows, self._ids)
        return OpenGallery(rows, gallery, self._search_of(gallery))


def _identity(location: str) -> tuple[int, int] | None:
    """Return device and inode of a gallery's database."""
    try:
        found = Path(location, "gallery.sqlite").stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
