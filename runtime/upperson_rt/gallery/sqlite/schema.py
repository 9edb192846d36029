"""Tables of a gallery's database, what it says about itself, and its checksums.

A row's checksum shows that the row is as it was written. The sums in the table ``meta`` show that
all rows are there, and none of an earlier state. SQLite's integrity check shows that its indexes
name the right rows. A file beside the log shows that the log lost no transaction.
"""

import errno
import json
import os
import re
import sqlite3
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.files import read_bounded
from upperson_rt.gallery.protocol import Meta, check_schema_version, made_now

SCHEMA_VERSION = 4
_WITHOUT_CHECKSUMS, _WITH_INDEX_SUMS = 2, 3
"""Still read, and brought to `SCHEMA_VERSION` by the first transaction that writes."""
GUARD = "upperson_rt_keeps_checksums"
"""A function that a program must have to write: others would not update the sums."""
INCREMENTAL = 2
"""SQLite's ``auto_vacuum`` of new galleries: free pages can be cut off the file in steps."""
_SUMS = "sums"
PAGE_BYTES = 1024
"""Of new galleries. A commit of a few rows changes a page of each index for each camera, which its
log holds whole: with SQLite's 4096 it writes twice as many bytes. Longer vectors get pages of their
own."""
_TABLES = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    # AUTOINCREMENT: an id is never used again, so what is newer than an index has a higher one.
    """
    CREATE TABLE items (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        key TEXT NOT NULL UNIQUE,
        source TEXT,
        camera TEXT,
        time REAL,
        track TEXT,
        box TEXT,
        crop TEXT,
        attributes TEXT NOT NULL,
        variant TEXT,
        vector BLOB NOT NULL
    )
    """,
    # The log of replaced and deleted items: a search index reads on from where it was.
    "CREATE TABLE changes (seq INTEGER PRIMARY KEY AUTOINCREMENT, id INTEGER NOT NULL)",
    """
    CREATE TRIGGER items_replaced AFTER UPDATE OF id, vector ON items
    BEGIN INSERT INTO changes (id) VALUES (old.id); END
    """,
    """
    CREATE TRIGGER items_deleted AFTER DELETE ON items
    BEGIN INSERT INTO changes (id) VALUES (old.id); END
    """,
    "CREATE INDEX items_by_camera_time ON items (camera, time) WHERE camera IS NOT NULL",
    "CREATE INDEX items_by_time ON items (time)",
    "CREATE INDEX items_by_track ON items (track, camera, time) WHERE track IS NOT NULL",
    "CREATE INDEX items_by_variant ON items (variant)",
    "CREATE INDEX items_by_crop ON items (crop) WHERE crop IS NOT NULL",
)
_PARTIAL = {"camera": "items_by_camera_time", "track": "items_by_track", "crop": "items_by_crop"}
_CHECKSUMS = (
    "ALTER TABLE items ADD COLUMN checksum INTEGER",
    f"CREATE TRIGGER items_adding BEFORE INSERT ON items BEGIN SELECT {GUARD}(); END",
    f"CREATE TRIGGER items_changing BEFORE UPDATE ON items BEGIN SELECT {GUARD}(); END",
    f"CREATE TRIGGER items_deleting BEFORE DELETE ON items BEGIN SELECT {GUARD}(); END",
)
_NAMES = [
    name
    for statement in (*_TABLES, *_CHECKSUMS)
    for name in re.findall(r"CREATE (?:TABLE|TRIGGER|INDEX) (\w+)", statement)
]

COLUMNS = "key, source, camera, time, track, box, crop, attributes"
"""The metadata of an item, in the order of `rows.row_from_item` and `rows.item_from_row`."""
ROW = f"id, {COLUMNS}, variant"
Row: TypeAlias = Sequence[Any]
"""Values of `ROW`; what follows is not looked at."""
_METADATA = 1 + 8 + 1
_VECTOR_BITS = 32
_MODULUS = 1 << 64
_MOST_MARK_BYTES = 4096


class DamageError(sqlite3.DatabaseError):
    """Damage that SQLite itself does not notice; code and fields as in `UppersonError`."""

    def __init__(self, message: str, code: str = "gallery_damaged", **fields: object) -> None:
        super().__init__(message)
        self.code, self.fields = code, fields


# --- Sums over all rows


