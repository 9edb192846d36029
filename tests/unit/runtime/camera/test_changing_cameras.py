"""Cameras and zones that come, change and go while a pipeline runs, by calls or in a file."""

import itertools
import os
import sys
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.helpers.fake_camera import (
    ALL,
    BOX,
    LIVE,
    RULES,
    START,
    FakeOpener,
    FakeReader,
    Gate,
    person_frame,
    submit,
    wait_for,
)
from tests.helpers.refused import refused
from upperson_camera import BoxesFile, Pipeline, PipelineSettings
from upperson_camera.config import CamerasFile, read_cameras
from upperson_camera.regions import Regions
from upperson_camera.source import Logins
from upperson_rt.errors import BackendError, InputError, UsageError
from upperson_rt.gallery import Filter
from upperson_rt.ingest.boxes import QualityRules, clean_boxes

LIMIT_S = 1000
LEFT = [(0, 0), (0.5, 0), (0.5, 1), (0, 1)]
TOP = [(0, 0), (1, 0), (1, 0.3), (0, 0.3)]


def test_people_outside_the_zones_or_in_a_mask_give_no_rows(encoder, gallery, street):
    regions = {
        "all": {}, "left": {"zones": [LEFT]}, "right": {"masks": [LEFT]},
        "none": {"zones": [LEFT], "masks": [LEFT]},
    }  # fmt: skip
    boxes = BoxesFile(street[0].with_suffix(".json"))
    with Pipeline(encoder, gallery, save_crops=False, **ALL) as pipeline:
        for name, given in regions.items():
            pipeline.add_camera(name, str(street[0]), boxes, start_time=START, **given)
        assert pipeline.wait()
        assert pipeline.drain()
    stats = pipeline.stats()
    rows = {
        name: {(i.attributes["frame"], i.box) for i in gallery.items() if i.camera == name}
        for name in regions
    }
    left = {(frame, box) for frame, box in rows["all"] if box[0] + box[2] <= 640}
    assert len(rows["all"]) > 100
    assert rows["left"] == left
    assert rows["right"] == rows["all"] - left
    assert rows["none"] == set()
    assert all(rows[name] for name in ("left", "right"))
    none = stats.cameras["none"]
    assert sum(none.crops_dropped.values()) == none.detections
    assert none.crops_dropped.keys() <= {"masked", "outside_zone", "no_track"}
    assert none.tracks == 0


def test_a_box_counts_by_its_foot_point_or_centre_and_is_masked_by_its_foot_point():
    # Of 100 x 200 pixels: centre at (0.5, 0.5), foot point at (0.5, 0.9).
    boxes = clean_boxes([[30, 20, 70, 180]], 100, 200)
    for what, top, bottom, counts, is_masked in (
        ("centre", 0.4, 0.6, True, False),
        ("foot", 0.85, 1, True, True),
        ("head", 0, 0.2, False, False),
    ):
        strip = [(0, top), (1, top), (1, bottom), (0, bottom)]
        assert Regions(zones=[strip]).in_zone(boxes, 100, 200) == [counts], what
        left = Regions(masks=[strip]).without_masked(boxes, 100, 200)
        assert left.dropped["masked"] == is_masked, what
        assert len(left.edges) == (not is_masked)
    cut = clean_boxes([[30, 100, 70, 200]], 100, 200)
    last_row = Regions(masks=[[(0, 0.99), (1, 0.99), (1, 1), (0, 1)]])
    assert last_row.without_masked(cut, 100, 200).dropped == {"masked": 1}
    assert Regions(zones=[LEFT]).in_zone(clean_boxes(None, 100, 200), 100, 200) == []
    assert Regions(zones=[LEFT]) == Regions(zones=np.array([LEFT])) != Regions(masks=[LEFT])


