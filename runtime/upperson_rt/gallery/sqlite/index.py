"""The search index in memory: kept up with the database row by row, never the truth itself."""

import sqlite3
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError
from upperson_rt.gallery.records import IndexInfo
from upperson_rt.gallery.sqlite import ivf
from upperson_rt.gallery.sqlite.database import SqliteMeta
from upperson_rt.gallery.sqlite.index_file import (
    INDEX_FILE,
    Stamp,
    UnusableIndexError,
    read_index,
    read_stamp,
    write_index,
)
from upperson_rt.gallery.sqlite.rows import changed_since, ids_where, stored_vectors, version_of
from upperson_rt.gallery.sqlite.segments import (
    Candidates,
    Segment,
    Tail,
    flat_index,
    merge_flat,
    stored_rows,
)
from upperson_rt.printable import get_logger

__all__ = ["APPROXIMATE_FROM", "SearchIndex", "Snapshot"]

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

    def search(
        self, queries: NDArray[np.float32], k: int, only: NDArray[np.int64] | None = None
    ) -> Candidates:
        """Find at least the k best items for (Q, D) queries, if there are so many.

        With ``only`` (ascending) among those items.
        """
        found = [part.search(queries, k, only) for part in self.segments]
        if self.tail.length or not found:
            found.append(self.tail.search(queries, k, only))
        scores, ids = found[0]
        if len(found) > 1:
            scores = np.concatenate([part for part, _ in found], axis=1)
            ids = np.concatenate([part for _, part in found], axis=1)
        scores = np.where(ids < 0, -np.inf, scores)
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)


