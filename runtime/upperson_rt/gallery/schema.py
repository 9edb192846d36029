"""The SQLite file of a gallery: connecting, creating, and telling it from anything else."""

import datetime
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import upperson_rt
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery.rows import attribute_equals

__all__ = [
    "DATABASE_FILE",
    "SCHEMA_VERSION",
    "Meta",
    "connect",
    "create",
    "read_meta",
    "translated",
]

DATABASE_FILE = "gallery.sqlite"
SCHEMA_VERSION = 2

_TABLES = (
    "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL)",
    # AUTOINCREMENT: an id is never used again, so indexes built beside the table stay right.
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
    "CREATE INDEX items_by_camera_time ON items (camera, time)",
    "CREATE INDEX items_by_time ON items (time)",
    "CREATE INDEX items_by_track ON items (track)",
)


@dataclass(frozen=True)
class Meta:
    """The table `meta`."""

    schema_version: int
    fingerprint: str
    embed_dim: int
    created: str
    generator: str


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Turn errors of SQLite into ours, naming the file."""
    try:
        yield
    except sqlite3.OperationalError as error:  # Locked, disk full, read-only.
        raise InputError(f"cannot use gallery {path}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise IntegrityError(
            f"gallery {path} is damaged or not a gallery ({error}); it was left as it is: restore "
            "it from a copy, or index again into another folder"
        ) from error


def connect(path: Path) -> sqlite3.Connection:
    """Open an existing database file for reading and writing; errors are SQLite's own."""
    connection = sqlite3.connect(
        f"file:{quote(str(path.absolute()))}?mode=rw",
        uri=True,
        timeout=30.0,
        isolation_level=None,  # Transactions are written out.
        check_same_thread=False,  # Gallery holds a lock.
    )
    connection.execute("PRAGMA synchronous = FULL")
    connection.create_function("attribute_equals", 3, attribute_equals, deterministic=True)
    return connection


def create(connection: sqlite3.Connection, fingerprint: str, embed_dim: int) -> None:
    """Make the tables in a database that has none, all or nothing; errors are SQLite's own."""
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("BEGIN IMMEDIATE")
    try:
        if not _tables(connection):  # Else another process was faster.
            for statement in _TABLES:
                connection.execute(statement)
            meta = {
                "schema_version": str(SCHEMA_VERSION),
                "fingerprint": fingerprint,
                "embed_dim": str(embed_dim),
                "created": datetime.datetime.now(datetime.timezone.utc).isoformat("T", "seconds"),
                "generator": f"upperson-rt {upperson_rt.__version__}",
            }
            connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        connection.execute("COMMIT")
    except BaseException:
        connection.execute("ROLLBACK")
        raise


def read_meta(connection: sqlite3.Connection, path: Path) -> Meta | None:
    """Return the content of `meta`, or None for a database without any table.

    Raises:
        InputError: A newer schema than this program knows.
        IntegrityError: Some other database.
    """
    tables = _tables(connection)
    if not tables:
        return None
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
            fingerprint=rows["fingerprint"],
            embed_dim=int(rows["embed_dim"]),
            created=rows["created"],
            generator=rows["generator"],
        )
    except (KeyError, ValueError, sqlite3.OperationalError) as error:
        raise foreign from error


def _tables(connection: sqlite3.Connection) -> set[str]:
    rows = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
    return {str(name) for (name,) in rows}
