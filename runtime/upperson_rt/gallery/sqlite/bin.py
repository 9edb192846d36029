"""The bin of a gallery in a folder: deleted items, until they are restored or deleted permanently.

A row moves between the tables ``items`` and ``bin`` in one transaction and keeps its id, so that
marks and links hold again after a restoration. Then its crop moves between ``FOLDER/crops`` and
``FOLDER/bin/crops``, with all frames and clips that may show the person. The file
``FOLDER/bin/moving`` exists until that is done: after a kill the next opening goes on.
"""

import errno
import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from upperson_rt.errors import InputError
from upperson_rt.files import make_folder, require_no_links, sync_folder, write_atomically
from upperson_rt.gallery.clips import (
    ClipFile,
    Erased,
    all_clips,
    clips_dir,
    clips_showing,
    erase_clips,
)
from upperson_rt.gallery.crops import has_hash, own_path, remove_crops, sync_crops
from upperson_rt.gallery.protocol import Gallery
from upperson_rt.gallery.records import Item
from upperson_rt.gallery.sqlite import rows as table
from upperson_rt.gallery.sqlite import schema
from upperson_rt.gallery.sqlite.database import Transaction
from upperson_rt.gallery.sqlite.deletion import Eraser, Selected, selected
from upperson_rt.gallery.sqlite.schema import COLUMNS, ROW, Sums
from upperson_rt.locks import locked_folder
from upperson_rt.printable import count_of, safe_repr

_TABLE = (
    f"CREATE TABLE IF NOT EXISTS bin (id INTEGER PRIMARY KEY, {COLUMNS}, variant, vector, "
    "checksum, deleted REAL NOT NULL, user TEXT NOT NULL, reason TEXT NOT NULL)"
)
_STORED = f"{ROW}, vector, checksum"
_ADD = f"INSERT INTO bin VALUES ({', '.join('?' * 15)})"
_KEY, _CROP, _COLUMNS = 1, 7, slice(1, 9)
"""Places in `ROW` of some columns, and of all that makes an `Item`."""
_Row: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class BinEntry:
    """An item in the bin, with the id that it had and gets again."""

    id: int
    item: Item
    deleted: float
    """Unix seconds."""
    user: str
    reason: str


def among(column: str, values: Sequence[object]) -> tuple[str, list[object]]:
    """Return a condition for `Bin.delete_where`, with its values."""
    return f"{column} IN (SELECT value FROM json_each(?))", [json.dumps([*values])]


def rows_in_bin(transaction: Transaction) -> Selected:
    """Return the ids and checksums of all rows in the bin."""
    return selected(transaction, "bin" if table.has_bin(transaction) else "items WHERE 0", ())


def leave_out(transaction: Transaction) -> None:
    """Remove all rows of the bin from a copy of a database."""
    if table.has_bin(transaction):
        transaction.execute("DELETE FROM bin")


def empty_bin(gallery: Gallery, before: float) -> int:
    """Delete permanently what was deleted before a time, unix seconds; return how many items."""
    return 0 if gallery.bin is None else int(gallery.bin.delete(before=before))


