"""The bin of a gallery in a folder: deleted items, until they are restored or deleted for good.

A row moves between the tables ``items`` and ``bin`` in one transaction and keeps its id, so that
marks and links hold again after a restoration. Its crop, and all frames and clips that may show the
person, get a second place below ``FOLDER/bin`` before the commit and lose the first one after it.
What a killed process left undone `Bin.tidy` finishes.
"""

import errno
import filecmp
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from upperson_rt.errors import InputError
from upperson_rt.files import locked_folder, make_folder, write_atomically
from upperson_rt.gallery.clips import Erased, all_clips, clips_dir, clips_showing, erase_clips
from upperson_rt.gallery.crops import crop_path, remove_crops
from upperson_rt.gallery.protocol import Gallery
from upperson_rt.gallery.records import Item
from upperson_rt.gallery.sqlite import rows as table
from upperson_rt.gallery.sqlite import schema
from upperson_rt.gallery.sqlite.database import Transaction
from upperson_rt.gallery.sqlite.schema import COLUMNS, ROW, Sums
from upperson_rt.printable import count_of, safe_repr

_FOLDER = "bin"
_TABLES = (
    f"CREATE TABLE IF NOT EXISTS bin (id INTEGER PRIMARY KEY, {COLUMNS}, variant, vector, "
    "checksum, deleted REAL NOT NULL, user TEXT NOT NULL, reason TEXT NOT NULL)",
    "CREATE INDEX IF NOT EXISTS bin_by_time ON bin (deleted, id)",
)
_STORED = f"{ROW}, vector, checksum"
_WITH_ID = "id IN (SELECT value FROM json_each(?))"
_ADD = f"INSERT INTO bin VALUES ({', '.join('?' * 15)})"
_TIME, _TRACK, _CROP, _COLUMNS = 4, 5, 7, slice(1, 9)
"""Places in `ROW` of some columns, and of all that makes an `Item`."""
_AT_A_TIME = 4096
_Row: TypeAlias = tuple[Any, ...]
_Writing: TypeAlias = Callable[[], AbstractContextManager[tuple[Transaction, Sums]]]
_Reading: TypeAlias = Callable[[], AbstractContextManager[Transaction]]


@dataclass(frozen=True, kw_only=True)
class BinEntry:
    """An item in the bin."""

    id: int
    """`Hit.id`, which it had before and gets again."""
    item: Item
    deleted: float
    """Unix seconds."""
    user: str
    reason: str


def empty_bin(gallery: Gallery, before: float) -> int:
    """Delete for good what went into a gallery's bin before a time; return how many items."""
    return 0 if gallery.bin is None else cast("Bin", gallery.bin).delete(before=before)