@pytest.mark.parametrize(
    "polygon",
    [
        [(0, 0), (1, 1), (1, 0), (0, 1)],
        [(0, 0), (0.5, 0.5), (0.2, 0.2)],
        [(0, 0), (1, 0), (1, 1), (0.5, 0), (0, 1)],
        [(0, 0), (1, 0), (1, 1), (0, 0)],
        [(0, 0), (1, 0)],
        *([(0, 0), (1, 0), corner] for corner in ((1, 1.01), (1, float("nan")), (1, True), (1,))),
        [(k / 101, k % 2) for k in range(101)],
    ],
)
def test_a_polygon_that_is_none_is_refused(polygon):
    with refused("polygon_malformed", InputError) as found:
        Regions(zones=[LEFT, polygon])
    assert found.value.fields["at"].startswith("zones[1]")


def test_polygons_may_be_concave_and_begin_anywhere():
    star = [(0, 0), (0.5, 0.4), (1, 0), (0.6, 0.5), (0.5, 1)]
    for turned in range(5):
        for corners in (star, star[::-1], [(0, 0), (0.5, 0), (1, 0), (1, 1), (0, 1)]):
            Regions(masks=[corners[turned:] + corners[:turned]])
    with refused("polygon_malformed", InputError, at="masks"):
        Regions(masks=[LEFT] * 51)


def test_zones_apply_from_the_next_frame_on(encoder, gallery):
    with Pipeline(encoder, gallery, max_delay_s=0, **ALL) as pipeline:
        pipeline.add_camera("gate", drop="block")
        for number, (zones, masks, rows) in enumerate(
            (((), (), 1), ([TOP], (), 1), ([LEFT], (), 2), ([LEFT], [LEFT], 2), ((), (), 3))
        ):
            pipeline.set_zones("gate", zones, masks)
            submit(pipeline, first=number)
            assert pipeline.drain()
            assert gallery.count() == rows
        with refused("polygon_malformed", InputError):
            pipeline.set_zones("gate", [[(0, 0)]])
        with refused("camera_unknown", UsageError, camera="hall"):
            pipeline.set_zones("hall", [LEFT])
    assert pipeline.stats().cameras["gate"].crops_dropped == {"masked": 1, "outside_zone": 1}


def test_a_camera_has_settings_of_its_own(encoder, gallery):
    with Pipeline(encoder, gallery, **ALL) as pipeline:
        own = {
            "gate": {}, "small": {"quality": QualityRules(min_height_px=190)},
            "seen": {"min_views": 2}, "vectors": {"save_crops": False, "every_s": None},
        }  # fmt: skip
        for name, options in own.items():
            pipeline.add_camera(name, **options)
            assert pipeline.submit(name, person_frame(), [BOX], START)
    rows = {item.camera: item.crop is not None for item in gallery.items()}
    assert rows == {"gate": True, "vectors": False}
    dropped = {name: dict(c.crops_dropped) for name, c in pipeline.stats().cameras.items()}
    assert dropped["small"] == {"too_small": 1}
    assert dropped["seen"] == {"seen_once": 1}
    pipeline = Pipeline(encoder, gallery, save_crops=False)
    for options, code in (
        ({"batch_size": 3}, "option_unknown"),
        ({"min_views": 0}, "setting_out_of_range"),
        ({"save_crops": True}, "no_place_for_pictures"),
    ):
        with refused(code, UsageError):
            pipeline.add_camera("gate", **options)


def runs_of(gallery, camera):
    """Return the parts of the names of a camera's tracks that are unique to a run."""
    return {item.track.rpartition("-")[0] for item in gallery.items(Filter(camera=camera))}


