"""The image files of records: whether all of them are there, and those that end early.

Both are looked at before training begins: what is missing would else end a run when its turn comes,
hours later.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL import ImageFile

from upperson_rt.errors import InputError
from upperson_rt.printable import count_of

_NAMED = 5
"""Missing folders that a message names."""


class FoundImages(NamedTuple):
    """What is there of the files that records name."""

    present: list[Path]

    folders: dict[Path, int]
    """Folders that do not exist, the topmost of each path, and how many images belong in them."""

    files: list[Path]
    """Images that are missing from folders that are there."""


def find_images(images: Iterable[Path]) -> FoundImages:
    """Look which images are not there; no file is opened, every folder is listed once."""
    names: dict[Path, set[str]] = {}
    absent: dict[Path, Path] = {}  # Folder to its topmost missing one.
    found = FoundImages([], Counter(), [])
    for image in images:
        folder = image.parent
        if folder not in names and folder not in absent:
            if folder.is_dir():
                names[folder] = _names_in(folder)
            else:
                absent[folder] = _topmost_missing(folder)
        if folder in absent:
            found.folders[absent[folder]] += 1
        # Systems that spell names in their own way, and folders that do not let themselves be
        # listed, are asked again.
        elif image.name in names[folder] or image.exists():
            found.present.append(image)
        else:
            found.files.append(image)
    return found


def require_images(images: Iterable[Path]) -> None:
    """Raise InputError if an image is not there; names the folders that are missing."""
    found = find_images(images)
    if not found.folders and not found.files:
        return
    folders = [f"{folder} ({count_of(count, 'image')})" for folder, count in found.folders.items()]
    parts = folders[:_NAMED]
    if len(folders) > _NAMED:
        parts.append(f"{len(folders) - _NAMED} more folders")
    if found.files:
        files = "a file" if len(found.files) == 1 else f"{len(found.files)} files, the first"
        parts.append(f"{files} {found.files[0]}")
    raise InputError(
        f"images are missing: {', '.join(parts)}: put them in place, or leave their "
        "records out of the annotations;  upperson data check  lists them"
    )


@contextmanager
def truncated_images(allowed: bool) -> Iterator[None]:
    """In this process, decode pictures that end early as far as they go, or refuse them.

    Pillow has one switch for all threads. Refusing is what it does unless told otherwise.
    """
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = allowed
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _names_in(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except PermissionError:
        return set()


def _topmost_missing(folder: Path) -> Path:
    while not folder.parent.is_dir() and folder.parent != folder:
        folder = folder.parent
    return folder