class Bin:
    """The bin. Safe for several threads and processes, which take turns."""

    def __init__(
        self, folder: Path, reading: _Reading, writing: _Writing, item: Callable[[Any], Item]
    ) -> None:
        """Use `Gallery.bin`."""
        self.crops_dir = folder / _FOLDER / "crops"
        """Where `Item.crop` is found of what is in the bin."""
        self._crops_dir = folder / "crops"
        self._reading, self._writing, self._item = reading, writing, item

    def entries(
        self,
        ids: Sequence[int] | None = None,
        before: float = math.inf,
        most: int = -1,
        start: int = 0,
    ) -> list[BinEntry]:
        """Return what is in the bin, last deleted first.

        Args:
            ids: Only these.
            before: Only what was deleted before, in unix seconds.
            most: At most so many; -1 for all.
            start: Leave out so many first.
        """
        columns = f"{ROW}, checksum, deleted, user, reason"
        more = f"ORDER BY deleted DESC, id DESC LIMIT {int(most)} OFFSET {int(start)}"
        with self._reading() as transaction:
            found = _select(transaction, columns, *_condition(ids, before), more)
        for row in found:
            schema.check_metadata(row, row[-4])
        return [
            BinEntry(
                id=row[0], item=self._item(row[_COLUMNS]), deleted=at, user=user, reason=reason
            )
            for *row, at, user, reason in found
        ]

    def count(self, before: float = math.inf) -> int:
        """Return the number of items in the bin, or of those deleted before a time."""
        with self._reading() as transaction:
            return sum(n for (n,) in _select(transaction, "count(*)", *_condition(None, before)))

    def add(self, keys: Sequence[str], user: str, reason: str) -> int:
        """Move items of the gallery into the bin, some thousands at a time; return how many.

        Raises:
            InputError: A file cannot be moved.
        """
        now, moved = time.time(), 0
        for start in range(0, len(keys), _AT_A_TIME):
            with self._alone():
                with self._writing() as (transaction, sums):
                    for statement in _TABLES:
                        transaction.execute(statement)
                    source, values = table.has_key(transaction, keys[start : start + _AT_A_TIME])
                    sql = f"SELECT {_STORED} FROM {source}"
                    rows = transaction.execute(sql, values).fetchall()
                    schema.check_rows(rows)
                    clips = self._link(transaction, rows)
                    new = ((*row, now, user, reason) for row in rows)
                    transaction.connection.executemany(_ADD, new)
                    transaction.execute(f"DELETE FROM items WHERE {_WITH_ID}", (_ids(rows),))
                    sums.remove(rows)
                    sums.seq += len(rows)
                    table.trim_log(transaction)
                self._sweep(rows, clips)
            moved += len(rows)
        return moved

    def restore(self, ids: Sequence[int]) -> int:
        """Move items back into the gallery; return how many were in the bin.

        Raises:
            InputError: A key is in the gallery again (``key_taken``), or a file cannot be moved.
                All stay in the bin then.
        """
        with self._alone():
            with self._writing() as (transaction, sums):
                rows = _select(transaction, _STORED, *_condition(ids))
                schema.check_rows(rows)
                _require_free(transaction, [row[1] for row in rows])
                clips = self._link(transaction, rows, back=True)
                transaction.connection.executemany(table.ADD, rows)
                # For search indexes: these ids are lower than the newest one.
                changes = "INSERT INTO changes (id) VALUES (?)"
                transaction.connection.executemany(changes, ((row[0],) for row in rows))
                sums.add(rows)
                sums.seq += len(rows)
                if rows:
                    transaction.execute(f"DELETE FROM bin WHERE {_WITH_ID}", (_ids(rows),))
            self._sweep(rows, clips)
        return len(rows)

    def delete(self, ids: Sequence[int] | None = None, before: float = math.inf) -> int:
        """Delete for good what is in the bin, see `entries`; return how many items.

        Raises:
            InputError: A frame or clip cannot be removed. All stay then.
        """
        return self.delete_where(*_condition(ids, before))

    def delete_where(self, condition: str, values: Sequence[object]) -> int:
        """Do the same with what meets a condition on the columns of ``items``, as SQL."""
        with self._reading() as transaction:
            if not _select(transaction, "id", condition, values, "LIMIT 1"):
                return 0
        with self._alone():
            with self._writing() as (transaction, _):
                rows = _select(transaction, ROW, condition, values)
                for folder in (self._crops_dir, self.crops_dir):
                    erase_clips(folder, _erased(rows))
                transaction.execute(f"DELETE FROM bin WHERE {condition}", values)
            self._sweep(rows)
        return len(rows)

    def tidy(self) -> None:
        """Bring files to where their rows are: of killed processes, and clips that came late."""
        if not self.crops_dir.parent.exists():
            return
        with self._alone():
            with self._reading() as transaction:
                rows = _select(transaction, ROW)
                clips = self._link(transaction, rows)
            kept = {file.path for file in clips_showing(self.crops_dir, _erased(rows))}
            clips += [file.path for file in all_clips(self.crops_dir) if file.path not in kept]
            crops = (file for file in self.crops_dir.rglob("*") if file.is_file())
            names = [file.relative_to(self.crops_dir).as_posix() for file in crops]
            self._sweep(rows, clips, names)

    def problems(self) -> list[str]:
        """Return what is wrong with the rows."""
        with self._reading() as transaction:
            try:
                schema.check_rows(_select(transaction, _STORED))
            except schema.DamageError as error:
                return [f"in the bin: {error}"]
        return []

    # --- Files

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Let no other thread or process change the bin meanwhile."""
        try:
            make_folder(self.crops_dir.parent)
            with locked_folder(self.crops_dir.parent):
                yield
        except OSError as error:
            raise InputError(
                f"cannot move or remove {error.filename or self.crops_dir.parent}: "
                f"{error.strerror}; remove the cause, then repeat it",
                code="bin_not_writable",
                path=error.filename,
            ) from error

    def _link(self, transaction: Transaction, rows: list[_Row], back: bool = False) -> list[Path]:
        """Give the files of rows a place in the bin, or back; return the first place of clips."""
        source, target = self._crops_dir, self.crops_dir
        erased = _erased(rows)
        if back:
            source, target = target, source
        shown = {file.path for file in clips_showing(source, erased)}
        if back:  # Those that show others in the bin stay there.
            others = _erased(_select(transaction, ROW, f"NOT {_WITH_ID}", (_ids(rows),)))
            shown -= {file.path for file in clips_showing(source, others)}
        for row in erased:
            _give_second_place(source, target, row.crop)
        for path in shown:
            name = path.relative_to(clips_dir(source)).as_posix()
            _give_second_place(clips_dir(source), clips_dir(target), name)
        return [*shown]

    def _sweep(
        self, rows: list[_Row], clips: Iterable[Path] = (), more: Iterable[str] = ()
    ) -> None:
        """Remove the crops of rows where no row names them, more crops of the bin, and clips."""
        crops = [row.crop for row in _erased(rows)]
        with self._reading() as transaction:
            remove_crops(self._crops_dir, table.unnamed_crops(transaction, crops))
            crops += more
            condition = "crop IN (SELECT value FROM json_each(?))"
            named = {*_select(transaction, "crop", condition, (json.dumps(crops),))}
        remove_crops(self.crops_dir, (crop for crop in crops if (crop,) not in named))
        for path in clips:
            path.unlink(missing_ok=True)


def _give_second_place(source: Path, target: Path, name: str) -> None:
    """Link a file, if it is there, into another folder; copy it where the disk has no links."""
    old, new = crop_path(source, name), crop_path(target, name)
    if old is None or new is None or not old.is_file():
        return
    if new.exists():
        if not filecmp.cmp(old, new, shallow=False):
            raise FileExistsError(errno.EEXIST, "another file has this name", str(new))
        return
    make_folder(new.parent)
    try:
        os.link(old, new)
    except OSError:
        write_atomically(new, old.read_bytes())


# --- Rows


def _select(
    transaction: Transaction,
    columns: str,
    condition: str = "1",
    values: Sequence[object] = (),
    more: str = "",
) -> list[_Row]:
    """Return rows of the bin; none of a gallery that never had one."""
    if not transaction.execute("SELECT 1 FROM sqlite_master WHERE name = 'bin'").fetchone():
        return []
    sql = f"SELECT {columns} FROM bin WHERE {condition} {more}"
    return transaction.execute(sql, values).fetchall()


def _condition(ids: Sequence[int] | None, before: float = math.inf) -> tuple[str, list[object]]:
    if ids is None:
        return "deleted < ?", [before]
    return f"deleted < ? AND {_WITH_ID}", [before, json.dumps([*ids])]


def _ids(rows: Iterable[_Row]) -> str:
    return json.dumps([row[0] for row in rows])


def _erased(rows: Iterable[_Row]) -> list[Erased]:
    return [
        Erased(crop=row[_CROP], track=row[_TRACK], time=row[_TIME])
        for row in rows
        if row[_CROP] is not None
    ]


def _require_free(transaction: Transaction, keys: list[str]) -> None:
    source, values = table.has_key(transaction, keys)
    taken = {key for (key,) in transaction.execute(f"SELECT key FROM {source}", values)}
    taken |= {key for key in keys if keys.count(key) > 1}
    for key in sorted(taken):
        raise InputError(
            f"{count_of(len(taken), 'picture')}, such as {safe_repr(key)}, came into the gallery "
            "again since: delete the newer one, or leave out the one in the bin; all stay there",
            code="key_taken",
            key=key,
        )
