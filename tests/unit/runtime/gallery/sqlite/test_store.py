"""A gallery in a folder beyond the contract: how it is made, what it leaves alone and finds."""

import sqlite3
from contextlib import closing

import numpy as np
import pytest

from tests.helpers.gallery_places import (
    DIM,
    FINGERPRINT,
    keys_of,
    open_new,
    put,
    save,
    some_vectors,
    sql,
)
from tests.helpers.refused import refused
from upperson_maintenance.backup import back_up, restore
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery import Filter, Gallery, Item, TrackSpan
from upperson_rt.gallery.sqlite import schema
from upperson_rt.gallery.sqlite.schema import ROW


def test_it_is_durable_and_no_id_is_used_again(gallery):
    with Gallery.open(gallery.path) as second:
        for opened in (gallery, second):
            with opened._database.writing() as connection:
                for pragma, value in (("journal_mode", "wal"), ("synchronous", 2)):
                    assert connection.execute(f"PRAGMA {pragma}").fetchone() == (value,)
    put(gallery, range(3))
    assert gallery.delete(["k2", "missing"]) == 1
    put(gallery, ["later"])
    assert gallery.ids(["k0", "k1", "k2", "later"]) == {"k0": 1, "k1": 2, "later": 4}


# Making and opening


def test_a_gallery_that_is_not_there_or_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save(tmp_path, "file", "demo/report.html", "demo/bundle/bundle.json")
    with refused("gallery_not_made", InputError):
        open_new("file")
    open_new("demo/gallery").close()
    save(tmp_path, "demo/gallery/crops/a.jpg")
    near = "demo/gallery"
    for wrong, found in (
        ("nowhere", None), ("demo/bundle", None), ("demo", near),
        *((f"{near}/{name}", f"{tmp_path}/{near}") for name in ("crops", "gallery.sqlite", "none")),
    ):  # fmt: skip
        with refused("gallery_not_found", InputError, path=wrong, near=found):
            Gallery.open(wrong)
    assert not (tmp_path / "nowhere").exists()


def test_a_creation_happens_completely_or_not_at_all(tmp_path, monkeypatch):
    """And leaves a faster one alone."""

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_new(tmp_path)
    assert [*tmp_path.iterdir()] == []
    create = schema.create

    def slow(connection, *space):
        create(connection, *space)
        with monkeypatch.context() as patch:
            patch.setattr(schema, "create", create)
            with open_new(tmp_path) as faster:
                put(faster, range(3))

    monkeypatch.setattr(schema, "create", slow)
    with open_new(tmp_path) as gallery:
        assert gallery.count() == 3


def test_unowned_files_are_never_overwritten(tmp_path):
    path, diary = tmp_path / "gallery.sqlite", b"my diary, not a database" * 50
    path.write_bytes(diary)
    for create in (False, True):
        with refused("gallery_damaged", IntegrityError):
            open_new(tmp_path, create=create)
        assert path.read_bytes() == diary
    path.unlink()
    for table in ("contacts", "meta", "items"):
        sql(tmp_path, f"CREATE TABLE {table} (x)")
        for create in (False, True):
            with refused("not_a_gallery", IntegrityError):
                open_new(tmp_path, create=create)


@pytest.mark.parametrize("version", [5, 3, 1])
def test_another_schema_is_refused(gallery, version):
    sql(gallery.path, "UPDATE meta SET value = ? WHERE name = 'schema_version'", version)
    for create in (False, True):
        with refused("version_altered", IntegrityError):
            open_new(gallery.path, create=create)
    sql(gallery.path, "DELETE FROM meta WHERE name = 'sums'")
    for create in (False, True):
        with pytest.raises(IntegrityError if version == 3 else InputError):
            open_new(gallery.path, create=create)


# Filters and states


