"""Pictures kept in a folder beside the items that name them; nothing outside is ever touched."""

import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from upperson_rt.gallery.records import Item
from upperson_rt.printable import get_logger

__all__ = ["crop_path", "old_files", "picture_file", "remove_crops"]

_LOG = get_logger(__name__)

_UNNAMED_YET_S = 3600.0
"""A crop is saved before its item is; a younger file may be one of those."""


def crop_path(folder: Path, crop: str) -> Path | None:
    """Return the file of a crop, or None if it would lie outside of the folder."""
    if "\0" in crop:
        return None
    path = folder / crop
    inside = path.parent.resolve().is_relative_to(folder.resolve()) and ".." not in path.parts
    return path if inside and path != folder else None


def picture_file(item: Item, crops_dir: Path | None) -> Path | None:
    """Return the absolute path of the saved picture, or of the one it was cut from, if it opens."""
    saved = None if item.crop is None or crops_dir is None else crop_path(crops_dir, item.crop)
    for file in (saved, None if item.source is None else Path(item.source)):
        if file is not None and os.path.isfile(file):  # No name is too long to ask.
            return file.absolute()
    return None


def old_files(folder: Path, before: float = float("inf")) -> Iterator[str]:
    """Yield files, as `Item.crop` names them, last changed before a time in unix seconds.

    Those of the last hour are left out. Links are not followed.
    """
    limit = min(time.time() - _UNNAMED_YET_S, before)
    for place, _, names in os.walk(folder):
        for path in (Path(place, name) for name in names):
            try:
                changed = path.lstat().st_mtime
            except FileNotFoundError:  # It went meanwhile.
                continue
            if changed < limit:
                yield path.relative_to(folder).as_posix()


def remove_crops(folder: Path, crops: Iterable[str]) -> None:
    """Remove files that are there and lie inside the folder; what cannot be removed is logged."""
    for crop in crops:
        path = crop_path(folder, crop)
        try:
            if path is None:
                _LOG.warning("crop %s lies outside of %s and was left there", crop, folder)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            _LOG.warning("crop %s could not be removed: %s", path, error.strerror)
