"""A gallery in a folder beyond the contract: how it is made, what it leaves alone and tells."""

import sqlite3
from contextlib import closing

import numpy as np
import pytest

from tests.helpers.gallery_places import DIM, FINGERPRINT, keys_of, some_vectors, sql, unit
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery import Filter, Gallery, Item, TrackSpan
from upperson_rt.gallery.sqlite import database


def items(count, **fields):
    return [Item(key=f"k{i}", **fields) for i in range(count)]


def open_(folder, create=True):
    return Gallery.open(folder, FINGERPRINT, DIM, create=create)


@pytest.fixture
def gallery(tmp_path):
    with open_(tmp_path / "gallery") as opened:
        yield opened


def test_database_is_durable(gallery):
    with open_(gallery.path, create=False) as second:
        for opened in (gallery, second):
            with opened._database.writing() as connection:
                assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
                assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_ids_are_never_used_again(gallery):
    gallery.add(items(3), some_vectors(3))
    assert gallery.delete(["k2", "nobody"]) == 1
    gallery.add([Item(key="later")], some_vectors(1))
    assert gallery.ids(["k0", "k1", "k2", "later"]) == {"k0": 1, "k1": 2, "later": 4}


def test_info_counts_the_bytes_of_its_files(gallery):
    gallery.add(items(3), some_vectors(3))
    files = [path.stat().st_size for path in gallery.path.iterdir()]
    assert gallery.info().size_bytes == sum(files) > 0


# Making and opening


def test_a_gallery_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot make gallery"):
        open_(tmp_path / "file")
    with pytest.raises(InputError, match=r"no gallery at .*upperson-rt index"):
        open_(tmp_path / "nowhere", create=False)
    assert not (tmp_path / "nowhere").exists()


def test_a_creation_happens_completely_or_not_at_all(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with open_(tmp_path) as gallery:
        assert gallery.count() == 0


def test_a_creation_leaves_a_faster_one_alone(tmp_path, monkeypatch):
    fill = database._fill

    def slow(connection, *space):
        fill(connection, *space)
        with monkeypatch.context() as patch:
            patch.setattr(database, "_fill", fill)
            with open_(tmp_path) as faster:
                faster.add(items(3), some_vectors(3))

    monkeypatch.setattr(database, "_fill", slow)
    with open_(tmp_path) as gallery:
        assert gallery.count() == 3


@pytest.mark.parametrize("create", [False, True])
def test_an_empty_file_is_damage(tmp_path, create):
    """Whatever was in it: its log may still be there, and SQLite would remove it."""
    with open_(tmp_path) as gallery:
        gallery.add(items(3), some_vectors(3))
        log = (tmp_path / "gallery.sqlite-wal").read_bytes()
    (tmp_path / "gallery.sqlite").write_bytes(b"")
    (tmp_path / "gallery.sqlite-wal").write_bytes(log)
    with pytest.raises(IntegrityError, match=r"is empty: it is damaged, .* left as it is"):
        open_(tmp_path, create)
    assert (tmp_path / "gallery.sqlite").read_bytes() == b""
    assert (tmp_path / "gallery.sqlite-wal").read_bytes() == log


@pytest.mark.parametrize("create", [False, True])
def test_foreign_files_are_never_overwritten(tmp_path, create):
    path = tmp_path / "gallery.sqlite"
    path.write_bytes(b"my diary, not a database" * 50)
    before = path.read_bytes()
    with pytest.raises(IntegrityError, match=r"damaged or not a gallery .* left as it is"):
        open_(tmp_path, create)
    assert path.read_bytes() == before

    path.unlink()
    sql(tmp_path, "CREATE TABLE contacts (name)")
    with pytest.raises(IntegrityError, match="a database, but not a gallery"):
        open_(tmp_path, create)
    sql(tmp_path, "CREATE TABLE meta (x)")
    sql(tmp_path, "CREATE TABLE items (x)")
    with pytest.raises(IntegrityError, match="a database, but not a gallery"):
        open_(tmp_path, create)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (3, "schema version 3, this program reads up to 2: update it with  pip"),
        (1, "schema version 1, this program reads 2 only: index the pictures again"),
    ],
)
@pytest.mark.parametrize("create", [False, True])
def test_another_schema_is_refused(gallery, version, message, create):
    sql(gallery.path, "UPDATE meta SET value = ? WHERE name = 'schema_version'", version)
    with pytest.raises(InputError, match=message):
        open_(gallery.path, create)


# Filters and states


def test_a_null_character_in_an_attribute_is_only_text(gallery):
    odd = "a\x00b"
    gallery.add([Item(key="a", attributes={odd: odd}), Item(key="b")], some_vectors(2))
    assert keys_of(gallery.items(Filter(attributes={odd: odd}))) == ["a"]
    assert gallery.count(Filter(attributes={"a": "a"})) == 0


def test_damaged_attributes_match_nothing(gallery):
    gallery.add([Item(key="a", attributes={"x": 1, "ü": 1}), Item(key="b")], some_vectors(2))
    sql(gallery.path, "UPDATE items SET attributes = '{\"x\": 1' WHERE key = 'a'")
    assert gallery.count(Filter(attributes={"x": 1})) == 0
    assert gallery.count(Filter(attributes={"ü": 1})) == 0
    assert "item a: malformed metadata" in gallery.verify()[0]


