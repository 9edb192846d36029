"""The tables of a gallery's SQLite file: made, brought up to date, and read."""

import datetime
import logging
import os
import sqlite3
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import upperson_rt
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery.connections import connect, translated
from upperson_rt.locks import locked_folder

__all__ = ["SCHEMA_VERSION", "Meta", "make", "migrate", "read_meta"]

SCHEMA_VERSION = 2

_LOG = logging.getLogger(__name__)

_SINCE_2 = (
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
    *_SINCE_2,
)
_FROM_1_TO_2 = (
    "DROP INDEX IF EXISTS items_by_camera_time",
    "DROP INDEX IF EXISTS items_by_time",
    "DROP INDEX IF EXISTS items_by_track",
    "ALTER TABLE items ADD COLUMN crop TEXT",
    *_SINCE_2,
)


@dataclass(frozen=True)
class Meta:
    """The table `meta`."""

    schema_version: int
    identity: str
    """Of this one gallery; empty before version 2."""
    fingerprint: str
    embed_dim: int
    created: str
    generator: str


def make(file: Path, fingerprint: str, embed_dim: int) -> None:
    """Make a gallery's database, completely or not at all; one that is there is left alone.

    Raises:
        InputError: It cannot be made.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as name:
            temporary = Path(name, file.name)
            temporary.touch()
            with translated(temporary), closing(connect(temporary)) as connection:
                _create(connection, fingerprint, embed_dim)
            with locked_folder(file.parent):
                if not file.exists():  # Else another process was faster.
                    os.rename(temporary, file)
    except OSError as error:
        raise InputError(f"cannot make gallery {file.parent}: {error.strerror}") from error


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring an older schema up to date in one transaction; errors are SQLite's own."""
    with _transaction(connection):
        meta = read_meta(connection, path)
        if meta.schema_version >= SCHEMA_VERSION:
            return  # Another process was faster.
        for statement in _FROM_1_TO_2:
            connection.execute(statement)
        meta_rows = {"schema_version": str(SCHEMA_VERSION), "identity": uuid.uuid4().hex}
        connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", meta_rows.items())
    _LOG.warning(
        "gallery %s was brought from schema version %d to %d", path, meta.schema_version,
        SCHEMA_VERSION,
    )  # fmt: skip


def read_meta(connection: sqlite3.Connection, path: Path) -> Meta:
    """Return the content of `meta`.

    Raises:
        InputError: A newer schema than this program knows.
        IntegrityError: Some other database.
    """
    tables = _tables(connection)
    foreign = IntegrityError(
        f"{path} is a database, but not a gallery; it was left as it is: name another folder "
        "with  --gallery"
    )
    if not {"meta", "items"} <= tables:
        raise foreign
    try:
        rows = dict(connection.execute("SELECT name, value FROM meta"))
        version = int(rows["schema_version"])
        if version > SCHEMA_VERSION:
            raise InputError(
                f"gallery {path} has schema version {version}, this program reads up to "
                f"{SCHEMA_VERSION}: update it with  pip install -U upperson-rt"
            )
        return Meta(
            schema_version=version,
            identity=rows["identity"] if version > 1 else "",
            fingerprint=rows["fingerprint"],
            embed_dim=int(rows["embed_dim"]),
            created=rows["created"],
            generator=rows["generator"],
        )
    except (KeyError, ValueError) as error:
        raise foreign from error
    except sqlite3.OperationalError as error:
        if "no such column" in str(error):
            raise foreign from error
        raise


def _create(connection: sqlite3.Connection, fingerprint: str, embed_dim: int) -> None:
    """Make the tables in an empty database; errors are SQLite's own."""
    connection.execute("PRAGMA journal_mode = WAL")
    with _transaction(connection):
        for statement in _TABLES:
            connection.execute(statement)
        meta = {
            "schema_version": str(SCHEMA_VERSION),
            "identity": uuid.uuid4().hex,
            "fingerprint": fingerprint,
            "embed_dim": str(embed_dim),
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
            "generator": f"upperson-rt {upperson_rt.__version__}",
        }
        connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _tables(connection: sqlite3.Connection) -> set[str]:
    rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    return {str(name) for (name,) in rows}