@dataclass(kw_only=True)
class Sums:
    """Sums over all rows; stand in the table ``meta``, updated by each transaction."""

    commits: int = 0
    """Transactions so far."""
    rows: int = 0
    total: int = 0
    """Of the checksums of all rows, modulo 2^64."""
    seq: int = 0
    """Last entry of the log of changes."""
    last_id: int = 0
    """Highest id ever given."""

    def add(self, rows: Sequence[Row], sign: int = 1) -> None:
        """Count rows in; the last value of each is its checksum."""
        self.rows += sign * len(rows)
        self.total = (self.total + sign * sum(row[-1] for row in rows)) % _MODULUS

    def remove(self, rows: Sequence[Row]) -> None:
        """Count rows out."""
        self.add(rows, -1)

    def as_text(self, meta_checksum: int) -> str:
        """Return the text to store; its checksum covers the other rows of ``meta`` as well."""
        text = json.dumps(vars(self))
        return f"{zlib.crc32(text.encode(), meta_checksum):08x} {text}"

    @classmethod
    def from_text(cls, text: object, meta_checksum: int) -> "Sums":
        """Read a stored text; schema 3 has sums of SQLite's indexes in it, which are left out."""
        checksum, _, stored = str(text).partition(" ")
        if checksum != f"{zlib.crc32(stored.encode('utf-8', 'replace'), meta_checksum):08x}":
            raise DamageError("the gallery's description or its sums were altered", "meta_altered")
        names = {field.name for field in fields(cls)}
        return cls(**{k: value for k, value in json.loads(stored).items() if k in names})

    def check(self, count: int, total: int) -> None:
        """Check the number of rows and the sum of their checksums."""
        if (count, total % _MODULUS) != (self.rows, self.total):
            raise DamageError(
                f"{self.rows} pictures were stored, {count} are found, or others",
                "rows_missing",
                expected=self.rows,
                found=count,
            )


def check_totals(connection: sqlite3.Connection, sums: Sums) -> None:
    """Check that no row is missing or of an earlier state, by the checksums that rows have."""
    # In halves, of which SQLite can add up two thousand million.
    (count, high, low) = connection.execute(
        f"SELECT count(*), ifnull(sum(checksum >> {_VECTOR_BITS}), 0), "
        f"ifnull(sum(checksum & {0xFFFFFFFF}), 0) FROM items NOT INDEXED"
    ).fetchone()
    sums.check(count, (high << _VECTOR_BITS) + low)


_OF_DATABASE = "*** in database main ***\n"
"""What SQLite's findings begin with."""


def structural_problems(connection: sqlite3.Connection, of_items: bool = False) -> Iterator[str]:
    """Yield what SQLite's integrity check finds, and surplus entries of its partial indexes.

    SQLite counts the entries of its other indexes only. ``of_items`` leaves out the other tables
    and the list of free pages.
    """
    sql = f"PRAGMA integrity_check{'(items)' if of_items else ''}"
    texts = [text for (text,) in connection.execute(sql)]
    if texts != ["ok"]:
        parts = [text.removeprefix(_OF_DATABASE).splitlines() for text in texts]
        lines = [line for part in parts for line in part]  # A part may have a hundred.
        yield from (f"SQLite: {line}" for line in lines or ["no answer of its check"])
        return
    columns = ", ".join(f"count({column})" for column in _PARTIAL)
    counts = connection.execute(f"SELECT {columns} FROM items NOT INDEXED").fetchone()
    for (column, index), rows in zip(_PARTIAL.items(), counts, strict=True):
        sql = f"SELECT count(*) FROM items INDEXED BY {index} WHERE {column} IS NOT NULL"
        if connection.execute(sql).fetchone() != (rows,):
            yield f"entries of {index} are missing, or there are others"


# --- Checksums of rows


def checksum_of_values(values: tuple[object, ...], start: int = 0) -> int:
    """Return 32 bits of values of a row, going on from others or from 0."""
    # ascii() keeps texts, numbers and NULL apart, the same in every release of Python.
    return zlib.crc32(ascii(values).encode(), start)


def checksum_of(row: Row, vector: bytes) -> int:
    """Return a row's checksum: 31 bits of id and metadata, 32 bits of id and vector."""
    return _of_metadata(row) << _VECTOR_BITS | zlib.crc32(vector, row[0] & 0xFFFFFFFF)


