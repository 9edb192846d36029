"""The search index in memory: kept up with the database row by row, never the truth itself."""

import json
import os
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError
from upperson_rt.files import put_in_place, scratch_folder
from upperson_rt.gallery.records import IndexInfo
from upperson_rt.gallery.sqlite.database import Transaction
from upperson_rt.gallery.sqlite.rows import changed_since, ids_where, stored_vectors, version_of
from upperson_rt.gallery.sqlite.schema import DamageError, SqliteMeta
from upperson_rt.gallery.sqlite.segments import (
    Candidates,
    Segment,
    Tail,
    TrainedLists,
    flat_index,
    load_faiss,
    merge_flat,
    stored_rows,
    train_lists,
)
from upperson_rt.printable import get_logger

_LOG = get_logger(__name__)

APPROXIMATE_FROM = 1_000_000
"""Pictures from which on searches without a filter use an approximate index: until there an exact
one takes up to 1 GB at 512 dimensions, and about 0.1 s on one core of a server."""
_SEAL_ROWS = 8192
"""Below, rows are searched with numpy: nothing is saved, and faiss is not even loaded."""
_MOST_SEGMENTS = 8
"""Exact segments below `_LARGE_ROWS` that may be there before they are merged."""
_LARGE_ROWS = 131_072
"""Exact segments from there on are not merged: that would need their memory twice."""
_WITNESSES = 32


# --- The index in a file: derived from the database, checked when read, replaceable any time
#
#     faiss index | item ids, int64 | checksums of their rows, int64 | JSON
#     | crc32 of the JSON, 4 bytes | length of the JSON, 4 bytes | crc32 of all that, 8 bytes
#     | magic, 8 bytes
#
# faiss reads its own part from the beginning and ignores what follows.

INDEX_FILE = "gallery.index"
FORMAT = 2

_MAGIC = b"uprtidx2"
_END_BYTES = 24
_CHUNK_BYTES = 1 << 24
Contents: TypeAlias = tuple[Any, NDArray[np.int64], NDArray[np.int64]]
"""The index of faiss, and for each of its rows the item's id and its checksum."""


class UnusableIndexError(Exception):
    """An index file that cannot be used, and why; it is made anew."""


@dataclass(frozen=True, kw_only=True)
class Stamp:
    """What an index was made from, and how."""

    identity: str
    """The gallery's, see `schema.SqliteMeta`."""
    seq: int
    """Last entry of the log of changes."""
    last_id: int
    """Highest id ever given."""
    embed_dim: int
    rows: int
    kind: str
    """``exact`` or ``ivf-sq8``."""
    witnesses: list[list[int]]
    """[id, crc32 of the stored vector] of the newest rows: a database that was replaced by an
    earlier copy and went on from there has others."""
    nlist: int = 0
    nprobe: int = 0
    recall_at_10: float = 1.0
    format: int = field(default=FORMAT)


def write_index(path: Path, contents: Contents, stamp: Stamp) -> None:
    """Write the file completely or not at all."""
    faiss = load_faiss()
    index, ids, checksums = contents

    with scratch_folder(path) as folder:
        temporary = folder / path.name
        try:
            faiss.write_index(index, str(temporary))
        except RuntimeError as error:
            raise OSError(f"cannot write {path}: {error}") from error
        details = json.dumps(asdict(stamp)).encode()
        with open(temporary, "r+b") as file:
            checksum = _checksum(file, temporary.stat().st_size)
            file.seek(0, os.SEEK_END)
            for part in (
                ids.astype("<i8").tobytes(),
                checksums.astype("<i8").tobytes(),
                details,
                zlib.crc32(details).to_bytes(4, "little"),
                len(details).to_bytes(4, "little"),
            ):
                checksum = zlib.crc32(part, checksum)
                file.write(part)
            file.write(checksum.to_bytes(8, "little") + _MAGIC)
        if path.exists():
            temporary.chmod(path.stat().st_mode)
        put_in_place(temporary, path)


def read_stamp(path: Path) -> Stamp:
    """Read only what an index was made from."""
    with open(path, "rb") as file:
        return _read_stamp(file)[0]


