"""Pictures saved beside a gallery go with their items, nothing else goes, and damage is found."""

import os
import sqlite3
import time

import numpy as np
import pytest

from tests.helpers import crop_damage
from tests.helpers.gallery_places import items_of, open_new, put, save, some_vectors
from tests.helpers.refused import refused
from upperson_maintenance.export import export_gallery
from upperson_rt.errors import InputError, IntegrityError
from upperson_rt.gallery import Filter, Hit, Item
from upperson_rt.gallery.crops import has_hash, name_with_hash, picture_file, read_crop
from upperson_sheet.sheet import draw_sheet


def crops(gallery):
    files = (path for path in gallery.crops_dir.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(gallery.crops_dir)) for path in files)


def test_crops_go_with_their_items(gallery, tmp_path):
    save(gallery.crops_dir, "a.jpg", "gate/b.jpg", "gate/c.jpg", "d.jpg", "other.jpg")
    put(gallery, ["a"], crop="a.jpg", camera="c")
    for key, crop, at in (("b", "gate/b.jpg", 1.0), ("c", "gate/c.jpg", 2.0), ("d", "d.jpg", 3.0)):
        put(gallery, [key], crop=crop, time=at)
    put(gallery, ["none"])
    assert gallery.verify() == []
    gallery.delete(["a"])
    assert crops(gallery) == ["d.jpg", "gate/b.jpg", "gate/c.jpg", "other.jpg"]
    gallery.prune(older_than=2)
    assert crops(gallery) == ["d.jpg", "gate/c.jpg", "other.jpg"]
    gallery.delete_where(Filter(since=2, until=3))
    assert crops(gallery) == ["d.jpg", "other.jpg"]
    (gallery.crops_dir / "d.jpg").unlink()
    assert gallery.verify() == ["item d: its crop d.jpg is missing"]
    # Which does not keep others from an export.
    assert export_gallery(gallery, tmp_path / "exported").items == gallery.count()
    gallery.prune(keep_newest=0)
    assert crops(gallery) == ["other.jpg"]


def test_a_replaced_crop_goes_a_kept_or_shared_one_stays(gallery):
    save(gallery.crops_dir, "1.jpg", "2.jpg", "shared.jpg")
    for key, crop in (("a", "1"), ("b", "shared"), ("a", "1"), ("c", "shared")):
        put(gallery, [key], crop=f"{crop}.jpg")
    assert crops(gallery) == ["1.jpg", "2.jpg", "shared.jpg"]
    put(gallery, ["a"], crop="2.jpg")
    gallery.delete(["b"])
    assert crops(gallery) == ["2.jpg", "shared.jpg"]
    put(gallery, ["a"])
    gallery.delete(["c"])
    assert crops(gallery) == []


def test_crops_stay_while_the_deletion_is_not_committed(gallery, monkeypatch):
    save(gallery.crops_dir, "a.jpg")
    put(gallery, ["a"], crop="a.jpg")

    def fail(connection):
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("upperson_rt.gallery.sqlite.rows.trim_log", fail)
    for change in (lambda: gallery.delete(["a"]), lambda: put(gallery, ["a"])):
        with refused("disk_full", InputError):
            change()
    assert crops(gallery) == ["a.jpg"]
    assert next(gallery.items()).crop == "a.jpg"


def test_files_outside_are_never_removed(gallery, tmp_path, caplog):
    """Neither through a link, nor by a database that another program wrote."""
    precious = tmp_path / "precious"
    save(precious, "a.jpg", "b.jpg")
    (gallery.crops_dir / "c.jpg").mkdir(parents=True)
    (gallery.crops_dir / "link").symlink_to(precious)
    items = [Item(key="a", crop="link/a.jpg"), Item(key="b"), Item(key="c", crop="c.jpg")]
    object.__setattr__(items[1], "crop", os.path.relpath(precious / "b.jpg", gallery.crops_dir))
    gallery.add(items, some_vectors(3))
    assert len(gallery.verify()) == 3
    assert gallery.delete(["a", "b", "c"]) == 3
    assert sorted(file.name for file in precious.iterdir()) == ["a.jpg", "b.jpg"]
    assert caplog.text.count("lies outside") == 2
    assert caplog.text.count("could not be removed") == 1