def _of_metadata(row: Row) -> int:
    return checksum_of_values(tuple(row[1:_METADATA]), row[0] & 0xFFFFFFFF) & 0x7FFFFFFF


def check_rows(rows: Iterable[Row]) -> None:
    """Check rows, which end in the vector and the checksum."""
    for row in rows:
        vector = row[-2]
        if type(vector) is not bytes or checksum_of(row, vector) != row[-1]:
            check_metadata(row, row[-1])
            check_vector(row[0], vector, row[-1])


def check_metadata(row: Row, checksum: object) -> None:
    """Check a row without its vector against its checksum."""
    if not isinstance(checksum, int) or _of_metadata(row) != checksum >> _VECTOR_BITS:
        raise DamageError(f"the picture with id {row[0]} was altered", "row_altered", id=row[0])


def check_vector(id_: int, vector: object, checksum: object) -> None:
    """Check a stored vector against the checksum of its row."""
    if (
        not isinstance(checksum, int)
        or not isinstance(vector, bytes)
        or zlib.crc32(vector, id_ & 0xFFFFFFFF) != checksum & 0xFFFFFFFF
    ):
        raise DamageError(
            f"the vector of the picture with id {id_} was altered", "vector_altered", id=id_
        )


def with_checked_metadata(rows: Iterable[tuple[Any, ...]], sums: Sums) -> Iterator[tuple[Any, ...]]:
    """Pass on all rows (`Row` and, last, the checksum), in order of their ids."""
    last, count, total = 0, 0, 0
    for row in rows:
        check_metadata(row, row[-1])
        if row[0] <= last:
            raise DamageError("the pictures are not in the order of their ids")
        last = row[0]
        count += 1
        total += row[-1]
        yield row
    sums.check(count, total)


# --- What a gallery says about itself


@dataclass(frozen=True, kw_only=True)
class SqliteMeta(Meta):
    """The table `meta`."""

    identity: str
    """Unique to this gallery, so that an index is not used with another one."""


@dataclass(frozen=True)
class Description:
    """What a gallery says about itself, and a checksum of that."""

    meta: SqliteMeta
    checksum: int
    """Of meta and of the definitions of tables and indexes."""

    @property
    def keeps_sums(self) -> bool:
        """Whether there are checksums: not in a gallery that was made before there were any."""
        return self.meta.schema_version > _WITHOUT_CHECKSUMS

    @property
    def is_current(self) -> bool:
        """Whether the next write need not bring the gallery to `SCHEMA_VERSION`."""
        return self.meta.schema_version == SCHEMA_VERSION

    def write_sums(self, connection: sqlite3.Connection, sums: Sums) -> None:
        """Store the sums as part of a transaction."""
        sql = "UPDATE meta SET value = ? WHERE name = ?"
        if connection.execute(sql, (sums.as_text(self.checksum), _SUMS)).rowcount != 1:
            raise DamageError("its sums are missing")


def create(connection: sqlite3.Connection, fingerprint: str, embed_dim: int) -> None:
    """Make the tables of an empty gallery."""
    meta = SqliteMeta(
        schema_version=_WITHOUT_CHECKSUMS,
        identity=uuid.uuid4().hex,
        fingerprint=fingerprint,
        embed_dim=embed_dim,
        **made_now(),
    )
    connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
    connection.execute(f"PRAGMA auto_vacuum = {INCREMENTAL}")
    connection.execute("BEGIN IMMEDIATE")
    for statement in _TABLES:
        connection.execute(statement)
    rows = [(name, str(value)) for name, value in asdict(meta).items()]
    connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
    upgrade(connection)
    connection.execute("COMMIT")


def upgrade(connection: sqlite3.Connection, sums: Sums | None = None) -> None:
    """Bring an earlier gallery to `SCHEMA_VERSION`; without sums it gets room for checksums."""
    for statement in _CHECKSUMS if sums is None else ():
        connection.execute(statement)
    connection.execute(
        "UPDATE meta SET value = ? WHERE name = 'schema_version'", (str(SCHEMA_VERSION),)
    )
    rows = dict(connection.execute("SELECT name, value FROM meta"))
    text = (sums or Sums()).as_text(_checksum(connection, rows))
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (_SUMS, text))


