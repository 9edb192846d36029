"""The whole camera pipeline, on drawn people with known tracks and on frames made for a purpose."""

import threading
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

import upperson_rt
from tests.helpers.fake_camera import FakeOpener, person_frame
from tests.helpers.toy_bundle import make_toy_bundle
from upperson.data.synthetic.video import VideoSpec, write_video
from upperson_rt.camera import BoxesFile, CaptureRules, Pipeline, QualityRules, Source
from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.gallery import Filter, Gallery

BOX = [100, 40, 160, 220]
START = 1_800_000_000.0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")


@pytest.fixture(scope="module")
def bundle(folder):
    return make_toy_bundle(folder / "bundle")


@pytest.fixture
def encoder(bundle):
    return upperson_rt.open(bundle, "fp32", "onnxruntime", threads=1)


@pytest.fixture(scope="module")
def street(folder):
    """A video, and what is true about it."""
    path = folder / "street.avi"
    return path, write_video(path, VideoSpec(people=6, seconds=12, fps=8, seed=5))


@pytest.fixture
def gallery(tmp_path, encoder):
    with Gallery.open(
        tmp_path / "gallery", encoder.fingerprint, encoder.embed_dim, create=True
    ) as opened:
        yield opened


def check_sums(stats):
    """Everything that came in went somewhere that has a name."""
    for camera in stats.cameras.values():
        frames = camera.frames_processed + sum(camera.frames_dropped.values())
        assert camera.frames_read == frames + camera.frames_waiting
        crops = camera.committed + sum(camera.crops_dropped.values())
        assert camera.detections == crops + camera.crops_waiting


def people_of(item, truth):
    """The people whose true box an item has."""
    found = truth["frames"][item.attributes["frame"]]
    return {entry["person"] for entry in found if tuple(entry["box"]) == item.box}


