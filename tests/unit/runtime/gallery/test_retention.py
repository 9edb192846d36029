"""Retention: by age, by camera and by bytes, once or in a thread."""

import os
import time
from collections import Counter
from contextlib import closing

import pytest

from tests.helpers.fake_camera import wait_for
from tests.helpers.gallery_places import open_new, put, save
from tests.helpers.refused import refused
from upperson_maintenance import retention
from upperson_maintenance.cli.retention import byte_size, read_retention
from upperson_maintenance.retention import Retention, RetentionThread, UsedBytes
from upperson_rt.errors import BackendError, InputError, UsageError
from upperson_rt.gallery import Gallery

DAY = 86400.0
CROP_BYTES = 40_000


@pytest.fixture
def gallery(tmp_path):
    """Three cameras, one of them without a name, a picture a day of each for ten days."""
    with open_new(tmp_path / "gallery") as opened:
        now = time.time()
        for camera in ("gate", "hall", None):
            taken = {f"{camera}/{day}/a.jpg": now - DAY * day - 60 for day in range(10)}
            for crop in taken:
                save(opened.crops_dir, crop, content=os.urandom(CROP_BYTES))
            put(opened, taken, camera=camera, time=taken.get, crop=str)
        yield opened


@pytest.fixture(autouse=True)
def counts(monkeypatch):
    monkeypatch.setattr(retention, "_counts", Counter())


def left(gallery):
    """Return how many pictures each camera has, and check that they are the newest."""
    found = {}
    for item in gallery.items():
        found.setdefault(item.camera, []).append(int(item.key.split("/")[1]))
    assert all(days == list(range(len(days))) for days in found.values())
    assert gallery.verify() == []
    return {camera: len(days) for camera, days in found.items()}


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"keep_s": 3 * DAY}, {"gate": 3, "hall": 3, None: 3}),
        ({"keep_s": 3 * DAY, "by_camera": {"gate": DAY}}, {"gate": 1, "hall": 3, None: 3}),
        ({"keep_s": 3 * DAY, "by_camera": {"gate": 7 * DAY}}, {"gate": 7, "hall": 3, None: 3}),
        ({"by_camera": {"gate": 2 * DAY, "yard": DAY}}, {"gate": 2, "hall": 10, None: 10}),
    ],
)
def test_by_age(gallery, limits, expected):
    keeping = Retention(**limits)
    assert keeping.enforce(gallery, dry_run=True) == 30 - sum(expected.values())
    assert gallery.count() == 30
    assert keeping.enforce(gallery) == 30 - sum(expected.values())
    assert left(gallery) == expected
    assert keeping.enforce(gallery) == 0


def test_by_bytes_of_all_files(gallery):
    used = UsedBytes(gallery)
    before = used.count()
    assert before > 30 * CROP_BYTES
    save(gallery.path, "clips/gate/0/b.1.jpg", content=os.urandom(CROP_BYTES))
    assert used.count() - before >= CROP_BYTES
    keeping = Retention(keep_bytes=before // 2)
    assert keeping.enforce(gallery, dry_run=True) > 10
    assert gallery.count() == 30
    keeping.enforce(gallery, used)
    assert 0 < used.count() <= before // 2
    assert set(left(gallery)) == {"gate", "hall", None}  # The oldest of all went.
    Retention(keep_bytes=1).enforce(gallery)
    assert gallery.count() == 0


def test_by_bytes_the_bin_is_emptied_first(gallery):
    for day in (0, 1, 2):
        gallery.bin.add([f"{camera}/{day}/a.jpg" for camera in ("gate", "hall", None)], "ada", "x")
    before = UsedBytes(gallery).count()
    live = [item.key for item in gallery.items()]
    keeping = Retention(keep_bytes=before - 2 * CROP_BYTES)
    estimate = keeping.enforce(gallery, dry_run=True)
    assert 0 < estimate <= 9
    assert keeping.enforce(gallery) == estimate
    assert [item.key for item in gallery.items()] == live
    kept = [entry.item.key.split("/")[1] for entry in gallery.bin.entries()]
    assert kept == [*"222111000"][: 9 - estimate]  # What was deleted first is gone.
    Retention(keep_bytes=before // 2).enforce(gallery)
    assert gallery.bin.entries() == []
    assert 0 < gallery.count() < len(live)


def test_unchanged_folders_are_read_once(gallery, monkeypatch):
    used, read, inside = UsedBytes(gallery), [], retention._bytes_in
    long_ago = time.time() - 100
    for place, _, _ in os.walk(gallery.path):
        os.utime(place, (long_ago, long_ago))

    def noted(place, links):
        read.append(place)
        return inside(place, links)

    monkeypatch.setattr(retention, "_bytes_in", noted)
    first = used.count()
    assert len(read) == 35
    (gallery.crops_dir / "gate/3/b.jpg").write_bytes(b"x" * 5000)
    read.clear()
    assert used.count() - first >= 5000
    assert sorted(read) == [str(gallery.path), str(gallery.crops_dir / "gate/3")]


def test_threads_enforce_at_once_do_no_harm_and_go_on_after_failures(gallery, monkeypatch):
    monkeypatch.setattr(Retention, "every_s", 0.001)
    errors, prune = iter([BackendError("the server is away")]), type(gallery).prune

    def failing(self, *limits):
        for error in errors:
            raise error
        return prune(self, *limits)

    monkeypatch.setattr(type(gallery), "prune", failing)
    keeping = Retention(keep_s=3 * DAY, by_camera={"gate": DAY})
    with (
        Gallery.open(gallery.location) as other,
        closing(RetentionThread(keeping, gallery)),
        closing(RetentionThread(keeping, other)),
    ):
        wait_for(lambda: retention.counters()["pruned"][1] == 23)
    assert retention._counts == {"pruned": 23, "prune_failures": 1}
    assert left(gallery) == {"gate": 1, "hall": 3, None: 3}


def test_limits_are_read_and_checked(gallery, monkeypatch):
    monkeypatch.setattr(gallery, "is_remote", True)
    with refused("bytes_not_counted", InputError):
        RetentionThread(Retention(keep_bytes=10), gallery)
    assert read_retention(["30d", "gate=7d", "a=b=12h"], 5) == Retention(
        keep_s=30 * DAY, by_camera={"gate": 7 * DAY, "a=b": DAY / 2}, keep_bytes=5
    )
    assert read_retention([], None) is None
    assert [byte_size(text) for text in ("200G", "1.5TB", "512")] == [2 * 10**11, 15 * 10**11, 512]
    for text in ("", "0", "-1G", "200g", "1GiB"):
        with refused("size_malformed", UsageError):
            byte_size(text)
    for ages, code in ((["30"], "age_malformed"), (["1d", "2d"], "age_given_twice")):
        with refused(code, UsageError):
            read_retention(ages, None)
    for keeping, every_s in (
        (Retention(keep_s=DAY), 3600), (Retention(by_camera={"gate": 3600.0}), 150),
        (Retention(keep_s=30 * DAY, keep_bytes=1), 600),
    ):  # fmt: skip
        assert keeping.every_s == every_s
