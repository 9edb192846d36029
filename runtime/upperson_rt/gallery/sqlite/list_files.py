"""The files of a large gallery's index: made in parts, and kept up with the database.

``gallery.index`` names the parts, and says which of their items are gone. Each part is a file
beside it, `lists.ListPart`, that is never changed. New items are collected, then become a part of
their own; small parts are merged; parts of which little is left are made again or removed. Each
such step sees one state of the database and is saved: what a kill interrupts goes on where it was.
"""

import json
import os
import re
import threading
import uuid
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError
from upperson_rt.files import sweep
from upperson_rt.gallery.sqlite.database import Transaction
from upperson_rt.gallery.sqlite.deletion import to_purge
from upperson_rt.gallery.sqlite.index_file import (
    UnusableIndexError,
    read_file,
    read_stamp,
    write_file,
)
from upperson_rt.gallery.sqlite.lists import (
    KIND,
    ListPart,
    ReadVectors,
    make_part,
    read_part,
    without_dead,
    write_part,
)
from upperson_rt.gallery.sqlite.rows import (
    MAX_ID,
    Block,
    changed_since,
    stored_vectors,
    version_of,
)
from upperson_rt.gallery.sqlite.schema import SqliteMeta
from upperson_rt.gallery.sqlite.segments import Segment, is_flat
from upperson_rt.locks import lock_until_closed, unlock_and_close
from upperson_rt.printable import get_logger

_LOG = get_logger(__name__)

INDEX_FILE = "gallery.index"
EXACT = "exact"
PART_ROWS = 524_288
"""Items of a full part: it takes 0.6 GB of memory and a minute to make one of 512 dimensions."""
SEAL_ROWS = 16_384
"""Newest items that are searched one by one, until they become a part."""
_SMALL_PARTS = 8
"""Parts that are not full, until the newest of them are merged."""
_MOST_CHANGES = 100_000
"""Replaced and deleted rows that may be newer than the files; the log has the last million."""
_WITNESSES = 32
_NAME = re.compile(rf"{re.escape(INDEX_FILE)}-[0-9a-f]+")


@dataclass(frozen=True, kw_only=True)
class PartFile:
    """A file of a part."""

    name: str
    first: int
    """Lowest and highest id in it."""
    last: int
    alive: int
    recall_at_10: float


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """What an index was made from."""

    kind: str
    """`EXACT`, or `lists.KIND`."""
    identity: str
    """The gallery's, see `schema.SqliteMeta`."""
    embed_dim: int
    seq: int = 0
    """Last entry of the log of changes."""
    last_id: int = 0
    """Up to this id, all items are in it."""
    witnesses: list[list[int]] = field(default_factory=list)
    """[id, crc32 of the stored vector] of its newest rows: a database that was replaced by an
    earlier copy and went on from there has others."""
    parts: list[PartFile] = field(default_factory=list)

    @classmethod
    def of(cls, transaction: Transaction, last_id: int, **facts: Any) -> "Stamp":
        """Return the stamp of an index of the state that a transaction sees, up to an id."""
        rows = transaction.execute(
            "SELECT id, vector FROM items WHERE id <= ? ORDER BY id DESC LIMIT ?",
            (last_id, _WITNESSES),
        )
        witnesses = [[id_, zlib.crc32(blob)] for id_, blob in rows]
        seq = version_of(transaction)[0]
        return cls(seq=seq, last_id=last_id, witnesses=witnesses, **facts)

    @classmethod
    def read(cls, stored: Mapping[str, Any]) -> "Stamp":
        """Read what was written; UnusableIndexError if it is of another version."""
        try:
            found = cls(**{**stored, "parts": [PartFile(**part) for part in stored["parts"]]})
            numbers = [found.seq, found.last_id, found.embed_dim, *chain(*found.witnesses)]
            numbers += [n for part in found.parts for n in (part.first, part.last, part.alive)]
            if not all(type(number) is int and 0 <= number <= MAX_ID for number in numbers):
                raise TypeError("a number is none")
            if not all(
                isinstance(part.name, str) and isinstance(part.recall_at_10, float)
                for part in found.parts
            ):
                raise TypeError("a part is none")
            if not all(len(witness) == 2 for witness in found.witnesses):
                raise TypeError("a row has other numbers")
        except (TypeError, KeyError) as error:
            raise UnusableIndexError(f"it is of another version: {error}") from error
        return found

    def changes(self, transaction: Transaction, meta: SqliteMeta) -> NDArray[np.int64]:
        """Return the items that changed since; UnusableIndexError if it is of another state."""
        if (self.identity, self.embed_dim) != (meta.identity, meta.embed_dim):
            raise UnusableIndexError("it belongs to another gallery")
        seq, last_id = version_of(transaction)
        if self.seq > seq or self.last_id > last_id:
            raise UnusableIndexError("it is newer than the database")
        changed = changed_since(transaction, self.seq)
        if changed is None:
            raise UnusableIndexError("the database has changed too much since")
        gone = set(changed.tolist())
        for id_, checksum in self.witnesses:
            sql = "SELECT vector FROM items NOT INDEXED WHERE id = ?"
            (vector,) = transaction.execute(sql, (id_,)).fetchone() or (None,)
            is_same = isinstance(vector, bytes) and zlib.crc32(vector) == checksum
            if id_ not in gone and not is_same:
                raise UnusableIndexError("the database is another one than it was made from")
        return changed


