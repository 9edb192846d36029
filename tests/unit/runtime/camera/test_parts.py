"""The small parts of a camera pipeline."""

import json
import logging
import threading
import time
from math import inf, nan

import numpy as np
import pytest

from tests.helpers.fake_camera import wait_for
from upperson_camera import PipelineSettings, Source, parse_source
from upperson_camera.crops import Selection, safe_folder_name, sharpness
from upperson_camera.frames import SteadyClock, View
from upperson_camera.queues import BoundedQueue, check_policy
from upperson_camera.source import without_secrets
from upperson_camera.stats import Durations, Ledger
from upperson_rt.cli.app import JsonFormatter
from upperson_rt.errors import BackendError, InputError, UsageError
from upperson_rt.ingest.boxes import MOST_BOXES, clean_boxes
from upperson_rt.ingest.quality import QualityRules


def test_a_full_queue_drops_what_its_policy_says():
    queue = BoundedQueue(2)
    assert [queue.put(n, "oldest") for n in (1, 2, 3)] == [None, None, 1]
    assert queue.put(4, "newest") == 4
    assert [queue.get(0), queue.get(0), queue.get(0)] == [2, 3, None]
    assert not queue.is_idle
    queue.done(2)
    assert queue.is_idle


def test_a_blocked_put_goes_on_when_there_is_room_and_ends_with_the_queue():
    queue = BoundedQueue(1)
    queue.put("first", "block")
    results = []
    threads = [
        threading.Thread(target=lambda n=n: results.append(queue.put(n, "block"))) for n in (2, 3)
    ]
    for thread in threads:
        thread.start()
    assert queue.get() == "first"
    wait_for(lambda: len(queue) == 1)
    queue.close()
    for thread in threads:
        thread.join()
    assert results.count(None) == 1
    assert set(results) - {None} <= {2, 3}
    assert queue.put(4, "oldest") == 4
    assert queue.get_all(0.1) == [({2, 3} - set(results)).pop()]
    assert queue.is_finished
    assert queue.get() is None


def test_an_empty_queue_gives_nothing_in_time():
    began = time.monotonic()
    assert BoundedQueue(1).get(0.05) is None
    assert time.monotonic() - began > 0.04
    assert BoundedQueue(1).get_all(0.01) == []


@pytest.mark.parametrize("policy", ["", "first", "Oldest"])
def test_an_unknown_policy_is_refused(policy):
    with pytest.raises(UsageError, match="one of oldest, newest, block"):
        check_policy(policy)


def test_boxes_are_clipped_and_the_useless_ones_counted():
    boxes = clean_boxes(
        [
            [10, 20, 50, 90, 0.5],
            [-30, -5, 40, 300, 0.9],
            [10, 20, 50, 90, 0.4],  # The first one again.
            [50, 20, 10, 90, 0.5],
            [nan, 0, 5, 5, 0.5],
            [0, 0, inf, 5, 0.5],
            [200, 10, 260, 90, 0.5],
            [10, 10, 10.2, 60, 0.5],
        ],
        width=200,
        height=100,
    )
    assert boxes.edges.tolist() == [[10, 20, 50, 90], [0, 0, 40, 100]]
    assert boxes.scores.tolist() == [0.5, 0.9]
    assert boxes.rows.tolist() == [0, 1]
    assert boxes.dropped == {"empty": 4, "outside": 1, "duplicate": 1}


