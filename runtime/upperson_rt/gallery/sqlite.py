"""A gallery in a folder: SQLite is the truth, durable per commit; a search index is derived."""

import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.gallery import schema
from upperson_rt.gallery.base import Gallery, check_condition, check_prune
from upperson_rt.gallery.check import problems_of
from upperson_rt.gallery.connections import (
    DATABASE_FILE,
    Connections,
    connect,
    is_writable,
    translated,
)
from upperson_rt.gallery.crops import remove_crops, stray_crops, unused_crops
from upperson_rt.gallery.index import SearchIndex
from upperson_rt.gallery.records import Filter, GalleryInfo, Hit, Item
from upperson_rt.gallery.rows import COLUMNS, UPSERT, item_from_row, row_from_item, sql_from_filter
from upperson_rt.gallery.search import search_items
from upperson_rt.gallery.segments import Segment
from upperson_rt.gallery.vectors import STORED, check_space, unit_vectors, vector_problem

__all__ = ["APPROXIMATE_FROM", "SqliteGallery"]

APPROXIMATE_FROM = 1_000_000
"""Pictures from which on searches without a filter use an approximate index: until there an exact
one takes up to 1 GB at 512 dimensions, and about 0.1 s on one core of a server."""
_LOG_ENTRIES = 1_000_000
_MOST_ROWS = 2**63 - 1  # SQLite knows no larger number.