@dataclass(frozen=True)
class Lists:
    """The files at one state of the database."""

    stamp: Stamp
    parts: Mapping[str, ListPart]
    """By name; without the items that are gone."""
    missing: Sequence[tuple[int, int]] = ()
    """First and last ids of parts that cannot be used."""


class ListFiles:
    """Reads the files of a large gallery's index, and keeps them up."""

    def __init__(self, folder: Path, meta: SqliteMeta) -> None:
        """Read nothing yet."""
        self.path = folder / INDEX_FILE
        self.stopped = threading.Event()
        """Ends the work of other threads here."""
        self.failed = False
        """Whether something could not be saved."""
        self._meta = meta

    def version(self) -> tuple[int, int]:
        """Return something that differs once other files were saved."""
        with suppress(OSError):
            found = self.path.stat()
            return found.st_ino, found.st_mtime_ns
        return 0, 0

    def read(self, known: Mapping[str, ListPart] | None = None) -> Lists:
        """Read the files, except for parts that are known already.

        Raises UnusableIndexError or OSError if there is no list of parts that can be used.
        """
        _, arrays, stored = read_file(self.path)
        stamp = Stamp.read(stored)
        if stamp.kind != KIND:
            raise UnusableIndexError("it is of a small gallery")
        parts, missing = {}, []
        for file in stamp.parts:
            try:
                part = (known or {}).get(file.name) or self.read_part(file.name)
            except (UnusableIndexError, OSError) as error:
                _LOG.warning(
                    "part %s of the search index cannot be used (%s): making it again from the "
                    "database", self.path.with_name(file.name), error,
                )  # fmt: skip
                missing.append((file.first, file.last))
                continue
            dead = None
            if file.name in arrays:
                dead = read_dead(arrays[file.name], part)
            count = 0 if dead is None else int(np.count_nonzero(dead))
            parts[file.name] = replace(part, dead=dead, dead_count=count)
        return Lists(stamp, parts, missing)

    def read_part(self, name: str) -> ListPart:
        """Read a part; UnusableIndexError or OSError if that cannot be used."""
        if not _NAME.fullmatch(name):
            raise UnusableIndexError("its name is none of a part")
        path = self.path.with_name(name)
        return read_part(path, self._meta.identity, self._meta.embed_dim)

    def empty(self) -> Lists:
        """Return what to begin with."""
        meta = self._meta
        return Lists(Stamp(kind=KIND, identity=meta.identity, embed_dim=meta.embed_dim), {})

    @contextmanager
    def only_one(self, wait: bool) -> Iterator[bool]:
        """Keep other processes from working on the files; False if another one does."""
        path = self.path.with_name(f"{INDEX_FILE}-lock")
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        handle = os.open(path, flags, 0o644)
        try:
            lock_until_closed(handle, wait=wait)
        except BlockingIOError:
            os.close(handle)
            yield False
            return
        try:
            yield True
        finally:
            unlock_and_close(handle)

    def step(
        self, transaction: Transaction, lists: Lists, save: bool = True, purge: bool = False
    ) -> Lists | None:
        """Do what is due first; return the outcome, or None if nothing is.

        With ``purge`` only take all items that are gone out of the files.

        Raises UnusableIndexError if the files are of another state of the database.
        """
        changed = lists.stamp.changes(transaction, self._meta)
        parts = {name: part.without(changed) for name, part in lists.parts.items()}
        covered, newest = lists.stamp.last_id, version_of(transaction)[1]
        again = _existing(transaction, changed[changed <= covered])
        missing = list(lists.missing)
        seals = bool(len(again)) and len(changed) >= _MOST_CHANGES
        seals = seals or newest - covered + len(again) >= SEAL_ROWS
        least = 1 if purge else None
        old = [name for name, part in parts.items() if part.dead_count >= (least or part.alive + 1)]
        if purge and not old:
            return None
        if missing and not purge:
            first, last = missing.pop(0)
            parts |= self._made(transaction, parts, first, last)
        elif seals and not purge:
            first, covered = covered + 1, min(newest, covered + PART_ROWS)
            parts |= self._made(transaction, parts, first, covered, again)
            again = again[:0]
        elif old:
            for name in old:
                part = parts.pop(name)
                if part.alive:
                    parts |= self._written(without_dead(part, self.reader(transaction)))
        elif small := _to_be_merged(parts):
            merged = np.sort(np.concatenate([parts.pop(name).alive_ids for name in small]))
            parts |= self._made(transaction, parts, also=merged)
        elif len(changed) < _MOST_CHANGES:
            return None
        parts = dict(sorted(parts.items(), key=lambda part: int(part[1].ids[0])))
        stamp = Stamp.of(
            transaction,
            covered,
            kind=KIND,
            identity=self._meta.identity,
            embed_dim=self._meta.embed_dim,
            parts=[
                PartFile(
                    name=name,
                    first=int(part.ids[0]),
                    last=int(part.ids[-1]),
                    alive=part.alive,
                    recall_at_10=part.recall_at_10,
                )
                for name, part in parts.items()
            ],
        )
        if len(again):  # No part has them: who reads the files has to look for them.
            stamp = replace(stamp, seq=lists.stamp.seq)
        done = Lists(stamp, parts, missing)
        if save and not missing:
            self.save(done)
        return done

    def save(self, lists: Lists) -> None:
        """Write the list of parts, and remove files that it does not name."""
        if not all(self.path.with_name(name).exists() for name in lists.parts):
            return  # Which the log says already.
        dead = {
            name: np.packbits(part.dead)
            for name, part in lists.parts.items()
            if part.dead is not None
        }
        named = set[str]()
        try:
            write_file(self.path, None, dead, asdict(lists.stamp))
            named = {*lists.parts}
        except (OSError, InputError) as error:
            self.failed = True
            _LOG.warning("search index %s cannot be saved: %s", self.path, error)
            with suppress(UnusableIndexError, OSError):
                named = {part.name for part in Stamp.read(read_stamp(self.path)).parts}
        self.remove_parts(named)

    def purge(self, reading: Callable[[], AbstractContextManager[Transaction]]) -> bool:
        """Take all items that are gone out of the files, and remove files that no list names.

        Returns False if that has to be repeated, or if another process works on the files. That
        one does it then: each that had the lock looks for deletions after it.
        """
        done, due = None, set[str]()
        while done is None or due - done:
            with self.only_one(wait=False) as is_alone:
                if not is_alone:
                    _LOG.warning(
                        "another process makes search index %s: deleted rows leave it when that is "
                        "done, and  upperson-rt gallery erase-proof  shows whether it is",
                        self.path,
                    )
                    return False
                try:
                    with reading() as transaction:
                        done = to_purge(transaction)
                        self._purge(transaction)
                except OSError as error:
                    self.failed = True
                    _LOG.warning("search index %s may hold deleted rows: %s", self.path, error)
            with reading() as transaction:
                due = to_purge(transaction)
            if self.failed:
                return False
        return True

    def purge_if_due(self, reading: Callable[[], AbstractContextManager[Transaction]]) -> None:
        """Do that if a deletion is not finished: it may have found the files locked."""
        with reading() as transaction:
            is_due = bool(to_purge(transaction))
        if is_due:
            self.purge(reading)

    def _purge(self, transaction: Transaction) -> None:
        sweep(self.path.parent, f"{INDEX_FILE}*")
        self.failed = False
        try:
            lists = self.read()
            while lists.missing:
                lists = self.step(transaction, lists) or lists
            if self.step(transaction, lists, purge=True) is None:
                self.remove_parts(lists.parts)
        except FileNotFoundError:
            self.remove_parts()
        except UnusableIndexError as error:
            _LOG.warning("parts of search index %s are removed: %s", self.path, error)
            self.remove_parts()

    def remove(self) -> None:
        """Remove all files; what has them open goes on with them."""
        self.path.unlink(missing_ok=True)
        self.remove_parts()

    def remove_parts(self, but: Collection[str] = ()) -> None:
        """Remove the files of parts, except for some."""
        for file in self.path.parent.glob(f"{INDEX_FILE}-[0-9a-f]*"):
            if file.name not in but and not file.is_dir():
                file.unlink(missing_ok=True)

    @property
    def are_there(self) -> bool:
        """Whether there are files of parts, or were any."""
        return any(self.path.parent.glob(f"{INDEX_FILE}-*"))

    def _made(
        self,
        transaction: Transaction,
        others: Mapping[str, ListPart],
        first: int | None = None,
        last: int = MAX_ID,
        also: NDArray[np.int64] | None = None,
    ) -> dict[str, ListPart]:
        """Make and write a part of the items from one id to another that no other part has.

        ``also`` are lower ids (ascending), or all of them without a first one.
        """
        taken = (
            []
            if first is None
            else [_between(part.alive_ids, first, last) for part in others.values()]
        )
        elsewhere = np.concatenate([np.empty(0, np.int64), *taken])
        blocks = list[Block]()
        for block in stored_vectors(
            transaction,
            self._meta.embed_dim,
            None if first is None else first - 1,
            also,
            until=last,
            with_columns=True,
        ):
            self._check()
            blocks.append(block.only(~np.isin(block.ids, elsewhere)))
        whole = Block.joined(blocks, self._meta.embed_dim)
        del blocks
        if not len(whole.ids):
            return {}
        return self._written(make_part(whole, self._check))

    def reader(self, transaction: Transaction) -> ReadVectors:
        """Return what reads stored vectors."""
        return lambda ids: stored_vectors(transaction, self._meta.embed_dim, None, ids)

    def _written(self, part: ListPart) -> dict[str, ListPart]:
        """Write a part, and return it by the name of its file, which no other one ever had."""
        name = f"{INDEX_FILE}-{uuid.uuid4().hex[:12]}"
        path = self.path.with_name(name)
        try:
            write_part(path, part, self._meta.identity)
            return {name: read_part(path, self._meta.identity, self._meta.embed_dim)}
        except (OSError, InputError, UnusableIndexError) as error:
            self.failed = True
            _LOG.warning("search index %s cannot be saved: %s", path, error)
            return {name: part}

    def _check(self) -> None:
        if self.stopped.is_set():
            raise StoppedError


