"""Filters, tracks, retention and crops of a gallery in a folder."""

import math
import os
import sqlite3
from contextlib import closing

import numpy as np
import pytest

from upperson_rt.errors import InputError, UsageError
from upperson_rt.gallery import Filter, Gallery, Item, TrackSpan

D = 8
SPACE = "sha256:" + "a" * 64


def unit(count, seed=0):
    rows = np.random.default_rng(seed).normal(size=(count, D))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def gallery(tmp_path):
    with Gallery.open(tmp_path / "gallery", SPACE, D, create=True) as store:
        yield store


def keys(gallery, where=None):
    """The keys that pass, as every method that takes a filter sees them."""
    found = [item.key for item in gallery.items(where)]
    assert gallery.count(where) == len(found)
    assert sorted(hit.item.key for hit in gallery.search(unit(1, 9), 99, where)[0]) == sorted(found)
    assert [item.key for items, _ in gallery.vectors(where, 2) for item in items] == found
    return "".join(found)


def test_several_cameras(gallery):
    gallery.add([Item(key=key, camera=key * 2) for key in "abc"] + [Item(key="d")], unit(4))
    assert keys(gallery, Filter(camera=["aa", "cc", "nowhere"])) == "ac"
    assert keys(gallery, Filter(camera="nowhere")) == ""
    assert gallery.cameras() == ["aa", "bb", "cc"]
    with pytest.raises(UsageError, match="at least one name"):
        Filter(camera=[])


def test_attributes_are_equal_by_kind_and_value(gallery):
    values = [1, 1.0, True, "1", "true", 0, False, None, [1], {"a": 1}, "ü", 2**62, 0.1]
    gallery.add(
        [Item(key=chr(97 + i), attributes={"x": value}) for i, value in enumerate(values)],
        unit(len(values)),
    )
    expected = {
        "ab": 1, "c": True, "d": "1", "e": "true", "f": 0, "g": False, "k": "ü", "l": 2**62,
        "m": 0.1, "": "None",
    }  # fmt: skip
    for found, value in expected.items():
        assert keys(gallery, Filter(attributes={"x": value})) == found
    assert keys(gallery, Filter(attributes={"y": 1})) == ""
    assert keys(gallery, Filter(attributes={"x": 1, "y": 1})) == ""


HOSTILE = [
    "a b", "a.b", "$", "$.x", '"', 'a"b', "a'b", "'; DROP TABLE items; --", "\\", "a\\", '\\"',
    "[0]", "x[0]", "", "ü", "人", "\n", "\x00", "%", "_", '" OR 1=1', "?", ":x", "@x", "' || '",
    "-",
]  # fmt: skip


@pytest.mark.parametrize("key", HOSTILE)
def test_any_key_of_an_attribute_is_only_a_key(gallery, key):
    gallery.add(
        [
            Item(key="a", attributes={key: key, "other": 1}),
            Item(key="b", attributes={key + "x": key}),
            Item(key="c", attributes={"other": {key: key}}),
        ],
        unit(3),
    )
    assert keys(gallery, Filter(attributes={key: key})) == "a"
    assert keys(gallery, Filter(attributes={key: "else"})) == ""
    assert keys(gallery, Filter(camera=key, track=key)) == ""
    assert keys(gallery) == "abc"
    assert gallery.verify() == []


@pytest.mark.parametrize("value", [None, [1], {"a": 1}, math.nan, math.inf, 1 << 63, b"x"])
def test_only_plain_values_can_be_compared(value):
    with pytest.raises(UsageError, match="compares attributes with"):
        Filter(attributes={"x": value})


def test_damaged_attributes_match_nothing(gallery):
    gallery.add([Item(key="a", attributes={"x": 1, "ü": 1}), Item(key="b")], unit(2))
    with closing(sqlite3.connect(gallery.path / "gallery.sqlite")) as connection, connection:
        connection.execute("UPDATE items SET attributes = '{\"x\": 1' WHERE key = 'a'")
    assert gallery.count(Filter(attributes={"x": 1})) == 0
    assert gallery.count(Filter(attributes={"ü": 1})) == 0
    assert "item a: malformed metadata" in gallery.verify()[0]


