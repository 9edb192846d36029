"""The file of cameras: what is refused, and what a running pipeline does when it changes."""

import itertools
import os
import sys
from pathlib import Path

import pytest

from tests.helpers.fake_camera import BOX, RULES, FakeReader, check_sums, person_frame, wait_for
from tests.helpers.refused import refused
from upperson_camera import Pipeline, PipelineSettings
from upperson_camera.config import CamerasFile, read_cameras
from upperson_camera.decoding import find_hwaccel
from upperson_camera.source import Logins
from upperson_rt.errors import BackendError, InputError
from upperson_rt.gallery import Filter
from upperson_rt.ingest.boxes import QualityRules

PATH = Path("cameras.yaml")
SQUARE = "[[0, 0], [1, 0], [1, 1], [0, 1]]"
TOP = "[[0, 0], [1, 0], [1, 0.1], [0, 0.1]]"


def gate(*lines):
    return "\n".join(["cameras:", "  gate:", *(f"    {line}" for line in lines)])


def read(text, **defaults):
    return read_cameras(text.encode(), PATH, defaults)


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


@pytest.mark.parametrize(
    ("text", "code", "fields"),
    [
        (gate("source: 0.avi", "zone: []"), "key_unknown", {"camera": "gate", "key": "zone"}),
        (gate("source: 0.avi", "batch_size: 3"), "key_unknown", {"key": "batch_size"}),
        (gate("source: 0.avi", "every_s: fast"), "value_unfit", {"at": "every_s"}),
        (gate("source: 0.avi", "drop: no"), "value_unfit", {"camera": "gate", "at": "drop"}),
        (gate("source: 0"), "value_unfit", {"at": "source"}),
        (gate("detector: hog"), "key_missing", {"camera": "gate", "at": "source"}),
        (gate("source: 0.avi", "start_time: soon"), "time_malformed", {"camera": "gate"}),
        (gate("source: 0.avi", "start_time: [1]"), "time_malformed", {"camera": "gate"}),
        (
            gate("source: 0.avi", f"zones: [{SQUARE}, [[0, 0], [1, 1]]]"),
            "polygon_malformed",
            {"camera": "gate", "at": "zones[1]"},
        ),
        (
            gate("source: 0.avi", "masks: [[[0, 0], [1, 1], [1, 0], [0, 1]]]"),
            "polygon_malformed",
            {"camera": "gate", "at": "masks[0]"},
        ),
        (gate("source: 0.avi", "zones:"), "no_list", {"camera": "gate"}),
        (gate("source: rtsp://anna:s3cr3t@cam/x"), "secret_in_config", {"camera": "gate"}),
        (gate("source: http://cam/x?token=s3cr3t"), "secret_in_config", {"camera": "gate"}),
        (gate("source: 0.avi", "password: s3cr3t"), "secret_in_config", {"camera": "gate"}),
        ("cameras:\n  gate: 0.avi", "value_unfit", {"camera": "gate"}),
        ("cameras: [gate]", "value_unfit", {"at": "cameras"}),
        ("cameras:", "value_unfit", {"at": "cameras"}),
        ("[gate]", "value_unfit", {"at": ""}),
        ("cameras: {}", "no_cameras", {}),
        ("kameras: {}", "key_unknown", {"key": "kameras"}),
        ("", "value_unfit", {}),
        ("cameras: [s3cr3t", "not_yaml", {}),
        ("cameras: !!python/object:os.system s3cr3t", "not_yaml", {}),
        ("cameras: {gate: {source: a}, gate: {source: b}}", "not_yaml", {}),
        ("cameras: {1: {source: a}}", "not_yaml", {}),
        ("cameras: &a [*a]", "value_unfit", {}),
        ("[" * 5000, "not_yaml", {}),
    ],
)
def test_a_bad_file_is_refused_with_its_place(text, code, fields):
    with refused(code, InputError, **fields) as found:
        read(text)
    message = str(found.value)
    assert message.startswith("cameras.yaml")
    assert "\n" not in message
    assert "s3cr3t" not in message


