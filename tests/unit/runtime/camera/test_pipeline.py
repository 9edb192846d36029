"""The whole camera pipeline, on drawn people with known tracks and on frames made for a purpose."""

import dataclasses
import platform
import threading
from collections import Counter, defaultdict
from types import SimpleNamespace
from typing import get_type_hints

import numpy as np
import pytest
from PIL import Image

from tests.helpers.fake_camera import (
    ALL,
    BOX,
    FILE,
    LIVE,
    START,
    FakeEncoder,
    FakeOpener,
    Gate,
    UnspeakableError,
    person_frame,
    pictures_of,
    submit,
    wait_for,
)
from tests.helpers.refused import refused
from upperson_camera import (
    BoxesFile,
    CaptureRules,
    Pipeline,
    PipelineOptions,
    PipelineSettings,
    parse_source,
)
from upperson_machine.description import resident_bytes
from upperson_rt import extensions
from upperson_rt.errors import InputError, IntegrityError, UsageError, install_command
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.ingest.boxes import QualityRules


def people_of(item, truth):
    """The people whose true box an item has."""
    found = truth["frames"][item.attributes["frame"]]
    return {entry["person"] for entry in found if tuple(entry["box"]) == item.box}


def test_every_person_of_a_video_is_one_track_with_pictures_of_their_own(encoder, gallery, street):
    path, truth = street
    boxes = BoxesFile(path.with_suffix(".json"))
    with Pipeline(encoder, gallery, every_s=0.5) as pipeline:
        pipeline.add_camera("gate", str(path), boxes, start_time=START)
        assert pipeline.wait()
    camera = pipeline.stats().cameras["gate"]
    assert (camera.state, camera.frames_read, camera.frames_dropped) == ("ended", 96, {})
    assert camera.tracks == 6
    assert camera.committed == gallery.count() == camera.accepted

    people_by_track = defaultdict(set)
    for item in gallery.items():
        people = people_of(item, truth)
        assert people, "a crop shows a person who is really there"
        people_by_track[item.track] |= people
        frame = item.attributes["frame"]
        assert item.time == pytest.approx(START + frame / 8, abs=0.01)
        assert item.source == f"{path}#frame={frame}"
        with Image.open(gallery.crops_dir / item.crop) as picture:
            x0, y0, x1, y1 = item.box
            assert picture.size == (x1 - x0, y1 - y0)
    assert sorted(map(len, people_by_track.values())) == [1] * 6
    assert set.union(*people_by_track.values()) == set(range(6))
    # Each row has the embedding of its own picture.
    item = next(gallery.items())
    with Image.open(gallery.crops_dir / item.crop) as picture:
        (hits,) = gallery.search(encoder.encode_images([np.asarray(picture)]), 1)
    assert hits[0].item.key == item.key


def test_a_tracker_of_the_package_trackers_takes_the_place_of_ours(encoder, gallery, street):
    pytest.importorskip("trackers", reason=f"run  {install_command('trackers')}")
    path, truth = street
    with Pipeline(encoder, gallery, every_s=1.0, tracker="bytetrack") as pipeline:
        pipeline.add_camera("gate", str(path), BoxesFile(path.with_suffix(".json")))
        assert pipeline.wait()
    camera = pipeline.stats().cameras["gate"]
    assert 0 < camera.crops_dropped["no_track"] < camera.detections / 4, "the first box has none"
    people = {frozenset(people_of(item, truth)) for item in gallery.items()}
    assert people == {frozenset({number}) for number in range(6)}


def test_a_file_watched_again_replaces_its_rows_under_names_that_are_no_file_names(
    encoder, gallery, street
):
    path, _ = street
    boxes, names, seen = BoxesFile(path.with_suffix(".json")), ("../gate", "Süd 1/2"), []
    others = Item(key="of another process", camera=names[0])
    for run in range(2):
        with Pipeline(encoder, gallery, every_s=2.0) as pipeline:
            for name in names:
                pipeline.add_camera(name, str(path), boxes)
            assert pipeline.wait()
            assert pipeline.drain()
            if run:
                gallery.add([others], np.eye(1, encoder.embed_dim, dtype=np.float32))
        if run:
            gallery.delete([others.key])
        seen.append((gallery.count(), {item.track for item in gallery.items()}))
        for name, camera in pipeline.stats().cameras.items():
            added = run * (name == names[0])
            assert (camera.replaced, camera.added_by_others) == (run * camera.committed, added)
    assert seen[0][0] == seen[1][0] > 10
    assert not seen[0][1] & seen[1][1], "tracks of two runs never have one name"
    assert pictures_of(gallery) == sorted(gallery.crops_dir / item.crop for item in gallery.items())
    assert len(list(gallery.crops_dir.iterdir())) == len(names)