class StoppedError(Exception):
    """The work was stopped."""


def read_dead(packed: NDArray[Any], part: ListPart) -> NDArray[np.bool_]:
    """Return which items of a part are gone; UnusableIndexError if that is of another part."""
    count = len(part.ids)
    if packed.dtype != np.uint8 or len(packed) != -(-count // 8):
        raise UnusableIndexError("it does not fit its parts")
    return np.unpackbits(packed, count=count).astype(np.bool_)


def read_exact(path: Path, embed_dim: int) -> tuple[Segment, Stamp]:
    """Read the index of a small gallery; UnusableIndexError or OSError if it cannot be used."""
    index, arrays, stored = read_file(path)
    stamp = Stamp.read(stored)
    if stamp.kind != EXACT:
        raise UnusableIndexError("it is of a large gallery")
    try:
        segment = Segment(ids=arrays["ids"], checksums=arrays["checksums"], index=index)
    except KeyError as error:
        raise UnusableIndexError(f"it has no {error}") from error
    if not is_flat(segment, embed_dim):
        raise UnusableIndexError("it does not hold the rows that its stamp says")
    return segment, stamp


def _existing(transaction: Transaction, ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return those of some items (ascending) that the database has."""
    sql = (
        "SELECT id FROM items NOT INDEXED WHERE id IN (SELECT value FROM json_each(?)) ORDER BY id"
    )
    rows = transaction.execute(sql, (json.dumps(ids.tolist()),))
    return np.fromiter((id_ for (id_,) in rows), np.int64)


def _between(ids: NDArray[np.int64], first: int, last: int) -> NDArray[np.int64]:
    return ids[np.searchsorted(ids, first) : np.searchsorted(ids, last, "right")]


def _to_be_merged(parts: Mapping[str, ListPart]) -> list[str]:
    """Return the newest of many small parts."""
    small = [name for name, part in parts.items() if part.alive < PART_ROWS // 2]
    due, rows = list[str](), 0
    for name in reversed(small) if len(small) > _SMALL_PARTS else ():
        rows += parts[name].alive
        if rows > PART_ROWS:
            break
        due.append(name)
    return due