def test_times_may_go_backwards(gallery):
    """They are data: a clock that was set back changes neither ids nor what a filter finds."""
    for key, time in {"a": 300.0, "b": 200.0, "c": 100.5, "d": -5.0}.items():
        gallery.add([Item(key=key, time=time)], unit(1, int(abs(time))))
    assert keys(gallery) == "abcd"
    assert keys(gallery, Filter(since=100.5, until=300)) == "bc"
    assert (gallery.info().first_time, gallery.info().last_time) == (-5, 300)
    assert gallery.prune(keep_newest=2) == 2
    assert keys(gallery) == "ab"


@pytest.mark.parametrize("k", [0, -1])
def test_k_must_be_positive(gallery, k):
    with pytest.raises(UsageError, match=f"k must be at least 1, got {k}"):
        gallery.search(unit(1), k)


@pytest.mark.parametrize("engine", ["tail", "segments"])
def test_one_hit_for_a_track(gallery, engine, monkeypatch):
    if engine == "segments":
        monkeypatch.setattr("upperson_rt.gallery.sqlite.index._SEAL_ROWS", 32)
    vectors = unit(400, 3)
    places = [(f"c{i % 2}", f"t{i % 11}" if i % 5 else None) for i in range(400)]
    gallery.add(
        [
            Item(key=str(i), camera=camera, track=track, time=None if i % 3 else float(i))
            for i, (camera, track) in enumerate(places)
        ],
        vectors,
    )
    for where in (None, Filter(camera="c1"), Filter(since=50, until=300)):
        plain = gallery.search(unit(2, 8), 400, where)
        for k in (1, 5, 30, 400):
            for hits, every in zip(
                gallery.search(unit(2, 8), k, where, by_track=True), plain, strict=True
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


def test_a_track_without_a_camera_is_one_of_its_own(gallery):
    gallery.add(
        [Item(key="a", track="t"), Item(key="b", track="t", camera="c"), Item(key="c", track="t")],
        unit(3),
    )
    (hits,) = gallery.search(unit(1), 9, by_track=True)
    assert {(hit.item.camera, hit.span.pictures) for hit in hits} == {(None, 2), ("c", 1)}
    assert gallery.info().tracks == 2


@pytest.fixture
def aged(gallery):
    """a to f, taken at 1 to 6 by two cameras; x and y at no known time."""
    gallery.add(
        [
            *(Item(key=key, camera=f"c{i % 2}", time=i + 1.0) for i, key in enumerate("abcdef")),
            Item(key="x", camera="c0"),
            Item(key="y", camera="c1"),
        ],
        unit(8),
    )
    return gallery


@pytest.mark.parametrize(
    ("arguments", "left"),
    [
        ({"older_than": 3}, "cdefxy"),
        ({"older_than": 3, "camera": "c0"}, "bcdefxy"),
        ({"older_than": 0}, "abcdefxy"),
        ({"keep_newest": 3}, "def"),
        ({"keep_newest": 0}, ""),
        ({"keep_newest": 99}, "abcdefxy"),
        ({"keep_newest": 7}, "abcdefy"),
        ({"keep_newest": 1, "camera": "c1"}, "acefx"),
        ({"keep_newest": 3, "camera": "nowhere"}, "abcdefxy"),
        ({"older_than": 3, "keep_newest": 5}, "cdefy"),
        ({"older_than": 6, "keep_newest": 5}, "fxy"),
        ({"older_than": 4, "keep_newest": 2, "camera": "c0"}, "bdefxy"),
    ],
)
def test_pruning(aged, arguments, left):
    expected = 8 - len(left)
    if arguments == {"older_than": 4, "keep_newest": 2, "camera": "c0"}:
        expected = 2
    assert aged.count_prunable(**arguments) == expected
    assert aged.prune(**arguments) == expected
    assert keys(aged) == left


def test_pruning_needs_to_know_what(aged):
    for arguments, message in (
        ({}, r"needs an age \(--older-than\), a number"),
        ({"keep_newest": -1}, "must not be negative"),
        ({"older_than": math.nan}, "must be a time"),
    ):
        for prune in (aged.prune, aged.count_prunable):
            with pytest.raises(UsageError, match=message):
                prune(**arguments)
    assert aged.count() == 8


def test_deleting_by_filter(aged):
    assert aged.delete_where(Filter(camera="c0", until=4)) == 2
    assert keys(aged) == "bdefxy"
    assert aged.delete_where(Filter(camera="nowhere")) == 0
    for where in (Filter(), Filter(attributes={})):
        with pytest.raises(UsageError, match="would delete the whole gallery"):
            aged.delete_where(where)
    assert aged.delete(["b", "b", "nobody"]) == 1
    assert aged.delete([]) == 0
    assert keys(aged) == "defxy"


def test_items_and_vectors_are_one_state(aged):
    batches = aged.vectors(batch_size=3)
    items, vectors = next(batches)
    walk = aged.items()
    assert next(walk).key == "a"
    aged.prune(keep_newest=0)
    rest = [item.key for found, _ in batches for item in found]
    assert [item.key for item in items] + rest == list("abcdefxy")
    assert [item.key for item in walk] == list("bcdefxy")
    assert np.array_equal(vectors, unit(8)[:3].astype(np.float16).astype(np.float32))
    assert keys(aged) == ""
    with pytest.raises(UsageError, match="batch_size must be at least 1"):
        next(aged.vectors(batch_size=0))


def save(gallery, *names):
    for name in names:
        path = gallery.crops_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"picture")


