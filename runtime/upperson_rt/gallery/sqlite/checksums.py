"""What tells damage of a gallery: a checksum in each row, and sums over all rows and indexes.

A row's checksum tells that the row is as it was written; the sums tell that all rows are there, and
that the indexes of SQLite, which filters are answered from, name the right ones. SQLite itself
would tell neither.
"""

import errno
import json
import os
import sqlite3
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

from upperson_rt.errors import InputError

__all__ = [
    "COLUMNS",
    "FACETS",
    "ROW",
    "DamageError",
    "Facet",
    "Row",
    "Sums",
    "check_metadata",
    "check_rows",
    "check_total",
    "check_vector",
    "checksum_of",
    "checksum_of_values",
    "facet_of",
    "prove_facet",
    "prove_metadata",
    "prove_rows",
    "read_mark",
    "write_mark",
]

COLUMNS = "key, source, camera, time, track, box, crop, attributes"
"""The metadata of an item, in the order of `rows.row_from_item` and `rows.item_from_row`."""
ROW = f"id, {COLUMNS}, variant"
Row: TypeAlias = Sequence[Any]
"""Values of `ROW`; what follows is not looked at."""
_METADATA = 1 + 8 + 1
_VECTOR_BITS = 32
_MODULUS = 1 << 64
_NUMBERS = struct.Struct("<dq")
_NO_TIME = float("-inf")  # Sorts as NULL does; no item has it.


class DamageError(sqlite3.DatabaseError):
    """What SQLite would have raised if it had noticed."""


@dataclass(frozen=True, kw_only=True)
class Facet:
    """An index of SQLite that answers come from, and what an entry of it says."""

    index: str
    text: str | None = None
    """Column of texts that it begins with, never NULL in an entry."""
    nullable: str | None = None
    """Column of texts that follows."""
    timed: bool = False
    """Whether the time follows."""
    partial: bool = False
    """Whether rows without the first text are left out."""

    @property
    def column(self) -> str:
        """The column that it begins with."""
        return self.text or self.nullable or "time"

    def texts_of(self, rows: Sequence[Row]) -> list[tuple[object, ...]]:
        """Return what the entry of each row says before time and id."""
        first: list[tuple[object, ...]] = [()] * len(rows)
        if self.text is not None:
            place = _PLACES[self.text]
            first = [(row[place],) for row in rows]
        if self.nullable is None:
            return first
        place = _PLACES[self.nullable]
        return [
            (*texts, int(row[place] is not None), row[place] or "")
            for texts, row in zip(first, rows, strict=True)
        ]

    @property
    def sql(self) -> str:
        """Selects all entries in the order of the index, see `prove_facet`."""
        columns = [] if self.text is None else [self.text]
        if self.nullable is not None:
            columns += [f"{self.nullable} IS NOT NULL", f"ifnull({self.nullable}, '')"]
        columns += ["ifnull(time, -9e999)" if self.timed else "0.0", "id"]
        where = f" WHERE {self.text} IS NOT NULL" if self.partial else ""
        return f"SELECT {', '.join(columns)} FROM items INDEXED BY {self.index}{where}"


FACETS = (
    Facet(index="sqlite_autoindex_items_1", text="key"),
    Facet(index="items_by_camera_time", text="camera", timed=True, partial=True),
    Facet(index="items_by_time", timed=True),
    Facet(index="items_by_track", text="track", nullable="camera", timed=True, partial=True),
    Facet(index="items_by_variant", nullable="variant"),
    Facet(index="items_by_crop", text="crop", partial=True),
)
_PLACES = {name: place for place, name in enumerate(ROW.split(", "))}
_TIME = _PLACES["time"]


def facet_of(column: str) -> Facet:
    """Return the facet whose index begins with a column."""
    return next(facet for facet in FACETS if facet.column == column)


