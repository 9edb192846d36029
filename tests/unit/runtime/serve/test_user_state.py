"""The user state store is as it was written, or refused."""

import shutil
import sqlite3
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest

from tests.helpers.refused import refused
from upperson_console.user_state import QueryPicture, UserState
from upperson_rt.errors import IntegrityError

VECTOR = np.full(16, 0.25, np.float32)
OLD_FILE = """
PRAGMA journal_mode = WAL;
CREATE TABLE pictures (
    id TEXT PRIMARY KEY, sha256 TEXT NOT NULL, fingerprint TEXT NOT NULL, vector BLOB NOT NULL,
    jpeg BLOB NOT NULL, width INTEGER NOT NULL, height INTEGER NOT NULL, added REAL NOT NULL
);
CREATE TABLE saved (
    id INTEGER PRIMARY KEY AUTOINCREMENT, user TEXT NOT NULL, name TEXT NOT NULL,
    address TEXT NOT NULL, added REAL NOT NULL, UNIQUE (user, name)
);
CREATE TABLE marks (
    user TEXT NOT NULL, question TEXT NOT NULL, item INTEGER NOT NULL, yes INTEGER NOT NULL,
    added REAL NOT NULL, PRIMARY KEY (user, question, item)
);
INSERT INTO pictures VALUES ('p', 'ab', 'space', unhex_vector, X'FFD86A706567', 3, 4, 1e9);
INSERT INTO saved VALUES (1, 'ann', 'red coats', '?q=a+red+coat', 1000000000.25);
INSERT INTO saved VALUES (2, 'j\u00fcrgen', 'Stra\u00dfe \U0001fae8', '?q=b', 1000000001.5);
INSERT INTO marks VALUES ('ann', 'question', 3, 1, 1e9);
INSERT INTO marks VALUES ('ann', 'question', 1, 1, 1000000000.5);
INSERT INTO marks VALUES ('ann', 'question', 2, 0, 1e9);
""".replace("unhex_vector", f"X'{VECTOR.tobytes().hex()}'")
"""A file as the release without checksums made it."""
OLD_SUMS = {
    "pictures": [471221202],
    "saved": [4219629890, 3213111734],
    "marks": [3372941223, 3234401555, 2961239662],
}
"""The same in every release of Python: one that prints an emoji and one that escapes it."""


def older_store(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.executescript(OLD_FILE)
    return path


def sums(path):
    with closing(sqlite3.connect(path)) as connection:
        return {
            table: [sum_ for (sum_,) in connection.execute(f"SELECT checksum FROM {table}")]
            for table in ("pictures", "saved", "marks")
        }


@pytest.fixture
def old_file(tmp_path):
    return older_store(tmp_path / "console.sqlite")


def picture(sha256="0" * 64):
    return QueryPicture(id="p", sha256=sha256, vector_D=VECTOR, jpeg=b"\xff\xd8jpeg", size=(3, 4))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "state" / "console.sqlite"
    with closing(UserState(path)) as store:
        store.keep_picture(picture(), "space")
        store.save("ann", "red coats", "?q=red")
        store.save("ann", "red coats", "?q=a+red+coat")
        store.change_marks("ann", "question", {3: True, 1: True, 2: False})
    return path


def test_a_new_file_is_for_its_owner_alone(file):
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (file, file.parent)]
    assert modes == [0o600, 0o700]


def test_what_was_written_is_there_again(file):
    with closing(UserState(file)) as store:
        assert store._connection.execute("PRAGMA synchronous").fetchone() == (2,), "full"
        assert store.picture("p", "another space") is None
        assert store.picture("p", "space").vector_D.tolist() == VECTOR.tolist()
        (saved,) = store.saved("ann")
        assert (saved.name, saved.address) == ("red coats", "?q=a+red+coat")
        assert store.marks("ann", "question") == {3: True, 1: True, 2: False}