def read_index(path: Path) -> tuple[Contents, Stamp]:
    """Read the file after checking all of it; the vectors stay there (mmap).

    So processes share them, and the system may drop them where memory is short.
    """
    with open(path, "rb") as file:
        stamp, ids_at, checksum_at = _read_stamp(file)
        file.seek(checksum_at)
        expected = int.from_bytes(file.read(8), "little")
        file.seek(0)
        if _checksum(file, checksum_at) != expected:
            raise UnusableIndexError("its checksum does not match")
        file.seek(ids_at)
        numbers = np.frombuffer(file.read(16 * stamp.rows), "<i8").astype(np.int64)
        faiss = load_faiss()
        # By descriptor: the path may lead to another process's newer file by now.
        name = f"/proc/self/fd/{file.fileno()}"
        # Older releases of faiss read exact indexes into memory.
        exact = getattr(faiss, "IO_FLAG_MMAP_IFC", 0)
        flags = exact if stamp.kind == "exact" else faiss.IO_FLAG_MMAP
        try:
            index = faiss.read_index(name if os.path.exists(name) else str(path), flags)
        except RuntimeError as error:
            raise UnusableIndexError(f"faiss cannot read it: {error}") from error
    if index.ntotal != stamp.rows or index.d != stamp.embed_dim:
        raise UnusableIndexError(
            f"it holds {index.ntotal} rows of {index.d}, not what its stamp says"
        )
    return (index, numbers[: stamp.rows], numbers[stamp.rows :]), stamp


def _read_stamp(file: BinaryIO) -> tuple[Stamp, int, int]:
    """Return the stamp, and where the ids and the checksum are."""
    size = file.seek(0, os.SEEK_END)
    if size < _END_BYTES:
        raise UnusableIndexError("it is too short")
    file.seek(size - _END_BYTES)
    end = file.read(_END_BYTES)
    checksum, length = (int.from_bytes(end[at : at + 4], "little") for at in (0, 4))
    if end[16:] != _MAGIC or length > size - _END_BYTES:
        raise UnusableIndexError("it is cut off, or no index of this version")
    file.seek(size - _END_BYTES - length)
    details = file.read(length)
    if zlib.crc32(details) != checksum:
        raise UnusableIndexError("its stamp is damaged")
    try:
        stamp = Stamp(**json.loads(details))
    except (ValueError, TypeError) as error:
        raise UnusableIndexError(f"it is of another version: {error}") from error
    ids_at = size - _END_BYTES - length - 16 * stamp.rows
    if stamp.format != FORMAT or ids_at < 0:
        raise UnusableIndexError("it is of another version")
    return stamp, ids_at, size - 16


def _checksum(file: BinaryIO, length: int) -> int:
    checksum, buffer = 0, memoryview(bytearray(_CHUNK_BYTES))
    while length > 0:
        count = file.readinto(buffer[: min(length, _CHUNK_BYTES)])  # type: ignore[attr-defined]
        if not count:
            raise UnusableIndexError("it is cut off")
        checksum = zlib.crc32(buffer[:count], checksum)
        length -= count
    return checksum


# --- The index in memory


@dataclass(frozen=True)
class Snapshot:
    """The index as of one state of the database; does not change."""

    seq: int
    last_id: int
    segments: tuple[Segment, ...]
    tail: Tail
    stamp: Stamp | None = None
    """Stands in the file that the first segment came from."""

    @property
    def is_exact(self) -> bool:
        """Whether the candidates are the best rows for certain."""
        return all(segment.nprobe is None for segment in self.segments)

    def checksums_of(self, ids: NDArray[np.int64]) -> dict[int, int]:
        """Return the checksums that the rows of these items (ascending) have to have, by id."""
        found: dict[int, int] = {}
        for part in self._parts:
            found |= part.checksums_of(ids)
        return found

    def is_complete(self, transaction: Transaction) -> bool:
        """Whether it holds exactly the vectors that the gallery has to hold, by their checksums."""
        if transaction.sums is None:
            return True
        found = (
            sum(part.alive for part in self._parts),
            sum(part.total for part in self._parts) % (1 << 64),
        )
        return found == (transaction.sums.rows, transaction.sums.total)

    def lacks_checksums(self, transaction: Transaction) -> bool:
        """Whether it, or part of it, was made before the gallery got checksums."""
        has_sums = transaction.sums is not None
        return has_sums and any(part.alive and not part.total for part in self._parts)

    @property
    def _parts(self) -> "tuple[Segment | Tail, ...]":
        return (*self.segments, self.tail)

    def search(
        self, queries: NDArray[np.float32], k: int, only: NDArray[np.int64] | None = None
    ) -> Candidates:
        """Find the k best items or more for (Q, D) queries, if there are so many.

        With ``only`` (ascending) among those items.
        """
        found = [part.search(queries, k, only) for part in self.segments]
        if self.tail.length or not found:
            found.append(self.tail.search(queries, k, only))
        if len(found) == 1:
            return found[0]
        scores = np.concatenate([part for part, _ in found], axis=1)
        ids = np.concatenate([part for _, part in found], axis=1)
        scores = np.where(ids < 0, -np.inf, scores)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


