"""One shard of a set of pictures into a gallery, with a record of what it should hold."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError
from upperson_rt.gallery import Gallery
from upperson_rt.gallery.shards import RECORD_FILE, Shard, ShardRecord, Tally
from upperson_rt.indexer import IndexReport, index_images
from upperson_rt.preprocess import iter_named_images

__all__ = ["ShardFiles", "choose_files", "index_shard", "record_of", "require_whole"]


@dataclass(frozen=True, kw_only=True)
class ShardFiles:
    """The pictures of a shard, and tallies of names: of all shards together and of this one."""

    shard: Shard
    files: list[Path]
    whole: Tally
    own: Tally


def choose_files(paths: Iterable[str | os.PathLike[str]], shard: Shard) -> ShardFiles:
    """Look at all pictures and choose those of a shard.

    Args:
        paths: Files and folders, see `iter_named_images`; the same pictures on every machine, under
            whatever folder.
        shard: Which part.

    Raises:
        InputError: A path does not exist, or a folder cannot be read or holds no picture.
    """
    files: list[Path] = []
    names: list[str] = []

    def every_name() -> Iterator[str]:
        for name, file in iter_named_images(paths):
            yield name
            if shard.holds(name):
                names.append(name)
                files.append(file)

    whole = Tally.of(every_name())
    return ShardFiles(shard=shard, files=files, whole=whole, own=Tally.of(names))


def record_of(location: str) -> Path | None:
    """Return where the record of a gallery lies; None for one that is no folder."""
    return None if "://" in location else Path(location, RECORD_FILE)


def require_whole(location: str) -> None:
    """Refuse a gallery that is a shard, for pictures that are chosen in another way.

    Raises:
        InputError: It is a shard.
    """
    file = record_of(location)
    if file is not None and file.exists():
        raise InputError(
            f"gallery {location} is shard {ShardRecord.read(file).shard}: index with  --shard, or "
            "into another gallery"
        )


def index_shard(
    encoder: Encoder,
    gallery: Gallery,
    chosen: ShardFiles,
    record_file: Path | None,
    **options: Any,
) -> tuple[IndexReport, ShardRecord]:
    """Index the pictures of a shard as `index_images` does, and write its record.

    The record says that it is not finished until all is in the gallery. Doing it again replaces
    what is there.

    Args:
        encoder: Whose image tower to use.
        gallery: Opened with the encoder's fingerprint: a shard's own, or one that all share.
        chosen: Its pictures.
        record_file: Where its record goes; None writes none.
        options: Of `index_images`.

    Returns:
        What was done, and the record.

    Raises:
        InputError: The gallery is another shard or no shard, or as for `index_images`.
        UppersonError: As for `index_images`.
    """
    record = ShardRecord(
        shard=str(chosen.shard),
        fingerprint=encoder.fingerprint,
        whole=chosen.whole,
        own=chosen.own,
    )
    if record_file is not None:
        _require_same(gallery, record_file, record)
        record.write(record_file)
    report = index_images(encoder, gallery, chosen.files, **options)
    record = replace(
        record,
        finished=True,
        items=report.keys,
        with_items=report.with_items,
        empty=report.empty,
        skipped=tuple(report.skipped),
    )
    if record_file is not None:
        record.write(record_file)
    return report, record


def _require_same(gallery: Gallery, file: Path, record: ShardRecord) -> None:
    if file.exists():
        if (found := ShardRecord.read(file).shard) != record.shard:
            raise InputError(
                f"gallery {gallery.location} is shard {found}, not {record.shard}: index each "
                "shard into a gallery of its own"
            )
    elif record_of(gallery.location) == file and gallery.count():
        raise InputError(
            f"gallery {gallery.location} holds pictures already and is no shard: index shard "
            f"{record.shard} into another one with  --gallery"
        )
