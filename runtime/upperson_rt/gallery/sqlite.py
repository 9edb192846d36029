"""A gallery in one SQLite file: durable per commit, searched exactly."""

import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.gallery import schema
from upperson_rt.gallery.base import Gallery, check_prune
from upperson_rt.gallery.ranking import best_of_tracks, top_k
from upperson_rt.gallery.records import Filter, GalleryInfo, Hit, IndexInfo, Item
from upperson_rt.gallery.rows import (
    COLUMNS,
    UPSERT,
    item_from_row,
    row_from_item,
    sql_from_filter,
)
from upperson_rt.gallery.vectors import STORED, check_space, unit_vectors, vector_problem

__all__ = ["SqliteGallery"]

_SCORES_AT_A_TIME = 1 << 24


@dataclass(frozen=True)
class _Matrix:
    """All vectors as of one state of the database."""

    state: tuple[int, int]
    ids: NDArray[np.int64]
    """(N,) ascending."""
    vectors: NDArray[np.float32]
    """(N, D)."""


class SqliteGallery(Gallery):
    """Items and their embeddings in ``FOLDER/gallery.sqlite``; a context manager.

    A transaction that has returned survives a power failure (WAL, synchronous=FULL). Several
    processes may read while one writes. One object may be used from several threads.

    The vectors are stored as float16 and searched as float32 from memory: 4 * D bytes per item,
    loaded at the first search and again after a change.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, meta: schema.Meta) -> None:
        """Use `Gallery.open`."""
        self.path = path
        self._file = path / schema.DATABASE_FILE
        self._connection = connection
        self._meta = meta
        self._lock = threading.RLock()
        self._matrix: _Matrix | None = None

    @classmethod
    def open(
        cls,
        location: str | os.PathLike[str],
        fingerprint: str | None = None,
        embed_dim: int | None = None,
        create: bool = False,
    ) -> "SqliteGallery":
        """Open a gallery folder.

        Args:
            location: The folder.
            fingerprint: Of the embedding space, `Encoder.fingerprint`; None skips the check,
                which suits looking at a gallery without its bundle.
            embed_dim: D; None skips the check.
            create: Make the folder and the database where there is none; needs the two above.

        Raises:
            UsageError: `create` without fingerprint or embed_dim.
            InputError: There is no gallery, it cannot be opened, or its schema is newer.
            IntegrityError: The file is damaged or no gallery, or holds another embedding space.
        """
        folder = Path(location)
        file = folder / schema.DATABASE_FILE
        if create and (fingerprint is None or embed_dim is None):
            raise UsageError("creating a gallery needs its fingerprint and embed_dim")
        if create:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                file.touch()
            except OSError as error:
                raise InputError(f"cannot make gallery {folder}: {error.strerror}") from error
        missing = InputError(
            f"no gallery at {folder}: make one with  upperson-rt index PATH...  or name another "
            "with  --gallery"
        )
        if not file.is_file():
            raise missing
        with schema.translated(file):
            connection = schema.connect(file)
            try:
                meta = schema.read_meta(connection, file)
                if meta is None and fingerprint is not None and embed_dim is not None and create:
                    schema.create(connection, fingerprint, embed_dim)
                    meta = schema.read_meta(connection, file)
                if meta is None:
                    raise missing
                check_space(str(folder), (meta.fingerprint, meta.embed_dim), fingerprint, embed_dim)
            except BaseException:
                connection.close()
                raise
        return cls(folder, connection, meta)

    @property
    def location(self) -> str:
        """The folder."""
        return str(self.path)

    @property
    def crops_dir(self) -> Path:
        """Where `Item.crop` is found: the folder ``crops`` of the gallery."""
        return self.path / "crops"

    @property
    def embed_dim(self) -> int:
        """D, the length of a vector."""
        return self._meta.embed_dim

    @property
    def fingerprint(self) -> str:
        """Identity of the embedding space."""
        return self._meta.fingerprint

    def close(self) -> None:
        """Close the database; the object cannot be used afterwards."""
        with self._lock:
            self._connection.close()
            self._matrix = None

    def add(
        self, items: Sequence[Item], vectors: NDArray[np.float32], variant: str | None = None
    ) -> None:
        """Add items in one transaction; one whose key is there already is replaced, id kept.

        Args:
            items: N items.
            vectors: (N, D) of unit length.
            variant: Of the bundle that embedded them, for the record.

        Raises:
            InputError: A vector has another dimension, is not finite or not of unit length, an
                item cannot be stored, or the database cannot be written. Nothing is added.
        """
        stored = unit_vectors(vectors, len(items), self.embed_dim, self.location).astype(STORED)
        rows = [
            (*row_from_item(item), variant, vector.tobytes())
            for item, vector in zip(items, stored, strict=True)
        ]
        with self._transaction("IMMEDIATE"):
            self._connection.executemany(UPSERT, rows)

    def delete(self, keys: Sequence[str]) -> int:
        """Delete items by key in one transaction; return how many were there."""
        with self._transaction("IMMEDIATE"):
            return sum(
                self._connection.execute("DELETE FROM items WHERE key = ?", (key,)).rowcount
                for key in keys
            )

    def count(self, where: Filter | None = None) -> int:
        """Return the number of items, or of those that pass a filter."""
        condition, values = sql_from_filter(where)
        return int(self._value(f"SELECT count(*) FROM items WHERE {condition}", values))

    def search(
        self,
        vectors: NDArray[np.float32],
        k: int,
        where: Filter | None = None,
        by_track: bool = False,
    ) -> list[list[Hit]]:
        """Find the best items for each query: exact, best first, ties by id.

        Args:
            vectors: (Q, D) queries of unit length.
            k: Hits per query; fewer come back where fewer items pass the filter.
            where: Only items that pass.
            by_track: One hit for each camera and track.

        Raises:
            InputError: A query has another dimension, is not finite or not of unit length.
            UsageError: k is below 1.
            IntegrityError: The database is damaged.
        """
        if k < 1:
            raise UsageError(f"k must be at least 1, got {k}")
        queries = unit_vectors(vectors, len(vectors), self.embed_dim, self.location)
        with self._transaction("DEFERRED"):  # One snapshot for vectors, filter and metadata.
            matrix = self._load_matrix()
            rows = self._rows_passing(where, matrix)
            found: list[list[tuple[int, float]]] = []
            step = max(1, _SCORES_AT_A_TIME // max(1, len(matrix.ids)))
            for start in range(0, len(queries), step):
                scores = queries[start : start + step] @ matrix.vectors.T
                for line in scores if rows is None else scores[:, rows]:
                    best = top_k(line, len(line) if by_track else k)
                    ids = matrix.ids[best if rows is None else rows[best]]
                    found.append(list(zip(ids.tolist(), line[best].tolist(), strict=True)))
            items = self._items_by_id({id_ for hits in found for id_, _ in hits})
        lists = [
            [Hit(id=id_, score=score, item=items[id_]) for id_, score in hits] for hits in found
        ]
        return [best_of_tracks(hits)[:k] for hits in lists] if by_track else lists

    def items(self, where: Filter | None = None) -> Iterator[Item]:
        """Yield the items that pass, by id."""
        for items, _ in self.vectors(where):
            yield from items

    def vectors(
        self, where: Filter | None = None, batch_size: int = 1024
    ) -> Iterator[tuple[list[Item], NDArray[np.float32]]]:
        """Yield items that pass, by id, and their vectors."""
        condition, values = sql_from_filter(where)
        sql = f"SELECT {COLUMNS}, vector FROM items WHERE {condition} ORDER BY id"
        with self._transaction("DEFERRED"):
            rows = self._connection.execute(sql, values).fetchall()
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            flat = np.frombuffer(b"".join(row[-1] for row in part), dtype=STORED)
            yield (
                [item_from_row(row[:-1]) for row in part],
                flat.reshape(len(part), self.embed_dim).astype(np.float32),
            )

    def delete_where(self, where: Filter) -> int:
        """Delete the items that pass."""
        if where.is_empty:
            raise UsageError("this filter is empty: it would delete the whole gallery")
        return self.delete([item.key for item in self.items(where)])

    def prune(
        self,
        older_than: float | None = None,
        keep_newest: int | None = None,
        camera: str | None = None,
    ) -> int:
        """Delete old items."""
        check_prune(older_than, keep_newest)
        found = list(self.items(Filter(camera=camera)))
        found.sort(key=lambda item: -np.inf if item.time is None else item.time)
        extra = 0 if keep_newest is None else max(0, len(found) - keep_newest)
        return self.delete(
            [
                item.key
                for place, item in enumerate(found)
                if place < extra
                or (older_than is not None and item.time is not None and item.time < older_than)
            ]
        )

    def rebuild(self) -> None:
        """Forget what is in memory."""
        with self._lock:
            self._matrix = None

    def info(self) -> GalleryInfo:
        """Return what the gallery holds."""
        by = "SELECT {0}, count(*) FROM items WHERE {0} IS NOT NULL GROUP BY {0} ORDER BY {0}"
        with self._transaction("DEFERRED"):
            execute = self._connection.execute
            (tracks,) = execute(
                "SELECT count(*) FROM (SELECT DISTINCT camera, track FROM items"
                " WHERE track IS NOT NULL)"
            ).fetchone()
            items, first, last = execute(
                "SELECT count(*), min(time), max(time) FROM items"
            ).fetchone()
            return GalleryInfo(
                location=self.location,
                items=items,
                embed_dim=self.embed_dim,
                fingerprint=self.fingerprint,
                created=self._meta.created,
                generator=self._meta.generator,
                schema_version=self._meta.schema_version,
                size_bytes=sum(f.stat().st_size for f in self.path.glob(f"{self._file.name}*")),
                cameras=dict(execute(by.format("camera"))),
                variants=dict(execute(by.format("variant"))),
                first_time=first,
                last_time=last,
                tracks=tracks,
                index=IndexInfo(kind="exact", rows=items, recall_at_10=1.0),
            )

    def verify(self) -> list[str]:
        """Check the whole database; return what is wrong, one line each, or nothing.

        Looks at SQLite's own structure, and at every vector's length, finiteness and norm and
        every item's box and attributes.

        Raises:
            IntegrityError: The database is so damaged that it cannot be read through.
        """
        problems = []
        with self._transaction("DEFERRED"):
            for (line,) in self._connection.execute("PRAGMA integrity_check"):
                if line != "ok":
                    problems.append(f"SQLite: {line}")
            rows = self._connection.execute(f"SELECT {COLUMNS}, vector FROM items ORDER BY id")
            for *columns, blob in rows:
                problem = vector_problem(blob, self.embed_dim)
                if problem is not None:
                    problems.append(f"item {columns[0]}: {problem}")
                try:
                    item_from_row(columns)
                except (ValueError, TypeError, InputError) as error:
                    problems.append(f"item {columns[0]}: malformed metadata: {error}")
        return problems

    @contextmanager
    def _transaction(self, kind: str) -> Iterator[None]:
        """Hold the lock and a transaction: committed at the end, rolled back on any error."""
        with self._lock, schema.translated(self._file):
            try:
                self._connection.execute(f"BEGIN {kind}")
            except sqlite3.ProgrammingError as error:
                raise UsageError(f"gallery {self.path} has been closed") from error
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _value(self, sql: str, values: Sequence[object] = ()) -> Any:
        with self._transaction("DEFERRED"), closing(self._connection.execute(sql, values)) as rows:
            return rows.fetchone()[0]

    def _load_matrix(self) -> _Matrix:
        """Return all vectors of the snapshot that the open transaction sees."""
        execute = self._connection.execute
        execute("SELECT 1 FROM meta").fetchone()  # The first read takes the snapshot.
        # The pragma tells of commits by others, total_changes of our own.
        state = (execute("PRAGMA data_version").fetchone()[0], self._connection.total_changes)
        if self._matrix is None or self._matrix.state != state:
            rows = execute("SELECT id, vector FROM items ORDER BY id").fetchall()
            size = self.embed_dim * STORED.itemsize
            broken = [id_ for id_, blob in rows if len(blob) != size]
            if broken:
                raise IntegrityError(
                    f"gallery {self.path} has {len(broken)} vectors of a wrong length, the first "
                    f"at id {broken[0]}: see  upperson-rt gallery verify"
                )
            flat = np.frombuffer(b"".join(blob for _, blob in rows), dtype=STORED)
            if not np.isfinite(flat).all():
                raise IntegrityError(
                    f"gallery {self.path} has vectors that are not finite: see "
                    " upperson-rt gallery verify"
                )
            self._matrix = _Matrix(
                state=state,
                ids=np.array([id_ for id_, _ in rows], dtype=np.int64),
                vectors=flat.reshape(len(rows), self.embed_dim).astype(np.float32),
            )
        return self._matrix

    def _rows_passing(self, where: Filter | None, matrix: _Matrix) -> NDArray[np.intp] | None:
        """Return the rows of the matrix that pass, ascending, or None for all."""
        condition, values = sql_from_filter(where)
        if not values:
            return None
        sql = f"SELECT id FROM items WHERE {condition} ORDER BY id"
        ids = [id_ for (id_,) in self._connection.execute(sql, values)]
        return np.searchsorted(matrix.ids, np.array(ids, dtype=np.int64))

    def _items_by_id(self, ids: set[int]) -> dict[int, Item]:
        sql = f"SELECT id, {COLUMNS} FROM items WHERE id IN (SELECT value FROM json_each(?))"
        rows = self._connection.execute(sql, (json.dumps(sorted(ids)),))
        try:
            return {id_: item_from_row(columns) for id_, *columns in rows}
        except (ValueError, TypeError, InputError) as error:
            raise IntegrityError(
                f"gallery {self.path} has malformed metadata ({error}): see "
                " upperson-rt gallery verify"
            ) from error