class Bin:
    """The bin. Safe for several threads and processes, which take turns."""

    def __init__(
        self,
        folder: Path,
        reading: Callable[[], AbstractContextManager[Transaction]],
        writing: Callable[[], AbstractContextManager[tuple[Transaction, Sums]]],
        item: Callable[[Sequence[Any]], Item],
        eraser: Eraser,
    ) -> None:
        """Use `Gallery.bin`."""
        self.crops_dir = folder / "bin" / "crops"
        """Where `Item.crop` is found of what is in the bin."""
        self._crops_dir = folder / "crops"
        self._moving = folder / "bin" / "moving"
        self._reading, self._writing, self._item = reading, writing, item
        self._eraser = eraser

    def entries(
        self,
        ids: Sequence[int] | None = None,
        before: float = math.inf,
        start: int = 0,
        most: int = -1,
    ) -> list[BinEntry]:
        """Return what is in the bin, last deleted first: all, or ``most`` from ``start`` on.

        With ``ids`` only these, and with ``before`` only what was deleted earlier (unix seconds).
        """
        condition, values = _condition(ids, before)
        condition += f" ORDER BY deleted DESC, id DESC LIMIT {most:d} OFFSET {start:d}"
        with self._reading() as transaction:
            columns = f"{ROW}, checksum, deleted, user, reason"
            found = _select(transaction, columns, condition, values)
        for row in found:
            schema.check_metadata(row, row[-4])
        return [
            BinEntry(id=row[0], item=self._item(row[_COLUMNS]), deleted=at, user=who, reason=why)
            for *row, at, who, why in found
        ]

    def add(self, keys: Sequence[str], user: str, reason: str) -> int:
        """Move items of the gallery into the bin; return how many.

        Raises:
            InputError: A file cannot be moved, or another one has its name in the bin.
        """
        with self._settling(), self._writing() as (transaction, sums):
            transaction.execute(_TABLE)
            source, values = table.has_key(transaction, keys)
            rows = transaction.execute(f"SELECT {_STORED} FROM {source}", values).fetchall()
            schema.check_rows(rows)
            _require_free_names(rows, self.crops_dir)
            about = time.time(), user, reason
            transaction.connection.executemany(_ADD, ((*row, *about) for row in rows))
            condition, values = among("id", [row[0] for row in rows])
            transaction.execute(f"DELETE FROM items WHERE {condition}", values)
            sums.remove(rows)
            sums.seq += len(rows)
            table.trim_log(transaction)
            self._begin_move()
        return len(rows)

    def restore(self, ids: Sequence[int]) -> int:
        """Move items back into the gallery; return how many were in the bin.

        Raises:
            InputError: A key is in the gallery again (``key_taken``): all stay in the bin. Or a
                file cannot be moved.
        """
        with self._settling(), self._writing() as (transaction, sums):
            rows = _select(transaction, _STORED, *_condition(ids))
            schema.check_rows(rows)
            _require_free_keys(transaction, [row[_KEY] for row in rows])
            _require_free_names(rows, self._crops_dir)
            transaction.connection.executemany(table.ADD, rows)
            # Indexes read these again, and by themselves only what is above the highest id.
            changes = "INSERT INTO changes (id) VALUES (?)"
            transaction.connection.executemany(changes, ((row[0],) for row in rows))
            sums.add(rows)
            sums.seq += len(rows)
            if rows:
                condition, values = among("id", [row[0] for row in rows])
                transaction.execute(f"DELETE FROM bin WHERE {condition}", values)
            self._begin_move()
        return len(rows)

    def delete(self, ids: Sequence[int] | None = None, before: float = math.inf) -> int:
        """Delete permanently what is in the bin, see `entries`; return how many items.

        Raises:
            InputError: A frame or clip cannot be removed. All items stay then. Or the log of
                erasures cannot be written: the next deletion writes it.
        """
        return self.delete_where(*_condition(ids, before), {})

    def delete_where(
        self,
        condition: str,
        values: Sequence[object],
        about: Mapping[str, object],
        action: str = "delete",
    ) -> int:
        """Do the same with what meets a condition on the columns of ``items``, as SQL.

        See `Eraser.erase` for what the log of erasures gets; its ``about`` also has ``bin``.
        """
        with self._reading() as transaction:
            if not _select(transaction, "id", f"{condition} LIMIT 1", values):
                return 0
        with self._settling(), self._writing() as (transaction, _):
            erased = _erased(transaction, condition, values)
            for folder in (self._crops_dir, self.crops_dir):
                erase_clips(folder, erased)
            crops = table.unnamed_crops(transaction, [row.crop for row in erased])
            remove_crops(self._crops_dir, crops)  # Of a process that was killed.
            rows = _select(transaction, f"{ROW}, checksum", condition, values)
            for row in rows:
                schema.check_metadata(row, row[-1])
            begun = self._eraser.begin(transaction, rows, action, {**about, "bin": True})
            transaction.execute(f"DELETE FROM bin WHERE {condition}", values)
            self._begin_move()
        self._eraser.finish(begun)
        return len(rows)

    def traces(self, condition: str, values: Sequence[object]) -> tuple[int, int]:
        """Count its rows and files, and of these what meets a condition or belongs to no row.

        The condition is that of `delete_where`. A frame or clip belongs to each row that it may
        show.
        """
        own, files = self.crops_dir, self._files()
        clips = {file.path for file in all_clips(own)}
        with self._reading() as transaction:
            rows = len(_select(transaction, "id"))
            gone = len(_select(transaction, "id", condition, values))
            erased = _erased(transaction, condition, values)
            kept = _erased(transaction, f"NOT ifnull({condition}, 0)", values)
        shown = {file.path for file in clips_showing(own, kept)}
        shown -= {file.path for file in clips_showing(own, erased)}
        left = gone + len(files - {row.crop for row in kept}) + len(clips - shown)
        return rows + len(files) + len(clips), left

    def problems(self, transaction: Transaction, embed_dim: int) -> list[str]:
        """Check every row, its checksum, vector and crop; return what is wrong, a line each."""
        if not table.has_bin(transaction):
            return []
        folders = self._crops_dir, self.crops_dir
        return [*table.problems_of_bin(transaction, embed_dim, *folders)]

    def tidy(self) -> None:
        """Move files to where their rows are: what a killed process left, and late clips."""
        if self.crops_dir.parent.exists():
            with _file_errors(), locked_folder(self.crops_dir.parent):
                self._settle()

    def finish_move(self) -> None:
        """Finish or undo what a killed process began; one that lives does that itself."""
        if self._moving.exists():
            with _file_errors(), locked_folder(self.crops_dir.parent, wait=False) as is_alone:
                if is_alone:
                    self._settle()

    @contextmanager
    def _settling(self) -> Iterator[None]:
        """Let no other thread or process change the bin meanwhile, and move files at the end."""
        with _file_errors():
            self._require_no_links()
            make_folder(self.crops_dir.parent)
            with locked_folder(self.crops_dir.parent):
                yield
                self._settle()

    def _require_no_links(self) -> None:
        for folder in (self._crops_dir.parent, self.crops_dir.parent):
            require_no_links(folder)

    def _begin_move(self) -> None:
        """Note durably, before rows move, that files have to follow."""
        self._moving.touch()
        sync_folder(self._moving.parent)

    def _files(self) -> set[str]:
        own = self.crops_dir
        return {file.relative_to(own).as_posix() for file in own.rglob("*") if file.is_file()}

    def _settle(self) -> None:
        self._require_no_links()
        main, own, files = self._crops_dir, self.crops_dir, self._files()
        with self._reading() as transaction:
            erased = _erased(transaction)
            binned = {row.crop for row in erased}
            unnamed = {*table.unnamed_crops(transaction, [*binned, *files])}
        copied = _copy(main, own, binned - files)
        _copy(own, main, (crop for crop in files - unnamed if not (main / crop).exists()))
        _remove(main, (files | copied) & binned & unnamed)
        _remove(own, files - binned)
        self._settle_clips(erased)
        self._moving.unlink(missing_ok=True)

    def _settle_clips(self, erased: Sequence[Erased]) -> None:
        main, own = clips_dir(self._crops_dir), clips_dir(self.crops_dir)
        hidden = {_name(file, main) for file in clips_showing(self._crops_dir, erased)}
        _remove(main, _copy(main, own, hidden))
        hidden = {_name(file, own) for file in clips_showing(self.crops_dir, erased)}
        shown = {_name(file, own): file.crop for file in all_clips(self.crops_dir)}
        shown = {name: crop for name, crop in shown.items() if name not in hidden}
        crops = {
            name: (self._crops_dir / name).with_name(f"{crop}.jpg") for name, crop in shown.items()
        }
        _copy(own, main, (name for name, crop in crops.items() if crop.exists()))
        _remove(own, crops)


