"""Pictures of a data set, resized to the input of the image tower: from their files, or a cache.

A cache is a folder that holds every picture as the bytes that training reads, so that none is
decoded twice:

    pictures.json   which pictures, by a hash of their list, and their size
    pixels.u8       uint8 [pictures, H, W, 3], read by place
    stamps.i64      int64 [pictures, 2]: bytes and time of the file it was made of, 0 until it is

A stamp is written when the picture is on disk, so building goes on where it stopped, and a picture
whose file has changed since is made again.

Shapes: N batch, H picture height, W picture width, G pictures of a cache.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageFile
from torch import Tensor
from torch.utils.data import Dataset

from upperson.data.images import truncated_images
from upperson_rt.encoder import Progress
from upperson_rt.errors import InputError, IntegrityError, UppersonError
from upperson_rt.files import make_folder, remove_unfinished, write_atomically
from upperson_rt.locks import lock_until_closed
from upperson_rt.preprocess import prepare_image
from upperson_rt.strict import read_json

LIST = "pictures.json"
PIXELS = "pixels.u8"
STAMPS = "stamps.i64"

_FORMAT = 1
_SYNC_BYTES = 64 << 20
"""Pictures are written to disk, and stamped, by so many bytes."""


class Pictures:
    """Files as uint8 RGB of one size, (height_px, width_px), read in any order and repeatedly."""

    def __init__(self, files: Sequence[Path], image_size: tuple[int, int]) -> None:
        self.image_size = image_size
        # One array of bytes: an object for each would be copied in every process that loads.
        self._files = np.array([os.fsencode(file) for file in files])
        # A spawned worker has only what it is given.
        self._truncated = ImageFile.LOAD_TRUNCATED_IMAGES

    @property
    def transfer_bytes(self) -> int:
        """Bytes of a picture that a loader process passes through shared memory."""
        return math.prod(self.image_size) * 3

    def __len__(self) -> int:
        return len(self._files)

    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.uint8]:
        """Return the pictures at some places, uint8 [N, H, W, 3]; InputError if one is broken."""
        pixels_NHW3 = np.empty((len(indices), *self.image_size, 3), dtype=np.uint8)
        with truncated_images(self._truncated):
            for pixels_HW3, index in zip(pixels_NHW3, indices, strict=True):
                pixels_HW3[:] = prepare_image(os.fsdecode(self._files[index]), *self.image_size)
        return pixels_NHW3

    def for_batch(self, indices: Sequence[int] | NDArray[np.integer]) -> "Tensor | StoredPictures":
        """Return what a loader process passes on, for `pixels_of`; raises as `read` does."""
        return torch.from_numpy(self.read(indices))


class CachedPictures(Pictures):
    """The same pictures out of the file of a cache, in which ``rows`` are their places."""

    def __init__(self, pixels: Path, rows: Sequence[int], image_size: tuple[int, int]) -> None:
        super().__init__([], image_size)
        self._path = pixels
        self._rows = np.array(rows, dtype=np.int64)

    @property
    def transfer_bytes(self) -> int:
        """Bytes of a picture's index, which a loader process passes on."""
        return self._rows.itemsize

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.uint8]:
        """Return the pictures at some places; IntegrityError if the cache is cut short or gone."""
        return self._at(indices).tensor().numpy()

    def for_batch(self, indices: Sequence[int] | NDArray[np.integer]) -> "StoredPictures":
        """Return references to the pictures, which the system begins to read."""
        stored = self._at(indices)
        stored.read_ahead()
        return stored

    def _at(self, indices: Sequence[int] | NDArray[np.integer]) -> "StoredPictures":
        return StoredPictures(self._path, self._rows[np.asarray(indices)], self.image_size)


