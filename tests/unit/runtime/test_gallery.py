import sqlite3
import threading
from contextlib import closing

import numpy as np
import pytest

from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.gallery.sqlite import database

D = 8
SPACE = "sha256:" + "a" * 64


def unit(count, seed=0):
    rows = np.random.default_rng(seed).normal(size=(count, D))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def items(count, **fields):
    return [Item(key=f"k{i}", **fields) for i in range(count)]


@pytest.fixture
def gallery(tmp_path):
    with Gallery.open(tmp_path / "gallery", SPACE, D, create=True) as store:
        yield store


def sql(folder, statement, *values):
    with closing(sqlite3.connect(folder / "gallery.sqlite")) as connection, connection:
        return connection.execute(statement, values).fetchall()


def test_items_come_back_as_they_went_in(gallery, tmp_path):
    item = Item(
        key="/crops/ü.png",
        source="rtsp://gate#12",
        camera="gate",
        time=1764000000.25,
        track="t7",
        box=(1, 2, 30, 40),
        attributes={"score": 0.5, "tags": ["a", None]},
    )
    vector = unit(1)
    gallery.add([item], vector, variant="int8")
    (hit,) = gallery.search(vector, 5)[0]
    assert hit.item == item
    assert hit.score == pytest.approx(1, abs=1e-3)
    with Gallery.open(tmp_path / "gallery", SPACE, D) as reopened:
        assert reopened.search(vector, 1)[0] == [hit]


def test_database_is_durable(gallery, tmp_path):
    with gallery._database.writing() as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)
    with (
        Gallery.open(tmp_path / "gallery") as second,
        second._database.writing() as connection,
    ):
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_search_equals_a_stable_sort(gallery):
    vectors, queries = unit(200), unit(7, seed=1)
    gallery.add(items(200), vectors)
    stored = vectors.astype(np.float16).astype(np.float32)
    order = np.argsort(-(queries @ stored.T), axis=1, kind="stable")
    for k in (1, 10, 200, 500):
        found = gallery.search(queries, k)
        assert [[hit.id - 1 for hit in hits] for hits in found] == order[:, :k].tolist()
        for query, hits in zip(queries, found, strict=True):
            expected = [query @ stored[hit.id - 1] for hit in hits]
            np.testing.assert_allclose([hit.score for hit in hits], expected, atol=1e-6)


def test_ties_are_ordered_by_id(gallery):
    gallery.add(items(6), np.tile(unit(1), (6, 1)))
    assert [hit.id for hit in gallery.search(unit(1), 4)[0]] == [1, 2, 3, 4]


def test_the_same_key_replaces_and_keeps_its_id(gallery):
    gallery.add(items(3, camera="old"), unit(3))
    other = unit(1, seed=9)
    gallery.add([Item(key="k1", camera="new")], other)
    assert gallery.count() == 3
    hit = gallery.search(other, 1)[0][0]
    assert (hit.id, hit.item.camera) == (2, "new")
    assert hit.score == pytest.approx(1, abs=1e-3)


def test_ids_are_never_used_again(gallery):
    gallery.add(items(3), unit(3))
    assert gallery.delete(["k2", "nobody"]) == 1
    gallery.add([Item(key="later")], unit(1))
    assert gallery.search(unit(1), 1, None)[0][0].id in (1, 4)
    assert {hit.id for hit in gallery.search(unit(1), 9)[0]} == {1, 2, 4}


def test_filters(gallery):
    gallery.add(
        [
            Item(key="a", camera="gate", time=100.0, track="x"),
            Item(key="b", camera="gate", time=200.0),
            Item(key="c", camera="hall", time=200.0, track="x"),
            Item(key="d"),
        ],
        unit(4),
    )
    cases = {
        "abcd": None,
        "abdc": Filter(),
        "ab": Filter(camera="gate"),
        "bc": Filter(since=200),
        "a": Filter(until=200),
        "abc": Filter(since=100, until=200.5),
        "ac": Filter(track="x"),
        "c": Filter(camera="hall", track="x", since=0),
        "": Filter(camera="' OR 1=1 --"),
    }
    everything = {hit.id: hit.score for hit in gallery.search(unit(1, 3), 9)[0]}
    for keys, where in cases.items():
        hits = gallery.search(unit(1, 3), 9, where)[0]
        assert {hit.item.key for hit in hits} == set(keys)
        assert gallery.count(where) == len(keys)
        assert all(hit.score == everything[hit.id] for hit in hits)
    with pytest.raises(UsageError, match="since must be earlier"):
        Filter(since=2, until=2)


def test_changes_by_anyone_are_seen(gallery, tmp_path):
    gallery.add(items(2), unit(2))
    assert len(gallery.search(unit(1), 9)[0]) == 2
    snapshot = gallery._index.snapshot
    gallery.search(unit(1), 9)
    assert gallery._index.snapshot is snapshot  # Nothing changed, nothing was read again.
    with Gallery.open(tmp_path / "gallery", SPACE, D) as other:
        other.add([Item(key="new")], unit(1))
    assert len(gallery.search(unit(1), 9)[0]) == 3
    gallery.delete(["new"])
    assert len(gallery.search(unit(1), 9)[0]) == 2


