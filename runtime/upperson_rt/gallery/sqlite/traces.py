"""Where the file of a gallery, its index and its crops could still have rows that were deleted."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from upperson_rt.gallery.sqlite import rows as table
from upperson_rt.gallery.sqlite.access import opened_bytes
from upperson_rt.gallery.sqlite.bin import rows_in_bin
from upperson_rt.gallery.sqlite.database import DATABASE_FILE, Transaction
from upperson_rt.gallery.sqlite.deletion import (
    Selected,
    own_outbox,
    selected,
    to_purge,
    unfinished,
)
from upperson_rt.gallery.sqlite.free_pages import FreePages
from upperson_rt.gallery.sqlite.index_file import UnusableIndexError, read_file
from upperson_rt.gallery.sqlite.list_files import INDEX_FILE, ListFiles
from upperson_rt.gallery.sqlite.lists import foreign_centroids
from upperson_rt.gallery.sqlite.schema import SqliteMeta
from upperson_rt.locks import try_lock

__all__ = [
    "Selected",
    "files_of_no_row",
    "free_pages",
    "indexed",
    "leftovers",
    "messages",
    "stored_ids",
]


def stored_ids(transaction: Transaction) -> tuple[Selected, Selected]:
    """Return ids and checksums (N, 2) of the rows, and of these with those in the bin."""
    items = selected(transaction, "items NOT INDEXED", ())
    return items, np.concatenate([items, rows_in_bin(transaction)])


def free_pages(folder: Path) -> tuple[int, int]:
    """Count the pages of the database that hold no rows, and those of them that have content."""
    with opened_bytes(folder / DATABASE_FILE) as opened:
        free = FreePages.read(opened)
        return len(free.leaves) + len(free.trunks), free.count_used(opened)


def leftovers(folder: Path, name: str) -> int:
    """Count what dead processes left of files and folders whose names match, see `files.sweep`."""
    count = 0
    for left in (*folder.glob(f".{name}.????????"), *folder.glob(f".{name}.????????.tmp")):
        with suppress(FileNotFoundError):  # A live process is done with it.
            handle = os.open(left, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
            count += try_lock(handle)
            os.close(handle)
    return count


class Indexed(NamedTuple):
    """What the files of the index have, and what of it comes from no stored row."""

    rows: int = 0
    stale_rows: int = 0
    """A file that cannot be read or is not finished counts as one, and so does a deletion whose
    rows are still to leave the files."""
    centroids: int = 0
    stale_centroids: int = 0


def indexed(transaction: Transaction, folder: Path, meta: SqliteMeta, kept: Selected) -> Indexed:
    """Compare the files of the index with rows that are stored, those of the bin among them.

    A centroid has to be the mean of the stored items of its list: no other may be part of it.
    """
    known, at = np.unique(kept[:, 0], return_index=True)
    files = ListFiles(folder, meta)
    being_made = to_purge(transaction) if files.are_there else ()
    found = Indexed(stale_rows=leftovers(folder, f"{INDEX_FILE}*") + len(being_made))
    for file in sorted(folder.glob(f"{INDEX_FILE}*")):
        if file.name == f"{INDEX_FILE}-lock":
            continue
        ids = checksums = np.zeros(1, np.int64)
        centroids = (0, 0)
        with suppress(UnusableIndexError, OSError):
            if file == files.path:
                arrays = read_file(file)[1]
                ids, checksums = arrays.get("ids", ids[:0]), arrays.get("checksums", ids[:0])
            else:
                part = files.read_part(file.name)
                ids, checksums = part.ids, part.checksums
                centroids = part.index.nlist, foreign_centroids(part, files.reader(transaction))
        place = np.searchsorted(known, ids).clip(max=max(0, len(known) - 1))
        same = np.zeros(len(ids), np.bool_)
        if len(known):
            same = (known[place] == ids) & (kept[at[place], 1] == checksums)
        counts = len(ids), int((~same).sum()), *centroids
        found = Indexed(*(one + more for one, more in zip(found, counts, strict=True)))
    return found


def messages(transaction: Transaction) -> tuple[int, int]:
    """Count the messages of alerts, and those of them that name a picture that is deleted."""
    outbox = own_outbox(transaction)
    return (0, 0) if outbox is None else (outbox.count(), len(outbox.of_deleted()))


def files_of_no_row(transaction: Transaction, crops_dir: Path) -> Sequence[str]:
    """Return the crops that no row names, and those that a deletion has still to remove."""
    files = [*table.stray_crops(transaction, crops_dir)]
    return files + [file for one in unfinished(transaction).values() for file in one["files"]]