@dataclass(frozen=True)
class StoredPictures:
    """References to pictures in a cache.

    A loader process passes these instead of bytes: writing bytes into shared memory takes longer
    than reading them again, and shared memory may be small.
    """

    path: Path
    """Pixels of the cache."""

    rows_N: NDArray[np.int64]
    """Their places in it."""

    image_size: tuple[int, int]

    def read_ahead(self) -> None:
        """Let the system, if it can, read them ahead."""
        if not hasattr(os, "posix_fadvise"):
            return
        with self._opened() as file:
            for start in self._starts():
                os.posix_fadvise(file.fileno(), start, self._size, os.POSIX_FADV_WILLNEED)

    def tensor(self) -> Tensor:
        """Read them, uint8 [N, H, W, 3]; IntegrityError if the cache is cut short or gone."""
        return self._read(pin_memory=False)

    def pin_memory(self) -> Tensor:
        """Read them into memory that a GPU copies from; the loader's thread calls it."""
        return self._read(pin_memory=True)

    def _read(self, pin_memory: bool) -> Tensor:
        shape = (len(self.rows_N), *self.image_size, 3)
        pixels_NHW3 = torch.empty(shape, dtype=torch.uint8, pin_memory=pin_memory)
        with self._opened() as file:
            for pixels_HW3, start in zip(pixels_NHW3.numpy(), self._starts(), strict=True):
                file.seek(start)
                if file.readinto(pixels_HW3.reshape(-1)) != self._size:
                    raise IntegrityError(
                        f"{self.path} was cut short: remove the folder to build the cache again",
                        code="cache_cut_short",
                        path=self.path,
                    )
        return pixels_NHW3

    def _opened(self) -> FileIO:
        try:
            return FileIO(self.path)
        except OSError as error:
            raise IntegrityError(
                f"cannot read the cache {self.path}: {error.strerror}",
                code="cache_unreadable",
                path=self.path,
            ) from error

    def _starts(self) -> list[int]:
        return [int(row) * self._size for row in self.rows_N]

    @property
    def _size(self) -> int:
        return math.prod(self.image_size) * 3


def pixels_of(item: Tensor | StoredPictures) -> Tensor:
    """Return a loader's item as pictures, uint8 [N, H, W, 3]; raises as `StoredPictures.tensor`."""
    return item.tensor() if isinstance(item, StoredPictures) else item


def cached_pictures(
    folder: Path,
    root: Path,
    splits: Sequence[Sequence[Path]],
    image_size: tuple[int, int],
    progress: Progress,
) -> list[CachedPictures]:
    """Return the pictures of some splits out of a cache, which is built, or completed, first.

    Several processes may call it at once: one builds, the others wait for it. Files are listed
    relative to the data set's ``root``, so that both may be moved.

    Raises:
        InputError: The folder holds something else, or cannot be written to; or a picture is
            broken.
        IntegrityError: The cache was cut short.
    """
    row_of = {file: row for row, file in enumerate(dict.fromkeys(f for s in splits for f in s))}
    if not row_of:
        return [CachedPictures(folder / PIXELS, [], image_size) for _ in splits]
    try:
        make_folder(folder)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(
            f"cannot use {folder} as cache: {error.strerror}", code="cache_unusable", path=folder
        ) from error
    try:
        lock_until_closed(handle, wait=True)
        _Builder(folder, root, list(row_of), image_size).complete(progress)
    except OSError as error:
        raise InputError(
            f"cannot write the cache {folder}: {error.strerror}: {len(row_of)} pictures take "
            f"{len(row_of) * math.prod(image_size) * 3 / 1e9:.1f} GB; make room or choose another "
            "folder; it then goes on",
            code="cache_not_written",
            path=folder,
            reason=error.strerror,
        ) from error
    finally:
        os.close(handle)
    return [
        CachedPictures(folder / PIXELS, [row_of[f] for f in files], image_size) for files in splits
    ]