def test_empty_gallery_and_empty_calls(gallery):
    assert gallery.search(unit(2), 5) == [[], []]
    assert gallery.search(np.empty((0, D), np.float32), 5) == []
    gallery.add([], np.empty((0, D), np.float32))
    assert gallery.verify() == []
    assert gallery.info().items == 0


def test_unusable_vectors_add_nothing(gallery):
    bad = unit(3)
    bad[2, 0] = np.nan
    for vectors, message in {
        "nan": (bad, "1 of 3 vectors are not finite .* index 2"),
        "dimension": (np.ones((3, D + 1), np.float32), r"shape \(3, 8\).* found \(3, 9\)"),
        "count": (unit(2), r"shape \(3, 8\).* found \(2, 8\)"),
        "norm": (unit(3) * 2, "not of unit length"),
    }.values():
        with pytest.raises(InputError, match=message):
            gallery.add(items(3), vectors)
        with pytest.raises(InputError):
            gallery.search(vectors[:, : D - 1], 1)
    assert gallery.count() == 0
    with pytest.raises(UsageError, match="k must be at least 1"):
        gallery.search(unit(1), 0)


def test_a_batch_is_added_whole_or_not_at_all(gallery):
    broken = [*items(2), Item(key="bad", attributes={"x": object()})]
    with pytest.raises(InputError, match="item bad: attributes are not JSON"):
        gallery.add(broken, unit(3))
    assert gallery.count() == 0


def test_items_are_checked():
    for fields, message in (
        ({"key": ""}, "key that is not empty"),
        ({"key": "a", "time": float("inf")}, "time must be finite"),
        ({"key": "a", "box": (1, 2, 3)}, "box must be"),
        ({"key": "a\udc80"}, "not valid Unicode"),
    ):
        with pytest.raises(InputError, match=message):
            Item(**fields)


def test_other_spaces_are_refused(gallery, tmp_path):
    for fingerprint, dim in (("sha256:" + "b" * 64, D), (SPACE, D + 1)):
        for create in (False, True):
            with pytest.raises(IntegrityError, match=r"of another model.*index the pictures again"):
                Gallery.open(tmp_path / "gallery", fingerprint, dim, create=create)


def test_there_must_be_a_gallery(tmp_path):
    with pytest.raises(InputError, match=r"no gallery at .*upperson-rt index"):
        Gallery.open(tmp_path / "nowhere", SPACE, D)
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(UsageError, match="needs its fingerprint"):
        Gallery.open(tmp_path / "nowhere", create=True)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="cannot make gallery"):
        Gallery.open(tmp_path / "file", SPACE, D, create=True)


def test_a_creation_happens_completely_or_not_at_all(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Gallery.open(tmp_path, SPACE, D, create=True)
    assert list(tmp_path.iterdir()) == []
    with Gallery.open(tmp_path, SPACE, D, create=True) as gallery:
        assert gallery.count() == 0


def test_a_creation_leaves_a_faster_one_alone(tmp_path, monkeypatch):
    made = database._fill

    def slow(connection, *space):
        made(connection, *space)
        with monkeypatch.context() as patch:
            patch.setattr(database, "_fill", made)
            with Gallery.open(tmp_path, SPACE, D, create=True) as faster:
                faster.add(items(3), unit(3))

    monkeypatch.setattr(database, "_fill", slow)
    with Gallery.open(tmp_path, SPACE, D, create=True) as gallery:
        assert gallery.count() == 3


@pytest.mark.parametrize("create", [False, True])
def test_an_empty_file_is_damage(tmp_path, create):
    """Whatever was in it: its log may still be there, and SQLite would remove it."""
    with Gallery.open(tmp_path, SPACE, D, create=True) as gallery:
        gallery.add(items(3), unit(3))
        log = (tmp_path / "gallery.sqlite-wal").read_bytes()
    (tmp_path / "gallery.sqlite").write_bytes(b"")
    (tmp_path / "gallery.sqlite-wal").write_bytes(log)
    with pytest.raises(IntegrityError, match=r"is empty: it is damaged, .* left as it is"):
        Gallery.open(tmp_path, SPACE, D, create=create)
    assert (tmp_path / "gallery.sqlite").read_bytes() == b""
    assert (tmp_path / "gallery.sqlite-wal").read_bytes() == log


@pytest.mark.parametrize("create", [False, True])
def test_foreign_files_are_never_overwritten(tmp_path, create):
    path = tmp_path / "gallery.sqlite"
    path.write_bytes(b"my diary, not a database" * 50)
    before = path.read_bytes()
    with pytest.raises(IntegrityError, match=r"damaged or not a gallery .* left as it is"):
        Gallery.open(tmp_path, SPACE, D, create=create)
    assert path.read_bytes() == before

    path.unlink()
    sql(tmp_path, "CREATE TABLE contacts (name)")
    with pytest.raises(IntegrityError, match="a database, but not a gallery"):
        Gallery.open(tmp_path, SPACE, D, create=create)
    sql(tmp_path, "CREATE TABLE meta (x)")
    sql(tmp_path, "CREATE TABLE items (x)")
    with pytest.raises(IntegrityError, match="a database, but not a gallery"):
        Gallery.open(tmp_path, SPACE, D, create=create)


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (3, "schema version 3, this program reads up to 2: update it with  pip"),
        (1, "schema version 1, this program reads 2 only: index the pictures again"),
    ],
)
def test_another_schema_is_refused(gallery, tmp_path, version, message):
    sql(tmp_path / "gallery", "UPDATE meta SET value = ? WHERE name = 'schema_version'", version)
    with pytest.raises(InputError, match=message):
        Gallery.open(tmp_path / "gallery", SPACE, D)
    with pytest.raises(InputError, match=message):
        Gallery.open(tmp_path / "gallery", SPACE, D, create=True)


