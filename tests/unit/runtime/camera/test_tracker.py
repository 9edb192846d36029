"""Tracks made of boxes alone: our own, and those of the package trackers."""

import sys
from types import ModuleType

import numpy as np
import pytest

from tests.helpers.refused import refused
from upperson_camera import PipelineSettings
from upperson_camera.tracker import COLOURS, TRACKERS, UppersonTracker, colours_of, new_tracker
from upperson_rt.errors import BackendError, UsageError, install_command
from upperson_rt.ingest.boxes import clean_boxes

SIZE = (1000, 500)
GREY = np.full((500, 1000, 3), 120, np.uint8)
OTHERS = [name for name in TRACKERS if name != "upperson"]


def as_boxes(edges):
    return clean_boxes(np.array(edges, float).reshape(-1, 4), *SIZE)


def follow(tracker, frames, fps=10.0, start_s=0.0):
    """Return the track numbers of every frame; boxes are given as x of the left edge, or whole."""
    numbers = []
    for index, boxes in enumerate(frames):
        edges = [box if len(box) == 4 else [box[0], box[1], box[0] + 60, 400] for box in boxes]
        numbers.append(tracker.update(as_boxes(edges), start_s + index / fps, GREY)[0])
    return numbers


def walk(frames, fps=10.0):
    """Return all numbers of a tracker that follows one person."""
    return {number for numbers in follow(UppersonTracker(), frames, fps) for number in numbers}


def test_one_person_is_one_track_in_spite_of_gaps_and_at_any_frame_rate():
    assert walk([[(100 + 12 * i, 220)] if i % 7 not in (4, 5) else [] for i in range(50)]) == {0}
    for fps in (2.0, 5.0, 25.0):  # 120 pixels a second, at heights of 200 pixels.
        assert walk([[(50 + 120 * i / fps, 200)] for i in range(int(6 * fps))], fps) == {0}
    numbers = follow(UppersonTracker(lost_after_s=2.0), [[(400, 200)]] * 6, fps=0.25)
    assert numbers[-1] == numbers[-2], "a slow camera gets more patience after the start"


def test_people_who_cross_keep_their_numbers():
    frames = [[(100 + 15 * i, 200), (700 - 15 * i, 230)] for i in range(40)]
    # For a few frames only one box is left, as a detector does it.
    for index in range(19, 22):
        frames[index] = frames[index][:1]
    numbers = follow(UppersonTracker(), frames)
    assert all(n == [0, 1] or n == [0] for n in numbers)


def test_a_person_who_comes_back_later_is_a_new_track():
    tracker = UppersonTracker(lost_after_s=2.0)
    follow(tracker, [[(400, 200)]] * 10)
    numbers, ended = tracker.update(as_boxes([[400, 200, 460, 400]]), 0.9 + 2.1, GREY)
    assert (numbers, ended) == ([1], [0])


LEAVING = {
    "left": [(max(0, 40 - 20 * i), 200, max(10, 100 - 20 * i), 400) for i in range(5)],
    "right": [(min(990, 900 + 20 * i), 200, min(1000, 960 + 20 * i), 400) for i in range(5)],
    "above": [(300, max(0, 60 - 15 * i), 360, 240 - 15 * i) for i in range(5)],
    "below": [(300, 300 + 4 * i, 360, 484 + 4 * i) for i in range(5)],
}


@pytest.mark.parametrize("side", LEAVING)
def test_a_person_who_leaves_is_not_the_next_one_there(side):
    leaving = [[box] for box in LEAVING[side]]
    numbers = follow(UppersonTracker(), [*leaving, [], [], *leaving[::-1]])
    assert numbers[:5] == [[0]] * 5
    assert numbers[7:] == [[1]] * 5


def test_a_gap_is_no_frame_rate():
    tracker = UppersonTracker(lost_after_s=2.0)
    follow(tracker, [[(400, 200)]] * 20)
    assert tracker.update(as_boxes([]), 60.0, GREY)[1] == [0]


