"""The newest frame of a camera beside the gallery: when it is written, and when it goes."""

import io
import json
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tests.helpers.fake_camera import ALL, BOX, START, FakeTime, person_frame, wait_for
from upperson_camera import Pipeline
from upperson_camera.regions import Regions
from upperson_camera.settings import camera_settings
from upperson_rt.gallery import Filter
from upperson_rt.gallery.snapshots import (
    Snapshot,
    picture_path,
    read_snapshots,
    snapshot_folder,
    write_snapshot,
)

ZONE = ((0.0, 0.5), (1.0, 0.5), (1.0, 1.0))
MASK = ((0.0, 0.0), (0.2, 0.0), (0.2, 0.2))
EVERY_S = 1e6
"""Instead of a minute, which a busy machine may take."""
SIZED = {"width": 320, "height": 240}


@pytest.fixture
def clock(monkeypatch):
    clock = FakeTime()
    monkeypatch.setattr("upperson_camera.snapshots.time", clock)
    monkeypatch.setattr("upperson_camera.snapshots.EVERY_S", EVERY_S)
    return clock


@pytest.fixture
def folder(gallery):
    return snapshot_folder(gallery)


def add(pipeline, name="gate", snapshot=None, zones=(), masks=(), **options):
    """Add a camera as a file of cameras does."""
    regions = Regions(zones=zones, masks=masks)
    camera = camera_settings(pipeline.settings, name, regions=regions, options=options)
    pipeline.add_prepared(pipeline.prepare_camera(replace(camera, snapshot=snapshot)))


def submit(pipeline, number, frame=None, camera="gate"):
    pipeline.submit(camera, person_frame() if frame is None else frame, [BOX], START + number)
    assert pipeline.drain(60)


def test_a_frame_is_kept_with_its_polygons_and_replaced_once_a_minute(
    encoder, gallery, folder, clock
):
    with Pipeline(encoder, gallery, max_delay_s=0, **ALL) as pipeline:
        add(pipeline, zones=[ZONE], masks=[MASK])
        for number, later_s in enumerate((0.0, EVERY_S / 2, 0.0)):
            clock.more_s += later_s
            submit(pipeline, number)
        kept = Snapshot(camera="gate", time=START, zones=(ZONE,), masks=(MASK,), **SIZED)
        assert read_snapshots(folder) == {"gate": kept}
        with Image.open(picture_path(folder, "gate")) as picture:
            assert picture.size == (320, 240)
            red, _, blue = np.asarray(picture)[130, 130].tolist()
            assert red > blue, "it is no BGR"
        clock.more_s += EVERY_S / 2
        submit(pipeline, 3)
        assert read_snapshots(folder)["gate"].time == START + 3
        pipeline.set_zones("gate", masks=[MASK])
        submit(pipeline, 4)
        changed = read_snapshots(folder)["gate"]
        assert (changed.time, changed.zones, changed.masks) == (START + 4, (), (MASK,))
        pipeline.set_zones("gate")
        submit(pipeline, 5)
        assert list(folder.iterdir()) == [], "without zones and masks there is none"
        pipeline.set_zones("gate", zones=[ZONE])
        submit(pipeline, 6)
        assert list(read_snapshots(folder)) == ["gate"]
    assert list(folder.iterdir()) == [], "it goes with the camera"


@pytest.mark.parametrize(
    ("options", "snapshot", "kept"),
    [
        ({"zones": [ZONE]}, None, True),
        ({}, None, False),
        ({}, True, True),
        ({"zones": [ZONE]}, False, False),
        ({"zones": [ZONE], "save_crops": False}, True, False),
    ],
)
def test_what_is_asked_for_decides(encoder, gallery, folder, options, snapshot, kept):
    with Pipeline(encoder, gallery, max_delay_s=0, **ALL) as pipeline:
        add(pipeline, snapshot=snapshot, **options)
        pipeline.add_camera("hall", zones=[ZONE])  # A program's camera has none.
        for camera in ("gate", "hall"):
            submit(pipeline, 0, camera=camera)
        assert list(read_snapshots(folder)) == ["gate"] * kept
        pipeline.remove_camera("gate")
        wait_for(lambda: read_snapshots(folder) == {})