def crops(gallery):
    return sorted(
        str(path.relative_to(gallery.crops_dir))
        for path in gallery.crops_dir.rglob("*")
        if path.is_file()
    )


def test_crops_go_with_their_items(gallery):
    save(gallery, "a.jpg", "gate/b.jpg", "gate/c.jpg", "d.jpg", "other.jpg")
    gallery.add(
        [
            Item(key="a", crop="a.jpg", camera="c"),
            Item(key="b", crop="gate/b.jpg", time=1.0),
            Item(key="c", crop="gate/c.jpg", time=2.0),
            Item(key="d", crop="d.jpg", time=3.0),
            Item(key="none"),
        ],
        unit(5),
    )
    assert gallery.verify() == []
    assert next(gallery.items()).crop == "a.jpg"
    gallery.delete(["a"])
    assert crops(gallery) == ["d.jpg", "gate/b.jpg", "gate/c.jpg", "other.jpg"]
    gallery.prune(older_than=2)
    assert crops(gallery) == ["d.jpg", "gate/c.jpg", "other.jpg"]
    gallery.delete_where(Filter(since=2, until=3))
    assert crops(gallery) == ["d.jpg", "other.jpg"]
    (gallery.crops_dir / "d.jpg").unlink()
    assert gallery.verify() == ["item d: its crop d.jpg is missing"]
    gallery.prune(keep_newest=0)
    assert crops(gallery) == ["other.jpg"]


def test_a_replaced_crop_goes_a_kept_or_shared_one_stays(gallery):
    save(gallery, "1.jpg", "2.jpg", "shared.jpg")
    gallery.add([Item(key="a", crop="1.jpg"), Item(key="b", crop="shared.jpg")], unit(2))
    gallery.add([Item(key="a", crop="1.jpg"), Item(key="c", crop="shared.jpg")], unit(2))
    assert crops(gallery) == ["1.jpg", "2.jpg", "shared.jpg"]
    gallery.add([Item(key="a", crop="2.jpg")], unit(1))
    gallery.delete(["b"])
    assert crops(gallery) == ["2.jpg", "shared.jpg"]
    gallery.add([Item(key="a")], unit(1))
    gallery.delete(["c"])
    assert crops(gallery) == []


