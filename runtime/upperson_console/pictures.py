"""Pictures for browsers: decoded within limits, scaled down, always a plain JPEG.

No request names a path: the item of the gallery names its file, and a file that does not decode is
not sent. Only an export (see `results`) sends files byte for byte, so that hashes match.
"""

import hashlib
import io
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from upperson_rt.errors import InputError
from upperson_rt.gallery import Item
from upperson_rt.gallery.crops import picture_file, use_picture
from upperson_rt.preprocess import IMAGE_SUFFIXES, use_image

Size: TypeAlias = Literal["thumb", "view", "frame"]
"""``thumb`` for a card, ``view`` for a person's page, ``frame`` for the frame of a crop."""

_Jpeg: TypeAlias = tuple[bytes, tuple[int, int]]
"""A picture, and width and height of its file in pixels."""
_BOUNDS: dict[Size, tuple[int, int]] = {
    "thumb": (256, 384),
    "view": (960, 1200),
    "frame": (1600, 1200),
}
_CACHE_BYTES = 64 << 20
PIECE_BYTES = 1 << 20
"""Bytes of a file that are read at a time."""
_QUALITY = 85


@dataclass(frozen=True)
class Upload:
    """A decoded query picture."""

    pixels: NDArray[np.uint8]
    """uint8 RGB [H, W, 3], scaled down if it was large."""
    sha256: str
    """Of the file that was sent."""
    size: tuple[int, int]
    """Width and height of ``pixels``."""


def as_jpeg(pixels: NDArray[np.uint8], size: Size) -> _Jpeg:
    """Return a picture as JPEG, scaled down to a size, and its width and height before."""
    whole = pixels.shape[1], pixels.shape[0]
    image = Image.fromarray(pixels)
    image.thumbnail(_BOUNDS[size])
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue(), whole


def read_upload(content: IO[bytes]) -> Upload:
    """Decode a picture file, which is read in pieces."""

    def small(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        image = Image.fromarray(pixels)
        image.thumbnail(_BOUNDS["view"])
        return np.asarray(image).copy()

    digest = hashlib.sha256()
    with tempfile.TemporaryDirectory(prefix="upperson-") as folder:
        file = Path(folder, "picture")
        with file.open("wb") as written:
            while piece := content.read(PIECE_BYTES):
                digest.update(piece)
                written.write(piece)
        try:
            pixels = use_image(file, small)
        except InputError as error:
            raise InputError(str(error).replace(f"image {file}", "the picture")) from error
    size = pixels.shape[1], pixels.shape[0]
    return Upload(pixels, digest.hexdigest(), size)


class GalleryPictures:
    """Pictures of a gallery's items, with a cache. Safe for several threads."""

    def __init__(self, crops_dir: Path | None) -> None:
        """Read saved pictures from `Gallery.crops_dir`."""
        self._crops_dir = crops_dir
        self._lock = threading.Lock()
        self._kept: OrderedDict[tuple[str, int, int, Size], _Jpeg] = OrderedDict()
        self.kept_bytes = 0
        """Bytes of the cached pictures."""

    def file(self, item: Item) -> Path | None:
        """Return the file of an item's picture, or None."""
        return picture_file(item, self._crops_dir)

    def frame(self, item: Item) -> Path | None:
        """Return the file of the frame that an item was cut from, or None."""
        if item.source is None or item.box is None:
            return None
        file = picture_file(Item(key=item.key, source=item.source), None)
        is_picture = file is not None and file.suffix.lower() in IMAGE_SUFFIXES
        return file if is_picture else None

    def jpeg(self, item: Item, size: Size) -> _Jpeg | None:
        """Return an item's picture as JPEG, and the size of its file in pixels, or None."""
        file = self.frame(item) if size == "frame" else self.file(item)
        if file is None:
            return None
        try:
            found = file.stat()
        except OSError:  # It was deleted meanwhile.
            return None
        key = str(file), found.st_mtime_ns, found.st_size, size
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        box = item.box if item.crop is None and size != "frame" else None
        made = use_picture(file, _cut(box, size))
        with self._lock:
            if key not in self._kept:
                self._kept[key] = made
                self.kept_bytes += len(made[0])
            while self.kept_bytes > _CACHE_BYTES:
                _, (old, _) = self._kept.popitem(last=False)
                self.kept_bytes -= len(old)
        return made

    def clear_cache(self) -> None:
        """Clear the cache after a deletion."""
        with self._lock:
            self._kept.clear()
            self.kept_bytes = 0


def _cut(box: tuple[int, int, int, int] | None, size: Size) -> Callable[[NDArray[np.uint8]], _Jpeg]:
    def make(pixels: NDArray[np.uint8]) -> _Jpeg:
        if box is not None:
            x0, y0, x1, y1 = (max(0, edge) for edge in box)
            part = pixels[y0:y1, x0:x1]
            pixels = part if part.size else pixels
        return as_jpeg(np.ascontiguousarray(pixels), size)

    return make