def test_cameras_come_and_go_while_frames_flow(encoder, gallery):
    def add(name):
        opener = FakeOpener(itertools.repeat(person_frame()))
        pipeline.add_camera(name, LIVE, lambda frame: [BOX], opener=opener)
        return opener

    def committed(name):
        return pipeline.stats().cameras[name].committed

    with Pipeline(encoder, gallery, batch_size=4, **ALL) as pipeline:
        openers = [add("gate"), add("hall")]
        for times in range(1, 3):
            before = committed("gate"), committed("hall")
            wait_for(lambda: committed("gate") > before[0] and committed("hall") > before[1])  # noqa: B023
            pipeline.remove_camera("hall")
            assert openers[-1].readers[0].closed.is_set()
            stats = pipeline.stats().cameras["hall"]
            assert (stats.state, stats.frames_waiting, stats.error) == ("removed", 0, None)
            with refused("camera_unknown", UsageError):
                pipeline.remove_camera("hall")
            with refused("camera_unknown", UsageError):
                pipeline.submit("hall", person_frame())
            wait_for(lambda: pipeline.stats().cameras["hall"].crops_waiting == 0)
            assert gallery.count(Filter(camera="hall")) == committed("hall") > before[1]
            assert len(runs_of(gallery, "hall")) == times, "no name of a track is there twice"
            openers.append(add("hall"))
        assert len(pipeline._shared.detectors) == 2, "those of removed cameras are not kept"
    stats = pipeline.stats()
    states = {name: camera.state for name, camera in stats.cameras.items()}
    assert states == {"gate": "stopped", "hall": "stopped"}
    assert stats.failures == {}
    assert gallery.count() == stats.total("committed")
    with refused("not_running", UsageError):
        pipeline.remove_camera("gate")


def test_a_camera_is_removed_before_the_start_and_the_track_of_a_removed_one_is_written(
    encoder, gallery
):
    pipeline = Pipeline(encoder, gallery, every_s=60.0)
    pipeline.add_camera("gate")
    pipeline.remove_camera("gate")
    pipeline.add_camera("gate")
    with pipeline:
        for number in range(3):
            assert pipeline.submit("gate", person_frame(), [BOX], START + number / 2)
        pipeline.remove_camera("gate")
        assert pipeline.stats().cameras["gate"].accepted == 1
        assert pipeline.drain()
        assert gallery.count() == 1
        assert not pipeline.wait(0), "there is no camera that has ended"


def test_removing_a_camera_abandons_its_stuck_detector_and_no_other(encoder, gallery, patience):
    with Gate() as gate:

        def hang(frame):
            gate.hold()
            return [BOX]

        with Pipeline(encoder, gallery, **ALL, end_within_s=LIMIT_S) as pipeline:
            pipeline.add_camera("gate", detector=hang)
            pipeline.add_camera("hall", detector=hang)
            pipeline.submit("gate", person_frame(), time=START)
            wait_for(lambda: gate.entered == 1)
            pipeline.submit("hall", person_frame(), time=START)
            frames = pipeline._cameras["gate"]._frames
            removing = threading.Thread(target=pipeline.remove_camera, args=("gate",))
            removing.start()
            wait_for(lambda: frames.closed)
            patience.more_s += LIMIT_S + 1
            removing.join()
            assert pipeline.stats().cameras["gate"].failures == {"detector_stuck": 1}
            gate.open()
            wait_for(lambda: pipeline.stats().cameras["hall"].frames_processed == 1)
    stats = pipeline.stats()
    assert (stats.cameras["hall"].committed, stats.cameras["hall"].failures) == (1, {})
    assert gallery.count() == 1


class Learning:
    """A detector that has a state for each camera."""

    def __init__(self, error=None):
        self.made, self.error = {}, error

    def __call__(self, frame):
        raise AssertionError("each camera has its own")

    def for_camera(self, name, stats):
        if self.error is not None:
            raise self.error
        seen = self.made[name] = []

        def detect(frame):
            seen.append((threading.current_thread().name, stats().state))
            return [BOX]

        return detect


