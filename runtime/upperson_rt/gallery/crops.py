"""Crop files: removed after the items that named them are gone for good."""

import json
import logging
import sqlite3
from collections.abc import Iterable
from pathlib import Path

__all__ = ["crop_path", "remove_crops", "unused_crops"]

_LOG = logging.getLogger(__name__)


def crop_path(folder: Path, crop: str) -> Path | None:
    """Return the file of a crop, or None if it would lie outside of the folder."""
    path = folder / crop
    inside = path.parent.resolve().is_relative_to(folder.resolve()) and ".." not in path.parts
    return path if inside and path != folder else None


def unused_crops(connection: sqlite3.Connection, crops: Iterable[str]) -> list[str]:
    """Return those that no item names any more."""
    return [
        str(crop)
        for (crop,) in connection.execute(
            "SELECT value FROM json_each(?)"
            " WHERE NOT EXISTS (SELECT 1 FROM items WHERE crop = value)",
            (json.dumps(list(crops)),),
        )
    ]


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
