"""Image files of records: find missing ones before training, and decode truncated ones.

A missing image would otherwise end a run hours later.
"""

import errno
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL import ImageFile

from upperson_rt.errors import InputError
from upperson_rt.printable import count_of, safe_repr

_NAMED = 5
"""Missing folders that a message names."""
_LONGEST_PATH = 500
"""Longest path that messages name whole."""


class FoundImages(NamedTuple):
    """The files of records, by whether they exist."""

    present: list[Path]

    folders: dict[Path, int]
    """Folders that do not exist, the topmost of each path, and how many images belong in them."""

    files: list[Path]
    """Images that are missing from folders that are there."""


def find_images(images: Iterable[Path]) -> FoundImages:
    """Find missing images; no file is opened, every folder is listed once."""
    names: dict[Path, set[str]] = {}
    absent: dict[Path, Path] = {}  # Folder to its topmost missing one.
    found = FoundImages([], Counter(), [])
    for image in images:
        folder = image.parent
        if folder not in names and folder not in absent:
            if not _is_there(folder, Path.is_dir):
                absent[folder] = _topmost_missing(folder)
            else:
                try:
                    names[folder] = set(os.listdir(folder))
                except PermissionError:
                    names[folder] = set()
        if folder in absent:
            found.folders[absent[folder]] += 1
        # Some systems normalise names, and some folders cannot be listed.
        elif image.name in names[folder] or _is_there(image, Path.exists):
            found.present.append(image)
        else:
            found.files.append(image)
    return found


def require_images(images: Iterable[Path]) -> None:
    """Raise InputError if an image is not there; names the folders that are missing."""
    found = find_images(images)
    if not found.folders and not found.files:
        return
    folders = [
        f"{path_text(folder)} ({count_of(count, 'image')})"
        for folder, count in found.folders.items()
    ]
    parts = folders[:_NAMED]
    if len(folders) > _NAMED:
        parts.append(f"{len(folders) - _NAMED} more folders")
    if found.files:
        files = "a file" if len(found.files) == 1 else f"{len(found.files)} files, the first"
        parts.append(f"{files} {path_text(found.files[0])}")
    raise InputError(
        f"images are missing: {', '.join(parts)}: put them in place, or leave their "
        "records out of the annotations;  upperson data check  lists them",
        code="images_missing",
        folders=dict(found.folders),
        files=found.files,
    )


def path_text(path: Path) -> str:
    """Return a path for a message, shortened if it is very long."""
    return str(path) if len(str(path)) <= _LONGEST_PATH else safe_repr(str(path))


@contextmanager
def truncated_images(allowed: bool) -> Iterator[None]:
    """In this process, decode pictures that end early as far as they go, or refuse them.

    Pillow has one switch for all threads, which refuses by default.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = allowed
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _is_there(path: Path, look: Callable[[Path], bool]) -> bool:
    try:
        return look(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # Nothing can be called so.
            return False
        raise InputError(
            f"cannot look for images: {path_text(path)}: {error.strerror}",
            code="folder_unreadable",
            path=path,
        ) from error


def _topmost_missing(folder: Path) -> Path:
    while not _is_there(folder.parent, Path.is_dir) and folder.parent != folder:
        folder = folder.parent
    return folder