def test_a_null_character_in_an_attribute_is_only_text(gallery):
    odd = "a\x00b"
    gallery.add([Item(key="a", attributes={odd: odd}), Item(key="b")], some_vectors(2))
    assert keys_of(gallery.items(Filter(attributes={odd: odd}))) == ["a"]
    assert gallery.count(Filter(attributes={"a": "a"})) == 0


def test_an_error_that_is_kept_does_not_keep_the_state_it_saw(gallery):
    put(gallery, range(5))
    sql(gallery.path, "UPDATE items SET box = '1,2' WHERE key = 'k1'")
    errors = []
    for _ in range(3):
        with refused("row_altered", IntegrityError, id=2) as error:
            list(gallery.items())
        errors.append(error)
    sql(gallery.path, "UPDATE items SET box = NULL WHERE key = 'k1'")
    gallery.delete(["k1"])
    walk = gallery.items()
    next(walk)
    gallery.delete(["k2"])
    walk.close()
    assert [item.key for item in gallery.items()] == ["k0", "k3", "k4"]
    assert len(errors) == 3


def test_tracks_are_ranked_as_all_their_pictures(gallery, monkeypatch):
    monkeypatch.setattr("upperson_rt.gallery.sqlite.index._SEAL_ROWS", 32)
    put(
        gallery, range(400), 3, camera=lambda n: f"c{n % 2}",
        track=lambda n: f"t{n % 11}" if n % 5 else None,
        time=lambda n: None if n % 3 else float(n),
    )  # fmt: skip
    query = some_vectors(1, 8)
    for where in (None, Filter(camera="c1"), Filter(since=50, until=300)):
        expected, times = [], {}
        for hit in gallery.search(query, 400, where)[0]:
            track = (hit.item.camera, hit.item.track)
            if track not in times or hit.item.track is None:
                expected.append(hit.id)
            times.setdefault(track, []).append(hit.item.time)
        for k in (1, 5, 30, 400):
            (hits,) = gallery.search(query, k, where, by_track=True)
            assert [hit.id for hit in hits] == expected[:k]
            for hit in hits:
                taken = times[hit.item.camera, hit.item.track]
                known = [time for time in taken if time is not None] or [None]
                span = TrackSpan(first_time=min(known), last_time=max(known), pictures=len(taken))
                assert hit.span == (None if hit.item.track is None else span)


# What is wrong


def test_verify_names_what_is_wrong(gallery):
    put(gallery, range(5))
    wrong = {
        "k0": ("vector", np.full(DIM, np.nan, "<f2").tobytes(), "length nan"),
        "k1": ("vector", b"\0\x11", "of 2 bytes, expected 32"),
        "k3": ("box", "1,2", "metadata: box"),
        "k4": ("attributes", "{", "metadata"),
    }
    for key, (column, value, _) in wrong.items():
        sql(gallery.path, f"UPDATE items SET {column} = ? WHERE key = ?", value, key)
    *problems, last = gallery.verify()
    for problem, (key, (_, _, text)) in zip(problems, wrong.items(), strict=True):
        assert problem.startswith(f"item {key}:")
        assert text in problem
    assert "the log of changes" in last  # SQL wrote to it.
    sql(gallery.path, "UPDATE items SET camera = CAST(x'67c3' AS TEXT) WHERE key = 'k2'")
    sql(gallery.path, "UPDATE items SET key = CAST(x'c36b' AS TEXT) WHERE key = 'k4'")
    problems = gallery.verify()
    for key in ("k2", "?k"):
        assert f"item {key}: malformed metadata: not UTF-8" in problems
    with refused("gallery_damaged", IntegrityError):
        list(gallery.items())


ALTERED = {
    **dict.fromkeys(("key", "source", "camera", "track", "crop", "variant"), "'other'"),
    "time": "time + 1e-3",
    "box": "'1,2,3,5'",
    "attributes": "'{\"floor\": 2}'",
    "vector": "CAST(x'0000' || substr(vector, 3) AS BLOB)",
    "checksum": "checksum + 1",
}