def test_numbers_never_come_twice_and_every_end_comes_once():
    rng = np.random.default_rng(0)
    tracker, seen, ended = UppersonTracker(lost_after_s=0.3), set(), []
    for index in range(200):
        count = int(rng.integers(0, 6))
        corner = rng.integers(0, 400, (count, 2))
        boxes = np.hstack([corner, corner + rng.integers(20, 200, (count, 2))])
        numbers, gone = tracker.update(as_boxes(boxes), index / 10, GREY)
        assert len(set(numbers)) == count
        seen.update(numbers)
        ended += gone
    assert seen == set(range(len(seen)))
    assert len(ended) == len(set(ended))
    assert set(ended) <= seen


@pytest.mark.parametrize("dressed", [True, False])
def test_colours_tell_two_people_apart_who_meet_and_turn_round(dressed):
    tracker, numbers = UppersonTracker(), []
    for step in [*range(12), *range(11, 0, -1)]:
        image = GREY.copy()
        edges = [[300 + 15 * step, 200, 360 + 15 * step, 400],
                 [660 - 15 * step, 202, 720 - 15 * step, 400]]  # fmt: skip
        if dressed:
            for (x0, y0, x1, y1), colour in zip(edges, ((30, 30, 200), (40, 160, 40)), strict=True):
                image[y0:y1, x0:x1] = colour
        numbers.append(tracker.update(as_boxes(edges), len(numbers) / 10, image)[0])
    assert numbers[:11] == [[0, 1]] * 11
    assert numbers[-1] == ([0, 1] if dressed else [1, 0]), "by speed they passed one another"


def test_colours_are_alike_at_any_size_and_differ_between_people():
    image = GREY.copy()
    image[100:300, 100:180] = (200, 40, 30)
    image[300:400, 100:180] = 20
    image[50:100, 400:420] = (200, 40, 30)
    image[100:125, 400:420] = 20
    image[100:400, 600:680] = (40, 60, 220)
    edges = np.array([[100, 100, 180, 400], [400, 50, 420, 125], [600, 100, 680, 400]])
    found = colours_of(image, np.vstack([edges, [[5, 5, 6, 6]]]))
    likeness = found @ found.T
    assert np.diag(likeness) == pytest.approx(1.0)
    assert likeness[0, 1] > 0.8
    assert max(likeness[0, 2], likeness[0, 3]) < 0.1
    assert colours_of(image, edges[:0]).shape == (0, COLOURS)


def test_the_second_box_of_a_person_has_no_track():
    tracker = UppersonTracker()
    numbers = follow(tracker, [[(400, 200), (406, 205)][: 1 + i % 2] for i in range(10)])
    assert numbers == [[0], [0, -1]] * 5


@pytest.mark.parametrize("fps", [5.0, 10.0, 25.0])
def test_a_track_that_was_seen_in_few_frames_ends_soon(fps):
    tracker = UppersonTracker(lost_after_s=2.0)
    often = [[(400, 200)]] * int(fps)
    few = [[*boxes, (700, 200)] if i % 5 == 0 else boxes for i, boxes in enumerate(often)]
    assert {n for numbers in follow(tracker, few, fps)[: int(fps / 2)] for n in numbers} == {0, 1}
    ends = [tracker.update(as_boxes([]), 1 + i / fps, GREY)[1] for i in range(int(2.5 * fps))]
    assert ends.index([0]) > 1.8 * fps, "seen in most frames"
    assert not any(1 in gone for gone in ends), "ended before"


@pytest.mark.parametrize("fps", [5.0, 10.0, 25.0])
def test_a_person_who_turns_round_is_one_track(fps):
    way = [0.7 * 200 / fps * i for i in range(int(3 * fps))]
    assert walk([[(100 + x, 200)] for x in [*way, *way[::-1]]], fps) == {0}


@pytest.fixture
def library():
    return pytest.importorskip("trackers", reason=f"run  {install_command('trackers')}")


@pytest.mark.parametrize(("name", "fps"), [*zip(OTHERS, (10.0, 25.0, 10.0), strict=True)])
def test_other_trackers_track_two_people_who_cross(library, name, fps):
    frames = [[(100 + 80 * i / fps, 200), (800 - 80 * i / fps, 220)] for i in range(int(8 * fps))]
    tracker = new_tracker(name, 2.0)
    numbers = follow(tracker, frames, fps)
    assert all(n == [-1, -1] for n in numbers[:4]), "the first frames give the rate"
    assert numbers[8] == numbers[-1] != [-1, -1]
    assert {n for of_frame in numbers for n in of_frame} == {-1, 0, 1}