def test_every_person_of_a_video_is_one_track_and_is_found_again(encoder, gallery, street):
    path, truth = street
    with Pipeline(encoder, gallery, every_s=1.0) as pipeline:
        pipeline.add_camera(
            "gate", str(path), BoxesFile(path.with_suffix(".json")), start_time=START
        )
        assert pipeline.wait(20)
    stats = pipeline.stats()
    check_sums(stats)
    camera = stats.cameras["gate"]
    assert (camera.state, camera.frames_read, camera.frames_dropped) == ("ended", 96, {})
    assert camera.crops_waiting == 0
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

    # Search by a picture of each person from another moment, and by when they were there.
    import cv2

    for person in truth["people"]:
        frames = [
            (index, entry["box"])
            for index, found in enumerate(truth["frames"])
            for entry in found
            if entry["person"] == person["person"]
        ]
        index, (x0, y0, x1, y1) = frames[len(frames) // 3]
        reader = cv2.VideoCapture(str(path))
        reader.set(cv2.CAP_PROP_POS_FRAMES, index)
        crop = np.ascontiguousarray(reader.read()[1][y0:y1, x0:x1, ::-1])
        reader.release()
        when = Filter(
            camera="gate",
            since=START + person["first_frame"] / 8,
            until=START + (person["last_frame"] + 1) / 8,
        )
        hits = gallery.search(encoder.encode_images([crop]), 1, when, by_track=True)[0]
        assert people_of(hits[0].item, truth) == {person["person"]}


def test_a_file_watched_again_replaces_its_rows(encoder, gallery, street):
    path, _ = street
    seen = []
    for _ in range(2):
        with Pipeline(encoder, gallery, every_s=2.0) as pipeline:
            pipeline.add_camera("gate", str(path), BoxesFile(path.with_suffix(".json")))
            pipeline.wait(20)
        seen.append((gallery.count(), {item.track for item in gallery.items()}))
    assert seen[0][0] == seen[1][0] > 0
    assert not seen[0][1] & seen[1][1], "tracks of two runs never have one name"
    files = [file for file in gallery.crops_dir.rglob("*") if file.is_file()]
    assert len(files) == gallery.count()


def test_two_cameras_at_once_and_names_that_are_no_file_names(encoder, gallery, street):
    path, _ = street
    boxes = BoxesFile(path.with_suffix(".json"))
    with Pipeline(encoder, gallery, every_s=3.0) as pipeline:
        for name in ("../gate", "Süd 1/2"):
            pipeline.add_camera(name, str(path), boxes)
        assert pipeline.wait(20)
    check_sums(pipeline.stats())
    counts = [gallery.count(Filter(camera=name)) for name in ("../gate", "Süd 1/2")]
    assert counts[0] == counts[1] > 5
    for item in gallery.items():
        assert (gallery.crops_dir / item.crop).is_file()
    assert len(list(gallery.crops_dir.iterdir())) == 2


def submit_walk(pipeline, camera="gate", frames=10, start=START, **options):
    for index in range(frames):
        box = [BOX[0] + 2 * index, BOX[1], BOX[2] + 2 * index, BOX[3]]
        frame = person_frame(box=tuple(box))
        while not pipeline.submit(camera, frame, [box], start + index / 10, **options):
            time.sleep(0.001)
        while pipeline.stats().frame_queues[camera] > 2:
            time.sleep(0.001)


def test_frames_of_ones_own_loop(encoder, gallery):
    told = []
    with Pipeline(encoder, gallery, every_s=0.5, on_commit=told.extend) as pipeline:
        pipeline.add_camera("gate")
        submit_walk(pipeline, frames=13)
        assert pipeline.drain(10)
        items = list(gallery.items())
        assert {item.key for item in items} == {item.key for item in told}
        assert len(items) == 3
        assert len({item.track for item in items}) == 1
        assert all(item.track.startswith(pipeline.run_name) for item in items)
        assert all(START <= item.time <= START + 1.3 for item in items)
        assert pipeline.stats().cameras["gate"].state == "running"
        submit_walk(pipeline, frames=4, start=START + 100)
    assert len({item.track for item in gallery.items()}) == 2
    check_sums(pipeline.stats())
    with pytest.raises(UsageError, match="does not run"):
        pipeline.submit("gate", person_frame(), [BOX])


def test_colours_arrive_as_they_should(encoder, gallery):
    red_bgr = person_frame(colour=(40, 30, 200))
    with Pipeline(encoder, gallery, every_s=0, min_views=1) as pipeline:
        for name in ("bgr", "rgb"):
            pipeline.add_camera(name)
        pipeline.submit("bgr", red_bgr, [BOX])
        pipeline.submit("rgb", np.ascontiguousarray(red_bgr[:, :, ::-1]), [BOX], rgb=True)
    red = encoder.encode_texts(["red"])
    for name in ("bgr", "rgb"):
        (hit,) = gallery.search(red, 1, Filter(camera=name))[0]
        assert hit.score > 0.5
        with Image.open(gallery.crops_dir / hit.item.crop) as picture:
            assert picture.resize((1, 1)).getpixel((0, 0))[0] > 120


def test_ones_own_tracks_and_memory_are_respected(encoder, gallery):
    frame = person_frame()
    second = [200, 40, 260, 220]
    with Pipeline(encoder, gallery, every_s=0, quality=QualityRules(min_sharpness=0)) as pipeline:
        pipeline.add_camera("gate")
        for index in range(3):
            frame[:] = person_frame()
            pipeline.submit(
                "gate", frame, [BOX, [500, 0, 600, 9], second], START + index, tracks=[7, 9, "x"]
            )
            frame[:] = 0  # The caller's memory is the caller's again.
            pipeline.drain(10)
    tracks = Counter(item.track.removeprefix(f"{pipeline.run_name}-") for item in gallery.items())
    assert set(tracks) == {"7", "x"}
    for item in gallery.items():
        with Image.open(gallery.crops_dir / item.crop) as picture:
            assert np.asarray(picture).mean() > 40
    stats = pipeline.stats().cameras["gate"]
    assert stats.crops_dropped["outside"] == 3
    assert stats.tracks == 2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (("hall", person_frame(), [BOX]), UsageError, "no camera 'hall'"),
        (("gate", person_frame()), UsageError, "has no detector"),
        (("gate", person_frame()[:, :, 0], [BOX]), InputError, "a frame must be uint8"),
        (("gate", person_frame().tolist(), [BOX]), InputError, "found list"),
        (("gate", person_frame().astype(float), [BOX]), InputError, "found float64"),
        (("gate", person_frame(), [[1, 2, 3]]), InputError, "rows of x0"),
        (("gate", person_frame(), [BOX], float("nan")), InputError, "must be finite"),
        (("film", person_frame(), [BOX]), UsageError, "reads its own source"),
    ],
)
def test_wrong_frames_are_refused(encoder, gallery, arguments, error, message):
    opener = FakeOpener([])
    with Pipeline(encoder, gallery, opener=opener) as pipeline:
        pipeline.add_camera("gate")
        live = Source(address="rtsp://cam", kind="network")
        pipeline.add_camera("film", live, lambda frame: None)
        with pytest.raises(error, match=message):
            pipeline.submit(*arguments)
        with pytest.raises(InputError, match="2 tracks need as many boxes"):
            pipeline.submit("gate", person_frame(), [BOX], tracks=[1, 2])
    assert gallery.count() == 0