class SqliteGallery(Gallery):
    """Items and their embeddings in ``FOLDER/gallery.sqlite``, their crops in ``FOLDER/crops``.

    A transaction that has returned survives a power failure (WAL, synchronous=FULL). Several
    processes may read while one writes; each search sees everything committed before it began.
    Searches of several threads run beside each other and beside an `add`.

    Vectors are stored as float16, and every score is computed from those. The search index lies in
    ``FOLDER/gallery.index``; it can be deleted at any time. It is exact below `APPROXIMATE_FROM`
    items, from there on IVF-SQ8; filters that leave few items are always answered exactly.
    """

    def __init__(self, path: Path, connections: Connections, meta: schema.Meta) -> None:
        """Use `Gallery.open`."""
        self.path = path
        self._meta = meta
        self._connections = connections
        self._index = SearchIndex(
            path, meta.identity, meta.embed_dim, APPROXIMATE_FROM, not connections.read_only
        )

    @classmethod
    def open(
        cls,
        location: str | os.PathLike[str],
        fingerprint: str | None = None,
        embed_dim: int | None = None,
        create: bool = False,
    ) -> "SqliteGallery":
        """Open a gallery folder, see `Gallery.open`. An older schema is brought up to date."""
        folder = Path(location)
        file = folder / DATABASE_FILE
        if create and (fingerprint is None or embed_dim is None):
            raise UsageError("creating a gallery needs its fingerprint and embed_dim")
        if fingerprint is not None and embed_dim is not None and create and not file.exists():
            schema.make(file, fingerprint, embed_dim)
        if not file.is_file():
            raise InputError(
                f"no gallery at {folder}: make one with  upperson-rt index PATH...  or name "
                "another with  --gallery"
            )
        if not file.stat().st_size:  # SQLite would take it for new, and remove its log.
            raise IntegrityError(
                f"{file} is empty: it is damaged, and was left as it is. Restore it from a copy, "
                "or remove it to begin anew"
            )
        read_only = not is_writable(file)
        with translated(file):
            connection = connect(file, read_only)
            try:
                meta = schema.read_meta(connection, file)
                check_space(str(folder), (meta.fingerprint, meta.embed_dim), fingerprint, embed_dim)
                if meta.schema_version < schema.SCHEMA_VERSION:
                    if read_only:
                        raise InputError(
                            f"gallery {folder} has schema version {meta.schema_version} and must "
                            f"be brought to {schema.SCHEMA_VERSION}, but cannot be written to: "
                            "open it once where it can, or copy it"
                        )
                    schema.migrate(connection, file)
                    meta = schema.read_meta(connection, file)
            except BaseException:
                connection.close()
                raise
        return cls(folder, Connections(file, connection, read_only), meta)

    @property
    def location(self) -> str:
        """The folder."""
        return str(self.path)

    @property
    def embed_dim(self) -> int:
        """D, the length of a vector."""
        return self._meta.embed_dim

    @property
    def fingerprint(self) -> str:
        """Identity of the embedding space."""
        return self._meta.fingerprint

    @property
    def crops_dir(self) -> Path:
        """Where `Item.crop` is found: the folder ``crops`` of the gallery."""
        return self.path / "crops"

    def close(self) -> None:
        """Close the database; the object cannot be used afterwards."""
        self._connections.close()
        self._index.snapshot = None

    def add(
        self, items: Sequence[Item], vectors: NDArray[np.float32], variant: str | None = None
    ) -> None:
        """Add items in one transaction, see `Gallery.add`."""
        stored = unit_vectors(vectors, len(items), self.embed_dim, self.location).astype(STORED)
        rows = [
            (*row_from_item(item), variant, vector.tobytes())
            for item, vector in zip(items, stored, strict=True)
        ]
        if not rows:
            return
        keys = json.dumps([item.key for item in items])
        with self._connections.writing() as connection:
            replaced = connection.execute(
                "SELECT crop FROM items WHERE key IN (SELECT value FROM json_each(?))"
                " AND +crop IS NOT NULL",
                (keys,),
            ).fetchall()
            connection.executemany(UPSERT, rows)
            crops = unused_crops(connection, (crop for (crop,) in replaced)) if replaced else []
            _trim_log(connection)
        remove_crops(self.crops_dir, crops)

    def delete(self, keys: Sequence[str]) -> int:
        """Delete items by key in one transaction, then their crops; return how many were there."""
        condition = "key IN (SELECT value FROM json_each(?))"
        return self._delete([(condition, [json.dumps(list(keys))])])

    def delete_where(self, where: Filter) -> int:
        """Delete the items that pass in one transaction, then their crops; return how many."""
        check_condition(where)
        return self._delete([sql_from_filter(where)])

    def prune(
        self,
        older_than: float | None = None,
        keep_newest: int | None = None,
        camera: str | None = None,
    ) -> int:
        """Delete old items in one transaction, then their crops; return how many.

        By age and without a camera also files among the crops that no item names, by the time of
        their last change: processes that were killed leave some behind.
        """
        check_prune(older_than, keep_newest)
        scope, values = sql_from_filter(Filter(camera=camera))
        steps: list[tuple[str, list[object]]] = []
        if older_than is not None:
            steps.append((f"{scope} AND time < ?", [*values, older_than]))
        if keep_newest is not None:
            # Without a time comes first: NULL is the smallest.
            condition = (
                f"id IN (SELECT id FROM items WHERE {scope} ORDER BY time, id LIMIT max(0, "
                f"(SELECT count(*) FROM items WHERE {scope}) - ?))"
            )
            steps.append((condition, [*values, *values, min(keep_newest, _MOST_ROWS)]))
        deleted = self._delete(steps)
        if older_than is not None and camera is None:
            with self._connections.reading() as connection:
                strays = list(stray_crops(connection, self.crops_dir, older_than))
            remove_crops(self.crops_dir, strays)
        return deleted

    def count(self, where: Filter | None = None) -> int:
        """Return the number of items, or of those that pass a filter."""
        condition, values = sql_from_filter(where)
        with self._connections.reading() as connection:
            sql = f"SELECT count(*) FROM items WHERE {condition}"
            return int(connection.execute(sql, values).fetchone()[0])

    def ids(self, keys: Sequence[str]) -> dict[str, int]:
        """Return `Hit.id` for those of the keys that are there."""
        sql = "SELECT key, id FROM items WHERE key IN (SELECT value FROM json_each(?))"
        with self._connections.reading() as connection:
            return dict(connection.execute(sql, [json.dumps(list(keys))]))

    def items(self, where: Filter | None = None) -> Iterator[Item]:
        """Yield the items that pass, by id, of one state of the gallery."""
        condition, values = sql_from_filter(where)
        with self._connections.reading() as connection:
            sql = f"SELECT {COLUMNS} FROM items WHERE {condition} ORDER BY id"
            for row in connection.execute(sql, values):
                yield self._item(row)

    def vectors(
        self, where: Filter | None = None, batch_size: int = 1024
    ) -> Iterator[tuple[list[Item], NDArray[np.float32]]]:
        """Yield items that pass, by id, and their (N, D) vectors; at most batch_size at a time."""
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        condition, values = sql_from_filter(where)
        with self._connections.reading() as connection:
            sql = f"SELECT {COLUMNS}, vector FROM items WHERE {condition} ORDER BY id"
            cursor = connection.execute(sql, values)
            while rows := cursor.fetchmany(batch_size):
                for *columns, blob in rows:
                    problem = vector_problem(blob, self.embed_dim)
                    if problem is not None:
                        raise IntegrityError(
                            f"gallery {self.path}, item {columns[0]}: {problem}: see "
                            " upperson-rt gallery verify"
                        )
                flat = np.frombuffer(b"".join(row[-1] for row in rows), STORED)
                yield (
                    [self._item(row[:-1]) for row in rows],
                    flat.reshape(len(rows), self.embed_dim).astype(np.float32),
                )

    def search(
        self,
        vectors: NDArray[np.float32],
        k: int,
        where: Filter | None = None,
        by_track: bool = False,
    ) -> list[list[Hit]]:
        """Find the best items for each query, see `Gallery.search`."""
        if k < 1:
            raise UsageError(f"k must be at least 1, got {k}")
        queries = unit_vectors(vectors, len(vectors), self.embed_dim, self.location)
        return search_items(self._connections, self._index, queries, k, where, by_track, self._item)

    def info(self) -> GalleryInfo:
        """Return what the gallery holds."""
        by = "SELECT {0}, count(*) FROM items WHERE {0} IS NOT NULL GROUP BY {0} ORDER BY {0}"
        tracks = (
            "SELECT count(*) FROM (SELECT DISTINCT track, camera FROM items"
            " WHERE track IS NOT NULL)"
        )
        files = [
            *self.path.glob(f"{DATABASE_FILE}*"),
            *([self._index.path] if self._index.path.exists() else []),
        ]
        with self._connections.reading() as connection:
            execute = connection.execute
            (items,) = execute("SELECT count(*) FROM items").fetchone()
            first, last = execute(
                "SELECT (SELECT min(time) FROM items), (SELECT max(time) FROM items)"
            ).fetchone()
            return GalleryInfo(
                location=self.location,
                items=items,
                embed_dim=self.embed_dim,
                fingerprint=self.fingerprint,
                created=self._meta.created,
                generator=self._meta.generator,
                schema_version=self._meta.schema_version,
                size_bytes=sum(file.stat().st_size for file in files),
                cameras=dict(execute(by.format("camera"))),
                variants=dict(execute(by.format("variant"))),
                tracks=execute(tracks).fetchone()[0],
                first_time=first,
                last_time=last,
                index=self._index.info(connection, items),
            )

    def cameras(self) -> list[str]:
        """Return the names of the cameras whose items are in the gallery."""
        sql = "SELECT DISTINCT camera FROM items WHERE camera IS NOT NULL ORDER BY camera"
        with self._connections.reading() as connection:
            return [str(camera) for (camera,) in connection.execute(sql)]

    def verify(self) -> list[str]:
        """Check the whole database; return what is wrong, one line each, or nothing.

        Looks at SQLite's own structure, at every vector's length, finiteness and norm, every item's
        texts, box, attributes and crop, at files among the crops that no item names, and at the
        file of the search index.

        Raises:
            IntegrityError: The database is so damaged that it cannot be read through.
        """
        with self._connections.reading() as connection:
            problems = list(problems_of(connection, self.embed_dim, self.crops_dir))
            index_problem = self._index.problem(connection)
            if index_problem is not None:
                problems.append(index_problem)
        return problems

    def rebuild(self) -> None:
        """Make the search index anew and save it: exact, or IVF-SQ8 from `APPROXIMATE_FROM` on.

        Other threads may search and add meanwhile.
        """
        with self._connections.reading() as connection:
            snapshot = self._index.build(connection)
        with self._index.lock:
            self._index.snapshot = snapshot

    def largest_segment(self) -> Segment | None:
        """Return the largest part of the index in memory, for measuring; None if there is none."""
        snapshot = self._index.snapshot
        segments = () if snapshot is None else snapshot.segments
        return max(segments, key=lambda part: len(part.ids), default=None)

    def _delete(self, steps: Sequence[tuple[str, list[object]]]) -> int:
        """Delete what meets each condition in turn, in one transaction, then the crops."""
        crops: list[str] = []
        deleted = 0
        with self._connections.writing() as connection:
            for condition, values in steps:
                crops += (
                    crop
                    for (crop,) in connection.execute(
                        f"SELECT crop FROM items WHERE ({condition}) AND +crop IS NOT NULL", values
                    )
                )
                deleted += connection.execute(
                    f"DELETE FROM items WHERE {condition}", values
                ).rowcount
            crops = unused_crops(connection, crops) if crops else []
            _trim_log(connection)
        remove_crops(self.crops_dir, crops)
        return deleted

    def _item(self, columns: Sequence[object]) -> Item:
        try:
            return item_from_row(columns)
        except (ValueError, TypeError, InputError) as error:
            raise IntegrityError(
                f"gallery {self.path} has malformed metadata ({error}): see "
                " upperson-rt gallery verify"
            ) from error


def _trim_log(connection: sqlite3.Connection) -> None:
    """Keep the log of changes bounded; an index that is older than it is made again."""
    first, last = connection.execute(
        "SELECT (SELECT min(seq) FROM changes), (SELECT max(seq) FROM changes)"
    ).fetchone()
    if first is not None and last - first >= _LOG_ENTRIES:
        connection.execute("DELETE FROM changes WHERE seq <= ?", (last - _LOG_ENTRIES // 2,))