def test_old_pictures_go_but_those_of_saved_searches(file):
    with closing(UserState(file)) as store:
        store.keep_picture(replace(picture(), id="q"), "space")
        now = time.time()
        store.save("ann", "like this", "?picture=p&k=5")
        store.forget_pictures(now - 60)
        assert store.picture("q", "space") is not None
        store.keep_picture(replace(picture(), id="wanted"), "space")
        store.set_approval("a", '{"picture": "wanted"}')
        in_use = sqlite3.connect(file)
        in_use.execute("UPDATE pictures SET added = added - 9, checksum = NULL")
        in_use.commit()
        in_use.close()
        store.forget_pictures(now - 1)
        gone = [store.picture(id_, "space") is None for id_ in ("p", "q", "wanted")]
        assert gone == [False, True, False]
        assert file.with_name(f"{file.name}-wal").stat().st_size == 0
        store.forget_pictures(now + 60)
        assert store.picture("wanted", "space") is None


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (VECTOR.tobytes()[:4], b"\0\0\0\0"),
        (b"red coats", b"\xff\xfe\xff\xfe\xff\xfe\xff\xfe\xff"),
        (b"ann", b"bob"),
        (b"?q=a+red", b"?q=a+rad"),
        (b"question", b"Question"),
        (b"\x03\x04", b"\x04\x03"),
        (b"CREATE TABLE marks", b"CREATE TABLE harks"),
        (b"SQLite format 3", b"SQLite format 9"),
    ],
)
def test_damage_is_refused(file, old, new):
    content = file.read_bytes()
    assert content.count(old) > 0
    file.write_bytes(content.replace(old, new))
    with refused("user_state_damaged", IntegrityError, path=file):
        UserState(file)


def is_upgraded(path):
    test_what_was_written_is_there_again(path)
    return sums(path) == OLD_SUMS


def test_a_file_of_an_older_release_gets_checksums_also_if_half_upgraded(old_file):
    for table in ("pictures", "saved", "marks"):
        with closing(sqlite3.connect(old_file)) as connection:
            connection.execute(f"ALTER TABLE {table} ADD COLUMN checksum INTEGER")
        assert is_upgraded(shutil.copy(old_file, old_file.with_name(table)))
    assert is_upgraded(old_file)
    test_damage_is_refused(old_file, b"a+red", b"a+rad")


def test_an_upgrade_is_done_as_a_whole_or_not_at_all(old_file):
    program = (
        "import os, sys; from pathlib import Path\n"
        "from upperson_console.user_state import UserState\n"
        "UserState._sum_up = lambda *_: os._exit(9)\n"
        "UserState(Path(sys.argv[1]))"
    )
    killed = subprocess.run([sys.executable, "-c", program, old_file], timeout=300)
    assert killed.returncode == 9
    with closing(sqlite3.connect(old_file)) as connection:
        (tables,) = connection.execute("SELECT group_concat(sql) FROM sqlite_master").fetchone()
    assert "checksum" not in tables
    assert is_upgraded(old_file)


def test_consoles_that_start_at_once_upgrade_once(tmp_path):
    with ThreadPoolExecutor(4) as pool:
        for place in range(5):
            path = older_store(tmp_path / f"{place}.sqlite")
            for store in pool.map(UserState, [path] * 4):
                store.close()
            assert sums(path) == OLD_SUMS


def test_an_older_release_cannot_leave_stale_sums(old_file):
    UserState(old_file).close()
    statements = (  # As that release writes.
        "INSERT OR REPLACE INTO pictures VALUES ('q', 'ab', 'space', X'00', X'00', 3, 4, 1e9)",
        "INSERT INTO saved (user, name, address, added) VALUES ('ann', 'red coats', '?q=new', 1e9) "
        "ON CONFLICT (user, name) DO UPDATE SET address = excluded.address",
        "INSERT OR REPLACE INTO marks VALUES ('ann', 'question', 3, 0, 1e9)",
    )
    with closing(sqlite3.connect(old_file)) as connection:
        for statement in statements:
            connection.execute("BEGIN")
            with pytest.raises(sqlite3.OperationalError, match=r"sum_of|has \d columns but"):
                connection.execute(statement)
            connection.rollback()
    test_what_was_written_is_there_again(old_file)
