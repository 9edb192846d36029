"""The gallery in a folder, of its database, its index and its crops."""

import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery.crops import crop_path, old_files, remove_crops
from upperson_rt.gallery.protocol import Gallery, read_item
from upperson_rt.gallery.records import Filter, GalleryInfo, Hit, Item, length_problem
from upperson_rt.gallery.sqlite.database import DATABASE_FILE, Database, make
from upperson_rt.gallery.sqlite.index import SearchIndex
from upperson_rt.gallery.sqlite.rows import (
    COLUMNS,
    STORED,
    UPSERT,
    item_from_row,
    row_from_item,
    sql_from_filter,
    trim_log,
    unnamed_crops,
)
from upperson_rt.gallery.sqlite.search import search_items

__all__ = ["SqliteGallery"]

_MOST_ROWS = 2**63 - 1  # SQLite knows no larger number.
_FILES_AT_A_TIME = 10_000


class SqliteGallery(Gallery):
    """Items and their embeddings in ``FOLDER/gallery.sqlite``, their crops in ``FOLDER/crops``.

    A transaction that has returned survives a power failure (WAL, synchronous=FULL). Several
    processes may read while one writes; each search sees everything committed before it began.
    Searches of several threads run beside each other and beside an `add`.

    Vectors are stored as float16, and every score is computed from those. The search index lies in
    ``FOLDER/gallery.index``; it can be deleted at any time. It is exact below
    `index.APPROXIMATE_FROM` items, from there on IVF-SQ8; filters that leave few items are always
    answered exactly.
    """

    crops_dir: Path

    def __init__(self, path: Path, database: Database) -> None:
        super().__init__(str(path), database.meta, path / "crops")
        self.path = path
        self._database = database
        self._index = SearchIndex(path, database.meta, writable=not database.read_only)

    @classmethod
    def _open(cls, location: str, create: tuple[str, int] | None) -> "SqliteGallery":
        folder = Path(location)
        file = folder / DATABASE_FILE
        if create is not None and not file.exists():
            make(file, *create)
        return cls(folder, Database(file))

    def close(self) -> None:
        self._database.close()
        self._index.snapshot = None

    def _add(
        self, items: Sequence[Item], vectors_ND: NDArray[np.float32], variant: str | None
    ) -> None:
        rows = [
            (*row_from_item(item), variant, vector.tobytes())
            for item, vector in zip(items, vectors_ND.astype(STORED), strict=True)
        ]
        with self._database.writing() as connection:
            replaced = _crops_of(connection, *_has_key([item.key for item in items]))
            connection.executemany(UPSERT, rows)
            unused = unnamed_crops(connection, replaced) if replaced else []
            trim_log(connection)
        remove_crops(self.crops_dir, unused)

    def delete(self, keys: Sequence[str]) -> int:
        return self._delete(_has_key(keys))

    def _delete_where(self, where: Filter) -> int:
        return self._delete(sql_from_filter(where))

    def _prune(self, too_old: Filter | None, keep_newest: int | None, scope: Filter) -> int:
        steps = [] if too_old is None else [sql_from_filter(too_old)]
        if keep_newest is not None:
            condition, values = sql_from_filter(scope)
            # Without a time comes first: NULL is the smallest.
            condition = (
                f"id IN (SELECT id FROM items WHERE {condition} ORDER BY time, id LIMIT max(0, "
                f"(SELECT count(*) FROM items WHERE {condition}) - ?))"
            )
            steps.append((condition, [*values, *values, min(keep_newest, _MOST_ROWS)]))
        deleted = self._delete(*steps)
        if too_old is not None and too_old.until is not None and too_old.camera is None:
            # Processes that were killed leave files that no item names; those are pruned as well.
            with self._database.reading() as connection:
                strays = list(_stray_crops(connection, self.crops_dir, too_old.until))
            remove_crops(self.crops_dir, strays)
        return deleted

    def _delete(self, *steps: tuple[str, list[object]]) -> int:
        """Delete what meets each condition in turn, in one transaction, then the crops."""
        crops: list[str] = []
        deleted = 0
        with self._database.writing() as connection:
            for condition, values in steps:
                crops += _crops_of(connection, condition, values)
                deleted += connection.execute(
                    f"DELETE FROM items WHERE {condition}", values
                ).rowcount
            unused = unnamed_crops(connection, crops) if crops else []
            trim_log(connection)
        remove_crops(self.crops_dir, unused)
        return deleted

    def count(self, where: Filter | None = None) -> int:
        condition, values = sql_from_filter(where)
        with self._database.reading() as connection:
            sql = f"SELECT count(*) FROM items WHERE {condition}"
            return int(connection.execute(sql, values).fetchone()[0])

    def ids(self, keys: Sequence[str]) -> dict[str, int]:
        condition, values = _has_key(keys)
        with self._database.reading() as connection:
            return dict(connection.execute(f"SELECT key, id FROM items WHERE {condition}", values))

    def items(self, where: Filter | None = None) -> Iterator[Item]:
        condition, values = sql_from_filter(where)
        with self._database.reading() as connection:
            sql = f"SELECT {COLUMNS} FROM items WHERE {condition} ORDER BY id"
            for row in connection.execute(sql, values):
                yield self._item(row)

    def _vectors(
        self, where: Filter | None, batch_size: int
    ) -> Iterator[tuple[list[Item], NDArray[np.float32]]]:
        condition, values = sql_from_filter(where)
        with self._database.reading() as connection:
            sql = f"SELECT {COLUMNS}, vector FROM items WHERE {condition} ORDER BY id"
            cursor = connection.execute(sql, values)
            while rows := cursor.fetchmany(batch_size):
                for key, *_, blob in rows:
                    problem = _vector_problem(blob, self.embed_dim)
                    if problem is not None:
                        raise IntegrityError(
                            f"gallery {self.path}, item {key}: {problem}: see "
                            " upperson-rt gallery verify"
                        )
                flat = np.frombuffer(b"".join(row[-1] for row in rows), STORED)
                yield (
                    [self._item(row[:-1]) for row in rows],
                    flat.reshape(len(rows), self.embed_dim).astype(np.float32),
                )

    def _search(
        self, queries_QD: NDArray[np.float32], k: int, where: Filter, by_track: bool
    ) -> list[list[Hit]]:
        return search_items(self._database, self._index, queries_QD, k, where, by_track, self._item)

    def info(self) -> GalleryInfo:
        by = "SELECT {0}, count(*) FROM items WHERE {0} IS NOT NULL GROUP BY {0} ORDER BY {0}"
        tracks = (
            "SELECT count(*) FROM (SELECT DISTINCT track, camera FROM items"
            " WHERE track IS NOT NULL)"
        )
        files = [
            *self.path.glob(f"{DATABASE_FILE}*"),
            *([self._index.path] if self._index.path.exists() else []),
        ]
        meta = self._database.meta
        with self._database.reading() as connection:
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
                created=meta.created,
                generator=meta.generator,
                schema_version=meta.schema_version,
                size_bytes=sum(file.stat().st_size for file in files),
                cameras=dict(execute(by.format("camera"))),
                variants=dict(execute(by.format("variant"))),
                tracks=execute(tracks).fetchone()[0],
                first_time=first,
                last_time=last,
                index=self._index.info(connection, items),
            )

    def cameras(self) -> list[str]:
        sql = "SELECT DISTINCT camera FROM items WHERE camera IS NOT NULL ORDER BY camera"
        with self._database.reading() as connection:
            return [str(camera) for (camera,) in connection.execute(sql)]

    def verify(self) -> list[str]:
        """Check the whole database; return what is wrong, one line each, or nothing.

        Looks at SQLite's own structure, at every vector's length, finiteness and norm, every item's
        texts, box, attributes and crop, at files among the crops that no item names, and at the
        file of the search index.

        Raises:
            IntegrityError: The database is so damaged that it cannot be read through.
        """
        with self._database.reading() as connection:
            problems = list(_problems(connection, self.embed_dim, self.crops_dir))
            index_problem = self._index.problem(connection)
            if index_problem is not None:
                problems.append(index_problem)
        return problems

    def rebuild(self) -> None:
        """Make the search index anew and save it: exact, or IVF-SQ8 for a large gallery.

        Other threads may search and add meanwhile.
        """
        with self._database.reading() as connection:
            snapshot = self._index.build(connection)
        with self._index.lock:
            self._index.snapshot = snapshot

    def _item(self, columns: Sequence[Any]) -> Item:
        return read_item(item_from_row, columns, self.location)