@dataclass(kw_only=True)
class Sums:
    """What all rows together come to; stands in the table ``meta``, updated by each transaction."""

    commits: int = 0
    """Transactions so far."""
    rows: int = 0
    total: int = 0
    """Of the checksums of all rows, modulo 2^64."""
    seq: int = 0
    """Last entry of the log of changes."""
    last_id: int = 0
    """Highest id ever given."""
    facets: list[int] = field(default_factory=lambda: [0] * len(FACETS))
    """For each of `FACETS` the sum over its entries, modulo 2^64."""

    def add(self, rows: Sequence[Row]) -> None:
        """Take rows in; the last value of each is its checksum."""
        self._count(rows, 1)

    def remove(self, rows: Sequence[Row]) -> None:
        """Leave rows out; the last value of each is its checksum."""
        self._count(rows, -1)

    def _count(self, rows: Sequence[Row], sign: int) -> None:
        self.rows += sign * len(rows)
        self.total = (self.total + sign * sum(row[-1] for row in rows)) % _MODULUS
        crc32, pack = zlib.crc32, _NUMBERS.pack
        timeless = [pack(0.0, row[0]) for row in rows]
        timed = [pack(_NO_TIME if row[_TIME] is None else row[_TIME], row[0]) for row in rows]
        for place, facet in enumerate(FACETS):
            total = sum(
                crc32(numbers, _text_sum(texts))
                for texts, numbers in zip(
                    facet.texts_of(rows), timed if facet.timed else timeless, strict=True
                )
                if not (facet.partial and texts[0] is None)
            )
            self.facets[place] = (self.facets[place] + sign * total) % _MODULUS

    def as_text(self, meta_checksum: int) -> str:
        """Return what is stored; it vouches for the other rows of ``meta`` as well."""
        text = json.dumps(vars(self))
        return f"{zlib.crc32(text.encode(), meta_checksum):08x} {text}"

    @classmethod
    def from_text(cls, text: object, meta_checksum: int) -> "Sums":
        """Read what was stored.

        Raises:
            DamageError: It is not what was stored.
        """
        checksum, _, stored = str(text).partition(" ")
        if checksum != f"{zlib.crc32(stored.encode('utf-8', 'replace'), meta_checksum):08x}":
            raise DamageError("the gallery's description or its sums were altered")
        return cls(**json.loads(stored))


def checksum_of_values(values: tuple[object, ...], start: int = 0) -> int:
    """Return 32 bits of values of a row, going on from others or from 0."""
    # ascii() tells texts, numbers and NULL apart, the same in every release of Python.
    return zlib.crc32(ascii(values).encode(), start)


def checksum_of(row: Row, vector: bytes) -> int:
    """Return a row's checksum: 31 bits of id and metadata, 32 bits of id and vector."""
    return _of_metadata(row) << _VECTOR_BITS | zlib.crc32(vector, row[0] & 0xFFFFFFFF)


def check_rows(rows: Iterable[Row]) -> None:
    """Check rows, which end in the vector and the checksum.

    Raises:
        DamageError: One is damaged.
    """
    for row in rows:
        vector = row[-2]
        if type(vector) is not bytes or checksum_of(row, vector) != row[-1]:
            check_metadata(row, row[-1])
            check_vector(row[0], vector, row[-1])


def check_metadata(row: Row, checksum: object) -> None:
    """Check a row without its vector against its checksum.

    Raises:
        DamageError: The row is damaged.
    """
    if not isinstance(checksum, int) or _of_metadata(row) != checksum >> _VECTOR_BITS:
        raise DamageError(f"the picture with id {row[0]} was altered")


def check_vector(id_: int, vector: object, checksum: object) -> None:
    """Check a stored vector against the checksum of its row.

    Raises:
        DamageError: The row is damaged.
    """
    if (
        not isinstance(checksum, int)
        or not isinstance(vector, bytes)
        or zlib.crc32(vector, id_ & 0xFFFFFFFF) != checksum & 0xFFFFFFFF
    ):
        raise DamageError(f"the vector of the picture with id {id_} was altered")


def _of_metadata(row: Row) -> int:
    return checksum_of_values(tuple(row[1:_METADATA]), row[0] & 0xFFFFFFFF) & 0x7FFFFFFF


_text_sum = lru_cache(maxsize=1024)(checksum_of_values)


