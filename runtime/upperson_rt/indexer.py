"""Pictures from files into a gallery, a committed batch at a time."""

import os
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from upperson_rt.encoder import Encoder, Progress
from upperson_rt.errors import InputError, UsageError
from upperson_rt.gallery import Gallery, Item

if TYPE_CHECKING:
    from upperson_rt.capture_time import TimeSource

__all__ = ["IndexReport", "SkippedImage", "index_images"]

_MOST_WORKERS = 4
"""Threads that decode; more than a few only wait for the model."""


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
    timed: int = 0
    """Those of them that have a time."""
    skipped: list[SkippedImage] = field(default_factory=list)


@dataclass(frozen=True)
class _Labels:
    """What all pictures of a run have in common."""

    camera: str | None
    time_from: "TimeSource"
    track_from: Literal["folder", "none"]
    attributes: Mapping[str, str | int | float | bool]

    def item(self, path: str) -> Item:
        from upperson_rt.capture_time import capture_time

        return Item(
            key=path,
            source=path,
            camera=self.camera,
            time=capture_time(path, self.time_from),
            track=Path(path).parent.name or None if self.track_from == "folder" else None,
            attributes=self.attributes,
        )


def index_images(
    encoder: Encoder,
    gallery: Gallery,
    files: Sequence[str | os.PathLike[str]],
    camera: str | None = None,
    batch_size: int = 32,
    progress: Progress | None = None,
    *,
    time_from: "TimeSource" = "exif",
    track_from: Literal["folder", "none"] = "none",
    attributes: Mapping[str, str | int | float | bool] | None = None,
    workers: int | None = None,
) -> IndexReport:
    """Embed pictures and add them; one that is there already is replaced.

    Each batch is committed before the next one runs: an interruption loses one batch at most.
    While one batch runs, threads decode the next one.

    Args:
        encoder: Whose image tower to use.
        gallery: Opened with the encoder's fingerprint.
        files: The pictures; their absolute paths become the keys.
        camera: Name of the camera that took them.
        batch_size: Pictures run and committed at a time.
        progress: Called after each batch.
        time_from: Where the time of a picture comes from, see `TimeSource`.
        track_from: ``folder`` makes the name of a picture's folder its track.
        attributes: Of every picture.
        workers: Threads that decode; None for as many as there are CPUs, 4 at most.

    Returns:
        How many were added, and which could not be read; those do not stop the rest.

    Raises:
        InputError: The gallery cannot be written, or batch_size is below 1.
        UsageError: workers is below 1.
        BackendError: The image tower cannot be loaded or fails.
        IntegrityError: The image tower gives wrong results, or the gallery is damaged.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if workers is None:
        workers = min(_MOST_WORKERS, os.cpu_count() or 1)
    if workers < 1:
        raise UsageError(f"workers must be at least 1, got {workers}")
    labels = _Labels(camera, time_from, track_from, dict(attributes or {}))
    report = IndexReport()
    done = 0
    with closing(_decoded(encoder, files, labels, batch_size, workers)) as batches:
        for batch in batches:
            report.skipped += [one for one in batch if isinstance(one, SkippedImage)]
            usable = [one for one in batch if not isinstance(one, SkippedImage)]
            if usable:
                items = [item for item, _ in usable]
                pixels = np.stack([pixels for _, pixels in usable])
                gallery.add(items, encoder.encode_pixels(pixels, batch_size), encoder.variant)
                report.indexed += len(items)
                report.timed += sum(item.time is not None for item in items)
            done += len(batch)
            if progress is not None:
                progress(done, len(files))
    return report


def _decoded(
    encoder: Encoder,
    files: Sequence[str | os.PathLike[str]],
    labels: _Labels,
    batch_size: int,
    workers: int,
) -> Generator[list[tuple[Item, NDArray[np.uint8]] | SkippedImage], None, None]:
    """Yield batches in order; the one after each is being decoded meanwhile, and no more."""

    def decode(
        file: str | os.PathLike[str],
    ) -> tuple[Item, NDArray[np.uint8]] | SkippedImage:
        path = os.fspath(Path(file).absolute())
        try:
            return labels.item(path), encoder.prepare_image(path)
        except InputError as error:
            return SkippedImage(path, str(error))

    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        left = iter(files)
        ahead: list[Future[tuple[Item, NDArray[np.uint8]] | SkippedImage]] = []
        while True:
            now, ahead = ahead, [pool.submit(decode, file) for file in islice(left, batch_size)]
            if now:
                yield [future.result() for future in now]
            elif not ahead:
                return
    finally:
        pool.shutdown(cancel_futures=True)