class SearchIndex:
    """Makes, loads, saves and refreshes the snapshot."""

    def __init__(self, folder: Path, meta: SqliteMeta, writable: bool) -> None:
        """Load nothing before the first `refresh`; save the index in the folder if writable."""
        self.path = folder / INDEX_FILE
        self.lock = threading.Lock()
        """Hold it around the beginning of a transaction and `refresh`."""
        self.snapshot: Snapshot | None = None
        self.embed_dim = meta.embed_dim
        self._identity = meta.identity
        self._writable = writable
        self._advised = False

    def refresh(self, transaction: Transaction) -> Snapshot:
        """Bring the index to the state that a transaction sees, and return it."""
        if self.snapshot is None or self.snapshot.lacks_checksums(transaction):
            self.snapshot = self._load(transaction)
        elif (self.snapshot.seq, self.snapshot.last_id) != version_of(transaction):
            changed = changed_since(transaction, self.snapshot.seq)
            if changed is None:
                self.snapshot = self._load(transaction)
            else:
                followed = self._compact(self._follow(transaction, self.snapshot, changed))
                self.snapshot = self._checked(transaction, followed)
        return self.snapshot

    def _checked(self, transaction: Transaction, snapshot: Snapshot) -> Snapshot:
        """Return a snapshot that followed the log of changes, or a new one if the log was wrong."""
        if snapshot.is_complete(transaction):
            return snapshot
        if not snapshot.lacks_checksums(transaction):
            _LOG.warning(
                "search index %s is not of this database: making it again from the database",
                self.path,
            )
        return self.build(transaction)

    def info(self, transaction: Transaction, items: int) -> IndexInfo | None:
        """Return what searches use, or would load."""
        stamp = None if self.snapshot is None else self.snapshot.stamp
        if self.snapshot is None:
            with suppress(UnusableIndexError, OSError):
                found = read_stamp(self.path)
                self._check(transaction, found)
                stamp = found
        if stamp is None or stamp.kind == "exact":
            if self._is_approximate(items) and self.snapshot is None:
                return None
            return IndexInfo(kind="exact", rows=items, recall_at_10=1.0)
        (beside,) = transaction.execute(
            "SELECT count(*) FROM items WHERE id > ?", (stamp.last_id,)
        ).fetchone()
        return IndexInfo(
            kind=stamp.kind,
            rows=items - beside,
            beside=beside,
            parameters={"nlist": stamp.nlist, "nprobe": stamp.nprobe},
            recall_at_10=stamp.recall_at_10,
        )

    def problem(self, transaction: Transaction) -> str | None:
        """Say what is wrong with the file, or return None; a missing file is fine."""
        try:
            self._check(transaction, read_index(self.path)[1])
        except FileNotFoundError:
            return None
        except (UnusableIndexError, OSError) as error:
            return f"index {self.path}: {error}: run  upperson-rt gallery rebuild"
        return None

    def _load(self, transaction: Transaction) -> Snapshot:
        """Read the file and what has changed since; without a file worth it make the index."""
        try:
            (index, ids, checksums), stamp = read_index(self.path)
            changed = self._check(transaction, stamp)
        except FileNotFoundError:
            return self.build(transaction)
        except (UnusableIndexError, OSError) as error:
            _LOG.warning(
                "search index %s cannot be used (%s): making it again from the database",
                self.path, error,
            )  # fmt: skip
            return self.build(transaction)
        segment = Segment(ids=ids, checksums=checksums, index=index, nprobe=stamp.nprobe or None)
        count = transaction.count()
        outgrown = segment.nprobe is None and self._is_approximate(count)
        if outgrown or segment.without(changed).alive < count // 2:
            _LOG.info("search index %s is outdated: making it again", self.path)
            return self.build(transaction)
        loaded = Snapshot(stamp.seq, stamp.last_id, (segment,), Tail(self.embed_dim), stamp)
        followed = self._compact(self._follow(transaction, loaded, changed))
        return self._checked(transaction, followed)

    def _check(self, transaction: Transaction, stamp: Stamp) -> NDArray[np.int64]:
        """Return the items that changed since; UnusableIndexError if it is of another state."""
        if (stamp.identity, stamp.embed_dim) != (self._identity, self.embed_dim):
            raise UnusableIndexError("it belongs to another gallery")
        seq, last_id = version_of(transaction)
        if stamp.seq > seq or stamp.last_id > last_id:
            raise UnusableIndexError("it is newer than the database")
        changed = changed_since(transaction, stamp.seq)
        if changed is None:
            raise UnusableIndexError("the database has changed too much since")
        gone = set(changed.tolist())
        for id_, checksum in stamp.witnesses:
            sql = "SELECT vector FROM items NOT INDEXED WHERE id = ?"
            (vector,) = transaction.execute(sql, (id_,)).fetchone() or (None,)
            is_same = isinstance(vector, bytes) and zlib.crc32(vector) == checksum
            if id_ not in gone and not is_same:
                raise UnusableIndexError("the database is another one than it was made from")
        return changed

    def _follow(
        self, transaction: Transaction, snapshot: Snapshot, changed: NDArray[np.int64]
    ) -> Snapshot:
        """Return the snapshot with what is new and without what is gone."""
        segments, tail = list(snapshot.segments), snapshot.tail
        if len(changed):
            segments = [segment.without(changed) for segment in segments]
            tail = tail.without(changed)
        again = changed[changed <= snapshot.last_id]
        for block in stored_vectors(transaction, self.embed_dim, snapshot.last_id, also=again):
            tail = tail.plus(block)
            if tail.length >= _SEAL_ROWS:
                segments.append(tail.sealed())
                tail = Tail(self.embed_dim)
        seq, last_id = version_of(transaction)
        return replace(snapshot, seq=seq, last_id=last_id, segments=tuple(segments), tail=tail)

    def _compact(self, snapshot: Snapshot) -> Snapshot:
        """Merge small exact segments where there are many, and clear those that are mostly gone."""
        segments = [part for part in snapshot.segments if part.alive or part.nprobe is not None]
        exact = [part for part in segments if part.nprobe is None]
        crowded = sum(len(part.ids) < _LARGE_ROWS for part in exact) > _MOST_SEGMENTS

        def is_due(part: Segment) -> bool:
            small = crowded and len(part.ids) < _LARGE_ROWS
            return part.nprobe is None and (small or part.dead_count > part.alive)

        if due := list(filter(is_due, segments)):
            segments = [part for part in segments if not is_due(part)]
            segments.append(merge_flat(due, self.embed_dim))
        if not self._advised and self._is_approximate(sum(part.alive for part in exact)):
            self._advised = True
            _LOG.warning(
                "%d pictures of gallery %s are searched one by one: upperson-rt gallery rebuild "
                "makes searches faster", sum(part.alive for part in exact), self.path.parent,
            )  # fmt: skip
        return replace(snapshot, segments=tuple(segments))

    def _is_approximate(self, count: int) -> bool:
        """Whether an index of so many rows would be approximate; unsaved it would be for once."""
        return count >= APPROXIMATE_FROM and self._writable

    def build(self, transaction: Transaction) -> Snapshot:
        """Make the index from the vectors that a transaction sees, save it, and return it.

        Needs no lock: searches go on with what there is until ``snapshot`` is set.
        """
        count = transaction.count()
        approximate = self._is_approximate(count)
        if count < _SEAL_ROWS and not approximate:
            empty = Snapshot(0, 0, (), Tail(self.embed_dim))
            followed = self._follow(transaction, empty, np.empty(0, np.int64))
            if self._writable and self.path.exists():
                transaction.check_items()
                transaction.check_table()
                with suppress(OSError):  # An earlier, larger one; it does no harm either.
                    self.path.unlink(missing_ok=True)
            return self._sound(transaction, followed)
        facts: dict[str, Any] = {"kind": "exact"}
        if approximate:
            trained, checksums = self._train(transaction, count)
            segment = Segment(
                ids=trained.ids, checksums=checksums, index=trained.index, nprobe=trained.nprobe
            )
            facts = {
                "kind": "ivf-sq8",
                "nlist": trained.nlist,
                "nprobe": trained.nprobe,
                "recall_at_10": trained.recall_at_10,
            }
        else:
            segment = self._build_exact(transaction, count)
        witnesses = [
            [id_, zlib.crc32(blob)]
            for id_, blob in transaction.execute(
                "SELECT id, vector FROM items ORDER BY id DESC LIMIT ?", (_WITNESSES,)
            )
        ]
        seq, last_id = version_of(transaction)
        stamp = Stamp(
            identity=self._identity,
            seq=seq,
            last_id=last_id,
            embed_dim=self.embed_dim,
            rows=len(segment.ids),
            witnesses=witnesses,
            **facts,
        )
        snapshot = Snapshot(seq, last_id, (segment,), Tail(self.embed_dim), stamp)
        sound = self._sound(transaction, snapshot)
        if self._writable:  # A search that is refused leaves the file of the index alone.
            transaction.check_items()
            transaction.check_table()
        segment = self._saved(sound.segments[0], stamp)
        return replace(snapshot, segments=(segment,))

    def _sound(self, transaction: Transaction, snapshot: Snapshot) -> Snapshot:
        """Return a snapshot of everything that is stored, if that is what has to be stored."""
        if not snapshot.is_complete(transaction):
            raise DamageError("pictures are missing, or there are others")
        return snapshot

    def _build_exact(self, transaction: Transaction, count: int) -> Segment:
        index, ids = flat_index(self.embed_dim, count), np.empty(count, np.int64)
        checksums = np.empty(count, np.int64)
        target, done = stored_rows(index), 0
        for block_ids, stored, block_checksums in stored_vectors(
            transaction, self.embed_dim, since=0
        ):
            part = slice(done, done + len(block_ids))
            done += len(block_ids)
            if done > count:
                break
            ids[part], checksums[part] = block_ids, block_checksums
            target[part] = stored.view(np.uint8)
        if done != count:
            raise DamageError(f"{count} pictures were stored, {done} or more are found")
        return Segment(ids=ids, checksums=checksums, index=index)

    def _train(
        self, transaction: Transaction, count: int
    ) -> tuple[TrainedLists, NDArray[np.int64]]:
        """Return an approximate index, and the checksum of each of its rows."""
        _LOG.warning(
            "making the search index of %d pictures in %s: this takes a while",
            count, self.path.parent,
        )  # fmt: skip
        checksums: list[NDArray[np.int64]] = [np.empty(0, np.int64)]

        def sample(most: int) -> NDArray[np.float32]:
            ids = ids_where(transaction)
            chosen = np.random.default_rng(0).choice(ids, min(most, len(ids)), replace=False)
            parts = stored_vectors(transaction, self.embed_dim, None, also=np.sort(chosen))
            return np.concatenate([stored for _, stored, _ in parts]).astype(np.float32)

        def blocks() -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
            for ids, stored, of_rows in stored_vectors(transaction, self.embed_dim, since=0):
                checksums.append(of_rows)
                yield ids, stored.astype(np.float32)

        return train_lists(count, self.embed_dim, sample, blocks), np.concatenate(checksums)

    def _saved(self, segment: Segment, stamp: Stamp) -> Segment:
        """Write the file; an approximate index is then read from there, without its copy here."""
        if not self._writable:
            return segment
        try:
            write_index(self.path, (segment.index, segment.ids, segment.checksums), stamp)
            if segment.nprobe is not None:
                (index, ids, checksums), _ = read_index(self.path)
                return replace(segment, index=index, ids=ids, checksums=checksums)
        except (OSError, InputError, UnusableIndexError) as error:
            _LOG.warning("search index %s cannot be saved: %s", self.path, error)
        return segment
