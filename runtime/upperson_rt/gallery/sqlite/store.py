"""The gallery in a folder, of its database, its index and its crops."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import IntegrityError, UppersonError
from upperson_rt.files import bytes_on_disk, require_no_links, sweep
from upperson_rt.gallery.clips import clips_dir, remove_clips, remove_stray_clips
from upperson_rt.gallery.crops import remove_crops
from upperson_rt.gallery.protocol import Gallery, Within, known_keys, read_item
from upperson_rt.gallery.records import CameraInfo, Filter, GalleryInfo, Hit, Item
from upperson_rt.gallery.snapshots import SNAPSHOTS, remove_snapshots
from upperson_rt.gallery.sqlite import rows as table
from upperson_rt.gallery.sqlite import schema
from upperson_rt.gallery.sqlite.bin import Bin, among
from upperson_rt.gallery.sqlite.database import DATABASE_FILE, Database, Transaction, make
from upperson_rt.gallery.sqlite.deletion import Eraser, Selected, outbox_in, selected
from upperson_rt.gallery.sqlite.index import SearchIndex
from upperson_rt.gallery.sqlite.rows import ADD, REPLACE, STORED
from upperson_rt.gallery.sqlite.schema import ROW, DamageError, Sums
from upperson_rt.gallery.sqlite.search import search_items
from upperson_rt.printable import get_logger

_LOG = get_logger(__name__)

_MOST_ROWS = 2**63 - 1  # SQLite knows no larger number.
_ROWS_AT_A_TIME = 8192
_CAMERA, _CROP, _COLUMNS = 3, 7, slice(1, 9)
"""Places in `ROW` of some columns, and of all that makes an `Item`."""


class SqliteGallery(Gallery):
    """Items and their embeddings in ``FOLDER/gallery.sqlite``, their crops in ``FOLDER/crops``.

    A transaction that has returned survives a power failure (WAL, synchronous=FULL). Several
    processes and threads may read while one writes; each search sees everything committed before it
    began.

    Vectors are stored as float16, and every score is computed from those. The search index lies in
    ``FOLDER/gallery.index``; it can be deleted at any time. It is exact below
    `index.APPROXIMATE_FROM` items, from there on IVF-SQ8; filters that leave few items are always
    answered exactly.

    Rows have checksums, which are checked when they are read, and the database has sums over all
    rows: what was altered or lost on the disk is an IntegrityError, not an answer.
    """

    has_outbox = True
    crops_dir: Path
    bin: Bin

    def __init__(self, path: Path, database: Database) -> None:
        super().__init__(str(path), database.meta, path / "crops")
        self.path = path
        self._database = database
        self._index = SearchIndex(path, database.meta, not database.read_only, database.reading)
        self._eraser = Eraser(database, self._writing, self._index.purge, path / "crops")
        self.bin = Bin(path, database.reading, self._writing, self._item, self._eraser)
        if not database.read_only:
            try:
                self.bin.finish_move()
            except UppersonError as error:
                _LOG.warning(
                    "gallery %s: a move into or out of the bin ends later: %s", path, error
                )

    @classmethod
    def _open(cls, location: str, create: tuple[str, int] | None) -> "SqliteGallery":
        folder = Path(location)
        file = folder / DATABASE_FILE
        if create is not None and not file.exists():
            make(file, *create)
        return cls(folder, Database(file))

    def close(self) -> None:
        self._index.close()
        self._database.close()

    def _add(
        self, items: Sequence[Item], vectors_ND: NDArray[np.float32], variant: str | None
    ) -> list[str]:
        return self._add_within(items, vectors_ND, variant, None)

    def _add_within(
        self,
        items: Sequence[Item],
        vectors_ND: NDArray[np.float32],
        variant: str | None,
        within: Within | None,
    ) -> list[str]:
        with self._writing() as (transaction, sums):
            source, keys = table.has_key(transaction, [item.key for item in items])
            sql = f"SELECT {ROW}, checksum FROM {source}"
            replaced = {row[1]: row for row in transaction.execute(sql, keys)}
            for row in replaced.values():
                schema.check_metadata(row, row[-1])
            if replaced:
                transaction.check_table()
                sums.remove([*replaced.values()])
            rows: dict[str, tuple[Any, ...]] = {}
            for item, vector in zip(items, vectors_ND.astype(STORED), strict=True):
                earlier = rows.get(item.key) or replaced.get(item.key)
                columns = list(table.row_from_item(item))
                if earlier is None:
                    sums.last_id += 1
                elif columns[_CAMERA - 1] is None:
                    columns[_CAMERA - 1] = earlier[_CAMERA]
                id_ = sums.last_id if earlier is None else earlier[0]
                rows[item.key] = (id_, *columns, variant, vector.tobytes())
            rows = {key: (*row, schema.checksum_of(row, row[-1])) for key, row in rows.items()}
            sums.add([*rows.values()])
            sums.seq += len(replaced)
            write = transaction.connection.executemany
            write(ADD, (row for key, row in rows.items() if key not in replaced))
            if replaced:
                again = ((*rows[key][1:], rows[key][0]) for key in replaced)
                if write(REPLACE, again).rowcount != len(replaced):
                    raise DamageError("pictures that an index names are missing")
            crops = [row[_CROP] for row in replaced.values() if row[_CROP] is not None]
            unused = table.unnamed_crops(transaction, crops) if crops else []
            table.trim_log(transaction)
            if within is not None:
                ids = {key: row[0] for key, row in rows.items()}
                within(outbox_in(transaction, write=True), ids, [*replaced])
            self._index.keep_up(transaction)
        remove_crops(self.crops_dir, unused)
        remove_clips(self.crops_dir, crops)
        return [*replaced]

    @property
    def is_read_only(self) -> bool:
        return self._database.read_only

    @contextmanager
    def outbox(self, write: bool = False) -> Iterator[Any]:
        if write:
            with self._writing() as (transaction, _):
                yield outbox_in(transaction, write=True)
        else:
            with self._database.reading() as transaction:
                yield outbox_in(transaction, write=False)

    @contextmanager
    def _writing(self) -> Iterator[tuple[Transaction, Sums]]:
        """Give a transaction and its sums, which the caller keeps right; makes them if need be.

        A gallery is only read if a symbolic link lies in its folder: what it leads to is not ours.
        """
        require_no_links(self.path)
        with self._database.writing() as transaction:
            if transaction.sums is None:
                _LOG.warning("giving gallery %s checksums: this takes a while", self.path)
                transaction.sums = table.add_checksums(transaction, self.embed_dim)
                self._database.reload(transaction.connection)
            yield transaction, transaction.sums

    def delete(self, keys: Sequence[str]) -> int:
        there = known_keys(keys)

        def select(transaction: Transaction) -> Selected:
            rows = selected(transaction, *table.has_key(transaction, there))
            rows[:, 1] = 0  # Also what is replaced meanwhile has the key.
            return rows

        about = {"keys": len(there)}
        binned = self.bin.delete_where(*among("key", there), about)
        return binned + self._eraser.erase("delete", about, select)

    def _delete_where(self, where: Filter) -> int:
        def select(transaction: Transaction) -> Selected:
            return selected(transaction, *table.passing(transaction, where))

        deleted = self.bin.delete_where(*table.condition_of(where), where.conditions)
        deleted += self._eraser.erase("delete", where.conditions, select)
        remove_snapshots(self.path / SNAPSHOTS, where)
        return deleted

    def _prune(self, too_old: Filter | None, keep_newest: int | None, scope: Filter) -> int:
        def select(transaction: Transaction) -> Selected:
            parts = []
            source, values = table.passing(transaction, scope)
            if scope.is_empty:  # By the index of times.
                transaction.check_table()
                source = "items WHERE 1"
            if too_old is not None:
                parts.append(selected(transaction, *table.passing(transaction, too_old)))
                source, values = f"{source} AND ifnull(time >= ?, 1)", [*values, too_old.until]
            if keep_newest is not None:
                sql = f"SELECT count(*) FROM {source}"
                surplus = max(0, transaction.execute(sql, values).fetchone()[0] - keep_newest)
                # Without a time comes first: NULL is the smallest.
                source, values = f"{source} ORDER BY time, id LIMIT ?", [*values, surplus]
                parts.append(selected(transaction, source, values))
            return np.concatenate(parts)

        about = {**(too_old or scope).conditions, "keep_newest": keep_newest}
        deleted = self._eraser.erase("prune", about, select)
        if too_old is not None and too_old.until is not None:
            self.bin.delete_where(*table.condition_of(too_old), too_old.conditions, "prune")
            remove_snapshots(self.path / SNAPSHOTS, too_old)
        if too_old is not None and too_old.until is not None and too_old.camera is None:
            # Processes that were killed leave files that no item names; those are pruned as well.
            with self._database.reading() as transaction:
                strays = list(table.stray_crops(transaction, self.crops_dir, too_old.until))
            remove_crops(self.crops_dir, strays)
            remove_stray_clips(self.crops_dir, too_old.until)
        return deleted

    @property
    def database(self) -> Database:
        """Transactions on its file."""
        return self._database

    def finish_erasures(self) -> bool:
        """Finish deletions that ended early; return whether SQLite's log could be emptied.

        It cannot while other programs read, see `Gallery.delete` for errors.
        """
        self._eraser.finish()
        self.bin.tidy()
        sweep(self.path / SNAPSHOTS, "*")
        sweep(clips_dir(self.crops_dir), "unfinished")
        with self._database.with_empty_log() as file:
            return file is not None

    def _count(self, where: Filter) -> int:
        with self._database.reading() as transaction:
            if where.is_empty:
                return transaction.count()
            source, values = table.passing(transaction, where)
            return int(transaction.execute(f"SELECT count(*) FROM {source}", values).fetchone()[0])

    def ids(self, keys: Sequence[str]) -> dict[str, int]:
        with self._database.reading() as transaction:
            source, values = table.has_key(transaction, known_keys(keys))
            return dict(transaction.execute(f"SELECT key, id FROM {source}", values))

    def _get(self, ids: Sequence[int]) -> dict[int, tuple[Item, NDArray[np.float32]]]:
        with self._database.reading() as transaction:
            transaction.check_table()
            return {
                row[0]: (
                    self._item(row[_COLUMNS]),
                    np.frombuffer(row[-2], STORED).astype(np.float32),
                )
                for row in table.rows_with_ids(transaction, ids, self.embed_dim)
            }

    def _items(self, where: Filter) -> Iterator[Item]:
        with self._database.reading() as transaction:
            for row in self._rows(transaction, where, ROW):
                yield self._item(row[_COLUMNS])

    def _sample(self, count: int) -> list[Item]:
        with self._database.reading() as transaction:
            transaction.check_table()
            ids = table.ids_where(transaction)
            if not len(ids):
                return []
            chosen = np.unique(ids[np.linspace(0, len(ids) - 1, count, dtype=np.int64)])
            rows = table.rows_with_ids(transaction, chosen.tolist(), self.embed_dim)
            return [self._item(row[_COLUMNS]) for row in rows]

    def _vectors(
        self, where: Filter, batch_size: int
    ) -> Iterator[tuple[list[Item], NDArray[np.float32]]]:
        with self._database.reading() as transaction:
            rows = self._rows(transaction, where, f"{ROW}, vector")
            while batch := table.checked(
                transaction, list(islice(rows, batch_size)), self.embed_dim
            ):
                flat = np.frombuffer(b"".join(row[-2] for row in batch), STORED)
                yield (
                    [self._item(row[_COLUMNS]) for row in batch],
                    flat.reshape(len(batch), self.embed_dim).astype(np.float32),
                )

    def checked_batches(self) -> Iterator[list[tuple[Any, ...]]]:
        """Yield the values of `ROW` and the stored vector of all items, by id, of one state."""
        with self._database.reading() as transaction:
            rows = self._rows(transaction, Filter(), f"{ROW}, vector")
            while batch := list(islice(rows, _ROWS_AT_A_TIME)):
                yield [row[:-1] for row in table.checked(transaction, batch, self.embed_dim)]

    def _rows(
        self, transaction: Transaction, where: Filter, columns: str
    ) -> Iterator[tuple[Any, ...]]:
        """Yield columns, which begin with `ROW`, and the checksum of what passes, by id."""
        source, values = table.passing(transaction, where)
        sql = f"SELECT {columns}, {transaction.checksum} FROM {source} ORDER BY id"
        rows = transaction.execute(sql, values)
        if transaction.sums is None:
            yield from rows
        elif where.is_empty:
            yield from schema.with_checked_metadata(rows, transaction.sums)
        else:
            transaction.check_table()
            for row in rows:
                schema.check_metadata(row, row[-1])
                yield row

    def _search(
        self, queries_QD: NDArray[np.float32], k: int, where: Filter, by_track: bool
    ) -> list[list[Hit]]:
        return [hits for hits, _ in self._found(queries_QD, k, where, by_track, k)]

    def _search_with_vectors(
        self, query_1D: NDArray[np.float32], k: int, where: Filter, by_track: bool, certain: int
    ) -> tuple[list[Hit], NDArray[np.float32]]:
        ((hits, stored),) = self._found(query_1D, k, where, by_track, certain)
        vectors = np.frombuffer(b"".join(stored), STORED).astype(np.float32)
        return hits, vectors.reshape(len(hits), self.embed_dim)

    def _found(
        self, queries_QD: NDArray[np.float32], k: int, where: Filter, by_track: bool, certain: int
    ) -> list[tuple[list[Hit], list[bytes]]]:
        own = self._database, self._index
        return search_items(*own, queries_QD, k, where, by_track, certain, self._item)

    def info(self) -> GalleryInfo:
        files = [
            *self.path.glob(f"{DATABASE_FILE}*"),
            *([self._index.path] if self._index.path.exists() else []),
        ]
        meta = self._database.meta
        with self._database.reading() as transaction:
            transaction.check_table()
            first, last, tracks = transaction.execute(
                "SELECT (SELECT min(time) FROM items), (SELECT max(time) FROM items), (SELECT "
                "count(*) FROM (SELECT DISTINCT track, camera FROM items WHERE track IS NOT NULL))"
            ).fetchone()
            return GalleryInfo(
                location=self.location,
                items=transaction.count(),
                embed_dim=self.embed_dim,
                fingerprint=self.fingerprint,
                created=meta.created,
                generator=meta.generator,
                schema_version=meta.schema_version,
                size_bytes=sum(file.stat().st_size for file in files),
                cameras=_counts(transaction, "camera"),
                variants=_counts(transaction, "variant"),
                tracks=tracks,
                first_time=first,
                last_time=last,
                index=self._index.info(transaction, transaction.count()),
            )

    def reusable_bytes(self) -> int:
        with self._database.reading() as transaction:
            names = ("page_count", "freelist_count", "page_size")
            pages, free, size = (
                transaction.execute(f"PRAGMA {name}").fetchone()[0] for name in names
            )
        used = int((pages - free) * size)
        return max(0, bytes_on_disk(self._database.path.stat()) - used)

    def cameras(self) -> list[str]:
        with self._database.reading() as transaction:
            return [*_counts(transaction, "camera")]

    def by_camera(self) -> dict[str, CameraInfo]:
        with self._database.reading() as transaction:
            transaction.check_table()
            rows = transaction.execute(
                "SELECT camera, count(*), min(time), max(time) FROM items "
                "WHERE camera IS NOT NULL GROUP BY camera ORDER BY camera"
            )
            return {
                str(camera): CameraInfo(pictures=pictures, first_time=first, last_time=last)
                for camera, pictures, first, last in rows
            }

    def check(self) -> None:
        with self._database.reading() as transaction:
            for problem in schema.structural_problems(transaction.connection):
                raise DamageError(problem)
            if transaction.sums is not None:
                schema.check_totals(transaction.connection, transaction.sums)
            index_problem = self._index.problem(transaction)
        if index_problem is not None:
            raise IntegrityError(index_problem)

    def verify(self) -> list[str]:
        """Check the whole gallery; return what is wrong, one line each, or nothing.

        Looks at SQLite's own structure, at every row, also of the bin, its checksum, vector and
        crop, at sums over all rows, at files among the crops that no item names, and at the file of
        the search index.
        """
        with self._database.reading() as transaction:
            folders = self.crops_dir, self.bin.crops_dir
            problems = list(table.problems_of(transaction, self.embed_dim, *folders))
            problems += self.bin.problems(transaction, self.embed_dim)
            index_problem = self._index.problem(transaction)
            if index_problem is not None:
                problems.append(index_problem)
        return problems

    def rebuild(self) -> None:
        """Make the search index anew and save it: exact, or IVF-SQ8 for a large gallery.

        Checks all rows before. A gallery that was made before there were checksums gets them, where
        it can be written to. Other threads may search and add meanwhile.
        """
        if not (self._database.has_sums or self._database.read_only):
            with self._writing():
                pass
        with self._database.reading() as transaction:
            if not self._index.is_large(transaction):  # Whose parts are made of checked rows.
                for _ in self._rows(transaction, Filter(), ROW):
                    pass
            snapshot = self._index.build(transaction)
        with self._index.lock:
            self._index.snapshot = snapshot

    def _item(self, columns: Sequence[Any]) -> Item:
        return read_item(table.item_from_row, columns, self.location)


def _counts(transaction: Transaction, column: str) -> dict[str, int]:
    transaction.check_table()
    condition = f"{column} IS NOT NULL GROUP BY {column} ORDER BY {column}"
    return dict(transaction.execute(f"SELECT {column}, count(*) FROM items WHERE {condition}"))