@pytest.mark.parametrize("column", ALTERED)
def test_what_was_altered_is_never_an_answer(gallery, column):
    put(
        gallery, range(5), variant="int8", source="s", camera="c", time=float, track="t",
        box=(1, 2, 3, 4), crop="{}.jpg".format, attributes={"floor": 1},
    )  # fmt: skip
    sql(gallery.path, f"UPDATE items SET {column} = {ALTERED[column]} WHERE id = 3")
    assert any("altered" in line or "of length" in line for line in gallery.verify())
    for use in (
        lambda opened: opened.search(some_vectors(1), 5),
        lambda opened: opened.search(some_vectors(1), 5, Filter(attributes={"floor": 1})),
        lambda opened: list(opened.vectors()),
        lambda opened: opened.rebuild(),
        *([] if column == "vector" else [lambda opened: list(opened.items())]),
    ):
        with Gallery.open(gallery.path) as opened, pytest.raises(IntegrityError):
            use(opened)


def test_a_picture_whose_vector_is_damaged_can_be_replaced_or_deleted(gallery):
    put(gallery, range(5))
    good = gallery.search(some_vectors(1), 5)
    for repair in (lambda: put(gallery, range(5)), lambda: gallery.delete(["k2"])):
        sql(gallery.path, "UPDATE items SET vector = zeroblob(32) WHERE id = 3")
        sql(gallery.path, "DELETE FROM changes WHERE seq = (SELECT max(seq) FROM changes)")
        sql(gallery.path, "UPDATE sqlite_sequence SET seq = seq - 1 WHERE name = 'changes'")
        with Gallery.open(gallery.path) as opened, refused("vector_altered", IntegrityError, id=3):
            opened.search(some_vectors(1), 5)
        repair()
        assert gallery.verify() == []
        found = gallery.search(some_vectors(1), 5)[0]
        assert found == [hit for hit in good[0] if gallery.ids([hit.item.key])]


MISSING = {
    "DELETE FROM items WHERE id = 3": ("search", "camera", "items", "add", "check"),
    """UPDATE meta SET value = replace(value, '"rows": 5', '"rows": 4')""": ("search", "count"),
    "UPDATE meta SET value = 'another' WHERE name = 'fingerprint'": ("count",),
    "UPDATE meta SET value = '32' WHERE name = 'embed_dim'": ("count",),
    "DELETE FROM meta WHERE name = 'sums'": ("count",),
    "DROP INDEX items_by_time": ("count",),
    "DROP TRIGGER items_deleted": ("count",),
}
WAYS = {
    "search": lambda opened: opened.search(some_vectors(1), 1),
    "camera": lambda opened: opened.search(some_vectors(1), 1, Filter(camera="c")),
    "items": lambda opened: list(opened.items()),
    "count": lambda opened: opened.count(),
    "add": lambda opened: put(opened, ["new"]),
    "check": lambda opened: opened.check(),
}


@pytest.mark.parametrize("statement", MISSING)
def test_what_is_missing_is_noticed(gallery, statement):
    put(gallery, range(5), camera="c")
    gallery.close()
    sql(gallery.path, statement)
    for name in MISSING[statement]:
        with pytest.raises(IntegrityError), Gallery.open(gallery.path) as opened:
            WAYS[name](opened)


# Galleries that were made before there were checksums