def test_what_is_no_text_is_refused():
    with refused("not_yaml", InputError):
        read_cameras(b"\xff\xfe\x00", PATH)


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
    file = CamerasFile(path, settings, lambda *choice: lambda frame: [], Logins(), {})
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
    settings = PipelineSettings(
        every_s=0, min_views=1, opener=street, capture_rules=RULES, batch_size=4
    )
    defaults = {"detector": "hog"}

    def states():
        return {name: camera.state for name, camera in pipeline.stats().cameras.items()}

    def grows(camera, what):
        def count():
            found = getattr(pipeline.stats().cameras[camera], what)
            return found if isinstance(found, int) else sum(found.values())

        before = count()
        wait_for(lambda: count() > before)

    write(path, gate={}, hall={}, door={"detector": "other"})
    file = CamerasFile(path, settings, open_detector, Logins(), defaults)
    with Pipeline(encoder, gallery, settings) as pipeline:
        file.start(pipeline)
        for camera in ("gate", "hall", "door"):
            grows(camera, "committed")
        assert file.poll() is None
        assert opened == [("hog", *[None] * 4), ("other", *[None] * 4)], "shared by gate and hall"

        write(
            path,
            gate={"min_height_px": 100},
            door={"detector": "other", "zones": f"[{TOP}]"},
            yard={},
        )
        assert file.poll() is None, "it may still be written"
        assert set(states()) == {"gate", "hall", "door"}
        assert file.poll() is not None
        assert file.poll() is None
        assert states()["hall"] == "removed"
        assert list(file.sources) == ["gate", "door", "yard"]
        for camera in ("gate", "yard"):
            grows(camera, "committed")
        grows("door", "crops_dropped")
        hosts = [address.split("/")[2] for address in street.opened]
        assert {name: hosts.count(name) for name in hosts} == {
            "gate": 2, "hall": 1, "door": 1, "yard": 1,
        }  # fmt: skip

        def runs():
            items = gallery.items(Filter(camera="gate"))
            return {item.track.rpartition("-")[0] for item in items}

        wait_for(lambda: len(runs()) == 2)  # Tracks of before and after have no name in common.
        wait_for(lambda: pipeline.stats().cameras["hall"].crops_waiting == 0)
        hall = pipeline.stats().cameras["hall"]
        assert hall.committed == gallery.count(Filter(camera="hall"))
        assert hall.accepted == hall.committed + hall.crops_dropped.get("queue_full", 0)

        before = pipeline.stats().cameras["door"].crops_dropped["outside_zone"]
        assert before > 0
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
            assert states() == {
                "gate": "running", "door": "running", "yard": "running", "hall": "removed",
            }  # fmt: skip
        path.write_text(good)
        assert [file.poll() is None for _ in range(3)] == [True, False, True], "it is right again"
        assert len(street.opened) == 5, "and no camera was opened for that"

        write(path, door={"detector": "hog", "min_height_px": 300})
        assert [file.poll() is None for _ in range(2)] == [True, False]
        assert len(pipeline._shared.detectors) == 1
        assert [name for name, state in states().items() if state != "removed"] == ["door"]
    check_sums(pipeline.stats())
    assert gallery.count() == pipeline.stats().total("committed")


@pytest.mark.parametrize(
    ("keys", "code", "error"),
    [
        ({"every_s": -1}, "setting_out_of_range", InputError),
        ({"drop": "block"}, "only_files_wait", InputError),
        ({"save_crops": "true"}, "no_place_for_pictures", InputError),
        ({"ca": "none.pem"}, "ca_unreadable", InputError),
        ({"hwaccel": "abacus"}, "unknown_hwaccel", InputError),
        ({"tracker": "bytetrack"}, "extra_missing", BackendError),
        ({"start_time": 1e15}, "time_malformed", InputError),
    ],
)
def test_what_no_camera_can_do_is_refused_with_its_name(path, monkeypatch, keys, code, error):
    monkeypatch.setitem(sys.modules, "trackers", None)
    write(path, gate=keys)
    settings = PipelineSettings(opener=Street(), save_crops=False)
    with refused(code, error, camera="gate"):
        CamerasFile(path, settings, lambda *choice: lambda frame: [], Logins(), {})


def test_what_decodes_is_said_for_each_camera_whose_entry_names_a_device(path, encoder, gallery):
    settings = PipelineSettings(opener=Street(), save_crops=False)
    said = []
    options = (settings, lambda *choice: lambda frame: [], Logins(), {})
    write(path, gate={"hwaccel": "auto"}, hall={}, door={"hwaccel": "auto"})
    file = CamerasFile(path, *options, notify=said.append)
    assert said == []
    with Pipeline(encoder, gallery, settings) as pipeline:
        file.start(pipeline)
    assert said == [f"gate, door: {find_hwaccel('auto')[1]}"]


def test_rules_of_a_camera_stand_beside_those_of_all(path, encoder, gallery):
    write(path, gate={"min_sharpness": 5, "stall_s": 3})
    quality = QualityRules(min_height_px=100)
    settings = PipelineSettings(opener=Street(), quality=quality)
    file = CamerasFile(path, settings, lambda *choice: lambda frame: [], Logins(), {})
    own = file._first.prepared["gate"].own
    assert own.quality == QualityRules(min_height_px=100, min_sharpness=5.0)
    assert (own.capture_rules.stall_s, own.capture_rules.longest_wait_s) == (3.0, 3.0)
    assert own.every_s == settings.every_s