def test_frames_without_pixels_and_clocks_that_go_back_break_nothing(encoder, gallery):
    times = [START, START + 1, START - 3600, START - 3599, START - 3598]
    with Pipeline(encoder, gallery, every_s=0) as pipeline:
        pipeline.add_camera("gate")
        assert not pipeline.submit("gate", np.zeros((0, 0, 3), np.uint8), [])
        for moment in times:
            assert pipeline.submit("gate", person_frame(), [BOX], moment)
            pipeline.drain(10)
    stats = pipeline.stats()
    check_sums(stats)
    assert stats.cameras["gate"].frames_dropped == {"empty": 1}
    assert stats.cameras["gate"].tracks == 1
    assert {item.time for item in gallery.items()} <= set(times)
    assert gallery.count() >= 3


class SlowEncoder:
    """An encoder that takes its time, or fails."""

    def __init__(self, encoder, seconds=0.0, error=None):
        self._encoder, self.seconds, self.error = encoder, seconds, error

    def __getattr__(self, name):
        return getattr(self._encoder, name)

    def encode_pixels(self, pixels, batch_size=32):
        if self.error is not None:
            raise self.error
        time.sleep(self.seconds * len(pixels))
        return self._encoder.encode_pixels(pixels, batch_size)


@pytest.mark.parametrize("drop", ["oldest", "newest"])
def test_under_overload_nothing_waits_and_everything_is_counted(encoder, gallery, drop):
    slow = SlowEncoder(encoder, seconds=0.01)
    pipeline = Pipeline(
        slow, gallery, every_s=0, min_views=1, batch_size=4, crop_queue=16, drop=drop,
        save_crops=False,
    )  # fmt: skip
    frame, slowest, submitted = person_frame(), 0.0, 0
    with pipeline:
        pipeline.add_camera("gate")
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            began = time.perf_counter()
            pipeline.submit("gate", frame, [BOX], START + submitted, tracks=[submitted])
            slowest = max(slowest, time.perf_counter() - began)
            submitted += 1
            now = pipeline.stats()
            assert now.crop_queue <= 16
            assert now.frame_queues["gate"] <= 4
            check_sums(now)
            time.sleep(0.003)
    stats = pipeline.stats()
    check_sums(stats)
    camera = stats.cameras["gate"]
    assert camera.frames_read == submitted > 150
    assert camera.frames_waiting == camera.crops_waiting == 0
    assert camera.crops_dropped["queue_full"] + camera.frames_dropped.get("queue_full", 0) > 20
    assert camera.committed == gallery.count() > 50
    assert stats.encoder_busy_share > 0.5
    assert slowest < 0.5
    newest = max(item.attributes["frame"] for item in gallery.items())
    if drop == "oldest":
        assert newest >= submitted - 5