def test_a_clock_that_jumps_takes_nothing_away(gallery, monkeypatch):
    """Ten years ahead, then far back: pictures, their crops and younger files without one stay."""
    stray, now = "not-named-yet.jpg", time.time()
    for key, jump in (("a", 0.0), ("ahead", 3e8), ("back", -1e9), ("d", 0.0)):
        monkeypatch.setattr("time.time", lambda jump=jump: now + jump)
        save(gallery.crops_dir, stray, f"{key}.jpg")
        put(gallery, [key], time=now + jump, crop=f"{key}.jpg")
        assert gallery.prune(older_than=now - 1e9 - 60) == 0
        assert stray in crops(gallery)
        gallery.rebuild()
    assert len(gallery.search(some_vectors(1), 9)[0]) == 4
    assert gallery.prune(keep_newest=2) == 2
    assert sorted(item.key for item in gallery.items()) == ["ahead", "d"]
    assert crops(gallery) == ["ahead.jpg", "d.jpg", stray]
    assert gallery.verify() == []


def test_a_picture_whose_name_is_too_long_is_none(gallery):
    (item,) = items_of(["a"], source="x" * 300, crop="y" * 300)
    gallery.add([item], some_vectors(1))
    assert picture_file(item, gallery.crops_dir) is None
    (problem,) = gallery.verify()
    assert problem.startswith("item a: its crop 'yyy")
    assert len(problem) < 200


def test_what_killed_processes_left_among_the_crops_goes_by_age(gallery):
    """A process may end between saving a crop and its item, or between deleting the two."""
    old = "gate/a.jpg", "gate/old.jpg", "gate/.old.jpg.x1", "\udcffo"
    for names, at in ((old, 100), (("gate/young.jpg",), 300)):
        save(gallery.crops_dir, *names)
        for name in names:
            os.utime(gallery.crops_dir / name, (at, at))
    (gallery.crops_dir / "link").symlink_to("gate")
    put(gallery, ["a"], camera="gate", crop="gate/a.jpg", time=400.0)
    (problem,) = gallery.verify()
    assert problem.startswith("4 files in")
    assert "prune --older-than" in problem
    gallery.prune(keep_newest=1)
    gallery.prune(older_than=200, camera="gate")
    assert len(crops(gallery)) == 5
    assert gallery.prune(older_than=200) == 0
    assert crops(gallery) == ["gate/a.jpg", "gate/young.jpg"]
    save(gallery.crops_dir, "gate/in-the-making.jpg")
    assert gallery.prune(older_than=1e300) == 1
    assert crops(gallery) == ["gate/in-the-making.jpg"]


# The name of a crop has a hash of its content


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    with open_new(tmp_path_factory.mktemp("crops") / "gallery") as gallery:
        yield gallery, crop_damage.fill(gallery, 4)


def test_a_crop_that_was_altered_is_found(filled):
    gallery, files = filled
    for kind in crop_damage.KINDS:
        assert crop_damage.missed(gallery, files, kind, np.random.default_rng(0)) == [], kind
    assert gallery.verify() == []


def test_what_cannot_be_a_crop_is_not_read_through(tmp_path):
    pipe, huge, missing = (
        tmp_path / name_with_hash(stem, b"picture") for stem in ("pipe", "huge", "missing")
    )
    os.mkfifo(pipe)
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    for path in (pipe, huge):
        with refused("crop_altered", IntegrityError):
            read_crop(path)
    with pytest.raises(InputError):
        read_crop(missing)
    for name in ("gate/101112-345-0123456789ab.jpg", "a.sha256-0123.jpg", "0" * 32 + ".jpg"):
        assert not has_hash(name)
        assert read_crop(tmp_path / name) is None


def test_an_altered_crop_is_not_drawn(filled, tmp_path):
    gallery, files = filled
    hits = [Hit(id=1, score=0.5, item=next(gallery.items()))]

    def is_grey(crops_dir):
        drawn = draw_sheet("a coat", hits, crops_dir=crops_dir)
        return drawn.getpixel((60, 300)) == (203, 207, 212)

    assert not is_grey(gallery.crops_dir)
    before = files[0].read_bytes()
    files[0].write_bytes(files[1].read_bytes())
    assert is_grey(gallery.crops_dir)
    files[0].write_bytes(before)
    assert is_grey(tmp_path)
