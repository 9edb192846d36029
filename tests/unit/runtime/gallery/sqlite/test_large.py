"""Checks of galleries that are too large to be read through before each use."""

import json
import os
import shutil
import time

import pytest

from tests.helpers.gallery_places import open_new, put, sql
from tests.helpers.refused import refused
from tests.unit.runtime.gallery.sqlite.conftest import put_of_cameras
from upperson_rt.errors import IntegrityError
from upperson_rt.gallery import Filter, Gallery
from upperson_rt.gallery.sqlite import database, schema
from upperson_rt.gallery.sqlite.free_pages import FreePages

WHERE = Filter(camera="c1")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(database, "LARGE_ROWS", 100)
    with open_new(tmp_path / "gallery") as gallery:
        put_of_cameras(gallery, 200)
    return tmp_path / "gallery"


@pytest.fixture
def read_through(monkeypatch):
    """The number of times that a file was read through."""
    calls, problems = [], schema.structural_problems

    def counted(connection, of_items=False):
        calls.append(of_items)
        return problems(connection, of_items)

    monkeypatch.setattr(schema, "structural_problems", counted)
    return calls


def test_a_filter_does_not_wait_for_the_check_but_a_deletion_does(folder):
    def count_twice():
        with Gallery.open(folder) as gallery:
            assert gallery.count(WHERE) == 67
            gallery._database._checker.join(30)
            return gallery.count(WHERE)

    assert count_twice() == 67
    sql(folder, "UPDATE items SET checksum = checksum + 1 WHERE id = 5")
    with refused("rows_missing", IntegrityError):
        count_twice()
    with Gallery.open(folder) as gallery, refused("rows_missing", IntegrityError):
        gallery.delete(["k7"])  # This waits for it.


def test_a_file_that_was_closed_in_order_is_not_read_through_again(folder, read_through):
    def add():
        with Gallery.open(folder) as gallery:
            put(gallery, [f"new{time.monotonic_ns()}"])
            if gallery._database._checker is not None:
                gallery._database._checker.join(30)
        found = [*read_through]
        read_through.clear()
        return found

    note = folder / "gallery.sqlite-checked"
    assert add() == []  # The process that made it has read through it.
    assert add() == []
    made = json.loads(note.read_bytes())
    for change in (
        lambda: note.write_text(json.dumps({**made, "time": made["time"] - 8 * 86_400})),
        lambda: os.utime(folder / "gallery.sqlite"),
        lambda: note.write_text("{"),
        note.unlink,
    ):
        change()
        assert add() == [True]
    assert add() == []


@pytest.fixture
def killed(folder, tmp_path):
    """Files as they are when a process is killed after a deletion; in the log or in the file."""

    def make(in_log):
        copy = tmp_path / f"killed-{in_log}"
        with Gallery.open(folder) as gallery:
            put(gallery, ["large"], source="x" * 90_000)
            if in_log:
                with gallery.database.writing() as transaction:
                    where = "FROM items WHERE key = 'large'"
                    rows = transaction.execute(f"SELECT {schema.ROW}, checksum {where}").fetchall()
                    transaction.execute(f"DELETE {where}")
                    transaction.sums.remove(rows)
                    transaction.sums.seq += 1
            else:
                gallery.delete(["large"])
            shutil.copytree(folder, copy)
        (copy / "gallery.sqlite-checked").unlink(missing_ok=True)
        return copy

    return make


@pytest.mark.parametrize("in_log", [True, False])
def test_a_change_does_not_wait_where_free_pages_are_empty(killed, read_through, in_log):
    folder = killed(in_log)
    assert ((folder / "gallery.sqlite-wal").stat().st_size > 0) == in_log
    read_through.clear()
    with Gallery.open(folder) as gallery:
        put(gallery, ["new"])
        gallery.database._checker.join(30)
        assert gallery.count() == 201
    assert read_through == [True]  # Beside it.
    assert sql(folder, "PRAGMA freelist_count") != [(0,)]


def test_a_change_waits_where_a_free_page_has_content(killed, read_through):
    folder = killed(False)
    with open(folder / "gallery.sqlite", "r+b") as file:
        free = FreePages.read(file.fileno())
        file.seek((int(free.leaves[3]) - 1) * free.page_bytes + 100)
        file.write(b"row")
    read_through.clear()
    with Gallery.open(folder) as gallery:
        put(gallery, ["new"])
    assert read_through[0] is False


def test_a_list_of_free_pages_that_names_a_row_is_refused(killed):
    folder = killed(False)
    with open(folder / "gallery.sqlite", "r+b") as file:
        free = FreePages.read(file.fileno())
        file.seek((next(iter(free.trunks)) - 1) * free.page_bytes + 8)
        file.write((5).to_bytes(4, "big"))
    before = (folder / "gallery.sqlite").read_bytes()
    with Gallery.open(folder) as gallery, refused("gallery_damaged", IntegrityError):
        put(gallery, ["new"])
    assert (folder / "gallery.sqlite").read_bytes() == before


def test_the_end_of_a_gallery_ends_its_check(folder, monkeypatch):
    def slow(connection, sums):
        connection.execute(
            "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c LIMIT 1000000000) "
            "SELECT sum(n) FROM c"
        ).fetchone()

    monkeypatch.setattr(schema, "check_totals", slow)
    (folder / "gallery.sqlite-checked").unlink()
    began = time.monotonic()
    with Gallery.open(folder) as gallery:
        gallery.count(WHERE)
        while gallery._database._checking is None and time.monotonic() - began < 30:
            pass
    assert not gallery._database._checker.is_alive()
    assert time.monotonic() - began < 30
