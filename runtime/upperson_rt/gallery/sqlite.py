"""A gallery in one SQLite file: durable per commit, searched exactly."""

import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.gallery import schema
from upperson_rt.gallery.ranking import top_k
from upperson_rt.gallery.records import Filter, GalleryInfo, Hit, Item
from upperson_rt.gallery.rows import (
    COLUMNS,
    UPSERT,
    item_from_row,
    row_from_item,
    sql_from_filter,
)

__all__ = ["Gallery"]

_STORED = np.dtype("<f2")
_MAX_NORM_ERROR = 0.01  # Far above the rounding of float16, far below a vector not normalised.
_SCORES_AT_A_TIME = 1 << 24


@dataclass(frozen=True)
class _Matrix:
    """All vectors as of one state of the database."""

    state: tuple[int, int]
    ids: NDArray[np.int64]
    """(N,) ascending."""
    vectors: NDArray[np.float32]
    """(N, D)."""


class Gallery:
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
        path: str | os.PathLike[str],
        fingerprint: str | None = None,
        embed_dim: int | None = None,
        create: bool = False,
    ) -> "Gallery":
        """Open a gallery folder.

        Args:
            path: The folder.
            fingerprint: Of the embedding space, `Encoder.fingerprint`; None skips the check,
                which suits looking at a gallery without its bundle.
            embed_dim: D; None skips the check.
            create: Make the folder and the database where there is none; needs the two above.

        Raises:
            UsageError: `create` without fingerprint or embed_dim.
            InputError: There is no gallery, it cannot be opened, or its schema is newer.
            IntegrityError: The file is damaged or no gallery, or holds another embedding space.
        """
        folder = Path(path)
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
                _check_space(meta, folder, fingerprint, embed_dim)
            except BaseException:
                connection.close()
                raise
        return cls(folder, connection, meta)

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

    def __enter__(self) -> "Gallery":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

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
        stored = self._unit_vectors(vectors, len(items)).astype(_STORED)
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
        self, vectors: NDArray[np.float32], k: int, where: Filter | None = None
    ) -> list[list[Hit]]:
        """Find the best items for each query: exact, best first, ties by id.

        Args:
            vectors: (Q, D) queries of unit length.
            k: Hits per query; fewer come back where fewer items pass the filter.
            where: Only items that pass.

        Raises:
            InputError: A query has another dimension, is not finite or not of unit length.
            UsageError: k is below 1.
            IntegrityError: The database is damaged.
        """
        if k < 1:
            raise UsageError(f"k must be at least 1, got {k}")
        queries = self._unit_vectors(vectors, len(vectors))
        with self._transaction("DEFERRED"):  # One snapshot for vectors, filter and metadata.
            matrix = self._load_matrix()
            rows = self._rows_passing(where, matrix)
            found: list[list[tuple[int, float]]] = []
            step = max(1, _SCORES_AT_A_TIME // max(1, len(matrix.ids)))
            for start in range(0, len(queries), step):
                scores = queries[start : start + step] @ matrix.vectors.T
                for line in scores if rows is None else scores[:, rows]:
                    best = top_k(line, k)
                    ids = matrix.ids[best if rows is None else rows[best]]
                    found.append(list(zip(ids.tolist(), line[best].tolist(), strict=True)))
            items = self._items_by_id({id_ for hits in found for id_, _ in hits})
        return [
            [Hit(id=id_, score=score, item=items[id_]) for id_, score in hits] for hits in found
        ]

    def info(self) -> GalleryInfo:
        """Return what the gallery holds."""
        by = "SELECT {0}, count(*) FROM items WHERE {0} IS NOT NULL GROUP BY {0} ORDER BY {0}"
        with self._transaction("DEFERRED"):
            execute = self._connection.execute
            items, first, last = execute(
                "SELECT count(*), min(time), max(time) FROM items"
            ).fetchone()
            return GalleryInfo(
                path=str(self.path),
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
                problem = self._vector_problem(blob)
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

    def _unit_vectors(self, vectors: NDArray[np.float32], count: int) -> NDArray[np.float32]:
        array = np.asarray(vectors, dtype=np.float32)
        if array.shape != (count, self.embed_dim):
            raise InputError(
                f"expected vectors of shape {(count, self.embed_dim)} for gallery {self.path}, "
                f"found {array.shape}"
            )
        norms = np.linalg.norm(array, axis=1)
        bad = np.flatnonzero(~(np.abs(norms - 1) <= _MAX_NORM_ERROR))  # True for NaN, too.
        if len(bad):
            raise InputError(
                f"{len(bad)} of {count} vectors are not finite or not of unit length, the first at "
                f"index {bad[0]} with length {norms[bad[0]]}: pass what the encoder returned"
            )
        return array

    def _load_matrix(self) -> _Matrix:
        """Return all vectors of the snapshot that the open transaction sees."""
        execute = self._connection.execute
        execute("SELECT 1 FROM meta").fetchone()  # The first read takes the snapshot.
        # The pragma tells of commits by others, total_changes of our own.
        state = (execute("PRAGMA data_version").fetchone()[0], self._connection.total_changes)
        if self._matrix is None or self._matrix.state != state:
            rows = execute("SELECT id, vector FROM items ORDER BY id").fetchall()
            size = self.embed_dim * _STORED.itemsize
            broken = [id_ for id_, blob in rows if len(blob) != size]
            if broken:
                raise IntegrityError(
                    f"gallery {self.path} has {len(broken)} vectors of a wrong length, the first "
                    f"at id {broken[0]}: see  upperson-rt gallery verify"
                )
            flat = np.frombuffer(b"".join(blob for _, blob in rows), dtype=_STORED)
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

    def _vector_problem(self, blob: bytes) -> str | None:
        size = self.embed_dim * _STORED.itemsize
        if len(blob) != size:
            return f"vector of {len(blob)} bytes, expected {size}"
        norm = float(np.linalg.norm(np.frombuffer(blob, dtype=_STORED).astype(np.float32)))
        if not abs(norm - 1) <= _MAX_NORM_ERROR:
            return f"vector of length {norm}, expected 1"
        return None


def _check_space(
    meta: schema.Meta, folder: Path, fingerprint: str | None, embed_dim: int | None
) -> None:
    if fingerprint not in (None, meta.fingerprint) or embed_dim not in (None, meta.embed_dim):
        raise IntegrityError(
            f"gallery {folder} holds embeddings of another model: the bundle's is "
            f"{fingerprint or f'of {embed_dim} dimensions'}, the gallery's {meta.fingerprint} of "
            f"{meta.embed_dim} dimensions. Use the bundle it was made with, or index the "
            "pictures again into another folder with  --gallery"
        )