@contextmanager
def _file_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        what = f"cannot move or remove {error.filename2 or error.filename}: {error.strerror}"
        what += "; remove the cause, then repeat it"
        raise InputError(what, code="bin_files") from error


def _name(file: ClipFile, folder: Path) -> str:
    return file.path.relative_to(folder).as_posix()


def _copy(source: Path, target: Path, names: Iterable[str]) -> set[str]:
    """Put files into another folder as well, durably; return those that are there."""
    copied = set()
    for name in names:
        old, new = own_path(source, name), own_path(target, name)
        if old is None or new is None or not old.is_file():
            continue
        make_folder(new.parent)
        try:
            os.link(old, new)
        except FileExistsError:  # Another process has written the same one again.
            pass
        except OSError:  # Not every file system has links.
            write_atomically(new, old.read_bytes())
        copied.add(name)
    sync_crops(target, copied)
    return copied


def _remove(folder: Path, names: Collection[str]) -> None:
    """Remove files durably; raises OSError."""
    if left := remove_crops(folder, names):
        raise OSError(errno.EACCES, "it stays, see the log", str(folder / left[0]))
    sync_crops(folder, names)


def _require_free_names(rows: Iterable[_Row], target: Path) -> None:
    """Refuse crops that would replace others; names with a hash have one content."""
    for crop in (row[_CROP] for row in rows if row[_CROP] is not None):
        if not has_hash(crop) and (target / crop).exists():
            raise FileExistsError(errno.EEXIST, "another file has this name", str(target / crop))


def _require_free_keys(transaction: Transaction, keys: list[str]) -> None:
    source, values = table.has_key(transaction, keys)
    taken = [key for (key,) in transaction.execute(f"SELECT key FROM {source}", values)]
    taken += [key for key, count in Counter(keys).items() if count > 1]
    if taken:
        raise InputError(
            f"{count_of(len(taken), 'picture')}, such as {safe_repr(taken[0])}, came into the "
            "gallery again since: delete the newer one, or leave out the one in the bin",
            code="key_taken",
            key=taken[0],
        )


def _select(
    transaction: Transaction, columns: str, condition: str = "1", values: Sequence[object] = ()
) -> list[_Row]:
    """Return rows of the bin; none of a gallery that never had one."""
    if not table.has_bin(transaction):
        return []
    sql = f"SELECT {columns} FROM bin WHERE {condition}"
    return transaction.execute(sql, values).fetchall()


def _condition(ids: Sequence[int] | None, before: float = math.inf) -> tuple[str, list[object]]:
    if ids is None:
        return "deleted < ?", [before]
    condition, values = among("id", ids)
    return f"deleted < ? AND {condition}", [before, *values]


def _erased(
    transaction: Transaction, condition: str = "1", values: Sequence[object] = ()
) -> list[Erased]:
    """Return rows with a crop; a track stands for the time of its rows of one deletion."""
    columns, condition = "crop, track || ' ' || deleted, time", f"crop IS NOT NULL AND {condition}"
    found = _select(transaction, columns, condition, values)
    return [Erased(crop=crop, track=track, time=at) for crop, track, at in found]
