"""The gallery at its location: opened again after it was replaced."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from upperson_console.pictures import GalleryPictures
from upperson_rt.errors import IntegrityError
from upperson_rt.gallery import CameraInfo, Gallery, GalleryInfo
from upperson_rt.search.service import SearchService

_COUNTS_FOR_S = 5.0
_COUNTING_SHARE = 200
"""Counts are reused for so many times their duration, which is 0.1 s for the cameras of a million
rows."""
_CHECKED_EVERY_S = 1.0
_Counts = TypeVar("_Counts")


class _Counted(Generic[_Counts]):
    """Counts that are made again when they are too old."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: tuple[_Counts, float] | None = None
        """The counts, and the time at which they are too old."""

    def now(self, count: Callable[[], _Counts]) -> _Counts:
        with self._lock:
            began = time.monotonic()
            if self._kept is None or began > self._kept[1]:
                counts = count()
                now = time.monotonic()
                until = now + max(_COUNTS_FOR_S, _COUNTING_SHARE * (now - began))
                self._kept = counts, until
            return self._kept[0]

    def forget(self) -> None:
        with self._lock:  # Waits for a count under way, which is outdated, too.
            self._kept = None


@dataclass
class OpenGallery:
    """An open gallery, with its pictures, search service and counts."""

    gallery: Gallery
    pictures: GalleryPictures
    search: SearchService
    identity: tuple[int, int] | None
    _cameras: _Counted[dict[str, CameraInfo]] = field(default_factory=_Counted)
    _info: _Counted[GalleryInfo] = field(default_factory=_Counted)

    def cameras(self) -> dict[str, CameraInfo]:
        """Return the cameras, some seconds old at most."""
        return self._cameras.now(lambda: self.gallery.by_camera())

    def info(self) -> GalleryInfo:
        """Return the summary of the gallery, some seconds old at most."""
        return self._info.now(lambda: self.gallery.info())

    def has_changed(self) -> None:
        """Drop cached pictures and counts after a deletion."""
        self.pictures.clear_cache()
        self._cameras.forget()
        self._info.forget()


class CurrentGallery:
    """A gallery that is opened again after it was replaced. Safe for several threads."""

    def __init__(
        self, open_gallery: Callable[[], Gallery], search_of: Callable[[Gallery], SearchService]
    ) -> None:
        """Open what is at the location; ``search_of`` returns the search service of a gallery."""
        self._open_gallery = open_gallery
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
        gallery = self._open_gallery()
        pictures = GalleryPictures(gallery.crops_dir)
        return OpenGallery(gallery, pictures, self._search_of(gallery), _identity(gallery.location))


def _identity(location: str) -> tuple[int, int] | None:
    """Return device and inode of a gallery's database."""
    try:
        found = Path(location, "gallery.sqlite").stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
