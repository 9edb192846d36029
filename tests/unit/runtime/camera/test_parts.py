"""The small parts of a camera pipeline."""

from math import inf, nan

import cv2
import numpy as np
import pytest

from tests.helpers.refused import refused
from upperson_camera import PipelineSettings, Source, parse_source
from upperson_camera.crops import Selection, safe_folder_name, sharpness
from upperson_camera.frames import Detection
from upperson_camera.source import without_secrets
from upperson_camera.stats import Durations
from upperson_rt.errors import InputError, UsageError
from upperson_rt.ingest.boxes import MOST_BOXES, QualityRules, clean_boxes


def test_boxes_are_clipped_and_the_useless_ones_counted():
    rows = [
        [10, 20, 50, 90, 0.5],
        [-30, -5, 40, 300, 0.9],
        [10, 20, 50, 90, 0.4],  # The first one again.
        *([50, 20, 10, 90, 0.5], [nan, 0, 5, 5, 0.5], [0, 0, inf, 5, 0.5]),
        [200, 10, 260, 90, 0.5],
        [10, 10, 10.2, 60, 0.5],
    ]
    boxes = clean_boxes(rows, width=200, height=100)
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
    for wrong in ([1, 2, 3, 4], [[1, 2], [3]], "boxes", np.ones((2, 4), "datetime64[D]")):
        with refused("boxes_malformed", InputError):
            clean_boxes(wrong, 10, 10)
    with refused("too_many_boxes", InputError):
        clean_boxes(np.broadcast_to(np.float32(1), (1_000_001, 5)), 8, 8)


def detection(track="t", sharp=100.0, height=128, border=False, index=0):
    return Detection(
        image=np.zeros((height, 50, 3), np.uint8), box=(0, 0, 50, height), score=None,
        sharpness=sharp, at_border=border, track=track, index=index, time=0.0, arrived=0.0,
    )  # fmt: skip


def select(every_s, min_views=1, dropped=None):
    return Selection(
        PipelineSettings(every_s=every_s, min_views=min_views),
        (lambda reason: None) if dropped is None else dropped.append,
    )


def offer(selection, clock, shown):
    selection.saw(shown.track, clock)
    selection.offer(shown, clock)
    return [found.index for found in selection.due(clock)]


def test_the_best_detection_of_each_window_is_selected():
    dropped = []
    selection = select(4.0, 2, dropped)
    sharp = [10, 50, 30, 90, 5, 5, 5, 5, 5, 5, 20, 5, 5, 40]
    found = [offer(selection, i / 2, detection(sharp=s, index=i)) for i, s in enumerate(sharp)]
    assert found == [[], [], [1], *[[]] * 8, [10], [], []], "within a quarter, then not for four"
    assert selection.end("t") is None
    assert dropped == ["not_best"] * 2 + ["too_soon"] * 6 + ["not_best"] * 2 + ["too_soon"] * 2


def test_no_two_pictures_of_a_track_are_closer_than_asked_for():
    every_s, random, dropped = 2.0, np.random.default_rng(0), []
    selection = select(every_s, 1, dropped)
    times, offered = [], 0
    for number in range(900):  # A minute at 15 frames a second, with gaps and useless detections.
        clock = number / 15
        selection.saw("t", clock)
        if random.random() < 0.7:
            selection.offer(detection(sharp=random.uniform(20, 900), index=number), clock)
            offered += 1
        if number % 100 == 99:
            times += [found.index / 15 for found in selection.flush()]
        times += [found.index / 15 for found in selection.due(clock)]
    times += [found.index / 15 for found in selection.end_all()]
    assert np.diff(times).min() >= every_s - 1e-6
    assert len(times) >= 60 / (2 * every_s + 1), "at least one of every other window"
    assert len(times) + len(dropped) == offered


def test_a_detection_that_is_cut_off_waits_for_a_whole_one_and_is_better_than_none():
    selection = select(1.0)
    offer(selection, 0.0, detection(sharp=900, border=True, index=0))
    offer(selection, 0.1, detection(sharp=30, index=1))
    offer(selection, 0.2, detection("other", sharp=900, border=True, index=2))
    assert [found.index for found in selection.end_all()] == [1, 2]
    selection = select(2.0)
    coming = [detection(sharp=900, border=True)] * 6
    coming += [detection(index=6), detection(sharp=200, index=7)]
    assert [offer(selection, n / 5, one) for n, one in enumerate(coming)] == [[]] * 8
    assert offer(selection, 1.7, detection(index=8)) == [7], "half a second after the first whole"
    for n in range(10):
        assert offer(selection, n / 5, detection("other", border=True, index=n)) == []
    last = detection("other", border=True, index=10)
    assert offer(selection, 2.0, last) == [0], "there is no other"