class _Builder:
    """Builds or completes a cache, whose folder is locked."""

    def __init__(
        self, folder: Path, root: Path, files: list[Path], image_size: tuple[int, int]
    ) -> None:
        self._folder = folder
        self._pictures = Pictures(files, image_size)
        self._files = files
        names = "\0".join(os.path.relpath(file, root) for file in files)
        self._facts = {
            "format": _FORMAT,
            "list_sha256": hashlib.sha256(os.fsencode(names)).hexdigest(),
            "pictures": len(files),
            "height_px": image_size[0],
            "width_px": image_size[1],
            # A truncated file decodes to another picture.
            "load_truncated": ImageFile.LOAD_TRUNCATED_IMAGES,
        }
        self._picture_bytes = math.prod(image_size) * 3

    def complete(self, progress: Progress) -> None:
        if not (self._folder / LIST).is_file():
            self._begin()
        self._check()
        stamps_G2 = np.fromfile(self._folder / STAMPS, np.int64).reshape(-1, 2)
        current_G2 = np.array([_stamp_of(file) for file in self._files], dtype=np.int64)
        missing = np.flatnonzero((stamps_G2 != current_G2).any(axis=1))
        if not len(missing):
            return
        done = len(self._files) - len(missing)
        step = max(1, _SYNC_BYTES // self._picture_bytes)
        with (
            FileIO(self._folder / PIXELS, "r+") as pixels,
            FileIO(self._folder / STAMPS, "r+") as stamps,
            ThreadPoolExecutor(os.cpu_count()) as pool,
        ):

            def write(row: int) -> None:
                _write_at(pixels, self._pictures.read([row]), row * self._picture_bytes)

            for rows in np.split(missing, range(step, len(missing), step)):
                for _ in pool.map(write, rows.tolist()):
                    done += 1
                    progress(done, len(self._files))
                os.fsync(pixels)
                for row in rows.tolist():
                    _write_at(stamps, current_G2[row], row * current_G2[row].nbytes)
                os.fsync(stamps)

    def _begin(self) -> None:
        """Allocate all pictures first; write the list last."""
        ours = (LIST, PIXELS, STAMPS)
        for name in ours:
            remove_unfinished(self._folder, name)
        if others := sorted({path.name for path in self._folder.iterdir()} - set(ours)):
            raise InputError(
                f"{self._folder} is not a cache of pictures (it holds '{others[0]}'): choose "
                "another folder",
                code="not_a_cache",
                path=self._folder,
                found=others[0],
            )
        write_atomically(self._folder / STAMPS, bytes(len(self._files) * 16))
        # A sparse file would fail later, on a full disk.
        try:
            with (self._folder / PIXELS).open("wb") as file:
                size = len(self._files) * self._picture_bytes
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
        except OSError:
            (self._folder / PIXELS).unlink(missing_ok=True)
            raise
        write_atomically(self._folder / LIST, json.dumps(self._facts, indent=2) + "\n")

    def _check(self) -> None:
        try:
            facts = read_json(self._folder / LIST)
        except InputError as error:
            if isinstance(error.__cause__, OSError):  # What may not be read may be whole.
                raise
            raise IntegrityError(
                f"{self._folder / LIST} is damaged: remove the folder to build the cache again",
                code="cache_damaged",
                path=self._folder / LIST,
            ) from error
        for name, expected in self._facts.items():
            found = facts.get(name) if isinstance(facts, dict) else None
            if found != expected:
                raise InputError(
                    f"{self._folder} is a cache of other pictures or settings: expected {name} "
                    f"{str(expected)[:12]}, found {str(found)[:12]}: choose another folder, or "
                    "remove this one",
                    code="cache_of_other_pictures",
                    setting=name,
                    expected=expected,
                    found=found,
                )
        for name, size in ((PIXELS, self._picture_bytes), (STAMPS, 16)):
            path, expected = self._folder / name, len(self._files) * size
            found = path.stat().st_size if path.is_file() else 0
            if found != expected:
                raise IntegrityError(
                    f"{path} was cut short: expected {expected} bytes, found {found}: remove the "
                    "folder to build the cache again",
                    code="cache_cut_short",
                    path=path,
                    expected=expected,
                    found=found,
                )


def _write_at(file: FileIO, array: NDArray[Any], place: int) -> None:
    """Write all of an array; several threads may."""
    rest = memoryview(array.tobytes())
    while rest:
        written = os.pwrite(file.fileno(), rest, place)
        rest, place = rest[written:], place + written


def _stamp_of(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError as error:
        raise InputError(
            f"cannot read image {file}: {error.strerror}", code="image_unreadable", path=file
        ) from error
    return status.st_size, status.st_mtime_ns


class PictureBatches(Dataset["Tensor | StoredPictures | UppersonError"]):
    """Pictures in batches of given places; for a loader with ``batch_size=None``.

    An error is the item, for the main process to raise: torch would wrap a raised one in a worker's
    traceback.
    """

    def __init__(self, pictures: Pictures, places: Sequence[Sequence[int]]) -> None:
        self._pictures = pictures
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Tensor | StoredPictures | UppersonError:
        """Return one batch, for `pixels_of`, or why it cannot be read."""
        try:
            return self._pictures.for_batch(self._places[index])
        except UppersonError as error:
            return error