def test_a_file_waits_instead_of_losing_frames(encoder, gallery, street):
    path, _ = street
    slow = SlowEncoder(encoder, seconds=0.002)
    with Pipeline(slow, gallery, every_s=0, batch_size=4, crop_queue=4) as pipeline:
        pipeline.add_camera("gate", str(path), BoxesFile(path.with_suffix(".json")))
        assert pipeline.wait(25)
    camera = pipeline.stats().cameras["gate"]
    assert camera.frames_dropped == {}
    assert "queue_full" not in camera.crops_dropped
    assert camera.committed > 100


def test_a_detector_that_fails_leaves_other_cameras_alone(encoder, gallery, street, caplog):
    path, _ = street
    calls = []

    def broken(frame):
        calls.append(frame.shape)
        raise ValueError("no model")

    with Pipeline(encoder, gallery, every_s=2.0) as pipeline:
        pipeline.add_camera("broken", str(path), broken)
        pipeline.add_camera("gate", str(path), BoxesFile(path.with_suffix(".json")))
        assert pipeline.wait(20)
    stats = pipeline.stats()
    check_sums(stats)
    assert stats.cameras["broken"].state == "failed"
    assert "ValueError: no model" in stats.cameras["broken"].error
    assert stats.cameras["broken"].frames_dropped["detector_error"] == len(calls) == 25
    assert stats.cameras["gate"].state == "ended"
    assert stats.cameras["gate"].committed > 5
    assert "camera broken is given up" in caplog.text


def test_a_detector_that_fails_now_and_then_goes_on(encoder, gallery):
    answers = iter([[BOX], ValueError("hiccup"), [BOX], "nonsense", [BOX], None])

    def detector(frame):
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with Pipeline(encoder, gallery, every_s=10) as pipeline:
        pipeline.add_camera("gate", detector=detector)
        for index in range(6):
            pipeline.submit("gate", person_frame(), time=START + index)
            pipeline.drain(10)
    camera = pipeline.stats().cameras["gate"]
    assert (camera.frames_processed, camera.frames_dropped) == (4, {"detector_error": 2})
    assert camera.committed >= 1


def test_cameras_that_share_a_detector_take_turns(encoder, gallery, street):
    path, _ = street
    inside, most = [], []

    def detector(frame):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.001)
        inside.pop()
        return []

    with Pipeline(encoder, gallery) as pipeline:
        for name in "abc":
            pipeline.add_camera(name, str(path), detector)
        assert pipeline.wait(20)
    assert len(most) == 3 * 96
    assert max(most) == 1


@pytest.mark.parametrize("where", ["encoder", "gallery", "callback", "disk"])
def test_a_failure_of_what_all_share_stops_the_pipeline(encoder, gallery, where, monkeypatch):
    error = InputError("the disk is full")
    options = {}
    if where == "encoder":
        encoder = SlowEncoder(encoder, error=error)
    elif where == "gallery":
        monkeypatch.setattr(gallery, "add", lambda *a: (_ for _ in ()).throw(error))
    elif where == "disk":
        gallery.crops_dir.mkdir()
        (gallery.crops_dir / "gate").write_text("a file where a folder should be")
    else:
        options["on_commit"] = lambda items: (_ for _ in ()).throw(error)
    pipeline = Pipeline(encoder, gallery, every_s=0, min_views=1, **options)
    pipeline.start()
    pipeline.add_camera("gate")
    pipeline.submit("gate", person_frame(), [BOX])
    message = "cannot write" if where == "disk" else "the disk is full"
    with pytest.raises(InputError, match=message):
        pipeline.drain(10)
    with pytest.raises(InputError, match=message):
        pipeline.submit("gate", person_frame(), [BOX])
    with pytest.raises(InputError, match=message):
        pipeline.stop()
    stats = pipeline.stats()
    check_sums(stats)
    assert stats.cameras["gate"].crops_waiting == 0
    assert gallery.count() == (1 if where == "callback" else 0)
    if where == "gallery":
        assert [f for f in gallery.crops_dir.rglob("*") if f.is_file()] == []