def test_crops_stay_while_the_deletion_is_not_committed(gallery, monkeypatch):
    save(gallery, "a.jpg")
    gallery.add([Item(key="a", crop="a.jpg")], unit(1))

    def fail(connection):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("upperson_rt.gallery.sqlite.store.trim_log", fail)
    for change in (
        lambda: gallery.delete(["a"]),
        lambda: gallery.add([Item(key="a")], unit(1)),
    ):
        with pytest.raises(InputError, match="full"):
            change()
    assert crops(gallery) == ["a.jpg"]
    assert next(gallery.items()).crop == "a.jpg"


@pytest.mark.parametrize(
    "crop", ["/etc/passwd", "../a.jpg", "a/../../b.jpg", "", ".", "C:/a.jpg", "a\\b.jpg", "a\0b"]
)
def test_a_crop_may_not_leave_its_folder(crop):
    with pytest.raises(InputError, match="crop must be a relative path inside"):
        Item(key="a", crop=crop)


def test_files_outside_are_never_removed(gallery, tmp_path, caplog):
    """Neither through a link, nor by a database that somebody else has written."""
    precious = tmp_path / "precious"
    precious.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (precious / name).write_bytes(b"mine")
    gallery.crops_dir.mkdir()
    (gallery.crops_dir / "link").symlink_to(precious)
    gallery.add([Item(key="a", crop="link/a.jpg"), Item(key="b", crop="b.jpg")], unit(2))
    path = os.path.relpath(precious / "b.jpg", gallery.crops_dir)
    with closing(sqlite3.connect(gallery.path / "gallery.sqlite")) as connection, connection:
        connection.execute("UPDATE items SET crop = ? WHERE key = 'b'", (path,))
    assert len(gallery.verify()) == 2
    assert gallery.delete(["a", "b"]) == 2
    assert sorted(file.name for file in precious.iterdir()) == ["a.jpg", "b.jpg"]
    assert caplog.text.count("lies outside") == 2


def test_a_crop_that_cannot_be_removed_is_told(gallery, caplog):
    (gallery.crops_dir / "a.jpg").mkdir(parents=True)
    gallery.add([Item(key="a", crop="a.jpg")], unit(1))
    assert gallery.delete(["a"]) == 1
    assert "could not be removed" in caplog.text


def test_what_killed_processes_left_among_the_crops_goes_by_age(gallery):
    """A process may end between saving a crop and its item, or between deleting the two."""
    save(gallery, "gate/a.jpg", "gate/old.jpg", "gate/.old.jpg.x1", "gate/young.jpg", "\udcffo")
    for name, time in (("a", 100), ("old", 100), ("young", 300)):
        os.utime(gallery.crops_dir / f"gate/{name}.jpg", (time, time))
    os.utime(gallery.crops_dir / "gate/.old.jpg.x1", (100, 100))
    os.utime(gallery.crops_dir / "\udcffo", (100, 100))
    (gallery.crops_dir / "link").symlink_to("gate")
    gallery.add([Item(key="a", camera="gate", crop="gate/a.jpg", time=400.0)], unit(1))
    (problem,) = gallery.verify()
    assert problem.startswith("4 files in")
    assert "prune --older-than" in problem
    gallery.prune(keep_newest=1)
    gallery.prune(older_than=200, camera="gate")
    assert len(crops(gallery)) == 5
    assert gallery.prune(older_than=200) == 0
    assert crops(gallery) == ["gate/a.jpg", "gate/young.jpg"]
    save(gallery, "gate/in-the-making.jpg")
    assert gallery.prune(older_than=1e300) == 1
    assert crops(gallery) == ["gate/in-the-making.jpg"]


def test_what_is_deleted_is_not_left_in_the_database(gallery):
    secret, vectors = "marker-of-a-person", unit(200)
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