def test_a_detector_gets_the_name_and_the_state_of_its_camera(encoder, gallery):
    detector = Learning()
    with Pipeline(encoder, gallery, **ALL) as pipeline:
        pipeline.add_camera("gate", LIVE, detector, opener=FakeOpener([person_frame()] * 2))
        pipeline.add_camera("hall", detector=detector)
        assert pipeline.submit("hall", person_frame())
        wait_for(lambda: len(detector.made["gate"]) == 2 and detector.made["hall"])
    assert detector.made["hall"] == [("camera hall", "running")]
    assert {thread for thread, _ in detector.made["gate"]} == {"camera gate"}
    assert {state for _, state in detector.made["gate"]} <= {"running", "reconnecting"}


def test_a_detector_that_fails_for_a_camera_is_refused(encoder, gallery):
    pipeline = Pipeline(encoder, gallery)
    with refused("detector_failed", InputError, camera="gate"):
        pipeline.add_camera("gate", detector=Learning(SystemExit(0)))
    pipeline.add_camera("gate")


# --- The file of cameras


SQUARE = "[[0, 0], [1, 0], [1, 1], [0, 1]]"
ABOVE = "[[0, 0], [1, 0], [1, 0.1], [0, 0.1]]"


def gate(*lines):
    return "\n".join(["cameras:", "  gate:", *(f"    {line}" for line in lines)])


def read(text, **defaults):
    return read_cameras(text.encode(), Path("cameras.yaml"), defaults)


def test_cameras_have_keys_and_take_the_rest_from_the_command_line():
    text = gate(
        "source: rtsp://10.0.0.5/stream", "detector: &d yolo.onnx", "start_time: 2026-11-25T08:00Z",
        "min_height_px: 80", "border: drop", "stall_s: 5", "every_s: 3", "allow_hosts: [Cam]",
        f"zones: [{SQUARE}]",
    )  # fmt: skip
    text += "\n  hall:\n    source: '0'\n    drop: newest\n    masks: []"
    found = read(text, detector="hog", detector_score=0.5, drop="oldest", start_time=5.0)
    assert list(found) == ["gate", "hall"]
    one, other = found.values()
    assert one.detector_choice == ("yolo.onnx", None, None, None, None), "with no score for hog"
    assert other.detector_choice == ("hog", None, None, 0.5, None)
    assert (one.drop, other.drop) == ("oldest", "newest")
    assert (one.start_time, other.start_time) == (1795593600.0, 5.0)
    assert (one.min_height_px, one.border, one.stall_s, one.every_s) == (80, "drop", 5.0, 3.0)
    assert one.regions.zones == (((0, 0), (1, 0), (1, 1), (0, 1)),)
    assert other.regions.zones == other.regions.masks == ()


VIDEO = "source: 0.avi"


