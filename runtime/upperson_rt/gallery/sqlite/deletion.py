"""Deletions from a gallery in a folder: in short transactions, with files and a line in a log.

Each step deletes some thousand rows in a transaction, so that others read and write between two
steps. In the same transaction it writes down what is left to do: the files to remove, and the line
for the log of erasures. What a killed deletion left is done by the next one.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain
from json import dumps
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError, UppersonError
from upperson_rt.extensions import load_service
from upperson_rt.files import require_no_links
from upperson_rt.gallery.clips import Erased, clips_dir, erase_clips
from upperson_rt.gallery.crops import remove_crops, sync_crops
from upperson_rt.gallery.erasures import (
    digest_of_keys,
    open_erasure_log,
    pack_ids,
    require_erasure_log,
    unpack_ids,
)
from upperson_rt.gallery.sqlite import rows as table
from upperson_rt.gallery.sqlite import schema
from upperson_rt.gallery.sqlite.database import Database, Transaction
from upperson_rt.gallery.sqlite.documents import read_documents, write_document
from upperson_rt.gallery.sqlite.free_pages import FreePages, can_punch
from upperson_rt.gallery.sqlite.schema import ROW, DamageError, Sums
from upperson_rt.printable import get_logger

_LOG = get_logger(__name__)

Selected: TypeAlias = NDArray[np.int64]
"""(N, 2): ids of rows, and the checksums that they must still have; 0 for any."""
_Record: TypeAlias = dict[str, Any]
_Records: TypeAlias = Mapping[str, _Record | None]
"""By name; None for one that is done."""
STEP_ROWS = 2048
"""Rows of a transaction: some tenths of a second."""
PAUSE_S = 0.12
"""Between two steps. SQLite tries for a lock at least every 0.1 s, so each waiting writer gets it.
"""
_RECORD = "erasing/"
_UNLINKING = 8
"""Threads: where a disk takes a while for each file, 2,000 took 0.3 s instead of 4 s."""
_STEP_S = 0.2
_TRIES = 50
"""To find SQLite's log unread: searches keep it for some milliseconds each."""
_SHRINKING_S = 10.0
_SPARE_PAGES = 4096
"""Free pages that the file keeps for new rows, and a tenth of it."""
_KEY, _TIME, _TRACK, _CROP = 1, 4, 5, 7
"""Places in `ROW`."""


def outbox_in(transaction: Transaction, write: bool) -> Any:
    """Return what the service ``outbox`` makes, see `upperson_alerts.outbox`."""
    return load_service("outbox")(transaction.connection, write)


def own_outbox(transaction: Transaction) -> Any:
    """Return the outbox of a gallery to read; None for one that never had alerts.

    So a deletion there needs no package of alerts.
    """
    sql = "SELECT count(*) FROM sqlite_master WHERE name = 'outbox'"
    (count,) = transaction.execute(sql).fetchone()
    return outbox_in(transaction, write=False) if count else None


def outdated_messages(transaction: Transaction) -> list[int]:
    """Return the numbers of messages whose picture is deleted."""
    outbox = own_outbox(transaction)
    return [] if outbox is None else outbox.of_deleted()


def forget_messages(transaction: Transaction) -> None:
    """Take out of messages what they say of pictures that are deleted."""
    if seqs := outdated_messages(transaction):
        outbox_in(transaction, write=False).forget(seqs)


def selected(transaction: Transaction, source: str, values: Sequence[object]) -> Selected:
    """Select the rows of a table with a condition, as they are now."""
    found = transaction.execute(f"SELECT id, {transaction.checksum} FROM {source}", values)
    return np.fromiter((one for row in found for one in row), np.int64).reshape(-1, 2)