def submit_walk(pipeline, camera="gate", frames=10, start=START, **options):
    for index in range(frames):
        box = [BOX[0] + 2 * index, BOX[1], BOX[2] + 2 * index, BOX[3]]
        assert pipeline.submit(camera, person_frame(box=box), [box], start + index / 10, **options)
        wait_for(lambda: pipeline.stats().frame_queues[camera] <= 2)


@pytest.mark.skipif(
    resident_bytes("VmRSS") is None or platform.libc_ver()[0] != "glibc",
    reason="needs Linux's /proc and glibc's heaps",
)
def test_what_threads_have_freed_goes_back_to_the_system_meanwhile(encoder, gallery, monkeypatch):
    kept, full = [], []

    def work():
        blocks = [bytearray(b"x" * (64 << 10)) for _ in range(1024)]
        kept.extend(blocks[::32])  # What stays keeps the heap from shrinking at its end.
        full.append(resident_bytes("VmRSS"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    monkeypatch.setattr("upperson_camera.commit._CHECK_EVERY_S", 0)
    with Pipeline(encoder, gallery):
        wait_for(lambda: resident_bytes("VmRSS") < full[0] - (32 << 20))


def test_another_process_with_a_camera_of_the_same_name_is_noticed(encoder, gallery, caplog):
    with Pipeline(encoder, gallery) as ours, Pipeline(encoder, gallery) as theirs:
        for pipeline, names in ((ours, ("gate", "hall")), (theirs, ("gate", "yard"))):
            for name in names:
                pipeline.add_camera(name)
                submit_walk(pipeline, name)
            assert pipeline.drain()
        their_name = theirs.run_name
    pictures = Counter(item.camera for item in gallery.items() if their_name in item.track)
    assert pictures["gate"] > 0
    numbers = {name: camera.added_by_others for name, camera in ours.stats().cameras.items()}
    assert numbers == {"gate": pictures["gate"], "hall": 0}
    assert [r.camera for r in caplog.records if r.event == "added_by_others"] == ["gate"]
    # What ours had added before is no news to theirs.
    assert theirs.stats().total("added_by_others") == 0


def test_a_check_for_others_that_fails_loses_nothing(encoder, gallery, monkeypatch):
    with Pipeline(encoder, gallery) as pipeline:
        pipeline.add_camera("gate")
        submit_walk(pipeline)
        assert pipeline.drain()
        fail = InputError("the server is away")
        monkeypatch.setattr(gallery, "count", lambda *_: (_ for _ in ()).throw(fail))
    monkeypatch.undo()
    assert pipeline.stats().cameras["gate"].committed == gallery.count() > 0
    assert pipeline.stats().failures == {}


def test_colours_arrive_as_they_should(encoder, gallery):
    red = person_frame(colour=(40, 30, 200))
    with Pipeline(encoder, gallery, **ALL) as pipeline:
        for name, frame in (("bgr", red), ("rgb", np.ascontiguousarray(red[:, :, ::-1]))):
            pipeline.add_camera(name)
            pipeline.submit(name, frame, [BOX], rgb=name == "rgb")
    for name in ("bgr", "rgb"):
        (hit,) = gallery.search(encoder.encode_texts(["red"]), 1, Filter(camera=name))[0]
        assert hit.score > 0.5
        with Image.open(gallery.crops_dir / hit.item.crop) as picture:
            assert picture.resize((1, 1)).getpixel((0, 0))[0] > 120


def test_ones_own_tracks_and_memory_are_respected(encoder, gallery):
    frame, boxes = person_frame(), [BOX, [500, 0, 600, 9], [200, 40, 260, 220]]
    quality = QualityRules(min_sharpness=0)
    with Pipeline(encoder, gallery, every_s=0, max_delay_s=0, quality=quality) as pipeline:
        pipeline.add_camera("gate")
        for index in range(3):
            frame[:] = person_frame()
            pipeline.submit("gate", frame, boxes, START + index, tracks=[7, 9, "x"])
            frame[:] = 0  # The caller's memory is the caller's again.
            pipeline.drain()
    run = f"gate/{pipeline.run_name}-"
    assert {item.track for item in gallery.items()} == {f"{run}7", f"{run}x"}
    for item in gallery.items():
        with Image.open(gallery.crops_dir / item.crop) as picture:
            assert np.asarray(picture).mean() > 40
    stats = pipeline.stats().cameras["gate"]
    assert (stats.crops_dropped["outside"], stats.tracks) == (3, 2)


def test_wrong_frames_are_refused(encoder, gallery):
    frame = person_frame()
    with Pipeline(encoder, gallery, opener=FakeOpener([])) as pipeline:
        pipeline.add_camera("gate")
        pipeline.add_camera("film", LIVE, lambda frame: None)
        for camera, picture, boxes, options, error, code in (
            ("hall", frame, [BOX], {}, UsageError, "camera_unknown"),
            ("film", frame, [BOX], {}, UsageError, "camera_has_source"),
            ("gate", frame, None, {}, UsageError, "detector_missing"),
            ("gate", frame[:, :, 0], [BOX], {}, InputError, "frame_malformed"),
            ("gate", frame.astype(float), [BOX], {}, InputError, "frame_malformed"),
            ("gate", frame, [[1, 2, 3]], {}, InputError, "boxes_malformed"),
            ("gate", frame, [BOX], {"time": START * 1000}, InputError, "time_malformed"),
            ("gate", frame, [BOX], {"time": float("nan")}, InputError, "time_malformed"),
            ("gate", frame, [BOX], {"tracks": [1, 2]}, InputError, "tracks_without_boxes"),
        ):
            with refused(code, error):
                pipeline.submit(camera, picture, boxes, **options)
        with refused("time_malformed", InputError):
            pipeline.add_camera("hall", start_time=START * 1000)
    assert pipeline.stats().cameras["gate"].frames_read == gallery.count() == 0


def test_frames_without_pixels_and_clocks_that_go_back_break_nothing(encoder, gallery):
    times = [START, START + 1, START - 3600, START - 3599, START - 3598]
    with Pipeline(encoder, gallery, every_s=0, max_delay_s=0) as pipeline:
        pipeline.add_camera("gate")
        assert not pipeline.submit("gate", np.zeros((0, 0, 3), np.uint8), [])
        for moment in times:
            assert pipeline.submit("gate", person_frame(), [BOX], moment)
            pipeline.drain()
    stats = pipeline.stats()
    assert stats.cameras["gate"].frames_dropped == {"empty": 1}
    assert stats.cameras["gate"].tracks == 1
    assert {item.time for item in gallery.items()} <= set(times)
    assert gallery.count() >= 3


@pytest.mark.parametrize("drop", ["oldest", "newest"])
def test_under_overload_nothing_waits_and_everything_is_counted(encoder, gallery, drop):
    gate, given = Gate(), 28
    limits = {"batch_size": 4, "crop_queue": 16, "max_delay_s": 1000, "save_crops": False}
    slow = FakeEncoder(encoder, gate)
    with Pipeline(slow, gallery, drop=drop, **limits, **ALL) as pipeline, gate:
        pipeline.add_camera("gate")
        for number in range(given):
            submit(pipeline, first=number)
            wait_for(lambda: pipeline._cameras["gate"].is_idle)
            now = pipeline.stats()
            assert now.crop_queue <= 16
            if number == 3:
                wait_for(lambda: gate.entered == 1)  # The encoder has a batch, and keeps it.
    stats = pipeline.stats()
    camera = stats.cameras["gate"]
    assert camera.frames_read == camera.accepted == given
    assert camera.crops_dropped == {"queue_full": given - 4 - 16}
    assert camera.committed == gallery.count() == 4 + 16
    assert 0 < stats.encoder_busy_share <= 1
    frames = {item.attributes["frame"] for item in gallery.items()}
    latest = range(given - 16, given) if drop == "oldest" else range(4, 4 + 16)
    assert frames == {*range(4), *latest}


def test_commits_wait_for_their_time_for_many_rows_or_for_the_end(encoder, gallery, monkeypatch):
    commits, add = [], gallery.add
    monkeypatch.setattr("upperson_camera.commit._MOST_ROWS", 4)
    monkeypatch.setattr(
        gallery, "add", lambda items, *rest: (commits.append(len(items)), add(items, *rest))[1]
    )
    one_by_one = {"batch_size": 1, "max_delay_s": 0, **ALL}
    for every_s, (first, more) in ((600.0, (4, 2)), (0.05, (1, 2)), (0.0, (1, 2))):
        before = gallery.count()
        with Pipeline(encoder, gallery, commit_every_s=every_s, **one_by_one) as pipeline:
            pipeline.add_camera("gate")
            submit(pipeline, first)
            wait_for(lambda: pipeline.stats().total("committed"))
            assert commits == [first]
            submit(pipeline, more, first)
        stats = pipeline.stats()
        assert (sum(commits), commits[0]) == (first + more, first)
        assert len(commits) == 2 or every_s < 600
        assert stats.total("committed") == gallery.count() - before == first + more
        commits.clear()


@pytest.mark.parametrize("drop", ["oldest", "newest"])
def test_frames_that_a_detector_is_too_slow_for_are_dropped_and_counted(encoder, gallery, drop):
    gate, seen = Gate(), []

    def detector(frame):
        seen.append(int(frame[0, 0, 0]))
        gate.hold()
        return []

    with Pipeline(encoder, gallery, frame_queue=4, drop=drop) as pipeline, gate:
        pipeline.add_camera("gate", detector=detector)
        taken = []
        for number in range(10):
            taken.append(pipeline.submit("gate", np.full((8, 8, 3), number, np.uint8)))
            if number == 0:
                wait_for(lambda: gate.entered == 1)
            assert pipeline.stats().frame_queues["gate"] <= 4
        gate.open()
        assert pipeline.drain(20), "what was dropped is not waited for"
    assert pipeline.stats().cameras["gate"].frames_dropped == {"queue_full": 5}
    # The results tell what became of each frame.
    dropped = {one.displaced for one in taken} | {one.index for one in taken if one.reason}
    assert dropped - {None} == set(range(10)) - set(seen)
    assert {one.reason for one in taken} == ({None, "queue_full"} if drop == "newest" else {None})
    assert seen == [0, *(range(6, 10) if drop == "oldest" else range(1, 5))]


def test_a_detector_that_fails_on_25_frames_in_a_row_fails_its_camera_only(
    encoder, gallery, street, caplog
):
    path, calls = street[0], []

    def broken(frame):
        calls.append(frame.shape)
        raise UnspeakableError

    def moody(frame):
        if frame[0, 0, 0] == 0:
            raise ValueError("hiccup")
        return [BOX] if frame[0, 0, 0] == 120 else "nonsense"

    with Pipeline(encoder, gallery, every_s=2.0, max_delay_s=0) as pipeline:
        pipeline.add_camera("broken", str(path), broken)
        pipeline.add_camera("gate", str(path), BoxesFile(path.with_suffix(".json")))
        pipeline.add_camera("moody", detector=moody)
        person, wrong = person_frame(), [np.full((9, 9, 3), value, np.uint8) for value in (0, 1)]
        for index, frame in enumerate([person, person, *wrong * 12, person, *wrong * 12]):
            pipeline.submit("moody", frame, time=START + index)
            wait_for(lambda: pipeline.stats().cameras["moody"].frames_waiting == 0)
        wait_for(lambda: pipeline._cameras["broken"].is_over and pipeline._cameras["gate"].is_over)
    cameras = pipeline.stats().cameras
    assert cameras["broken"].state == "failed"
    assert cameras["broken"].failures == {"detector_error": 1}
    assert "UnspeakableError" in cameras["broken"].error
    assert cameras["broken"].frames_dropped["detector_error"] == len(calls) == 25
    assert cameras["broken"].frames_read < 96, "a failed camera reads no further"
    assert (cameras["gate"].state, cameras["gate"].committed > 5) == ("ended", True)
    assert (cameras["moody"].frames_processed, cameras["moody"].committed > 0) == (3, True)
    assert cameras["moody"].frames_dropped == {"detector_error": 48}, "never 25 in a row"
    assert [r.camera for r in caplog.records if r.event == "failed"] == ["broken"]


def test_a_package_may_bring_a_kind_of_source(encoder, gallery, monkeypatch):
    opened = []

    def open_noise(source, timeout_s):
        opened.append((source.address, timeout_s))
        return FakeOpener([person_frame()] * 2)(source, timeout_s)

    points = {"noise": [SimpleNamespace(value="noise:open", load=lambda: open_noise)]}
    named = extensions._named
    monkeypatch.setattr(
        extensions, "_named", lambda group: points if group == "sources" else named(group)
    )
    address = "Noise://anna:s3cret@lab/1?token=s3cret!"
    source = parse_source(address)
    assert (source.kind, source.is_live, source.default_name) == ("extension", True, "lab")
    assert source.shown == "Noise://lab/1?token=***!"
    eager = CaptureRules(stall_s=1000, first_wait_s=0.02)
    with Pipeline(encoder, gallery, capture_rules=eager, **ALL) as pipeline:
        pipeline.add_camera("lab", address, lambda frame: [BOX])
        wait_for(lambda: pipeline.stats().cameras["lab"].frames_read >= 4)
        assert not pipeline.wait(0.05), "a live source never ends"
    assert opened[:2] == [(address, eager.stall_s)] * 2, "it is live: opened again"
    assert pipeline.stats().cameras["lab"].reconnects >= 1
    assert all(item.source.startswith(f"{source.shown}#time=20") for item in gallery.items())
    assert gallery.count()


def test_a_stop_lets_go_a_file_that_waits_for_room(encoder, gallery, street):
    gate = Gate()

    pipeline = Pipeline(encoder, gallery, frame_queue=2, end_within_s=1000)
    pipeline.start()
    pipeline.add_camera("gate", str(street[0]), lambda frame: gate.hold() or [])
    stopping = threading.Thread(target=pipeline.stop)
    with gate:
        wait_for(lambda: pipeline.stats().cameras["gate"].frames_read == 4)
        stopping.start()
        wait_for(lambda: pipeline.stats().cameras["gate"].state == "stopped")
    stopping.join()
    camera = pipeline.stats().cameras["gate"]
    assert (camera.frames_processed, camera.frames_dropped) == (3, {"stopped": 1})


def test_a_file_in_real_time_does_not_wait_for_a_slow_detector(encoder, gallery):
    options = {"start_time": START, "realtime": True, "opener": FakeOpener([person_frame()] * 12)}
    with (
        Gate() as gate,
        Pipeline(encoder, gallery, frame_queue=2, motion_gate=False) as pipeline,
    ):
        pipeline.add_camera("gate", FILE, lambda frame: gate.hold() or [], **options)
        assert pipeline.wait(), "it ends while the detector is in its first frame"
        stats = pipeline.stats()
        camera = stats.cameras["gate"]
        assert (camera.state, camera.frames_read, camera.frames_processed) == ("ended", 12, 0)
        dropped = camera.frames_dropped["queue_full"]
        assert dropped >= 12 - 1 - 2
        gate.open()
    camera = pipeline.stats().cameras["gate"]
    assert (camera.frames_processed, camera.frames_waiting) == (12 - dropped, 0)


def test_what_cannot_work_is_refused_at_once(encoder, gallery, tmp_path, monkeypatch):
    other = Gallery.open(tmp_path / "other", "f" * 64, encoder.embed_dim, create=True)
    with other, refused("other_model", IntegrityError):
        Pipeline(encoder, other)
    for drop, code in (("block", "only_files_wait"), ("some", "unknown_policy")):
        with refused(code, UsageError):
            Pipeline(encoder, gallery, drop=drop)
    pipeline = Pipeline(encoder, gallery)
    pipeline.add_camera("gate")
    for arguments, options, code in (
        (("gate",), {}, "camera_exists"),
        (("hall", LIVE), {}, "detector_missing"),
        (("hall", LIVE, lambda f: []), {"drop": "block"}, "only_files_wait"),
        (("hall", FILE, lambda f: []), {"drop": "block", "realtime": True}, "only_files_wait"),
    ):
        with refused(code, UsageError):
            pipeline.add_camera(*arguments, **options)
    with refused("not_running", UsageError):
        pipeline.submit("gate", person_frame(), [BOX])
    monkeypatch.setattr(gallery, "crops_dir", None)
    with refused("no_place_for_pictures", UsageError):
        Pipeline(encoder, gallery)
    assert Pipeline(encoder, gallery, save_crops=False).stats().total("committed") == 0


def test_a_wait_for_room_has_an_end_and_then_the_policy_decides(encoder, gallery):
    gate, results, waiting = Gate(), {}, []
    frame = np.zeros((8, 8, 3), np.uint8)

    def refuse_to_wait(frame):
        with refused("called_from_own_thread", UsageError, call="submit"):
            pipeline.submit("old", frame, wait_s=1)
        gate.hold()
        return []

    with Pipeline(encoder, gallery, frame_queue=1, end_within_s=1000) as pipeline, gate:
        policies = {"old": "oldest", "new": "newest", "film": "block"}
        for name, drop in policies.items():
            pipeline.add_camera(name, detector=lambda frame: refuse_to_wait(frame), drop=drop)
        for number, name in enumerate(policies):
            assert pipeline.submit(name, frame, wait_s=0)
            wait_for(lambda name=name: pipeline.stats().frame_queues[name] == 0)
            assert pipeline.submit(name, frame, wait_s=0)
            results[name] = pipeline.submit(name, frame, wait_s=0.01 * number)
        assert (bool(results["old"]), results["old"].displaced) == (True, 1)
        for name in ("new", "film"):
            assert (bool(results[name]), results[name].reason) == (False, "queue_full")
        held = threading.Thread(target=lambda: waiting.append(pipeline.submit("film", frame)))
        held.start()
        with refused("out_of_range", UsageError):
            pipeline.submit("film", frame, wait_s=-1)
        pipeline._cameras["film"].refuse_frames()
        held.join()
        assert waiting[0].reason == "stopped"
        assert pipeline.submit("old", frame[:0], []).reason == "empty"


def test_every_setting_is_a_typed_option_with_a_range(encoder, gallery):
    hints = get_type_hints(PipelineSettings)
    assert get_type_hints(PipelineOptions) == {name: kind | None for name, kind in hints.items()}
    settings = PipelineSettings(frame_queue=1, crop_queue=7)
    pipeline = Pipeline(encoder, gallery, settings, frame_queue=2, quality=None)
    assert pipeline.settings == dataclasses.replace(settings, frame_queue=2)
    assert Pipeline(encoder, gallery, every_s=None).settings == PipelineSettings()
    with refused("option_unknown", UsageError, found="evry_s"):
        Pipeline(encoder, gallery, evry_s=None)
    with refused("no_bool", UsageError):
        Pipeline(encoder, gallery, save_crops="no")
    for setting, values in {
        "every_s": [-1], "lost_after_s": [0], "min_views": [0], "batch_size": [0],
        "jpeg_quality": [0, 101], "frame_queue": [0], "crop_queue": [0], "end_within_s": [0],
        "max_delay_s": [-1], "commit_every_s": [-1, 601],
    }.items():  # fmt: skip
        for value in values:
            with refused("setting_out_of_range", UsageError, setting=setting):
                PipelineSettings(**{setting: value})
    with pytest.raises(UsageError, match="max_delay_s"):
        PipelineSettings(max_delay_s=float("nan"))
    for name, value in {"stall_s": 0, "first_wait_s": -1, "longest_wait_s": 8 * 86400}.items():
        with pytest.raises(UsageError):
            CaptureRules(**{name: value})