def test_boxes_come_in_many_forms():
    for nobody in (None, [], np.zeros((0, 5)), ()):
        assert len(clean_boxes(nobody, 10, 10).edges) == 0
    found = clean_boxes(np.array([[1, 2, 3, 4]], np.float32), 10, 10)
    assert found.edges.tolist() == [[1, 2, 3, 4]]
    assert np.isnan(found.scores).all()
    many = [[i % 90, i // 90, i % 90 + 5, i // 90 + 5, i / 1000] for i in range(MOST_BOXES + 7)]
    best = clean_boxes(many, 100, 100)
    assert best.dropped == {"too_many": 7}
    assert best.scores.min() == pytest.approx(0.007)
    for wrong in ([1, 2, 3, 4], [[1, 2, 3]], "boxes", [[1, 2, 3, 4, 5, 6]], [[1, 2], [3]]):
        with pytest.raises(InputError, match="rows of x0, y0, x1, y1"):
            clean_boxes(wrong, 10, 10)


def test_the_steady_clock_never_goes_back():
    clock = SteadyClock()
    given = [100.0, 100.5, 40.0, 40.25, 40.25]
    arrived = [0.0, 0.5, 0.75, 1.0, 1.5]
    steady = [clock.advance(*pair) for pair in zip(given, arrived, strict=True)]
    assert steady == [0.0, 0.5, 0.75, 1.0, 1.5]


def view(track="t", sharp=100.0, height=128, border=False, index=0):
    return View(
        image=np.zeros((height, 50, 3), np.uint8),
        box=(0, 0, 50, height),
        score=None,
        sharpness=sharp,
        at_border=border,
        track=track,
        index=index,
        time=0.0,
        arrived=0.0,
    )


def offer(selection, clock, shown):
    selection.saw(shown.track, clock)
    selection.offer(shown, clock)
    return [found.index for found in selection.due(clock)]


def test_the_best_view_of_each_window_is_chosen():
    dropped = []
    selection = Selection(PipelineSettings(every_s=4.0, min_views=2), dropped.append)
    sharp = [10, 50, 30, 90, 5, 5, 5, 5, 5, 5, 20, 5, 5, 40]
    chosen = [offer(selection, i / 2, view(sharp=s, index=i)) for i, s in enumerate(sharp)]
    assert chosen == [[], [], [1], *[[]] * 8, [10], [], []], "within a quarter, then not for four"
    assert selection.end("t") is None
    assert dropped == ["not_best"] * 2 + ["too_soon"] * 6 + ["not_best"] * 2 + ["too_soon"] * 2


@pytest.mark.parametrize("fps", [4.0, 12.5, 25.0])
def test_who_is_seen_for_longer_than_the_distance_has_two_pictures(fps):
    random = np.random.default_rng(0)
    for _ in range(50):
        selection = Selection(PipelineSettings(every_s=2.0), lambda reason: None)
        frames = int(2.5 * fps + 2)
        shown = [view(sharp=random.uniform(20, 900), index=n) for n in range(frames)]
        chosen = [n for at, one in enumerate(shown) for n in offer(selection, at / fps, one)]
        assert len(chosen + [one.index for one in selection.end_all()]) == 2


@pytest.mark.parametrize("every_s", [0.5, 2.0])
def test_no_two_pictures_of_a_track_are_closer_than_asked_for(every_s):
    random = np.random.default_rng(0)
    dropped = []
    selection = Selection(PipelineSettings(every_s=every_s, min_views=1), dropped.append)
    times, offered = [], 0
    for number in range(900):  # A minute at 15 frames a second, with gaps and views of no use.
        clock = number / 15
        selection.saw("t", clock)
        if random.random() < 0.7:
            selection.offer(view(sharp=random.uniform(20, 900), index=number), clock)
            offered += 1
        if number % 100 == 99:
            times += [found.index / 15 for found in selection.flush()]
        times += [found.index / 15 for found in selection.due(clock)]
    times += [found.index / 15 for found in selection.end_all()]
    assert np.diff(times).min() >= every_s - 1e-6
    assert len(times) >= 60 / (2 * every_s + 1), "at least one of every other window"
    assert len(times) + len(dropped) == offered


def test_a_view_that_is_cut_off_loses_but_is_better_than_none():
    selection = Selection(PipelineSettings(every_s=1.0, min_views=1), lambda reason: None)
    offer(selection, 0.0, view(sharp=900, border=True, index=0))
    offer(selection, 0.1, view(sharp=30, index=1))
    offer(selection, 0.2, view("other", sharp=900, border=True, index=2))
    assert [found.index for found in selection.end_all()] == [1, 2]


def test_who_comes_in_is_waited_for():
    selection = Selection(PipelineSettings(every_s=2.0, min_views=1), lambda reason: None)
    coming = [*[view(sharp=900, border=True)] * 6, view(index=6), view(sharp=200, index=7)]
    assert [offer(selection, n / 5, one) for n, one in enumerate(coming)] == [[]] * 8
    assert offer(selection, 1.7, view(index=8)) == [7], "half a second after the first whole one"
    for n in range(10):
        assert offer(selection, n / 5, view("other", border=True, index=n)) == []
    assert offer(selection, 2.0, view("other", border=True, index=10)) == [0], "there is no other"


def test_who_was_seen_once_is_a_mistake():
    dropped = []
    selection = Selection(PipelineSettings(every_s=0.0, min_views=2), dropped.append)
    assert offer(selection, 0.0, view()) == []
    assert selection.flush() == []
    assert selection.end("t") is None
    assert dropped == ["seen_once"]
    assert not selection.saw("two", 0.0)  # Seen, but not good enough to be looked at.
    assert selection.saw("two", 0.1), "now it counts"
    assert not selection.saw("two", 0.2), "once"
    assert offer(selection, 0.3, view("two")) == [0]


def test_a_flush_gives_the_best_so_far_and_keeps_the_pace():
    selection = Selection(PipelineSettings(every_s=1.0, min_views=1), lambda reason: None)
    offer(selection, 0.0, view(index=0))
    assert [found.index for found in selection.flush()] == [0]
    assert offer(selection, 0.5, view(index=1)) == []
    assert offer(selection, 1.0, view(index=2)) == []
    assert offer(selection, 2.0, view(index=3)) == [2]


def test_quality_rules_name_what_is_wrong():
    rules = QualityRules(min_height_px=60, min_width_px=20, min_sharpness=15, border="drop")
    assert rules.size_problem(59, 40) == rules.size_problem(90, 19) == "too_small"
    assert rules.size_problem(60, 20) is None
    assert rules.problem(10.0, at_border=False) == "blurred"
    assert rules.problem(90.0, at_border=True) == "at_border"
    assert QualityRules().problem(90.0, at_border=True) is None
    for wrong in ({"min_height_px": -1}, {"border": "maybe"}):
        with pytest.raises(UsageError):
            QualityRules(**wrong)


def test_sharpness_falls_with_blur_and_not_with_size():
    import cv2

    coarse = np.random.default_rng(0).integers(0, 255, (32, 12, 3), np.uint8)
    large = cv2.resize(coarse, (96, 256), interpolation=cv2.INTER_CUBIC)
    small = cv2.resize(coarse, (48, 128), interpolation=cv2.INTER_CUBIC)
    blurred = cv2.GaussianBlur(large, (0, 0), 12)
    assert sharpness(blurred) < 0.05 * sharpness(large)
    assert sharpness(large) == pytest.approx(sharpness(small), rel=0.3)


def test_durations_keep_quantiles_in_constant_memory():
    durations = Durations()
    assert durations.quantile_s(0.5) is None
    for value in np.linspace(0.01, 1.0, 1000):
        durations.add(float(value))
    assert durations.quantile_s(0.5) == pytest.approx(0.5, rel=0.2)
    assert durations.quantile_s(0.99) == pytest.approx(0.99, rel=0.2)
    counts, total = durations.snapshot()
    assert (sum(counts), round(total)) == (1000, 505)
    durations.add(1e6)
    assert durations.quantile_s(1.0) == inf


def test_the_ledger_loses_no_count_between_threads():
    ledger = Ledger()

    def work():
        for _ in range(2000):
            ledger.count("a", "seen")
            ledger.count("b", "seen", 2)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (ledger.of("a")["seen"], ledger.of("b")["seen"], ledger.of("c")) == (8000, 16000, {})


@pytest.mark.parametrize("name", ["gate", "../..", "a/b", "a_b", "Süd", ".", "x" * 300, "a b"])
def test_folder_names_are_safe_and_differ(name):
    others = {"gate", "../..", "a/b", "a_b", "Süd", ".", "x" * 300, "x" * 299, "a b"} - {name}
    safe = safe_folder_name(name)
    assert safe
    assert set(safe) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-")
    assert len(safe) < 80
    assert safe not in map(safe_folder_name, others)


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("rtsp://admin:s3cret@10.0.0.5:554/ch1", "rtsp://10.0.0.5:554/ch1"),
        ("rtsp://admin:s3@s3cret@@10.0.0.5/ch1", "rtsp://10.0.0.5/ch1"),
        ("rtsp://10.0.0.5/ch@1?a=b@c", "rtsp://10.0.0.5/ch@1?a=b@c"),
        ("rtsp://admin:12/s3cret@10.0.0.5/ch1", "rtsp://10.0.0.5/ch1"),
        ("rtsp://admin:12?s3cret@10.0.0.5/ch1", "rtsp://10.0.0.5/ch1"),
        ("rtsp://admin:1@2/s3cret@cam/ch1", "rtsp://cam/ch1"),
        ("a=rtsp://cam/x!b=rtsp://admin:/s3cret@cam/y c=rtsp://u:s3cret@h",
         "a=rtsp://cam/x!b=rtsp://cam/y c=rtsp://h"),
        ("rtsp://office/anna:s3cret@10.0.0.5/x", "rtsp://10.0.0.5/x"),
        ("rtsp://10.0.0.5:554/ch@1", "rtsp://10.0.0.5:554/ch@1"),
        ("rtsp://admin:s3cret@[fe80::1]:554/ch@1", "rtsp://[fe80::1]:554/ch@1"),
        ("rtsp://10.0.0.5/user=admin&password=s3cret&channel=1",
         "rtsp://10.0.0.5/user=admin&password=***&channel=1"),
        ("https://cam/live?token=s3cret&x=1", "https://cam/live?token=***&x=1"),
        ("rtspsrc location=rtsp://u:s3cret@h/s user-pw=s3cret ! appsink",
         "rtspsrc location=rtsp://h/s user-pw=*** ! appsink"),
        ("rtsp://10.0.0.5/stream", "rtsp://10.0.0.5/stream"),
    ],
)  # fmt: skip
def test_secrets_are_not_shown(address, shown):
    assert without_secrets(address) == shown
    assert "s3cret" not in Source(address=address, kind="network").shown