@pytest.mark.parametrize("name", OTHERS)
def test_other_trackers_end_every_track_once_and_bear_a_clock_that_stands_still(library, name):
    tracker = new_tracker(name, 1.0)
    for clock in (0.0, 0.0, 0.0, 0.0, 0.0, 0.0):
        assert tracker.update(as_boxes([]), clock, GREY) == ([], [])
    tracker = new_tracker(name, 1.0)
    follow(tracker, [[(400, 200)]] * 20)
    ends = [tracker.update(as_boxes([]), 2.0 + index / 10, GREY)[1] for index in range(25)]
    assert [0] in ends
    assert [number for end in ends for number in end] == [0]
    assert {n for n, *_ in follow(tracker, [[(400, 200)]] * 5, start_s=5.0)} <= {-1, 1}


@pytest.mark.parametrize("name", OTHERS)
def test_other_trackers_go_by_scores_where_there_are_any(library, name):
    box, sure, unsure = [400, 200, 460, 400], new_tracker(name, 2.0), new_tracker(name, 2.0)
    for index in range(20):
        scored = np.array([[*box, 0.9], [*box, 0.2]])
        (kept,) = sure.update(clean_boxes(scored[:1], *SIZE), index / 10, GREY)[0]
        (left,) = unsure.update(clean_boxes(scored[1:], *SIZE), index / 10, GREY)[0]
    assert (kept, left) == (0, -1)


def test_a_tracker_that_is_not_there_is_named(monkeypatch):
    with refused("unknown_tracker", UsageError, found="sort"):
        PipelineSettings(tracker="sort")
    monkeypatch.setitem(sys.modules, "trackers", None)
    with refused("extra_missing", BackendError, package="trackers", extra="trackers"):
        PipelineSettings(tracker="ocsort")
    assert PipelineSettings().tracker == "upperson"
    monkeypatch.setitem(sys.modules, "trackers", ModuleType("trackers"))
    with refused("trackers_too_old", BackendError):
        PipelineSettings(tracker="bytetrack")


def test_options_follow_the_name_of_a_tracker():
    found = new_tracker("upperson:gate=9,seen_share=0.5", 2.0)
    assert (found.lost_after_s, found.gate, found.seen_share) == (2.0, 9.0, 0.5)
    once = [[(400, 200)], *[[]] * 9, [(400, 200)]]
    assert follow(new_tracker("upperson:seen_share=0", 3.0), once)[-1] == [1], "two, at any share"
    assert follow(new_tracker("upperson:same_person_iou=1", 2.0), [[(400, 200), (406, 205)]])


@pytest.mark.parametrize(
    ("tracker", "code"),
    [
        ("upperson:lost_after_s=1", "unknown_tracker_option"),
        ("upperson:gate=9,", "unknown_tracker_option"),
        ("upperson:gate", "no_number"),
        ("upperson:gate=nan", "no_number"),
        ("upperson:seen_share=1.5", "out_of_range"),
        ("", "no_name"),
        (3, "no_text"),
    ],
)
def test_wrong_options_of_our_tracker_are_named(tracker, code):
    with refused(code, UsageError):
        PipelineSettings(tracker=tracker)


def test_options_of_other_trackers_are_those_of_their_classes(library):
    options = "track_activation_threshold=0.1,high_conf_det_threshold=0.1,iou=GIoU"
    weak = new_tracker(f"bytetrack:{options},minimum_consecutive_frames=1", 2.0)
    scored = clean_boxes(np.array([[400, 200, 460, 400, 0.3]]), *SIZE)
    numbers = [weak.update(scored, n / 10, GREY)[0] for n in range(9)]
    assert numbers[4:] == [[0]] * 5
    for tracker, code in (
        ("bytetrack:frame_rate=9", "unknown_tracker_option"),
        ("botsort:enable_cmc=1", "unknown_tracker_option"),
        ("ocsort:iou=2", "unknown_tracker_option"),
        ("ocsort:delta_t=1.5", "no_number"),
        ("ocsort:lost_track_buffer=-1", "tracker_option_refused"),
    ):
        with refused(code, UsageError):
            PipelineSettings(tracker=tracker)