@pytest.mark.parametrize(
    ("text", "code", "fields"),
    [
        *((gate(*lines), code, {"camera": "gate", **fields}) for lines, code, fields in (
            ((VIDEO, "zone: []"), "key_unknown", {"key": "zone"}),
            ((VIDEO, "batch_size: 3"), "key_unknown", {"key": "batch_size"}),
            ((VIDEO, "every_s: fast"), "value_unfit", {"at": "every_s"}),
            ((VIDEO, "drop: no"), "value_unfit", {"at": "drop"}),
            (("detector: hog",), "key_missing", {"at": "source"}),
            ((VIDEO, "start_time: soon"), "time_malformed", {}),
            ((VIDEO, f"zones: [{SQUARE}, [[0, 0], [1, 1]]]"), "polygon_malformed",
             {"at": "zones[1]"}),
            ((VIDEO, "zones:"), "no_list", {}),
            (("source: rtsp://anna:s3cr3t@cam/x",), "secret_in_config", {}),
            (("source: http://cam/x?token=s3cr3t",), "secret_in_config", {}),
            ((VIDEO, "password: s3cr3t"), "secret_in_config", {}),
        )),
        ("cameras:\n  gate: 0.avi", "value_unfit", {"camera": "gate"}),
        ("cameras: [gate]", "value_unfit", {"at": "cameras"}),
        ("[gate]", "value_unfit", {"at": ""}),
        ("cameras: {}", "no_cameras", {}),
        ("kameras: {}", "key_unknown", {"key": "kameras"}),
        *((text, "value_unfit", {}) for text in ("", "cameras: &a [*a]")),
        *((text, "not_yaml", {}) for text in (
            "cameras: [s3cr3t", "cameras: !!python/object:os.system s3cr3t",
            "cameras: {gate: {source: a}, gate: {source: b}}", "[" * 1000,
        )),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused_with_its_place(text, code, fields):
    with refused(code, InputError, **fields) as found:
        read(text)
    message = str(found.value)
    assert message.startswith("cameras.yaml")
    assert "\n" not in message
    assert "s3cr3t" not in message


class Street:
    """Opens live sources that never end; notes them by address."""

    def __init__(self):
        self.opened = []

    def __call__(self, source, timeout_s):
        self.opened.append(source.address)
        return FakeReader(itertools.repeat(person_frame()))


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr("upperson_camera.config.POLL_S", 0.0)
    return tmp_path / "cameras.yaml"


def write(path, **cameras):
    lines = ["cameras:"]
    for name, keys in cameras.items():
        given = {"source": f"rtsp://{name}/s", **keys}
        lines += [f"  {name}:", *(f"    {key}: {value}" for key, value in given.items())]
    path.write_text("\n".join(lines))


def following(path, settings):
    return CamerasFile(path, settings, lambda *choice: lambda frame: [], Logins(), {})


def test_a_file_is_read_again_only_if_it_may_have_changed(path, encoder, gallery, monkeypatch):
    reads = []

    def read(file, most):
        reads.append(file.read_bytes())
        return reads[-1]

    def polled():
        """What two polls report, and how often the file was read for it."""
        del reads[:]
        return [file.poll() is not None for _ in range(2)], len(reads)

    monkeypatch.setattr("upperson_camera.config.read_bounded", read)
    settings = PipelineSettings(opener=Street(), capture_rules=RULES)
    write(path, gate={})
    file = following(path, settings)
    with Pipeline(encoder, gallery, settings) as pipeline:
        file.start(pipeline)
        monkeypatch.setattr("upperson_camera.config._SAME_TIME_NS", 10**18)
        assert polled() == ([False, False], 2), "it was written just now"
        monkeypatch.setattr("upperson_camera.config._SAME_TIME_NS", -(10**18))
        assert polled() == ([False, False], 1)
        assert polled() == ([False, False], 0)
        before = os.stat(path)
        write(path, gaze={})  # As long, and with the time of before.
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert polled() == ([False, True], 1)
        assert list(file.sources) == ["gaze"]
        path.unlink()
        assert polled() == ([False, False], 0)
        write(path, gate={})
        assert polled() == ([False, True], 1)
        assert polled() == ([False, False], 0)


def test_a_running_pipeline_follows_the_file(path, encoder, gallery, caplog):
    opened = []

    def open_detector(*choice):
        if choice[0] == "none":
            raise InputError("there is none", code="detector_not_found")
        opened.append(choice)
        return lambda frame: [BOX]

    street = Street()
    settings = PipelineSettings(opener=street, capture_rules=RULES, batch_size=4, **ALL)

    def states():
        return {name: camera.state for name, camera in pipeline.stats().cameras.items()}

    def grows(camera, what):
        def count():
            found = getattr(pipeline.stats().cameras[camera], what)
            return found if isinstance(found, int) else sum(found.values())

        before = count()
        wait_for(lambda: count() > before)

    write(path, gate={}, hall={}, door={"detector": "other"})
    file = CamerasFile(path, settings, open_detector, Logins(), {"detector": "hog"})
    with Pipeline(encoder, gallery, settings) as pipeline:
        file.start(pipeline)
        for camera in ("gate", "hall", "door"):
            grows(camera, "committed")
        assert file.poll() is None
        assert opened == [("hog", *[None] * 4), ("other", *[None] * 4)], "shared by gate and hall"

        zoned = {"detector": "other", "zones": f"[{ABOVE}]"}
        write(path, gate={"min_height_px": 100}, door=zoned, yard={})
        assert file.poll() is None, "it may still be written"
        assert set(states()) == {"gate", "hall", "door"}
        assert file.poll() is not None
        assert file.poll() is None
        assert states()["hall"] == "removed"
        assert list(file.sources) == ["gate", "door", "yard"]
        for camera in ("gate", "yard"):
            grows(camera, "committed")
        grows("door", "crops_dropped")
        hosts = Counter(address.split("/")[2] for address in street.opened)
        assert hosts == {"gate": 2, "hall": 1, "door": 1, "yard": 1}
        # Tracks of before and after have no name in common.
        wait_for(lambda: len(runs_of(gallery, "gate")) == 2)
        wait_for(lambda: pipeline.stats().cameras["hall"].crops_waiting == 0)
        hall = pipeline.stats().cameras["hall"]
        assert hall.committed == gallery.count(Filter(camera="hall"))
        assert pipeline.stats().cameras["door"].crops_dropped["outside_zone"] > 0
        good = path.read_text()
        for bad, code in (
            (good.replace("min_height_px: 100", "min_height_px: high"), "value_unfit"),
            (f"{good}\n  last:\n    source: a.avi", "source_not_found"),
            (f"{good}\n    detector: none", "detector_not_found"),
            (good.replace("rtsp://gate", "rtsp://anna:secret@gate"), "secret_in_config"),
            (None, "config_unreadable"),
        ):
            caplog.clear()
            path.unlink() if bad is None else path.write_text(bad)
            assert [file.poll() for _ in range(3)] == [None] * 3
            (logged,) = [one for one in caplog.records if one.name.endswith("config")]
            assert (logged.event, logged.code) == ("config_refused", code)
            assert [*states().values()].count("running") == 3
        path.write_text(good)
        assert [file.poll() is None for _ in range(3)] == [True, False, True], "it is right again"
        assert len(street.opened) == 5, "and no camera was opened for that"

        write(path, door={"detector": "hog", "min_height_px": 300})
        assert [file.poll() is None for _ in range(2)] == [True, False]
        assert len(pipeline._shared.detectors) == 1
        assert [name for name, state in states().items() if state != "removed"] == ["door"]
    assert gallery.count() == pipeline.stats().total("committed")


def test_what_no_camera_can_do_is_refused_with_its_name(path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackers", None)
    settings = PipelineSettings(opener=Street(), save_crops=False)
    for key, value, code, error in (
        ("every_s", -1, "setting_out_of_range", InputError),
        ("drop", "block", "only_files_wait", InputError),
        ("save_crops", "true", "no_place_for_pictures", InputError),
        ("ca", "none.pem", "ca_unreadable", InputError),
        ("hwaccel", "abacus", "unknown_hwaccel", InputError),
        ("tracker", "bytetrack", "extra_missing", BackendError),
    ):
        write(path, gate={key: value})
        with refused(code, error, camera="gate"):
            following(path, settings)


def test_rules_of_a_camera_stand_beside_those_of_all(path, encoder, gallery):
    write(path, gate={"min_sharpness": 5, "stall_s": 3})
    quality = QualityRules(min_height_px=100)
    settings = PipelineSettings(opener=Street(), quality=quality)
    file = following(path, settings)
    own = file._first.prepared["gate"].own
    assert own.quality == QualityRules(min_height_px=100, min_sharpness=5.0)
    assert (own.capture_rules.stall_s, own.capture_rules.longest_wait_s) == (3.0, 3.0)
    assert own.every_s == settings.every_s
