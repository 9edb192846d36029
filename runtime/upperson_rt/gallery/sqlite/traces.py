"""Where the file of a gallery, its index and its crops could still have rows that were deleted."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from upperson_rt.gallery.sqlite import rows as table
from upperson_rt.gallery.sqlite.access import opened_bytes
from upperson_rt.gallery.sqlite.bin import rows_in_bin
from upperson_rt.gallery.sqlite.database import DATABASE_FILE, Transaction
from upperson_rt.gallery.sqlite.deletion import Selected, own_outbox, selected, unfinished
from upperson_rt.gallery.sqlite.free_pages import FreePages
from upperson_rt.gallery.sqlite.index_file import UnusableIndexError, read_file
from upperson_rt.gallery.sqlite.list_files import INDEX_FILE

__all__ = ["Selected", "files_of_no_row", "free_pages", "indexed_rows", "messages", "stored_ids"]


def stored_ids(transaction: Transaction) -> tuple[Selected, Selected]:
    """Return ids and checksums (N, 2) of the rows, and of these with those in the bin."""
    items = selected(transaction, "items NOT INDEXED", ())
    return items, np.concatenate([items, rows_in_bin(transaction)])


def free_pages(folder: Path) -> tuple[int, int]:
    """Count the pages of the database that hold no rows, and those of them that have content."""
    with opened_bytes(folder / DATABASE_FILE) as opened:
        free = FreePages.read(opened)
        return len(free.leaves) + len(free.trunks), free.count_used(opened)


def indexed_rows(folder: Path, stored: Selected) -> tuple[int, int]:
    """Count the rows in the files of the index, and those of them that are not stored any more.

    A file that cannot be read counts as one such row.
    """
    known, at = np.unique(stored[:, 0], return_index=True)
    count = stale = 0
    for file in folder.glob(f"{INDEX_FILE}*"):
        try:
            arrays = read_file(file)[1] if file.stat().st_size else {}  # A lock is empty.
        except (UnusableIndexError, OSError):
            arrays = {"ids": np.zeros(1, np.int64), "checksums": np.zeros(1, np.int64)}
        if "checksums" in arrays:
            ids = arrays["ids"]
            place = np.searchsorted(known, ids).clip(max=max(0, len(known) - 1))
            same = np.zeros(len(ids), np.bool_)
            if len(known):
                same = (known[place] == ids) & (stored[at[place], 1] == arrays["checksums"])
            count, stale = count + len(ids), stale + int((~same).sum())
    return count, stale


def messages(transaction: Transaction) -> tuple[int, int]:
    """Count the messages of alerts, and those of them that name a picture that is deleted."""
    outbox = own_outbox(transaction)
    return (0, 0) if outbox is None else (outbox.count(), len(outbox.of_deleted()))


def files_of_no_row(transaction: Transaction, crops_dir: Path) -> Sequence[str]:
    """Return the crops that no row names, and those that a deletion has still to remove."""
    files = [*table.stray_crops(transaction, crops_dir)]
    return files + [file for one in unfinished(transaction).values() for file in one["files"]]
