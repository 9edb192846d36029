"""Zones and masks, settings of one camera, and cameras that come and go while a pipeline runs."""

import itertools
import threading
from contextlib import contextmanager

import numpy as np
import pytest

from tests.helpers.fake_camera import (
    BOX,
    LIVE,
    START,
    FakeEncoder,
    FakeOpener,
    FakeTime,
    Gate,
    check_sums,
    person_frame,
    wait_for,
)
from tests.helpers.refused import refused
from upperson_camera import BoxesFile, Pipeline
from upperson_camera.regions import Regions
from upperson_rt.errors import InputError, UsageError
from upperson_rt.gallery import Filter
from upperson_rt.ingest.boxes import QualityRules, clean_boxes
from upperson_synthetic.video import VideoSpec, write_video

ALL = {"every_s": 0, "min_views": 1}
LIMIT_S = 1000
WIDTH, HEIGHT = 640, 360
LEFT = [(0, 0), (0.5, 0), (0.5, 1), (0, 1)]
TOP = [(0, 0), (1, 0), (1, 0.3), (0, 0.3)]


@pytest.fixture(scope="module")
def street(tmp_path_factory):
    path = tmp_path_factory.mktemp("street") / "street.avi"
    spec = VideoSpec(people=6, seconds=12, fps=8, width=WIDTH, height=HEIGHT, seed=5)
    write_video(path, spec)
    return path


def is_left(item):
    return (item.box[0] + item.box[2]) / 2 <= WIDTH / 2


def test_people_outside_the_zones_or_in_a_mask_give_no_rows(encoder, gallery, street):
    regions = {
        "all": {}, "left": {"zones": [LEFT]}, "right": {"masks": [LEFT]},
        "none": {"zones": [LEFT], "masks": [LEFT]},
    }  # fmt: skip
    boxes = BoxesFile(street.with_suffix(".json"))
    with Pipeline(encoder, gallery, **ALL) as pipeline:
        for name, given in regions.items():
            pipeline.add_camera(name, str(street), boxes, start_time=START, **given)
        assert pipeline.wait()
        assert pipeline.drain()
    stats = pipeline.stats()
    check_sums(stats)
    rows = {
        name: {(i.attributes["frame"], i.box) for i in gallery.items() if i.camera == name}
        for name in regions
    }
    left = {(i.attributes["frame"], i.box) for i in gallery.items() if is_left(i)}
    assert len(rows["all"]) > 100
    assert rows["left"] == rows["all"] & left
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
    strips = {
        "centre": [(0, 0.4), (1, 0.4), (1, 0.6), (0, 0.6)],
        "foot": [(0, 0.85), (1, 0.85), (1, 1), (0, 1)],
        "head": [(0, 0), (1, 0), (1, 0.2), (0, 0.2)],
    }
    found = {
        name: (
            Regions(zones=[strip]).in_zone(boxes, 100, 200),
            len(Regions(masks=[strip]).without_masked(boxes, 100, 200).edges),
        )
        for name, strip in strips.items()
    }
    assert found == {"centre": ([True], 1), "foot": ([True], 0), "head": ([False], 1)}
    cut = clean_boxes([[30, 100, 70, 200]], 100, 200)
    bottom = Regions(masks=[[(0, 0.99), (1, 0.99), (1, 1), (0, 1)]])
    assert bottom.without_masked(cut, 100, 200).dropped == {"masked": 1}, (
        "in the last row of pixels"
    )
    nobody = clean_boxes(None, 100, 200)
    assert Regions(zones=[LEFT]).in_zone(nobody, 100, 200) == []
    assert Regions(masks=[LEFT]).without_masked(nobody, 100, 200) is nobody
    assert Regions(zones=[LEFT]) == Regions(zones=np.array([LEFT])) != Regions(masks=[LEFT])


@pytest.mark.parametrize(
    "polygon",
    [
        [(0, 0), (1, 1), (1, 0), (0, 1)],
        [(0, 0), (0.5, 0.5), (0.2, 0.2)],
        [(0, 0), (1, 0), (0.5, 0)],
        [(0.1, 0.1), (0.3, 0.3), (0.2, 0.2), (0.4, 0.1)],
        [(0, 0), (1, 0), (1, 1), (0.5, 0), (0, 1)],
        [(0, 0), (1, 0), (1, 1), (0, 0)],
        [(0, 0), (1, 0), (1, 1), (0, 1), (0, 0)],
        [(0, 0), (0, 0), (1, 1), (0, 1)],
        [(0, 0), (1, 0)],
        [(0, 0), (1, 0), (1, 1.01)],
        [(0, 0), (1, 0), (1, float("nan"))],
        [(0, 0), (1, 0), (1, True)],
        [(0, 0), (1, 0), (1, "1")],
        [(0, 0), (1, 0), (1,)],
        [(k / 101, k % 2) for k in range(101)],
    ],
)
def test_a_polygon_that_is_none_is_refused(polygon):
    with refused("polygon_malformed", InputError) as found:
        Regions(zones=[LEFT, polygon])
    assert found.value.fields["at"].startswith("zones[1]")


