"""Merges shards into one gallery, completely or not at all, and checks that all is there once.

The records show that the shards are the parts of one list, each once. Each gallery must hold the
keys of its record, and every row as it was written. Read again from the disk, the new gallery must
hold the rows of the shards, no other and none twice.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.extensions import extension_names, load_extension
from upperson_rt.files import put_in_place, require_place, scratch_folder
from upperson_rt.gallery.protocol import Gallery
from upperson_rt.gallery.sqlite.stored import (
    DATABASE_FILE,
    Database,
    SqliteGallery,
    append_rows,
    keys_there,
    make,
)
from upperson_shards.records import RECORD_FILE, ShardRecord, Tally, check_whole


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What `merge_shards` has merged and checked."""

    shards: int
    pictures: int
    """In the list that was divided: the sum of the next three."""
    with_items: int
    """Pictures that gave at least one item."""
    empty: int
    """Pictures in which a detector found no person."""
    skipped: tuple[tuple[str, str, str], ...]
    """Shard, path and reason of pictures that could not be used."""
    items: Tally
    """Of the keys in the new gallery."""
    rows: Tally
    """Of its rows, with their vectors."""
    out_of_reach: int
    """Pictures whose paths lead nowhere on this machine, as the machine that indexed them had them
    elsewhere."""
    first_out_of_reach: str | None
    """The first one's path."""
    alerts: int
    """Standing queries that were copied."""


def merge_shards(
    shards: Sequence[str | Path], folder: Path, progress: Callable[[int, int], None] | None = None
) -> Merged:
    """Join the shards of one list, in any order, into a new gallery.

    Args:
        shards: Folders of galleries, each made with a `Shard`.
        folder: Of the new gallery; not there yet, or empty.
        progress: Called with the number of rows copied so far, and of all rows.

    Raises:
        UsageError: No shard was named.
        InputError: One is missing, not finished, there twice, of another list or no shard, or the
            new folder holds something.
        IntegrityError: One is damaged or does not hold what its record says, two hold one key, or
            they are of different models. There is no new gallery then.
    """
    if not shards:
        raise UsageError("name the galleries of the shards")
    folder = Path(folder).resolve()
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(
            f"{folder} is there already, and merge makes a new gallery: name another folder with "
            "--gallery"
        )
    folders = [Path(one) for one in shards]
    records = _read_records(folders)
    check_whole(folders, records)
    items = sum((record.items for record in records), Tally())
    require_place(folder)
    with scratch_folder(folder) as temporary:
        new = temporary / "gallery"
        with ExitStack() as stack:
            galleries = [_open(stack, *pair) for pair in zip(folders, records, strict=True)]
            make(new / DATABASE_FILE, galleries[0].fingerprint, galleries[0].embed_dim)
            target = stack.enter_context(closing(Database(new / DATABASE_FILE)))
            rows, missing = Tally(), _Missing()
            for gallery, record in zip(galleries, records, strict=True):
                keys = Tally()
                for batch in gallery.checked_batches():
                    _append(target, gallery, batch)
                    missing.look_for(batch)
                    keys += Tally.of(row[1] for row in batch)
                    rows += _tally(batch)
                    if progress is not None:
                        progress(rows.count, items.count)
                _check_keys(gallery, record, keys)
            alerts = _copy_standing_queries(galleries, _open(stack, new))
        _check_merged(new, items, rows)
        require_place(folder)  # Again: the work may have taken hours.
        put_in_place(new, folder)
    return Merged(
        shards=len(records),
        pictures=records[0].whole.count,
        with_items=sum(record.with_items for record in records),
        empty=sum(record.empty for record in records),
        skipped=tuple(
            (record.shard, one.path, one.reason) for record in records for one in record.skipped
        ),
        items=items,
        rows=rows,
        out_of_reach=missing.count,
        first_out_of_reach=missing.first,
        alerts=alerts,
    )


def _copy_standing_queries(galleries: Sequence[Gallery], merged: Gallery) -> int:
    matchers = (load_extension("matchers", name) for name in extension_names("matchers"))
    return sum(one.copy(galleries, merged) for one in matchers if hasattr(one, "copy"))


@dataclass
class _Missing:
    """Pictures that are not where rows say."""

    count: int = 0
    first: str | None = None
    _last: str | None = None

    def look_for(self, batch: Sequence[tuple[Any, ...]]) -> None:
        for source in (row[2] for row in batch):  # The people of one picture follow one another.
            if source not in (None, self._last):
                self._last = source
                if not os.path.exists(source):
                    self.count += 1
                    self.first = self.first or source


def _read_records(folders: Sequence[Path]) -> list[ShardRecord]:
    records = []
    for folder in folders:
        file = folder / RECORD_FILE
        if not folder.is_dir():
            raise InputError(f"no such folder: {folder}")
        if not file.is_file():
            raise InputError(
                f"{folder} is no shard, it has no {RECORD_FILE}: merge takes what  upperson-rt "
                "index --shard  has made"
            )
        record = ShardRecord.read(file)
        if not record.finished:
            raise InputError(
                f"shard {record.shard} in {folder} is not finished: run its  upperson-rt index  "
                "again"
            )
        records.append(record)
    return records


def _open(stack: ExitStack, folder: Path, record: ShardRecord | None = None) -> SqliteGallery:
    fingerprint = None if record is None else record.fingerprint
    gallery = stack.enter_context(Gallery.open(folder, fingerprint))
    assert isinstance(gallery, SqliteGallery)
    return gallery


def _append(target: Database, source: SqliteGallery, batch: Sequence[tuple[Any, ...]]) -> None:
    with target.writing() as transaction:
        if there := keys_there(transaction, [row[1] for row in batch]):
            raise IntegrityError(
                f"the picture {there[0]} is in {source.location} and in another shard: index both "
                "again from the same pictures"
            )
        append_rows(transaction, batch)


def _tally(batch: Sequence[tuple[Any, ...]]) -> Tally:
    """Return the tally of rows with their vectors, without the ids: those are new."""
    return Tally.of(ascii(row[1:-1]).encode() + row[-1] for row in batch)


def _check_keys(gallery: SqliteGallery, record: ShardRecord, keys: Tally) -> None:
    if keys != record.items:
        raise IntegrityError(
            f"shard {record.shard} in {gallery.location} holds {keys.count} items, its record says "
            f"{record.items.count}, or others: they were added or deleted since; index it again "
            "into a new folder"
        )


def _check_merged(folder: Path, items: Tally, rows: Tally) -> None:
    found_items, found_rows = Tally(), Tally()
    with ExitStack() as stack:
        for batch in _open(stack, folder).checked_batches():
            found_items += Tally.of(row[1] for row in batch)
            found_rows += _tally(batch)
    if (found_items, found_rows) != (items, rows):
        raise IntegrityError(
            f"the merged gallery has {found_rows.count} rows instead of {rows.count}, or others; "
            "nothing was kept: check the disk, then merge again"
        )