def test_a_damaged_page_is_noticed(tmp_path):
    with Gallery.open(tmp_path, SPACE, D, create=True) as gallery:
        gallery.add(items(400), unit(400))
    path = tmp_path / "gallery.sqlite"
    content = bytearray(path.read_bytes())
    content[8192 : len(content) - 4096] = b"\xaa" * (len(content) - 4096 - 8192)
    path.write_bytes(content)
    with (
        pytest.raises(IntegrityError, match="damaged"),
        Gallery.open(tmp_path, SPACE, D) as gallery,
    ):
        gallery.search(unit(1), 1)


def test_verify_names_what_is_wrong(gallery, tmp_path):
    gallery.add(items(5), unit(5))
    assert gallery.verify() == []
    folder = tmp_path / "gallery"
    nan = np.full(D, np.nan, "<f2").tobytes()
    sql(folder, "UPDATE items SET vector = ? WHERE key = 'k0'", nan)
    sql(folder, "UPDATE items SET vector = x'0011' WHERE key = 'k1'")
    sql(folder, "UPDATE items SET vector = ? WHERE key = 'k2'", np.ones(D, "<f2").tobytes())
    sql(folder, "UPDATE items SET box = '1,2' WHERE key = 'k3'")
    sql(folder, "UPDATE items SET attributes = '{' WHERE key = 'k4'")
    problems = gallery.verify()
    assert [line.partition(":")[0] for line in problems] == [f"item k{i}" for i in range(5)]
    assert "vector of length nan" in problems[0]
    assert "vector of 2 bytes, expected 16" in problems[1]
    assert "vector of length 2.8" in problems[2]
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


def test_an_error_that_is_kept_does_not_keep_the_state_it_saw(gallery, tmp_path):
    gallery.add(items(5), unit(5))
    sql(tmp_path / "gallery", "UPDATE items SET box = '1,2' WHERE key = 'k1'")
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


def test_info(gallery):
    gallery.add([Item(key="a", camera="gate", time=5.0), Item(key="b")], unit(2), "int8")
    gallery.add([Item(key="c", camera="gate", time=3.0)], unit(1), "fp32")
    info = gallery.info()
    assert (info.items, info.embed_dim, info.fingerprint) == (3, D, SPACE)
    assert (info.cameras, info.variants) == ({"gate": 2}, {"fp32": 1, "int8": 2})
    assert (info.first_time, info.last_time) == (3.0, 5.0)
    assert info.size_bytes > 0
    assert info.created.endswith("+00:00")


def test_threads_share_a_gallery(gallery):
    errors = []

    def work(name):
        try:
            for i in range(10):
                gallery.add([Item(key=f"{name}-{i}")], unit(1, seed=i))
                gallery.search(unit(1), 3)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert gallery.count() == 30


def test_a_locked_gallery_is_an_error(gallery, tmp_path):
    gallery._database._writer.execute("PRAGMA busy_timeout = 10")
    path = tmp_path / "gallery" / "gallery.sqlite"
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(InputError, match=r"cannot use gallery .*locked"):
            gallery.add(items(1), unit(1))
    gallery.add(items(1), unit(1))


def test_closed_gallery(gallery):
    gallery.close()
    with pytest.raises(UsageError, match="has been closed"):
        gallery.count()


def test_indexing_again_without_a_camera_keeps_the_camera(tmp_path):
    vector = np.eye(1, 4, dtype=np.float32)
    with Gallery.open(tmp_path / "g", "sha256:a", 4, create=True) as gallery:
        gallery.add([Item(key="a", source="a", camera="gate")], vector, "fp32")
        gallery.add([Item(key="a", source="a")], vector, "fp32")
        assert gallery.search(vector, 1)[0][0].item.camera == "gate"
        gallery.add([Item(key="a", source="a", camera="door")], vector, "fp32")
        assert gallery.search(vector, 1)[0][0].item.camera == "door"