def read_meta(connection: sqlite3.Connection, path: Path) -> Description:
    """Read what a gallery says about itself."""
    no_gallery = IntegrityError(
        f"{path} is a database, but not a gallery; it was left as it is: name another folder "
        "with  --gallery",
        code="not_a_gallery",
        path=path,
    )
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    if not {"meta", "items"} <= {str(name) for (name,) in tables}:
        raise no_gallery
    try:
        rows = dict(connection.execute("SELECT name, value FROM meta"))
        checksum = _checksum(connection, rows)
        version = _version(connection, rows, path)
        return Description(
            SqliteMeta(
                schema_version=version,
                identity=str(rows["identity"]),
                fingerprint=str(rows["fingerprint"]),
                embed_dim=int(rows["embed_dim"]),
                created=str(rows["created"]),
                generator=str(rows["generator"]),
            ),
            checksum,
        )
    except (KeyError, ValueError, TypeError) as error:
        raise no_gallery from error
    except sqlite3.OperationalError as error:
        if "no such column" in str(error):
            raise no_gallery from error
        raise


def read_sums(
    connection: sqlite3.Connection, path: Path, known: Description
) -> tuple[Description, Sums | None]:
    """Read the sums that a transaction sees; None where a gallery keeps none.

    What the gallery said about itself before is read anew if another process has brought it to
    another version since.
    """
    sql = "SELECT value FROM meta WHERE name = ?"
    row = connection.execute(sql, (_SUMS,)).fetchone()
    if row is None:
        if known.keeps_sums:
            raise DamageError("its sums are missing")
        return known, None
    if known.keeps_sums:
        try:
            return known, Sums.from_text(row[0], known.checksum)
        except DamageError:
            if known.is_current:
                raise
    known = read_meta(connection, path)
    return known, Sums.from_text(row[0], known.checksum)


def commit_in(page: bytes, about: Description) -> int | None:
    """Return the number of the transaction that wrote a page of ``meta``; None if unknown."""
    for text in re.findall(rb"[0-9a-f]{8} \{[^{}]*\}", page):
        with suppress(DamageError):
            return Sums.from_text(text.decode("ascii", "replace"), about.checksum).commits
    return None


def _version(connection: sqlite3.Connection, rows: dict[str, str], path: Path) -> int:
    """Return the version of the schema; one that was altered is not taken for another release's."""
    version = int(rows["schema_version"])
    readable = {_WITH_INDEX_SUMS, SCHEMA_VERSION}
    if _SUMS not in rows:
        readable.add(_WITHOUT_CHECKSUMS)
    for actual in readable - {version} if _SUMS in rows else ():
        assumed = rows | {"schema_version": str(actual)}
        if _is_valid(rows[_SUMS], _checksum(connection, assumed)):
            raise DamageError("its version was altered", "version_altered")
    if version not in readable:
        check_schema_version(str(path), version, SCHEMA_VERSION)
    return version


def _is_valid(text: object, meta_checksum: int) -> bool:
    with suppress(DamageError):
        Sums.from_text(text, meta_checksum)
        return True
    return False


def _checksum(connection: sqlite3.Connection, rows: dict[str, str]) -> int:
    named = ", ".join(f"'{name}'" for name in _NAMES)
    definitions = connection.execute(
        f"SELECT type, name, tbl_name, sql FROM sqlite_master WHERE name IN ({named}) ORDER BY name"
    ).fetchall()
    stored = sorted((name, value) for name, value in rows.items() if name != _SUMS)
    return zlib.crc32(ascii((stored, definitions)).encode())


# --- A file beside SQLite's log: how many transactions the log has to hold


def write_mark(path: Path, identity: str, commits: int) -> None:
    """Note beside the log how many transactions it has to hold.

    Written after the log was synced, so the number is never too high. It may be too low: then a
    loss is not noticed.
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
                "the last change may be lost: check the disk, then repeat it",
                code="disk_read_only",
                path=path.parent,
            ) from error


def read_mark(path: Path) -> tuple[str, int] | None:
    """Return the gallery's identity and its transactions; None where nothing was noted."""
    try:
        content = read_bounded(path, _MOST_MARK_BYTES).decode("ascii", "replace")
    except InputError:
        return None
    text, _, checksum = content.rpartition(" ")
    if checksum != f"{zlib.crc32(text.encode()):08x}\n":
        return None
    identity, _, commits = text.partition(" ")
    return identity, int(commits)