def test_a_track_of_one_frame_gives_nothing():
    dropped = []
    selection = select(0.0, 2, dropped)
    assert offer(selection, 0.0, detection()) == []
    assert selection.flush() == []
    assert selection.end("t") is None
    assert dropped == ["seen_once"]
    counted = [selection.saw("two", n / 10) for n in range(11)]
    assert counted == [n == 5 for n in range(11)], "two frames 0.45 s apart, at any rate"
    assert offer(selection, 1.1, detection("two")) == [0]


def test_a_flush_gives_the_best_so_far_and_keeps_the_pace():
    selection = select(1.0)
    offer(selection, 0.0, detection(index=0))
    assert [found.index for found in selection.flush()] == [0]
    found = [offer(selection, t, detection(index=n)) for n, t in enumerate((0.5, 1.0, 2.0), 1)]
    assert found == [[], [], [2]]


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
    coarse = np.random.default_rng(0).integers(0, 255, (32, 12, 3), np.uint8)
    large = cv2.resize(coarse, (96, 256), interpolation=cv2.INTER_CUBIC)
    small = cv2.resize(coarse, (48, 128), interpolation=cv2.INTER_CUBIC)
    assert sharpness(cv2.GaussianBlur(large, (0, 0), 12)) < 0.05 * sharpness(large)
    assert sharpness(large) == pytest.approx(sharpness(small), rel=0.3)


def test_durations_keep_quantiles_in_constant_memory():
    durations = Durations()
    assert durations.quantile_s(0.5) is None
    for value in np.linspace(0.01, 1.0, 1000):
        durations.add(float(value))
    for share in (0.5, 0.99):
        assert durations.quantile_s(share) == pytest.approx(share, rel=0.2)
    counts, total = durations.snapshot()
    assert (sum(counts), round(total)) == (1000, 505)
    durations.add(1e6)
    assert durations.quantile_s(1.0) == inf


def test_folder_names_are_safe_and_differ():
    names = ("gate", "../..", "a/b", "a_b", "Süd", ".", "x" * 300, "x" * 299, "a b")
    folders = [safe_folder_name(name) for name in names]
    assert len(set(folders)) == len(names)
    for folder in folders:
        assert 0 < len(folder) < 80
        assert folder.isascii()
        assert folder.replace("-", "").replace("_", "").isalnum()


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("rtsp://admin:s3@s3cret@@10.0.0.5:554/ch1", "rtsp://10.0.0.5:554/ch1"),
        ("rtsp://10.0.0.5/ch@1?a=b@c", "rtsp://10.0.0.5/ch@1?a=b@c"),
        ("rtsp://admin:12?s3cret@10.0.0.5/ch1", "rtsp://10.0.0.5/ch1"),
        ("rtsp://admin:1@2/s3cret@cam/ch1", "rtsp://cam/ch1"),
        ("a=rtsp://cam/x!b=rtsp://admin:/s3cret@cam/y c=rtsp://u:s3cret@h",
         "a=rtsp://cam/x!b=rtsp://cam/y c=rtsp://h"),
        ("rtsp://office/anna:s3cret@10.0.0.5/x", "rtsp://10.0.0.5/x"),
        ("rtsp://admin:s3cret@[fe80::1]:554/ch@1", "rtsp://[fe80::1]:554/ch@1"),
        ("rtsp://10.0.0.5/user=admin&password=s3cret&channel=1",
         "rtsp://10.0.0.5/user=admin&password=***&channel=1"),
        ("https://cam/live?token=s3cret&x=1", "https://cam/live?token=***&x=1"),
        ("rtspsrc location=rtsp://u:s3cret@h/s user-pw=s3cret ! appsink",
         "rtspsrc location=rtsp://h/s user-pw=*** ! appsink"),
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
    monkeypatch.setattr(cv2.videoio_registry, "hasBackend", lambda backend: True)
    assert parse_source("videotestsrc ! appsink").kind == "gstreamer"