@pytest.fixture
def older(tmp_path):
    """The folder of a gallery as it was made before, with 40 pictures."""
    folder = tmp_path / "older"
    with open_new(tmp_path / "new") as opened:
        put(opened, range(40), camera="c")
        opened.delete(["k7", "k39"])
    with open_new(folder) as made:
        identity = made._database.meta.identity
    (folder / "gallery.sqlite").unlink()
    with closing(sqlite3.connect(folder / "gallery.sqlite")) as connection, connection:
        for statement in schema._TABLES:
            connection.execute(statement)
        connection.execute("ATTACH ? AS new", (str(tmp_path / "new" / "gallery.sqlite"),))
        columns = f"{ROW}, vector"
        connection.execute(f"INSERT INTO items ({columns}) SELECT {columns} FROM new.items")
        connection.execute("INSERT INTO items (key, attributes, vector) VALUES ('x', '{}', x'00')")
        connection.execute("DELETE FROM items WHERE key = 'x'")
        meta = {
            "schema_version": 2, "identity": identity, "fingerprint": FINGERPRINT,
            "embed_dim": DIM, "created": "2026-01-01T00:00:00+00:00", "generator": "upperson-rt 0",
        }  # fmt: skip
        connection.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
    return folder


def shown(gallery):
    filtered = gallery.search(some_vectors(1), 9, Filter(camera="c"))
    return gallery.search(some_vectors(2, 5), 50), filtered


def test_an_older_gallery_is_backed_up_whole(older, tmp_path):
    for _ in range(2):
        assert not back_up(older, tmp_path / "copy").is_increment
    restore(tmp_path / "copy", tmp_path / "back")
    with Gallery.open(older) as gallery, Gallery.open(tmp_path / "back") as back:
        assert shown(gallery) == shown(back)
        assert back.info().schema_version == 2


@pytest.mark.parametrize("change", ["delete", "rebuild", "bin"])
def test_an_older_gallery_is_read_and_gets_checksums_when_it_is_written(older, caplog, change):
    with open_new(older) as gallery, open_new(older) as other:
        assert gallery.info().schema_version == 2
        before = shown(gallery)
        assert gallery.verify() == []
        assert shown(other) == before
        if change == "rebuild":
            gallery.rebuild()
        elif change == "bin":
            assert gallery.bin.entries() == []
            assert gallery.bin.add(["missing"], "ada", "why") == 0
        else:
            assert gallery.delete(["missing"]) == 0
        assert "giving gallery" in caplog.text
        for opened in (gallery, other):
            assert shown(opened) == before
            assert (opened.count(), opened.info().schema_version) == (38, 4)
        put(gallery, ["new"], 9)
        assert gallery.ids(["new"]) == {"new": 41}  # 40 has been used.
        gallery.delete(["new"])
        assert gallery.verify() == []
    with open_new(older) as gallery:
        assert shown(gallery) == before
    assert not [line for line in caplog.messages if "not of this database" in line]
    sql(older, "UPDATE items SET camera = 'd' WHERE key = 'k1'")
    with open_new(older) as gallery, refused("row_altered", IntegrityError):
        shown(gallery)


def test_a_damaged_older_gallery_gets_none(older):
    ((vector,),) = sql(older, "SELECT vector FROM items WHERE id = 3")
    for change in ("vector = zeroblob(32)", "vector = 'text'", "box = '1,2'"):
        sql(older, f"UPDATE items SET {change} WHERE id = 3")
        with open_new(older) as gallery:
            for use in (shown, lambda opened: put(opened, ["new"])):
                with pytest.raises(IntegrityError):
                    use(gallery)
            assert gallery.info().schema_version == 2
            assert len(gallery.verify()) == 1
        sql(older, "UPDATE items SET vector = ? WHERE id = 3", vector)


def test_programs_that_know_nothing_of_checksums_cannot_write(gallery):
    """A release before them, for one, that had the gallery open when it got them."""
    put(gallery, range(3))
    with closing(sqlite3.connect(gallery.path / "gallery.sqlite")) as connection:
        for statement in (
            "DELETE FROM items WHERE id = 1",
            "UPDATE items SET camera = 'c'",
            "INSERT INTO items (key, attributes, vector) VALUES ('x', '{}', x'00')",
        ):
            with pytest.raises(sqlite3.OperationalError, match="upperson_rt_keeps_checksums"):
                connection.execute(statement)
    assert gallery.verify() == []