class SearchIndex:
    """Makes, loads, saves and refreshes the snapshot."""

    def __init__(self, folder: Path, meta: SqliteMeta, writable: bool) -> None:
        """Remember where things are; nothing is loaded before the first `refresh`.

        Args:
            folder: Of the gallery.
            meta: Of the gallery.
            writable: Whether the index may be saved in the folder.
        """
        self.path = folder / INDEX_FILE
        self.lock = threading.Lock()
        """Hold it around the beginning of a transaction and `refresh`."""
        self.snapshot: Snapshot | None = None
        self.embed_dim = meta.embed_dim
        self._identity = meta.identity
        self._writable = writable
        self._advised = False

    def refresh(self, connection: sqlite3.Connection) -> Snapshot:
        """Bring the index to the state that a transaction sees, and return it.

        Raises:
            IntegrityError: A stored vector is damaged.
        """
        if self.snapshot is None:
            self.snapshot = self._load(connection)
        elif (self.snapshot.seq, self.snapshot.last_id) != version_of(connection):
            changed = changed_since(connection, self.snapshot.seq)
            self.snapshot = (
                self._load(connection)
                if changed is None
                else self._compact(self._follow(connection, self.snapshot, changed))
            )
        return self.snapshot

    def info(self, connection: sqlite3.Connection, items: int) -> IndexInfo | None:
        """Return what searches use, or would load."""
        snapshot = self.snapshot
        stamp: Stamp | None = None
        if snapshot is not None:
            stamp = snapshot.stamp
        else:
            try:
                stamp = read_stamp(self.path)
                self._check(connection, stamp)
            except (UnusableIndexError, OSError):
                stamp = None
        if stamp is None or stamp.kind == "exact":
            if self._is_approximate(items) and snapshot is None:
                return None
            return IndexInfo(kind="exact", rows=items, recall_at_10=1.0)
        (beside,) = connection.execute(
            "SELECT count(*) FROM items WHERE id > ?", (stamp.last_id,)
        ).fetchone()
        return IndexInfo(
            kind=stamp.kind,
            rows=items - beside,
            beside=beside,
            parameters={"nlist": stamp.nlist, "nprobe": stamp.nprobe},
            recall_at_10=stamp.recall_at_10,
        )

    def problem(self, connection: sqlite3.Connection) -> str | None:
        """Say what is wrong with the file, or return None; a missing file is fine."""
        try:
            self._check(connection, read_index(self.path)[2])
        except FileNotFoundError:
            return None
        except (UnusableIndexError, OSError) as error:
            return f"index {self.path}: {error}: run  upperson-rt gallery rebuild"
        return None

    def _load(self, connection: sqlite3.Connection) -> Snapshot:
        """Read the file and what has changed since; without a file worth it make the index."""
        try:
            index, ids, stamp = read_index(self.path)
            changed = self._check(connection, stamp)
        except FileNotFoundError:
            return self.build(connection)
        except (UnusableIndexError, OSError) as error:
            _LOG.warning(
                "search index %s cannot be used (%s): making it again from the database",
                self.path, error,
            )  # fmt: skip
            return self.build(connection)
        segment = Segment(ids=ids, index=index, nprobe=stamp.nprobe or None)
        (count,) = connection.execute("SELECT count(*) FROM items").fetchone()
        outgrown = segment.nprobe is None and self._is_approximate(count)
        if outgrown or segment.without(changed).alive < count // 2:
            _LOG.info("search index %s is outdated: making it again", self.path)
            return self.build(connection)
        loaded = Snapshot(stamp.seq, stamp.last_id, (segment,), Tail(self.embed_dim), stamp)
        return self._compact(self._follow(connection, loaded, changed))

    def _check(self, connection: sqlite3.Connection, stamp: Stamp) -> NDArray[np.int64]:
        """Return the items that changed since; UnusableIndexError if it is of another state."""
        if (stamp.identity, stamp.embed_dim) != (self._identity, self.embed_dim):
            raise UnusableIndexError("it belongs to another gallery")
        seq, last_id = version_of(connection)
        if stamp.seq > seq or stamp.last_id > last_id:
            raise UnusableIndexError("it is newer than the database")
        changed = changed_since(connection, stamp.seq)
        if changed is None:
            raise UnusableIndexError("the database has changed too much since")
        gone = set(changed.tolist())
        for id_, checksum in stamp.witnesses:
            row = connection.execute("SELECT vector FROM items WHERE id = ?", (id_,)).fetchone()
            if id_ not in gone and (row is None or zlib.crc32(row[0]) != checksum):
                raise UnusableIndexError("the database is another one than it was made from")
        return changed

    def _follow(
        self, connection: sqlite3.Connection, snapshot: Snapshot, changed: NDArray[np.int64]
    ) -> Snapshot:
        """Return the snapshot with what is new and without what is gone."""
        segments, tail = list(snapshot.segments), snapshot.tail
        if len(changed):
            segments = [segment.without(changed) for segment in segments]
            tail = tail.without(changed)
        again = changed[changed <= snapshot.last_id]
        for ids, vectors in self._vectors(connection, snapshot.last_id, also=again):
            tail = tail.plus(ids, vectors)
            if tail.length >= _SEAL_ROWS:
                segments.append(tail.sealed())
                tail = Tail(self.embed_dim)
        seq, last_id = version_of(connection)
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

    def build(self, connection: sqlite3.Connection) -> Snapshot:
        """Make the index from the vectors that a transaction sees, save it, and return it.

        Needs no lock: searches go on with what there is until ``snapshot`` is set.
        """
        (count,) = connection.execute("SELECT count(*) FROM items").fetchone()
        approximate = self._is_approximate(count)
        if count < _SEAL_ROWS and not approximate:
            if self._writable:
                with suppress(OSError):  # An earlier, larger one; it does no harm either.
                    self.path.unlink(missing_ok=True)
            empty = Snapshot(0, 0, (), Tail(self.embed_dim))
            return self._follow(connection, empty, np.empty(0, np.int64))
        facts: dict[str, Any] = {"kind": "exact"}
        if approximate:
            trained = self._train(connection, count)
            segment = Segment(ids=trained.ids, index=trained.index, nprobe=trained.nprobe)
            facts = {
                "kind": "ivf-sq8",
                "nlist": trained.nlist,
                "nprobe": trained.nprobe,
                "recall_at_10": trained.recall_at_10,
            }
        else:
            segment = self._build_exact(connection, count)
        witnesses = [
            [id_, zlib.crc32(blob)]
            for id_, blob in connection.execute(
                "SELECT id, vector FROM items ORDER BY id DESC LIMIT ?", (_WITNESSES,)
            )
        ]
        seq, last_id = version_of(connection)
        stamp = Stamp(
            identity=self._identity,
            seq=seq,
            last_id=last_id,
            embed_dim=self.embed_dim,
            rows=len(segment.ids),
            witnesses=witnesses,
            **facts,
        )
        segment = self._saved(segment, stamp)
        return Snapshot(seq, last_id, (segment,), Tail(self.embed_dim), stamp)

    def _build_exact(self, connection: sqlite3.Connection, count: int) -> Segment:
        index, ids = flat_index(self.embed_dim, count), np.empty(count, np.int64)
        target, done = stored_rows(index), 0
        for block_ids, stored in stored_vectors(connection, self.embed_dim, since=0):
            part = slice(done, done + len(block_ids))
            ids[part], target[part] = block_ids, stored.view(np.uint8)
            done += len(block_ids)
        return Segment(ids=ids, index=index)

    def _train(self, connection: sqlite3.Connection, count: int) -> ivf.Trained:
        _LOG.warning(
            "making the search index of %d pictures in %s: this takes a while",
            count, self.path.parent,
        )  # fmt: skip

        def sample(most: int) -> NDArray[np.float32]:
            ids = ids_where(connection)
            chosen = np.random.default_rng(0).choice(ids, min(most, len(ids)), replace=False)
            parts = self._vectors(connection, None, also=np.sort(chosen))
            return np.concatenate([vectors for _, vectors in parts])

        return ivf.train(count, self.embed_dim, sample, lambda: self._vectors(connection, since=0))

    def _vectors(
        self,
        connection: sqlite3.Connection,
        since: int | None,
        also: NDArray[np.int64] | None = None,
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        for ids, stored in stored_vectors(connection, self.embed_dim, since, also):
            yield ids, stored.astype(np.float32)

    def _saved(self, segment: Segment, stamp: Stamp) -> Segment:
        """Write the file; an approximate index is then read from there, without its copy here."""
        if not self._writable:
            return segment
        try:
            write_index(self.path, segment.index, segment.ids, stamp)
            if segment.nprobe is not None:
                index, ids, _ = read_index(self.path)
                return replace(segment, index=index, ids=ids)
        except (OSError, InputError, UnusableIndexError) as error:
            _LOG.warning("search index %s cannot be saved: %s", self.path, error)
        return segment
