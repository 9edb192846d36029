"""Pictures from files into a gallery, a committed batch at a time."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from upperson_rt.encoder import Encoder, Progress
from upperson_rt.errors import InputError
from upperson_rt.gallery import Gallery, Item

__all__ = ["IndexReport", "SkippedImage", "index_images"]


@dataclass(frozen=True)
class SkippedImage:
    """A picture that could not be used."""

    path: str
    reason: str


@dataclass
class IndexReport:
    """What `index_images` did."""

    indexed: int = 0
    """Pictures added or replaced."""
    skipped: list[SkippedImage] = field(default_factory=list)


def index_images(
    encoder: Encoder,
    gallery: Gallery,
    files: Sequence[str | os.PathLike[str]],
    camera: str | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> IndexReport:
    """Embed pictures and add them; one that is there already is replaced.

    Each batch is committed before the next is read: an interruption loses one batch at most.

    Args:
        encoder: Whose image tower to use.
        gallery: Opened with the encoder's fingerprint.
        files: The pictures; their absolute paths become the keys.
        camera: Name of the camera that took them.
        batch_size: Pictures run and committed at a time.
        progress: Called after each batch.

    Returns:
        How many were added, and which could not be read; those do not stop the rest.

    Raises:
        InputError: The gallery cannot be written, or batch_size is below 1.
        BackendError: The image tower cannot be loaded or fails.
        IntegrityError: The image tower gives wrong results, or the gallery is damaged.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    report = IndexReport()
    for start in range(0, len(files), batch_size):
        batch = files[start : start + batch_size]
        items: list[Item] = []
        pixels: list[NDArray[np.uint8]] = []
        for file in batch:
            path = os.fspath(Path(file).absolute())
            try:
                item = Item(key=path, source=path, camera=camera)
                pixels.append(encoder.prepare_image(path))
                items.append(item)
            except InputError as error:
                report.skipped.append(SkippedImage(path, str(error)))
        if items:
            embeds = encoder.encode_pixels(np.stack(pixels), batch_size)
            gallery.add(items, embeds, encoder.variant)
            report.indexed += len(items)
        if progress is not None:
            progress(start + len(batch), len(files))
    return report