def test_large_frames_are_scaled_down_and_cameras_with_any_name_have_their_own(
    encoder, gallery, folder
):
    names = ("../gate", "a b", "\u0100\u202e")
    with Pipeline(encoder, gallery, max_delay_s=0, **ALL) as pipeline:
        for name in names:
            add(pipeline, name, snapshot=True)
            submit(pipeline, 0, np.zeros((1500, 2000, 3), np.uint8), name)
        assert set(read_snapshots(folder)) == set(names)
        assert {path.parent for path in folder.parent.rglob("*.jpg")} >= {folder}
        with Image.open(picture_path(folder, "a b")) as picture:
            assert picture.size == (1280, 960)
        assert (read_snapshots(folder)["a b"].width) == 2000


def test_a_folder_that_cannot_be_written_costs_no_picture(encoder, gallery, folder, clock, caplog):
    folder.write_text("a file in its place")
    with Pipeline(encoder, gallery, max_delay_s=0, **ALL) as pipeline:
        add(pipeline, snapshot=True)
        for number in range(3):
            clock.more_s += EVERY_S
            submit(pipeline, number)
    assert gallery.count() == 3
    logged = [one for one in caplog.records if one.event == "snapshot_failed"]
    assert len(logged) == 1


def leave(folder):
    """Leave what a killed process leaves of three cameras, for each a picture and its facts."""
    made = io.BytesIO()
    Image.new("RGB", (4, 4)).save(made, "JPEG")
    for camera, later_s in (("gate", 0), ("hall", 0), ("yard", 9)):
        snapshot = Snapshot(camera=camera, time=START + later_s, **SIZED)
        write_snapshot(folder, snapshot, made.getvalue())


def test_pruning_by_age_removes_what_a_killed_process_left(gallery, folder):
    leave(folder)
    gallery.prune(older_than=START + 5, camera="hall")
    assert set(read_snapshots(folder)) == {"gate", "yard"}
    gallery.prune(keep_newest=0)
    assert set(read_snapshots(folder)) == {"gate", "yard"}
    gallery.prune(older_than=START + 9)
    assert set(read_snapshots(folder)) == {"yard"}
    assert len(os.listdir(folder)) == 2
    assert gallery.verify() == []


def test_a_deletion_by_camera_or_time_removes_what_a_killed_process_left(gallery, folder):
    for where, remaining in (
        ({"camera": ("gate", "yard")}, {"hall"}),
        ({"until": START + 9}, {"yard"}),
        ({"since": START + 9}, {"gate", "hall"}),
        ({"since": START + 5, "camera": "gate"}, {"gate", "hall", "yard"}),
        ({"track": "gate/1", "camera": "gate"}, {"gate", "hall", "yard"}),
    ):
        leave(folder)
        gallery.delete_where(Filter(**where))
        assert set(read_snapshots(folder)) == remaining
        assert len(os.listdir(folder)) == 2 * len(remaining)
    picture_path(folder, "gate").with_suffix(".json").unlink()
    gallery.delete_where(Filter(camera="gate"))
    assert len(os.listdir(folder)) == 4, "facts that were never written keep no picture"


def test_a_camera_that_starts_removes_what_a_killed_process_left_of_it(encoder, gallery, folder):
    leave(folder)
    with Pipeline(encoder, gallery, save_crops=False) as pipeline:
        pipeline.add_camera("gate")
        wait_for(lambda: set(read_snapshots(folder)) == {"hall", "yard"})
    assert len(os.listdir(folder)) == 4


def test_a_damaged_file_is_left_out(folder):
    leave(folder)
    file = picture_path(folder, "gate").with_suffix(".json")
    sound = json.loads(file.read_text())
    changes = ({"zones": [[[0, 2]]]}, {"masks": [[["a", 0]]]}, {"camera": "hall"}, {"more": 1})
    for damaged in (*(json.dumps(sound | change) for change in changes), "\xff{"):
        file.write_text(damaged, "latin-1")
        assert set(read_snapshots(folder)) == {"hall", "yard"}
