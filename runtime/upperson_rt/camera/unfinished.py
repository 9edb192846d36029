"""A note of the pictures that are being saved, so that a killed process leaves none behind."""

import glob
import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from upperson_rt.errors import InputError
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.locks import lock_until_closed, try_lock

__all__ = ["Unfinished", "remove_left_behind"]

_log = logging.getLogger(__name__)

_PREFIX = ".unfinished-"


class Unfinished:
    """Names the pictures of a batch on disk before they are saved, until their rows are committed.

    Pictures come before rows, so whoever is killed in between leaves pictures that no row names,
    and no retention would ever find. The file is locked as long as its process lives.
    """

    def __init__(self, crops_dir: Path, run_name: str) -> None:
        """Make the note.

        Raises:
            InputError: The folder cannot be written to.
        """
        self._path = crops_dir / f"{_PREFIX}{run_name}.json"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                self._file = self._path.open("wb", buffering=0)
                lock_until_closed(self._file.fileno(), wait=True)
                if self._path.exists():
                    break
                self._file.close()  # Another process swept it before it was locked.
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror}") from error

    @contextmanager
    def noted(self, items: Sequence[Item]) -> Iterator[None]:
        """Keep the note while pictures are saved and their rows committed.

        Raises:
            InputError: It cannot be written.
        """
        times = [item.time for item in items if item.time is not None]
        note = {
            "cameras": sorted({item.camera for item in items if item.camera is not None}),
            "since": min(times),
            "until": max(times),
            "pictures": [item.crop for item in items if item.crop is not None],
        }
        try:
            self._file.write(json.dumps(note).encode("utf-8"))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(f"cannot write {self._path}: {error.strerror}") from error
        try:
            yield
        finally:
            self._file.seek(0)
            self._file.truncate()

    def close(self) -> None:
        """Remove the note."""
        self._path.unlink(missing_ok=True)
        self._file.close()


def remove_left_behind(gallery: Gallery, crops_dir: Path) -> int:
    """Remove pictures that killed processes saved and did not commit; return how many."""
    removed = 0
    for path in sorted(crops_dir.glob(f"{_PREFIX}*.json")):
        try:
            file = path.open("r+b")
        except FileNotFoundError:
            continue  # Its process ended, or another one has seen to it.
        with file:
            if not try_lock(file.fileno()):
                continue  # Its process lives, or nobody can tell.
            content = file.read()
            # Half a note was never acted upon: its pictures were not begun.
            if content.endswith(b"}"):
                removed += _remove(gallery, crops_dir, json.loads(content))
            path.unlink(missing_ok=True)
    if removed:
        _log.warning(
            "removed %d pictures that a killed process had not committed",
            removed,
            extra={"event": "left_behind", "pictures": removed},
        )
    return removed


def _remove(gallery: Gallery, crops_dir: Path, note: dict[str, Any]) -> int:
    """Remove the pictures of a note that no row names, and halves of files beside them."""
    period = Filter(
        camera=note["cameras"],
        since=note["since"],
        until=math.nextafter(note["until"], math.inf),
    )
    named = {item.crop for item in gallery.items(period)}
    removed = 0
    for name in note["pictures"]:
        path = crops_dir / name
        for half in path.parent.glob(f".{glob.escape(path.name)}.*"):
            half.unlink(missing_ok=True)
        if name not in named and path.is_file():
            path.unlink(missing_ok=True)
            removed += 1
    return removed