def prove_facet(connection: sqlite3.Connection, facet: Facet, sums: Sums) -> None:
    """Read an index of SQLite through: it has all entries, no others, and in order.

    So what is looked for in it is found if it is there.

    Raises:
        DamageError: It is not so.
    """
    if _sum_of_entries(connection.execute(facet.sql)) != sums.facets[FACETS.index(facet)]:
        raise DamageError(f"entries of {facet.index} are missing or were altered")


def _sum_of_entries(entries: Iterable[tuple[Any, ...]]) -> int:
    total, last, text_sum = 0, (), 0
    texts: tuple[object, ...] | None = None
    pack, crc32 = _NUMBERS.pack, zlib.crc32
    try:
        for entry in entries:
            if entry <= last:
                raise DamageError("entries of an index are not in order")
            if entry[:-2] != texts:
                texts = entry[:-2]
                text_sum = checksum_of_values(texts)
            total += crc32(pack(entry[-2], entry[-1]), text_sum)
            last = entry
    except (TypeError, struct.error) as error:
        raise DamageError(f"an index holds values of a wrong type: {error}") from error
    return total % _MODULUS


def prove_rows(connection: sqlite3.Connection, sums: Sums) -> None:
    """Add the checksums of all rows up: no row is missing, or of an earlier state.

    They are in order, too: else one that is there is not found by its id. Whether a row fits its
    checksum is told when the row is read.

    Raises:
        DamageError: It is not so.
    """
    # In halves, of which SQLite can add up two thousand million.
    (count, high, low) = connection.execute(
        f"SELECT count(*), ifnull(sum(checksum >> {_VECTOR_BITS}), 0), "
        f"ifnull(sum(checksum & {0xFFFFFFFF}), 0) FROM items NOT INDEXED"
    ).fetchone()
    check_total(count, (high << _VECTOR_BITS) + low, sums)
    last = 0
    for (id_,) in connection.execute("SELECT id FROM items NOT INDEXED"):
        if id_ <= last:
            raise DamageError("the pictures are not in the order of their ids")
        last = id_


def check_total(count: int, total: int, sums: Sums) -> None:
    """Check the number of rows, and what their checksums add up to.

    Raises:
        DamageError: It is not what was stored.
    """
    if (count, total % _MODULUS) != (sums.rows, sums.total):
        raise DamageError(f"{sums.rows} pictures were stored, {count} are found, or others")


def prove_metadata(rows: Iterable[tuple[Any, ...]], sums: Sums) -> Iterator[tuple[Any, ...]]:
    """Pass on all rows (`Row` and, last, the checksum), in order of their ids.

    Raises:
        DamageError: A row is damaged, or at the end: some are missing.
    """
    last, count, total = 0, 0, 0
    for row in rows:
        check_metadata(row, row[-1])
        if row[0] <= last:
            raise DamageError("the pictures are not in the order of their ids")
        last = row[0]
        count += 1
        total += row[-1]
        yield row
    check_total(count, total, sums)


# --- A file beside SQLite's log that says how many transactions the log has to hold


def write_mark(path: Path, identity: str, commits: int) -> None:
    """Note beside the log how many transactions it has to hold, see `Database._check_mark`.

    Written after the log was synced, so it never says too much. It may say too little: nothing is
    lost then but the notice of a loss.

    Raises:
        InputError: The disk turned read-only, and may have kept nothing of what it said was synced.
    """
    text = f"{identity} {commits:020d}"
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.write(handle, f"{text} {zlib.crc32(text.encode()):08x}\n".encode())
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno == errno.EROFS:
            raise InputError(
                f"the disk of gallery {path.parent} turned read-only while it was written to, and "
                "the last change may be lost: check the disk, then repeat it"
            ) from error


def read_mark(path: Path) -> tuple[str, int] | None:
    """Return the gallery's identity and its transactions; None where nothing was noted."""
    try:
        text, _, checksum = path.read_bytes().decode("ascii", "replace").rpartition(" ")
    except OSError:
        return None
    if checksum != f"{zlib.crc32(text.encode()):08x}\n":
        return None
    identity, _, commits = text.partition(" ")
    return identity, int(commits)