class Eraser:
    """Deletes rows of one gallery, and all that belongs to them."""

    def __init__(
        self,
        database: Database,
        writing: Callable[[], AbstractContextManager[tuple[Transaction, Sums]]],
        purge: Callable[[NDArray[np.int64], bool], bool],
        crops_dir: Path,
    ) -> None:
        self._database, self._writing, self._crops_dir = database, writing, crops_dir
        self._purge = purge
        self._folder = crops_dir.parent

    def erase(
        self,
        action: str,
        about: Mapping[str, object],
        select: Callable[[Transaction], Selected],
        begun: str | None = None,
    ) -> int:
        """Delete the selected rows that are still as they were; return how many.

        Args:
            action: Of the lines in the log, such as ``prune``.
            about: What was asked for, for the log.
            select: Selects the rows in a transaction that reads.
            begun: What `begin` returned just now.

        Raises:
            InputError: A frame or clip cannot be removed (``clips_not_removed``), the gallery or
                the log cannot be written. What is left is done by the next deletion.
        """
        require_erasure_log()  # First: no row goes without a line.
        require_no_links(self._folder)
        if not (self._database.has_sums or self._database.read_only):
            with self._writing():
                pass
        with self._database.reading() as transaction:
            transaction.check_table(now=True)  # Not in a step, where others wait to write.
            rows = select(transaction)
            records = unfinished(transaction)
            outbox = own_outbox(transaction)
            messages = {} if outbox is None else outbox.by_picture()
        rows = rows[np.argsort(rows[:, 0])]
        firsts = [unpack_ids(record["ids"])[:1] for record in records.values()]
        parts = action == "delete" or any(map(_is_of_parts, records.values()))
        sparing = "prune" in {action, *(record["action"] for record in records.values())}
        id_, deleted, committed = uuid.uuid4().hex, 0, 0.0
        with ThreadPoolExecutor(_UNLINKING) as pool:
            done: _Records = {
                name: self._finish(one, pool, recovered=name != begun)
                for name, one in records.items()
            }
            for step, start in enumerate(range(0, len(rows), STEP_ROWS)):
                if step:  # Others also write while files are removed.
                    time.sleep(max(0.0, committed + PAUSE_S - time.monotonic()))
                part = rows[start : start + STEP_ROWS]
                line = {"erasure": id_, "step": step, "action": action, "about": dict(about)}
                record = self._step(part, line, done, messages)
                committed = time.monotonic()
                deleted += record["count"]
                firsts.append(part[:1, 0])
                done = {f"{id_}/{step}": self._finish(record, pool)}
        if done:
            left = {  # Until all is overwritten: see `_tidy`.
                "action": "prune" if sparing else action,
                "count": 0,
                "files": [],
                "ids": pack_ids(rows[:0, 0]),
                "parts": parts,
            }
            with self._writing() as (transaction, _):
                _write(transaction, {name: one or left for name, one in done.items()})
        with self._database.reading() as transaction:
            is_left = bool(outdated_messages(transaction))
        if is_left:  # Of a deletion that was killed, or an earlier release.
            with self._writing() as (transaction, _):
                forget_messages(transaction)
        is_done = True
        if firsts or parts:
            is_done = self._purge(np.concatenate([np.empty(0, np.int64), *firsts]), parts)
        if (firsts or is_left) and self._tidy(sparing) and is_done:
            with self._writing() as (transaction, _):
                _write(transaction, {name: None for name, one in done.items() if one is None})
            with self._database.with_empty_log():
                pass
        return deleted

    def begin(
        self,
        transaction: Transaction,
        rows: Sequence[Sequence[Any]],
        action: str,
        about: Mapping[str, object],
    ) -> str:
        """Write down rows that another one deletes in this transaction, for `finish`."""
        require_erasure_log()
        id_ = uuid.uuid4().hex
        line = {"erasure": id_, "step": 0, "action": action, "about": dict(about)}
        _write(transaction, {f"{id_}/0": self._record(line, rows, ())})
        return f"{id_}/0"

    def finish(self, begun: str | None = None) -> None:
        """Finish what `begin` and deletions that ended early left; errors are those of `erase`."""
        self.erase("delete", {}, lambda _: np.empty((0, 2), np.int64), begun)

    def _step(
        self,
        part: Selected,
        line: dict[str, Any],
        done: _Records,
        messages: Mapping[int, Sequence[int]],
    ) -> dict[str, Any]:
        """Delete some rows; return what was written down with it, in place of what is done.

        ``messages`` are those of the outbox, see `Outbox.by_picture`.

        Frames and clips go before the commit, so that a deletion that fails or is killed can be
        repeated: its rows are still there. They go once more after it: others may be written
        meanwhile. `watch` removes those that are written later, as their crops are gone then.
        """
        values = (dumps(part[:, 0].tolist()),)
        sql = f"SELECT {ROW}, checksum FROM items NOT INDEXED WHERE id IN (SELECT value FROM "
        sql += "json_each(?))"
        if clips_dir(self._crops_dir).exists():
            with self._database.reading() as transaction:
                erased = _with_crops(transaction.execute(sql, values).fetchall())
            self._erase_clips(erased, "no row of this step was deleted: remove the cause, repeat")
        expected = dict(part.tolist())
        with self._writing() as (transaction, sums):
            transaction.check_table(now=True)
            found = transaction.execute(sql, values).fetchall()
            rows = [row for row in found if expected[row[0]] in (0, row[-1])]
            for row in rows:
                schema.check_metadata(row, row[-1])
            sums.remove(rows)
            sums.seq += len(rows)
            gone = dumps([row[0] for row in rows])
            # Pages that become free are overwritten at the end, see `FreePages`.
            with _secure_delete(transaction, "FAST" if line["action"] == "prune" else "ON"):
                delete = "DELETE FROM items WHERE id IN (SELECT value FROM json_each(?))"
                if transaction.execute(delete, (gone,)).rowcount != len(rows):
                    raise DamageError("pictures that an index names are missing")
            if outdated := [seq for row in rows for seq in messages.get(row[0], ())]:
                outbox_in(transaction, write=False).forget(outdated)
            record = self._record(line, rows, _with_crops(rows))
            table.trim_log(transaction)
            if rows or done:
                name = f"{line['erasure']}/{line['step']}"
                _write(transaction, {**done, name: record if rows else None})
        return record

    def _record(
        self, line: _Record, rows: Sequence[Sequence[Any]], files: Sequence[Erased]
    ) -> _Record:
        times = [row[_TIME] for row in rows if row[_TIME] is not None]
        identity = self._database.meta.identity
        return {
            **line,
            "gallery": identity,
            "count": len(rows),
            "first_time": min(times, default=None),
            "last_time": max(times, default=None),
            "keys_sha256": digest_of_keys(identity, (row[_KEY] for row in rows)),
            "ids": pack_ids(np.array(sorted(row[0] for row in rows), np.int64)),
            "files": [(one.crop, one.track, one.time) for one in files],
        }

    def _finish(
        self, record: _Record, pool: ThreadPoolExecutor, *, recovered: bool = False
    ) -> _Record | None:
        """Remove the files of deleted rows, and write the line; return what is still left."""
        erased = [Erased(crop=crop, track=track, time=at) for crop, track, at in record["files"]]
        left = []
        if erased:
            with self._database.reading() as transaction:
                unused = table.unnamed_crops(transaction, [row.crop for row in erased])
            parts = (unused[start::_UNLINKING] for start in range(_UNLINKING))
            there = set(chain(*pool.map(partial(remove_crops, self._crops_dir), parts)))
            self._erase_clips(erased, "the rows are deleted: remove the cause and the file", unused)
            left = [one for one in record["files"] if one[0] in there]
        if record["count"]:
            line = {key: value for key, value in record.items() if key not in ("files", "action")}
            with open_erasure_log(self._folder) as log:
                log.append(record["action"], line | ({"recovered": True} if recovered else {}))
        return {**record, "count": 0, "files": left} if left else None

    def _tidy(self, sparing: bool) -> bool:
        """Overwrite deleted rows and give back their space; False if the next deletion has to.

        ``sparing`` if SQLite did not overwrite pages that became free. Problems are logged, as the
        rows are gone.
        """
        try:
            if sparing:
                is_done = self._overwrite()
            else:
                with self._database.with_empty_log() as file:
                    is_done = file is not None
            self._shrink()
            return is_done
        except (UppersonError, OSError) as error:
            _LOG.warning("the space of deleted rows is given back later: %s", error)
            return False

    def _shrink(self) -> None:
        """Cut free pages off the file if they are more than half of it, or if they take space.

        Holes take none, while SQLite moves the last pages of the file and looks for each of them
        among all that are free. What takes too long is left for the next deletion. A gallery of an
        earlier release keeps its free pages.
        """
        with self._database.reading() as transaction:
            mode, free, pages = (
                transaction.execute(f"PRAGMA {name}").fetchone()[0]
                for name in ("auto_vacuum", "freelist_count", "page_count")
            )
        surplus = free - max(_SPARE_PAGES, pages // 10) if mode == schema.INCREMENTAL else 0
        if surplus > 0 and free <= pages // 2:
            with self._database.with_empty_log(wait_ms=0) as file:  # No one reads without locks.
                surplus = 0 if file is None or can_punch(file) else surplus
        end = time.monotonic() + _SHRINKING_S
        while surplus > 0 and time.monotonic() < end:
            time.sleep(PAUSE_S)
            with self._writing() as (transaction, _):
                until = time.monotonic() + _STEP_S
                while surplus > 0 and time.monotonic() < until:
                    # One at a time: Python's sqlite3 ends this statement after the first.
                    transaction.execute("PRAGMA incremental_vacuum(1)")
                    surplus -= 1

    def _overwrite(self) -> bool:
        """Overwrite the file's free pages, in steps; False while readers need SQLite's log."""
        after, tries = 0, 0
        while tries < _TRIES:
            with self._database.with_empty_log(wait_ms=0) as file:
                if file is None:
                    tries += 1
                elif (last := FreePages.read(file).overwrite(file, after, _STEP_S)) is None:
                    return True
                else:
                    after = last
            time.sleep(PAUSE_S)
        return False

    def _erase_clips(
        self, rows: Sequence[Erased], advice: str, removed: Sequence[str] = ()
    ) -> None:
        """Remove frames and clips; after that no crop that was removed comes back either."""
        try:
            erase_clips(self._crops_dir, rows)
            sync_crops(self._crops_dir, removed)
        except OSError as error:
            raise InputError(
                f"cannot remove {error.filename}, which may show deleted people: "
                f"{error.strerror}; {advice}",
                code="clips_not_removed",
                path=error.filename,
            ) from error


@contextmanager
def _secure_delete(transaction: Transaction, mode: str) -> Iterator[None]:
    transaction.execute(f"PRAGMA secure_delete = {mode}")
    try:
        yield
    finally:
        transaction.execute("PRAGMA secure_delete = ON")


def unfinished(transaction: Transaction) -> dict[str, dict[str, Any]]:
    """Return what deletions have left to do, with the ``files`` that are to be removed."""
    return read_documents(transaction.connection, _RECORD)


def to_purge(transaction: Transaction) -> set[str]:
    """Return the deletions whose rows may still be in parts of the search index."""
    return {name for name, record in unfinished(transaction).items() if _is_of_parts(record)}


def _is_of_parts(record: _Record) -> bool:
    """Whether parts of the search index must lose the rows now: those of retention may wait."""
    return bool(record.get("parts", record["action"] != "prune"))


def _write(transaction: Transaction, records: _Records) -> None:
    for name, record in records.items():
        write_document(transaction.connection, f"{_RECORD}{name}", record)


def _with_crops(rows: Sequence[Sequence[Any]]) -> list[Erased]:
    return [
        Erased(crop=row[_CROP], track=row[_TRACK], time=row[_TIME])
        for row in rows
        if row[_CROP] is not None
    ]
