"""Tracks made of boxes alone."""

import numpy as np
import pytest

from upperson_rt.camera.tracker import Tracker

SIZE = (1000, 500)


def follow(tracker, frames, fps=10.0, start_s=0.0):
    """Return the track numbers of every frame; boxes are given as x of the left edge, or whole."""
    numbers = []
    for index, boxes in enumerate(frames):
        edges = [box if len(box) == 4 else [box[0], box[1], box[0] + 60, 400] for box in boxes]
        array = np.array(edges, np.int64).reshape(-1, 4)
        numbers.append(tracker.update(array, start_s + index / fps, SIZE)[0])
    return numbers


def test_a_walking_person_is_one_track_in_spite_of_gaps():
    frames = [[(100 + 12 * i, 220)] if i % 7 not in (4, 5) else [] for i in range(50)]
    tracker = Tracker()
    assert {n for numbers in follow(tracker, frames) for n in numbers} == {0}
    assert tracker.count == 1


def test_people_who_cross_keep_their_numbers():
    frames = [[(100 + 15 * i, 200), (700 - 15 * i, 230)] for i in range(40)]
    # For a few frames only one box is left, as a detector does it.
    for index in range(19, 22):
        frames[index] = frames[index][:1]
    numbers = follow(Tracker(), frames)
    assert all(n == [0, 1] or n == [0] for n in numbers)


@pytest.mark.parametrize("fps", [2.0, 5.0, 25.0])
def test_frame_rates_do_not_matter_much(fps):
    speed = 120  # Pixels a second, at heights of 200 pixels.
    frames = [[(50 + speed * i / fps, 200)] for i in range(int(6 * fps))]
    assert {n for numbers in follow(Tracker(), frames, fps) for n in numbers} == {0}


def test_who_comes_back_later_is_somebody_else():
    tracker = Tracker(lost_after_s=2.0)
    follow(tracker, [[(400, 200)]] * 10)
    _, ended = tracker.update(np.array([[400, 200, 460, 400]]), 0.9 + 2.1, SIZE)
    assert ended == [0]
    assert tracker.count == 2


def test_who_leaves_is_not_taken_for_who_comes_in_there():
    leaving = [[(max(0, 40 - 20 * i), 200, max(10, 100 - 20 * i), 400)] for i in range(5)]
    coming = [[(0, 205, min(60, 10 + 20 * i), 400)] for i in range(5)]
    numbers = follow(Tracker(), [*leaving, [], [], *coming])
    assert numbers[:5] == [[0]] * 5
    assert numbers[7:] == [[1]] * 5


def test_a_slow_camera_gets_more_patience():
    frames = [[(400, 200)]] * 6
    numbers = follow(Tracker(lost_after_s=2.0), frames, fps=0.25)
    assert numbers[-1] == numbers[-2], "a person who stands still is one track after the start"


def test_a_gap_makes_nobody_patient():
    tracker = Tracker(lost_after_s=2.0)
    follow(tracker, [[(400, 200)]] * 20)
    assert tracker.update(np.zeros((0, 4), np.int64), 60.0, SIZE)[1] == [0]


def test_numbers_never_come_twice_and_every_end_is_told_once():
    rng = np.random.default_rng(0)
    tracker, seen, ended = Tracker(lost_after_s=0.3), set(), []
    for index in range(200):
        count = int(rng.integers(0, 6))
        corner = rng.integers(0, 400, (count, 2))
        boxes = np.hstack([corner, corner + rng.integers(20, 200, (count, 2))])
        numbers, gone = tracker.update(boxes, index / 10, SIZE)
        assert len(set(numbers)) == count
        seen.update(numbers)
        ended += gone
    assert seen == set(range(tracker.count))
    assert len(ended) == len(set(ended))
    assert set(ended) <= seen