def test_sources_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "clip.avi").touch()
    (tmp_path / "7").touch()
    for text, kind, live, name in (
        ("clip.avi", "file", False, "clip"),
        ("7", "file", False, "7"),
        ("0", "device", True, "video0"),
        ("/dev/video3", "device", True, "video3"),
        ("rtsp://u:p@cam.local:554/s", "network", True, "cam.local"),
    ):
        source = parse_source(text)
        assert (source.kind, source.is_live, source.default_name) == (kind, live, name)
    assert parse_source("clip.avi").shown == str(tmp_path / "clip.avi")
    with pytest.raises(InputError, match=r"no video nothing\.mp4"):
        parse_source("nothing.mp4")
    with pytest.raises(UsageError, match="name a file by its path"):
        parse_source("file:///x.mp4")


def test_gstreamer_is_refused_where_opencv_has_none(monkeypatch):
    import cv2

    pipeline = "videotestsrc ! appsink"
    monkeypatch.setattr(cv2.videoio_registry, "hasBackend", lambda backend: False)
    with pytest.raises(BackendError, match="has no GStreamer"):
        parse_source(pipeline)
    monkeypatch.setattr(cv2.videoio_registry, "hasBackend", lambda backend: True)
    assert parse_source(pipeline).kind == "gstreamer"


def test_log_lines_are_json():
    record = logging.LogRecord("upperson_camera", 30, "f", 1, "camera %s lost", ("gate",), None)
    record.camera = "gate"
    record.wait_s = 0.5
    line = json.loads(JsonFormatter().format(record))
    assert line["message"] == "camera gate lost"
    assert (line["level"], line["camera"], line["wait_s"]) == ("warning", "gate", 0.5)
    assert line["time"].endswith("Z")
    assert "\n" not in JsonFormatter().format(record)