@pytest.mark.parametrize("turned", range(5))
def test_polygons_may_be_concave_and_begin_anywhere(turned):
    star = [(0, 0), (0.5, 0.4), (1, 0), (0.6, 0.5), (0.5, 1)]
    for corners in (star, star[::-1], [(0, 0), (0.5, 0), (1, 0), (1, 1), (0, 1)]):
        Regions(masks=[corners[turned:] + corners[:turned]])
    with refused("polygon_malformed", InputError, at="masks"):
        Regions(masks=[LEFT] * 51)


def test_zones_apply_from_the_next_frame_on(encoder, gallery):
    with Pipeline(encoder, gallery, **ALL) as pipeline:
        pipeline.add_camera("gate", drop="block")

        def rows_of(number):
            assert pipeline.submit("gate", person_frame(), [BOX], START + number)
            assert pipeline.drain()
            return gallery.count()

        assert rows_of(0) == 1
        pipeline.set_zones("gate", [TOP])
        assert rows_of(1) == 1
        pipeline.set_zones("gate", [LEFT])
        assert rows_of(2) == 2
        pipeline.set_zones("gate", [LEFT], masks=[LEFT])
        assert rows_of(3) == 2
        pipeline.set_zones("gate")
        assert rows_of(4) == 3
        with refused("polygon_malformed", InputError):
            pipeline.set_zones("gate", [[(0, 0)]])
        with refused("camera_unknown", UsageError, camera="hall"):
            pipeline.set_zones("hall", [LEFT])
    check_sums(pipeline.stats())
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


def flow():
    """Return frames of a person without an end."""
    return itertools.repeat(person_frame())


def test_cameras_come_and_go_while_frames_flow(encoder, gallery):
    def add(name):
        opener = FakeOpener(flow())
        pipeline.add_camera(name, LIVE, lambda frame: [BOX], opener=opener)
        return opener

    def committed(name):
        return pipeline.stats().cameras[name].committed

    with Pipeline(encoder, gallery, every_s=0, min_views=1, batch_size=4) as pipeline:
        openers = [add("gate"), add("hall")]
        for times in range(1, 4):
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
            hall = list(gallery.items(Filter(camera="hall")))
            assert len(hall) == committed("hall") > before[1]
            runs = {item.track.rpartition("-")[0] for item in hall}
            assert len(runs) == times, "no name of a track is there twice"
            openers.append(add("hall"))
        assert len(pipeline._shared.detectors) == 2, "those of removed cameras are not kept"
    stats = pipeline.stats()
    check_sums(stats)
    assert {name: c.state for name, c in stats.cameras.items()} == dict.fromkeys(
        ("gate", "hall"), "stopped"
    )
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


@pytest.fixture
def clock(monkeypatch):
    """The clock by which calls last too long; a busy machine does not move it."""
    clock = FakeTime()
    monkeypatch.setattr("upperson_camera.queues.time", clock)
    monkeypatch.setattr("upperson_camera.cameras.time", clock)
    return clock


@contextmanager
def removing(pipeline, camera):
    """Remove a camera in another thread, which has ended with the context."""
    frames = pipeline._cameras[camera]._frames
    thread = threading.Thread(target=pipeline.remove_camera, args=(camera,))
    thread.start()
    wait_for(lambda: frames.closed)
    yield
    thread.join()


def test_removing_a_camera_abandons_its_stuck_detector_and_no_other(encoder, gallery, clock):
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
            with removing(pipeline, "gate"):
                clock.more_s += LIMIT_S + 1
            assert pipeline.stats().cameras["gate"].failures == {"detector_stuck": 1}
            gate.open()
            wait_for(lambda: pipeline.stats().cameras["hall"].frames_processed == 1)
    stats = pipeline.stats()
    check_sums(stats)
    assert (stats.cameras["hall"].committed, stats.cameras["hall"].failures) == (1, {})
    assert gallery.count() == 1


def test_a_removed_camera_that_waits_for_the_encoder_ends_by_itself(encoder, gallery, clock):
    options = {"crop_queue": 1, "batch_size": 1, "end_within_s": LIMIT_S}

    def processed():
        return pipeline.stats().cameras["gate"].frames_processed

    with Gate() as gate:
        slow = FakeEncoder(encoder, gate)
        with Pipeline(slow, gallery, **ALL, **options) as pipeline:
            pipeline.add_camera("gate", drop="block")
            for number in range(4):
                pipeline.submit("gate", person_frame(), [BOX], START + number)
            # One is with the encoder, one waits for it, the third for room; the last is a frame.
            wait_for(lambda: gate.entered == 1 and processed() == 3)
            with removing(pipeline, "gate"):
                clock.more_s += LIMIT_S + 1
                wait_for(lambda: pipeline.stats().cameras["gate"].frames_dropped)
                clock.more_s += 2 * LIMIT_S
            assert not pipeline.drain(0)
            pipeline.add_camera("gate")
            gate.open()
    stats = pipeline.stats()
    check_sums(stats)
    assert stats.failures == {}
    camera = stats.cameras["gate"]
    assert (camera.frames_processed, camera.frames_dropped) == (3, {"stopped": 1})
    assert gallery.count() == camera.committed == 3


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


@pytest.mark.parametrize("error", [ValueError("no"), SystemExit(0)])
def test_a_detector_that_fails_for_a_camera_is_refused(encoder, gallery, error):
    pipeline = Pipeline(encoder, gallery)
    with refused("detector_failed", InputError, camera="gate"):
        pipeline.add_camera("gate", detector=Learning(error))
    pipeline.add_camera("gate")
