"""The gallery that lies at its place now: opened again if another one was put there."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from upperson_console.pictures import Pictures
from upperson_rt.gallery import CameraInfo, Gallery, GalleryInfo
from upperson_rt.search.service import SearchService

__all__ = ["CurrentGallery", "Opened"]

_COUNTS_FOR_S = 5.0
_COUNTING_SHARE = 200
"""Counts are used for so many times the time that counting took: a tenth of a second for the
cameras of a million rows."""
_LOOK_FOR_CHANGES_S = 1.0
_Counts = TypeVar("_Counts")


class _Counted(Generic[_Counts]):
    """Counts that are made anew when they are asked for and have become old."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: tuple[_Counts, float] | None = None
        """And until when they are used."""

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
        with self._lock:  # What is being counted at this moment is of before, too.
            self._kept = None


@dataclass
class Opened:
    """A gallery, and what was learned of it."""

    gallery: Gallery
    pictures: Pictures
    search: SearchService
    identity: tuple[int, int] | None
    _cameras: _Counted[dict[str, CameraInfo]] = field(default_factory=_Counted)
    _info: _Counted[GalleryInfo] = field(default_factory=_Counted)

    def cameras(self) -> dict[str, CameraInfo]:
        """Return the cameras as they were some seconds ago at most."""
        return self._cameras.now(lambda: self.gallery.by_camera())

    def info(self) -> GalleryInfo:
        """Return the gallery at a glance, as it was some seconds ago at most."""
        return self._info.now(lambda: self.gallery.info())

    def has_changed(self) -> None:
        """Forget what may not be there any more: something was deleted."""
        self.pictures.forget()
        self._cameras.forget()
        self._info.forget()


class CurrentGallery:
    """Opens a gallery, and whichever takes its place. Safe to use from several threads."""

    def __init__(
        self, open_gallery: Callable[[], Gallery], search_of: Callable[[Gallery], SearchService]
    ) -> None:
        """Open what lies there.

        Args:
            open_gallery: Does so, each time.
            search_of: Returns what searches it.
        """
        self._open_gallery = open_gallery
        self._search_of = search_of
        self._lock = threading.Lock()
        self._looked = time.monotonic()
        self.last = self._open()
        """What was opened last, without a look whether it is still there."""

    def now(self) -> Opened:
        """Return what lies there.

        Raises:
            IntegrityError: One of another model was put there.
            InputError: It is gone.
        """
        with self._lock:
            now = time.monotonic()
            if now - self._looked < _LOOK_FOR_CHANGES_S:
                return self.last
            if _identity(self.last.gallery.location) != self.last.identity:
                # The one before is not closed: searches of other threads may be in it.
                self.last = self._open()
            self._looked = now
            return self.last

    def _open(self) -> Opened:
        gallery = self._open_gallery()
        pictures = Pictures(gallery.crops_dir)
        return Opened(gallery, pictures, self._search_of(gallery), _identity(gallery.location))


def _identity(location: str) -> tuple[int, int] | None:
    """Return what tells a gallery's database from another one at its place."""
    try:
        found = Path(location, "gallery.sqlite").stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
