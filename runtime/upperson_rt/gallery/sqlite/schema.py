"""Tables of a gallery's database, and what it says about itself."""

import re
import sqlite3
import uuid
import zlib
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from upperson_rt.errors import IntegrityError
from upperson_rt.gallery.protocol import Meta, check_schema_version, made_now
from upperson_rt.gallery.sqlite.checksums import DamageError, Sums
from upperson_rt.gallery.sqlite.pages import Log

__all__ = [
    "GUARD",
    "SqliteMeta",
    "Vouched",
    "create",
    "first_commit_of",
    "read_meta",
    "read_sums",
    "upgrade",
]

SCHEMA_VERSION = 3
_WITHOUT_CHECKSUMS = 2
"""Still read, and brought to `SCHEMA_VERSION` by the first that writes."""
GUARD = "upperson_rt_keeps_checksums"
"""A function that those who write must have: others would leave the sums behind."""
_SUMS = "sums"
_READ_SUMS = "SELECT value FROM meta WHERE name = ?"
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
    # The log of what is no longer as it was: indexes beside the table read on from where they were.
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
_CHECKSUMS = (
    # Older releases and other programs, which know nothing of the sums, are refused by these.
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


@dataclass(frozen=True, kw_only=True)
class SqliteMeta(Meta):
    """The table `meta`."""

    identity: str
    """Unique to this gallery, so that an index is not used with another one."""


@dataclass(frozen=True)
class Vouched:
    """What a gallery says about itself, and what its sums must vouch for."""

    meta: SqliteMeta
    checksum: int
    """Of meta and of the definitions of tables and indexes."""

    @property
    def keeps_sums(self) -> bool:
        """Whether there are checksums: not in a gallery that was made before there were any."""
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
    connection.execute("BEGIN IMMEDIATE")
    for statement in _TABLES:
        connection.execute(statement)
    rows = [(name, str(value)) for name, value in asdict(meta).items()]
    connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
    upgrade(connection)
    connection.execute("COMMIT")


def upgrade(connection: sqlite3.Connection) -> None:
    """Give a gallery of the version before room for checksums, and sums of nothing."""
    for statement in _CHECKSUMS:
        connection.execute(statement)
    connection.execute(
        "UPDATE meta SET value = ? WHERE name = 'schema_version'", (str(SCHEMA_VERSION),)
    )
    rows = dict(connection.execute("SELECT name, value FROM meta"))
    text = Sums().as_text(_checksum(connection, rows))
    connection.execute("INSERT INTO meta VALUES (?, ?)", (_SUMS, text))


def read_meta(connection: sqlite3.Connection, path: Path) -> Vouched:
    """Read what a gallery says about itself.

    Raises:
        InputError: Its schema is another.
        IntegrityError: It is some other database.
        DamageError: It was altered.
    """
    foreign = IntegrityError(
        f"{path} is a database, but not a gallery; it was left as it is: name another folder "
        "with  --gallery"
    )
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    if not {"meta", "items"} <= {str(name) for (name,) in tables}:
        raise foreign
    try:
        rows = dict(connection.execute("SELECT name, value FROM meta"))
        checksum = _checksum(connection, rows)
        version = _version(connection, rows, path)
        return Vouched(
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
        raise foreign from error
    except sqlite3.OperationalError as error:
        if "no such column" in str(error):
            raise foreign from error
        raise


def read_sums(
    connection: sqlite3.Connection, path: Path, known: Vouched
) -> tuple[Vouched, Sums | None]:
    """Read the sums that a transaction sees; None where a gallery keeps none.

    Args:
        connection: In the transaction.
        path: For messages.
        known: What the gallery said about itself before; it is read anew if another process has
            given it checksums since.

    Raises:
        DamageError: The sums, or what they vouch for, were altered.
    """
    row = connection.execute(_READ_SUMS, (_SUMS,)).fetchone()
    if row is not None and not known.keeps_sums:
        known = read_meta(connection, path)
    if not known.keeps_sums:
        return known, None
    if row is None:
        raise DamageError("its sums are missing")
    return known, Sums.from_text(row[0], known.checksum)


def first_commit_of(log: Log, connection: sqlite3.Connection, about: Vouched) -> int | None:
    """Return the number of the first transaction in a log; None if that cannot be found."""
    ((root,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'meta'")
    if root not in log.first:
        return None
    for text in re.findall(rb"[0-9a-f]{8} \{[^{}]*\}", log.page(log.first[root])):
        with suppress(DamageError):
            return Sums.from_text(text.decode("ascii", "replace"), about.checksum).commits
    return None


def _version(connection: sqlite3.Connection, rows: dict[str, str], path: Path) -> int:
    """Return the version of the schema; one that was altered is not taken for another release's."""
    if _SUMS in rows and rows["schema_version"] != str(SCHEMA_VERSION):
        assumed = rows | {"schema_version": str(SCHEMA_VERSION)}
        with_sums = Sums.from_text  # Raises if it is not ours in any other way.
        try:
            with_sums(rows[_SUMS], _checksum(connection, assumed))
        except DamageError:
            pass
        else:
            raise DamageError("its version was altered")
    version = int(rows["schema_version"])
    if version == _WITHOUT_CHECKSUMS and _SUMS not in rows:
        return version
    check_schema_version(str(path), version, SCHEMA_VERSION)
    return version


def _checksum(connection: sqlite3.Connection, rows: dict[str, str]) -> int:
    named = ", ".join(f"'{name}'" for name in _NAMES)
    definitions = connection.execute(
        f"SELECT type, name, tbl_name, sql FROM sqlite_master WHERE name IN ({named}) ORDER BY name"
    ).fetchall()
    stored = sorted((name, value) for name, value in rows.items() if name != _SUMS)
    return zlib.crc32(ascii((stored, definitions)).encode())