def test_a_stop_commits_all_that_was_accepted(encoder, gallery):
    slow = SlowEncoder(encoder, seconds=0.02)
    pipeline = Pipeline(slow, gallery, every_s=0, min_views=1, batch_size=4)
    pipeline.start()
    pipeline.add_camera("gate")
    for index in range(20):
        pipeline.submit("gate", person_frame(), [BOX], START + index, tracks=[index])
        time.sleep(0.005)
    assert gallery.count() < 20
    pipeline.stop()
    camera = pipeline.stats().cameras["gate"]
    assert camera.committed == camera.accepted == gallery.count() > 10
    assert camera.state == "stopped"
    pipeline.stop()  # A second time does nothing.
    assert not [t.name for t in threading.enumerate() if t.name in ("encode", "commit")]


def test_a_live_camera_that_comes_back(encoder, gallery):
    script = [person_frame(box=(100 + i, 40, 160 + i, 220)) for i in range(5)]
    live = Source(address="rtsp://user:s3cret@cam/s", kind="network")
    rules = CaptureRules(stall_s=1.0, first_wait_s=0.02)
    pipeline = Pipeline(
        encoder, gallery, every_s=0, capture_rules=rules, opener=FakeOpener(script, script),
        frame_queue=16,
    )  # fmt: skip
    with pipeline:
        pipeline.add_camera("gate", live, lambda frame: [BOX])
        end = time.monotonic() + 10
        while pipeline.stats().cameras["gate"].frames_read < 10 and time.monotonic() < end:
            time.sleep(0.01)
        assert not pipeline.wait(0.05), "a live source never ends"
    check_sums(pipeline.stats())
    assert pipeline.stats().cameras["gate"].reconnects >= 1
    items = list(gallery.items())
    assert items
    assert not any("s3cret" in str(item) for item in items)
    assert all(item.source.startswith("rtsp://cam/s#time=20") for item in items)


def test_what_cannot_work_is_refused_at_once(encoder, gallery, bundle, tmp_path, monkeypatch):
    foreign = Gallery.open(tmp_path / "other", "f" * 64, encoder.embed_dim, create=True)
    with foreign, pytest.raises(IntegrityError, match="another model"):
        Pipeline(encoder, foreign)
    for options, message in (
        ({"every_s": -1}, "at least 0"),
        ({"batch_size": 0}, "at least 1"),
        ({"drop": "block"}, "only files can wait"),
        ({"drop": "some"}, "no drop policy"),
        ({"jpeg_quality": 0}, "1 to 100"),
        ({"frame_queue": 0}, None),
    ):
        with pytest.raises(UsageError, match=message):
            Pipeline(encoder, gallery, **options).add_camera("gate")
    pipeline = Pipeline(encoder, gallery)
    pipeline.add_camera("gate")
    live = Source(address="rtsp://cam", kind="network")
    for arguments, options, message in (
        (("gate",), {}, "a camera gate already"),
        (("",), {}, "needs a name"),
        (("hall", live), {}, "needs a detector"),
        (("hall", live, lambda f: []), {"drop": "block"}, "only a file can"),
    ):
        with pytest.raises(UsageError, match=message):
            pipeline.add_camera(*arguments, **options)
    with pytest.raises(UsageError, match="start it first"):
        pipeline.submit("gate", person_frame(), [BOX])
    monkeypatch.setattr(type(gallery), "crops_dir", None)
    with pytest.raises(UsageError, match="has no place for pictures"):
        Pipeline(encoder, gallery)
    assert Pipeline(encoder, gallery, save_crops=False).stats().total("committed") == 0
