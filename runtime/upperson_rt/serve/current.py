"""The gallery that lies at its place now: opened again if another one was put there."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from upperson_rt.gallery import CameraInfo, Gallery
from upperson_rt.serve.pictures import Pictures
from upperson_rt.serve.scale import Scale

__all__ = ["CurrentGallery", "Opened"]

_CAMERAS_FOR_S = 5.0
_COUNTING_SHARE = 200
"""Counts of cameras are used for so many times the time that counting took: a tenth of a second for
a million rows."""
_LOOK_FOR_CHANGES_S = 1.0


@dataclass
class Opened:
    """A gallery, and what was learned of it."""

    gallery: Gallery
    pictures: Pictures
    scale: Scale
    identity: tuple[int, int] | None
    _cameras: dict[str, CameraInfo] = field(default_factory=dict)
    _cameras_until: float = float("-inf")
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def cameras(self) -> dict[str, CameraInfo]:
        """Return the cameras as they were some seconds ago at most."""
        with self._lock:
            began = time.monotonic()
            if began > self._cameras_until:
                self._cameras = self.gallery.by_camera()
                now = time.monotonic()
                self._cameras_until = now + max(_CAMERAS_FOR_S, _COUNTING_SHARE * (now - began))
            return self._cameras

    def has_changed(self) -> None:
        """Forget what may not be there any more: something was deleted."""
        self.pictures.forget()
        self._cameras_until = float("-inf")


class CurrentGallery:
    """Opens a gallery, and whichever takes its place. Safe to use from several threads."""

    def __init__(
        self, open_gallery: Callable[[], Gallery], scale_of: Callable[[Gallery], Scale]
    ) -> None:
        """Open what lies there.

        Args:
            open_gallery: Does so, each time.
            scale_of: Returns what its scores are compared with.
        """
        self._open_gallery = open_gallery
        self._scale_of = scale_of
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
        return Opened(gallery, pictures, self._scale_of(gallery), _identity(gallery.location))


def _identity(location: str) -> tuple[int, int] | None:
    """Return what tells a gallery's database from another one at its place."""
    try:
        found = Path(location, "gallery.sqlite").stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