def test_items_and_vectors_are_one_state(gallery):
    vectors = some_vectors(8)
    gallery.add([Item(key=key) for key in "abcdefxy"], vectors)
    batches = gallery.vectors(batch_size=3)
    first, stored = next(batches)
    walk = gallery.items()
    assert next(walk).key == "a"
    gallery.prune(keep_newest=0)
    rest = [item.key for found, _ in batches for item in found]
    assert [item.key for item in first] + rest == list("abcdefxy")
    assert [item.key for item in walk] == list("bcdefxy")
    assert np.array_equal(stored, vectors[:3].astype(np.float16).astype(np.float32))
    assert gallery.count() == 0


def test_an_error_that_is_kept_does_not_keep_the_state_it_saw(gallery):
    gallery.add(items(5), some_vectors(5))
    sql(gallery.path, "UPDATE items SET box = '1,2' WHERE key = 'k1'")
    errors = []
    for _ in range(3):
        with pytest.raises(IntegrityError, match="malformed metadata") as error:
            list(gallery.items())
        errors.append(error)
    gallery.delete(["k1"])
    assert [item.key for item in gallery.items()] == ["k0", "k2", "k3", "k4"]
    walk = gallery.items()
    next(walk)
    gallery.delete(["k2"])
    walk.close()
    assert [item.key for item in gallery.items()] == ["k0", "k3", "k4"]
    assert len(errors) == 3


@pytest.mark.parametrize("searched", ["tail", "segments"])
def test_tracks_are_ranked_as_all_their_pictures(gallery, searched, monkeypatch):
    if searched == "segments":
        monkeypatch.setattr("upperson_rt.gallery.sqlite.index._SEAL_ROWS", 32)
    places = [(f"c{i % 2}", f"t{i % 11}" if i % 5 else None) for i in range(400)]
    gallery.add(
        [
            Item(key=str(i), camera=camera, track=track, time=None if i % 3 else float(i))
            for i, (camera, track) in enumerate(places)
        ],
        some_vectors(400, 3),
    )
    queries = some_vectors(2, 8)
    for where in (None, Filter(camera="c1"), Filter(since=50, until=300)):
        plain = gallery.search(queries, 400, where)
        for k in (1, 5, 30, 400):
            for hits, every in zip(
                gallery.search(queries, k, where, by_track=True), plain, strict=True
            ):
                expected, seen = [], {}
                for hit in every:
                    track = (hit.item.camera, hit.item.track)
                    if track not in seen or hit.item.track is None:
                        expected.append(hit.id)
                    seen.setdefault(track, []).append(hit.item.time)
                assert [hit.id for hit in hits] == expected[:k]
                for hit in hits:
                    if hit.item.track is None:
                        assert hit.span is None
                        continue
                    times = seen[hit.item.camera, hit.item.track]
                    timed = [time for time in times if time is not None]
                    assert hit.span == TrackSpan(
                        first_time=min(timed, default=None),
                        last_time=max(timed, default=None),
                        pictures=len(times),
                    )


def test_what_is_deleted_is_not_left_in_the_database(gallery):
    secret, vectors = "marker-of-a-person", some_vectors(200)
    gallery.add([Item(key=f"{i}-{secret}", source=secret * 4) for i in range(200)], vectors)
    stored = vectors.astype("<f2")[7].tobytes()

    def content():
        with closing(sqlite3.connect(gallery.path / "gallery.sqlite")) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return b"".join(path.read_bytes() for path in gallery.path.glob("gallery.sqlite*"))

    assert secret.encode() in content()
    assert stored in content()
    gallery.prune(keep_newest=0)
    assert secret.encode() not in content()
    assert stored not in content()


# What is wrong


def test_verify_names_what_is_wrong(gallery):
    gallery.add(items(5), some_vectors(5))
    assert gallery.verify() == []
    folder = gallery.path
    nan = np.full(DIM, np.nan, "<f2").tobytes()
    sql(folder, "UPDATE items SET vector = ? WHERE key = 'k0'", nan)
    sql(folder, "UPDATE items SET vector = x'0011' WHERE key = 'k1'")
    sql(folder, "UPDATE items SET vector = ? WHERE key = 'k2'", np.ones(DIM, "<f2").tobytes())
    sql(folder, "UPDATE items SET box = '1,2' WHERE key = 'k3'")
    sql(folder, "UPDATE items SET attributes = '{' WHERE key = 'k4'")
    problems = gallery.verify()
    assert [line.partition(":")[0] for line in problems] == [f"item k{i}" for i in range(5)]
    assert "vector of length nan" in problems[0]
    assert "vector of 2 bytes, expected 32" in problems[1]
    assert "vector of length 4.0" in problems[2]
    assert "malformed metadata: box" in problems[3]
    with pytest.raises(IntegrityError, match="vectors of a wrong length, the first at id 2"):
        gallery.search(unit(1), 1)
    sql(folder, "UPDATE items SET camera = CAST(x'67c3' AS TEXT) WHERE key = 'k2'")
    sql(folder, "UPDATE items SET key = CAST(x'c36b' AS TEXT) WHERE key = 'k4'")
    problems = gallery.verify()
    assert "item k2: malformed metadata: not UTF-8" in problems
    assert problems[-1] == "item ?k: malformed metadata: not UTF-8"
    with pytest.raises(IntegrityError, match="decode"):
        list(gallery.items())
    gallery.delete(["k1"])
    with pytest.raises(IntegrityError, match="not finite"):
        gallery.search(unit(1), 1)
    gallery.delete(["k0"])
    with pytest.raises(IntegrityError, match="decode"):
        gallery.search(unit(1), 9)
    gallery.delete(["k2"])
    sql(folder, "DELETE FROM items WHERE attributes = '{'")
    with pytest.raises(IntegrityError, match="malformed metadata"):
        gallery.search(unit(1), 9)
