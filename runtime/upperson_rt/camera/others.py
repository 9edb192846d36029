"""Notices that another process adds pictures of a camera of the same name, as a second box may."""

import time
from collections.abc import Iterable, Sequence

from upperson_rt.camera.stats import Ledger
from upperson_rt.errors import UppersonError
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.printable import count_of, get_logger

__all__ = ["OtherWriters"]

_log = get_logger(__name__)

_LOOK_EVERY_S = 60.0


class OtherWriters:
    """Compares what a gallery holds of our cameras with what we have added to it.

    Two boxes whose cameras have one name mix up what they see: filters and retention by camera
    then mean both. What is deleted in the meantime hides as many pictures of others.
    """

    def __init__(self, gallery: Gallery, ledger: Ledger) -> None:
        self._gallery = gallery
        self._ledger = ledger
        self._expected: dict[str, int] = {}
        self._looked = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the last look was a while ago."""
        return time.monotonic() - self._looked >= _LOOK_EVERY_S

    def know(self, cameras: Iterable[str]) -> None:
        """Count what is there of cameras whose first pictures are about to be added."""
        for camera in set(cameras) - self._expected.keys():
            self._expected[camera] = self._gallery.count(Filter(camera=camera))

    def count_ours(self, items: Sequence[Item], replaced: Sequence[str]) -> None:
        """Take what was added into account, and the keys of it that were there before."""
        before = set(replaced)
        for item in items:
            if item.camera is not None:
                self._expected[item.camera] += item.key not in before
                self._ledger.count(item.camera, "replaced", item.key in before)

    def look(self) -> None:
        """Count, and warn of, what others have added since the last look."""
        self._looked = time.monotonic()
        for camera, expected in self._expected.items():
            try:
                found = self._gallery.count(Filter(camera=camera))
            except UppersonError as error:  # Nothing is lost by it, and commits will tell.
                _log.warning("cannot tell whether others add pictures of %s: %s", camera, error)
                return
            self._expected[camera] = found
            if found > expected:
                self._ledger.count(camera, "added_by_others", found - expected)
                _log.warning(
                    "another process has added %s of a camera that is called %s as well: if it is "
                    "another camera, give it another name",
                    count_of(found - expected, "picture"),
                    camera,
                    extra={"event": "added_by_others", "camera": camera},
                )
