"""Pictures kept in a folder beside the items that name them; nothing outside is ever touched.

The name of a crop's file has the first 128 bits of the SHA-256 of its content. It stands in the
row of the crop, which has a checksum of its own, so a file that is not what was saved is found.
"""

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.files import IRREGULAR, link_below, open_regular, sync_folder
from upperson_rt.gallery.records import Item
from upperson_rt.printable import get_logger

T = TypeVar("T")
_LOG = get_logger(__name__)

_UNNAMED_YET_S = 3600.0
"""A crop is saved before its item is; a younger file may be one of those."""

_HASH = re.compile(r"\.sha256-([0-9a-f]{32})\.jpg\Z")
_MOST_BYTES = 64 << 20
"""A crop of 16,384 x 16,384 pixels takes less; a sparse file of terabytes is not read through."""


def _digits(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def name_with_hash(stem: str, content: bytes) -> str:
    """Return the name of the JPEG file of a crop, which has the hash of its content."""
    return f"{stem}.sha256-{_digits(content)}.jpg"


def has_hash(crop: str) -> bool:
    """Whether the name of a crop has a hash; those of other programs and old releases do not."""
    return _HASH.search(crop) is not None


def read_crop(file: Path) -> bytes | None:
    """Read a crop and compare it with the hash in its name; None if the name has no hash."""
    named = _HASH.search(file.name)
    if named is None:
        return None
    altered = IntegrityError(
        f"the crop {file} was altered: its content has another hash than its name. Restore it "
        "from a copy, or delete its item",
        code="crop_altered",
        path=file,
    )
    try:
        with open_regular(file, follow_links=False) as opened:
            content = opened.read(_MOST_BYTES + 1)
    except OSError as error:
        if error.errno in IRREGULAR:
            raise altered from error
        raise InputError(f"cannot read the crop {file}: {error.strerror}") from error
    if _digits(content) != named[1]:
        raise altered
    return content


def use_picture(file: Path, use: Callable[[NDArray[np.uint8]], T]) -> T:
    """Call a function with the pixels of a `picture_file`, see `use_image`; a crop is checked."""
    from upperson_rt.preprocess import use_image  # Loads Pillow, which searches do without.

    return use_image(file, use, content=read_crop(file))


def crop_path(folder: Path, crop: str) -> Path | None:
    """Return the file of a crop, or None if it would lie outside of the folder."""
    if "\0" in crop:
        return None
    path = folder / crop
    inside = path.parent.resolve().is_relative_to(folder.resolve()) and ".." not in Path(crop).parts
    return path if inside and path != folder else None


def own_path(folder: Path, crop: str) -> Path | None:
    """Return what `crop_path` does, and None behind a symbolic link: for writing and removing.

    The folder of crops itself must be no link either; the one that it lies in may be.
    """
    path = crop_path(folder, crop)
    return None if path is None or link_below(folder.parent, path.parent) else path


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


def sync_crops(folder: Path, crops: Iterable[str]) -> None:
    """Put on disk which of these files are in the folder: none comes back; raises OSError."""
    for parent in {os.path.dirname(crop) for crop in crops}:
        place = crop_path(folder, os.path.join(parent, "crop"))
        if place is not None and place.parent.is_dir():
            sync_folder(place.parent)


def remove_crops(folder: Path, crops: Iterable[str]) -> list[str]:
    """Remove files that lie inside the folder; log and return what cannot be removed there."""
    places: dict[str, Path | None] = {}  # By folder: finding out where it leads takes a while.
    left = []
    for crop in crops:
        parent, name = os.path.split(crop)
        if parent not in places:
            places[parent] = own_path(folder, os.path.join(parent, "crop"))
        place = None if name in ("", ".", "..") or "\0" in name else places[parent]
        if place is None:
            _LOG.warning("crop %s lies outside of %s or behind a link, and was left", crop, folder)
            continue
        try:
            place.with_name(name).unlink(missing_ok=True)
        except OSError as error:
            _LOG.warning("crop %s could not be removed: %s", place.with_name(name), error.strerror)
            left.append(crop)
    return left