def _has_key(keys: Sequence[str]) -> tuple[str, list[object]]:
    return "key IN (SELECT value FROM json_each(?))", [json.dumps(list(keys))]


def _crops_of(connection: sqlite3.Connection, condition: str, values: list[object]) -> list[str]:
    sql = f"SELECT crop FROM items WHERE ({condition}) AND +crop IS NOT NULL"
    return [crop for (crop,) in connection.execute(sql, values)]


def _stray_crops(
    connection: sqlite3.Connection, folder: Path, before: float = float("inf")
) -> Iterator[str]:
    """Yield files in the folder that no item names, see `old_files`."""
    files = old_files(folder, before)
    while part := list(islice(files, _FILES_AT_A_TIME)):
        yield from unnamed_crops(connection, part)


def _vector_problem(blob: bytes, embed_dim: int) -> str | None:
    size = embed_dim * STORED.itemsize
    if len(blob) != size:
        return f"vector of {len(blob)} bytes, expected {size}"
    return length_problem(np.frombuffer(blob, STORED).astype(np.float32))


def _problems(connection: sqlite3.Connection, embed_dim: int, crops_dir: Path) -> Iterator[str]:
    """Yield what is wrong, a line each; errors are SQLite's own where it cannot be read."""
    for (line,) in connection.execute("PRAGMA integrity_check"):
        if line != "ok":
            yield f"SQLite: {line}"
    with _any_text(connection):
        rows = connection.execute(f"SELECT {COLUMNS}, vector FROM items ORDER BY id")
        for *columns, blob in rows:
            name = f"item {str(columns[0]).encode('utf-8', 'replace').decode()}"
            for problem in (
                _vector_problem(blob, embed_dim),
                _metadata_problem(columns, crops_dir),
            ):
                if problem is not None:
                    yield f"{name}: {problem}"
    strays = list(_stray_crops(connection, crops_dir))
    if strays:
        yield (
            f"{len(strays)} files in {crops_dir} belong to no item, such as {strays[0]}: "
            "upperson-rt gallery prune --older-than removes old ones"
        )


def _metadata_problem(columns: Sequence[Any], crops_dir: Path) -> str | None:
    try:
        for text in columns:
            if isinstance(text, str):
                text.encode("utf-8")
        item = item_from_row(columns)
    except UnicodeEncodeError:
        return "malformed metadata: not UTF-8"
    except (ValueError, TypeError, InputError) as error:
        return f"malformed metadata: {error}"
    path = None if item.crop is None else crop_path(crops_dir, item.crop)
    if item.crop is not None and (path is None or not path.is_file()):
        return f"its crop {item.crop} is missing"
    return None


@contextmanager
def _any_text(connection: sqlite3.Connection) -> Iterator[None]:
    """Read texts that are not UTF-8, too, as what cannot be encoded again."""
    connection.text_factory = lambda text: text.decode("utf-8", "surrogateescape")
    try:
        yield
    finally:
        connection.text_factory = str
