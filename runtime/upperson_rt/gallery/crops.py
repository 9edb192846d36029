"""Crop files: removed after the items that named them are gone for good."""

import json
import logging
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

__all__ = ["crop_path", "remove_crops", "stray_crops", "unused_crops"]

_LOG = logging.getLogger(__name__)

_UNNAMED_YET_S = 3600.0
"""A crop is saved before its item is; a younger file may be one of those."""
_FILES_AT_A_TIME = 10_000


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


def stray_crops(
    connection: sqlite3.Connection, folder: Path, before: float | None = None
) -> Iterator[str]:
    """Yield files in the folder that no item names, last changed before a time in unix seconds.

    Those of the last hour are left out. Links are not followed.
    """
    limit = min(time.time() - _UNNAMED_YET_S, float("inf") if before is None else before)
    old = (
        path.relative_to(folder).as_posix()
        for place, _, names in os.walk(folder)
        for path in (Path(place, name) for name in names)
        if _last_change(path) < limit
    )
    while part := list(islice(old, _FILES_AT_A_TIME)):
        sql = "SELECT crop FROM items WHERE crop IN (SELECT value FROM json_each(?))"
        named = {crop for (crop,) in connection.execute(sql, (json.dumps(part),))}
        yield from (crop for crop in part if crop not in named)


def _last_change(path: Path) -> float:
    try:
        return path.lstat().st_mtime
    except FileNotFoundError:  # It went meanwhile.
        return float("inf")


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
