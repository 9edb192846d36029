"""Which frames are searched, which boxes are one person, and who stands still."""

import sys
from types import ModuleType

import numpy as np
import pytest

from tests.helpers.fake_camera import BOX, FILE, START, FakeOpener, person_frame
from tests.helpers.refused import refused
from upperson_camera import Pipeline, PipelineSettings
from upperson_camera.frames import Frame
from upperson_camera.motion import DetectionSchedule
from upperson_camera.still import StillTracks
from upperson_camera.tracker import COLOURS, TRACKERS, UppersonTracker, colours_of, new_tracker
from upperson_rt.errors import BackendError, UsageError, install_command
from upperson_rt.ingest.boxes import clean_boxes

# --- Tracks made of boxes alone: our own, and those of the package trackers


VIEW = (1000, 500)
GREY = np.full((500, 1000, 3), 120, np.uint8)
OTHERS = [name for name in TRACKERS if name != "upperson"]


def as_boxes(edges):
    return clean_boxes(np.array(edges, float).reshape(-1, 4), *VIEW)


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
    frames[19:22] = [frame[:1] for frame in frames[19:22]]
    assert all(n in ([0, 1], [0]) for n in follow(UppersonTracker(), frames))


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
    for x, y, size in ((100, 100, 4), (400, 50, 1)):
        image[y : y + 50 * size, x : x + 20 * size] = (200, 40, 30)
        image[y + 50 * size : y + 75 * size, x : x + 20 * size] = 20
    image[100:400, 600:680] = (40, 60, 220)
    edges = np.array(
        [[100, 100, 180, 400], [400, 50, 420, 125], [600, 100, 680, 400], [5, 5, 6, 6]]
    )
    found = colours_of(image, edges)
    likeness = found @ found.T
    assert np.diag(likeness) == pytest.approx(1.0)
    assert likeness[0, 1] > 0.8
    assert max(likeness[0, 2], likeness[0, 3]) < 0.1
    assert colours_of(image, edges[:0]).shape == (0, COLOURS)


def test_the_second_box_of_a_person_has_no_track():
    frames = [[(400, 200)], [(400, 200), (406, 205)]] * 5
    assert follow(UppersonTracker(), frames) == [[0], [0, -1]] * 5


@pytest.mark.parametrize("fps", [5.0, 25.0])
def test_a_track_that_was_seen_in_few_frames_ends_soon(fps):
    tracker = UppersonTracker(lost_after_s=2.0)
    often = [[(400, 200)]] * int(fps)
    few = [[*boxes, (700, 200)] if i % 5 == 0 else boxes for i, boxes in enumerate(often)]
    assert {n for numbers in follow(tracker, few, fps)[: int(fps / 2)] for n in numbers} == {0, 1}
    ends = [tracker.update(as_boxes([]), 1 + i / fps, GREY)[1] for i in range(int(2.5 * fps))]
    assert ends.index([0]) > 1.8 * fps, "seen in most frames"
    assert not any(1 in gone for gone in ends), "ended before"


def test_a_person_who_turns_round_is_one_track():
    for fps in (5.0, 25.0):
        way = [0.7 * 200 / fps * i for i in range(int(3 * fps))]
        assert walk([[(100 + x, 200)] for x in [*way, *way[::-1]]], fps) == {0}


@pytest.fixture
def library():
    return pytest.importorskip("trackers", reason=f"run  {install_command('trackers')}")


@pytest.mark.parametrize(("name", "fps"), [*zip(OTHERS, (10.0, 25.0, 10.0), strict=True)])
def test_other_trackers_track_two_people_who_cross(library, name, fps):
    frames = [[(100 + 80 * i / fps, 200), (800 - 80 * i / fps, 220)] for i in range(int(8 * fps))]
    numbers = follow(new_tracker(name, 2.0), frames, fps)
    assert all(n == [-1, -1] for n in numbers[:4]), "the first frames give the rate"
    assert numbers[8] == numbers[-1] != [-1, -1]
    assert {n for of_frame in numbers for n in of_frame} == {-1, 0, 1}


@pytest.mark.parametrize("name", OTHERS)
def test_other_trackers_end_every_track_once_and_bear_a_clock_that_stands_still(library, name):
    tracker = new_tracker(name, 1.0)
    for _ in range(6):
        assert tracker.update(as_boxes([]), 0.0, GREY) == ([], [])
    tracker = new_tracker(name, 1.0)
    follow(tracker, [[(400, 200)]] * 20)
    ends = [tracker.update(as_boxes([]), 2.0 + index / 10, GREY)[1] for index in range(25)]
    assert [0] in ends
    assert [number for end in ends for number in end] == [0]
    assert {n for n, *_ in follow(tracker, [[(400, 200)]] * 5, start_s=5.0)} <= {-1, 1}


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


def test_options_follow_the_name_of_our_tracker_and_wrong_ones_are_named():
    found = new_tracker("upperson:gate=9,seen_share=0.5", 2.0)
    assert (found.lost_after_s, found.gate, found.seen_share) == (2.0, 9.0, 0.5)
    once = [[(400, 200)], *[[]] * 9, [(400, 200)]]
    assert follow(new_tracker("upperson:seen_share=0", 3.0), once)[-1] == [1], "two, at any share"
    for tracker, code in (
        ("upperson:lost_after_s=1", "unknown_tracker_option"),
        ("upperson:gate", "no_number"),
        ("upperson:gate=nan", "no_number"),
        ("upperson:seen_share=1.5", "out_of_range"),
        ("", "no_name"),
        (3, "no_text"),
    ):
        with refused(code, UsageError):
            PipelineSettings(tracker=tracker)


def test_options_of_other_trackers_are_those_of_their_classes(library):
    options = "track_activation_threshold=0.1,high_conf_det_threshold=0.1,iou=GIoU"
    weak = new_tracker(f"bytetrack:{options},minimum_consecutive_frames=1", 2.0)
    scored = clean_boxes(np.array([[400, 200, 460, 400, 0.3]]), *VIEW)
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


# --- Who stands still is written seldom, a thing that scores low not at all


YARD = 240, 480
PLACE = 100, 40, 160, 220
NOISE = np.random.default_rng(9).integers(0, 12, (8, *YARD, 3), np.uint8)
RED, GREEN = (40, 30, 200), (40, 180, 40)
"""BGR."""


@pytest.fixture
def watch(encoder, gallery):
    """Has a camera see a person in each frame of a film: how far from their place, in which colour.

    None is a frame in which nobody is detected. Returns what the camera counted, and for each row
    its seconds and its track.
    """

    def watched(film, fps, score=0.8, **options):
        random = np.random.default_rng(0)
        with Pipeline(encoder, gallery, **options) as pipeline:
            pipeline.add_camera("yard", drop="block")
            for index, figure in enumerate(film):
                frame, boxes = np.full((*YARD, 3), 120, np.uint8), []
                if figure is not None:
                    x0, y0, x1, y1 = np.add(PLACE, (figure[0], 0, figure[0], 0))
                    frame[y0:y1, x0:x1] = figure[1]
                    frame[y0 + 4 : y1 - 4 : 12, x0 + 4 : x1 - 4] = 240
                    trembling = random.normal(0, 0.02 * (y1 - y0), 4)
                    boxes.append([*np.add((x0, y0, x1, y1), trembling), score])
                frame += NOISE[index % len(NOISE)]
                pipeline.submit("yard", frame, boxes, START + index / fps)
            assert pipeline.drain(300)
        rows = sorted((item.time - START, item.track) for item in gallery.items())
        return pipeline.stats().cameras["yard"], rows

    return watched


def test_who_stands_for_twenty_minutes_is_one_track_of_four_rows_that_span_them(watch):
    camera, rows = watch([(0, RED)] * 1200, fps=1)
    assert camera.tracks == len({track for _, track in rows}) == 1
    assert camera.committed == len(rows) == 4
    assert rows[0][0] <= 5
    assert 1200 - rows[-1][0] <= 300 + 5
    assert camera.crops_dropped["still"] > 1000


def test_a_still_person_whom_a_detector_loses_for_a_minute_goes_on_as_one_track(watch):
    fps = 2
    film = [(0, RED) if (index // (30 * fps)) % 3 else None for index in range(180 * fps)]
    camera, rows = watch(film, fps)
    assert camera.tracks == len({track for _, track in rows}) == 1
    assert len(rows) <= 3


def test_a_thing_that_never_moves_and_scores_low_gives_no_row(watch):
    random = np.random.default_rng(5)
    film = [(0, RED) if random.random() < 0.5 else None for _ in range(200)]
    camera, rows = watch(film, fps=2, score=0.45)
    assert rows == []
    assert camera.crops_dropped["never_moved"] >= 1
    assert camera.tracks <= 1


def test_who_stops_and_walks_on_is_written_while_they_move(watch):
    fps = 5
    times = [index / fps for index in range(70 * fps)]  # They stop for a minute.
    film = [(int(40 * (min(at_s, 5) + max(0, at_s - 65))) - 60, RED) for at_s in times]
    camera, rows = watch(film, fps)
    assert camera.tracks == 1
    stopped = [at_s for at_s, _ in rows if 8 < at_s < 65]
    assert len(stopped) <= 1
    assert len(rows) - len(stopped) >= 4
    assert rows[-1][0] > 66


def test_whoever_takes_the_place_of_a_still_person_is_written(watch):
    _, rows = watch([(0, RED)] * 150 + [(0, GREEN)] * 150, fps=5)
    assert any(30 < at_s < 40 for at_s, _ in rows)
    assert len(rows) <= 3


def test_low_scores_of_who_moves_and_of_a_glimpse_are_written(watch):
    walk = [(30 * index - 60, RED) for index in range(10)]
    _, rows = watch([*walk, *[None] * 20, *[(300, GREEN)] * 5], fps=5, score=0.42)
    assert {at_s < 4 for at_s, _ in rows} == {True, False}


@pytest.mark.parametrize("options", [{"every_s": 0.0}, {"still_every_s": 0.0}])
def test_the_rule_can_be_switched_off(watch, options):
    _, rows = watch([(0, RED)] * 60, fps=2, **options)
    assert len(rows) >= 10


def test_tracks_of_a_program_keep_their_names_and_what_is_kept_of_ended_ones_is_bounded():
    def update(name, clock):
        boxes = clean_boxes([PLACE], YARD[1], YARD[0])
        assert still.update([name], boxes, NOISE[0], clock, rename=False) == [name]

    still = StillTracks(PipelineSettings())
    for clock in range(5):
        update("a", clock)
    assert list(still.end(["a"], 8)) == []
    update("b", 8)
    assert list(still.end(["b"], 400)) == ["b", "a"]
    still, over = StillTracks(PipelineSettings()), 0
    for number in range(600):
        for _ in range(2):
            update(str(number), 1.0)
        over += len(list(still.end([str(number)], 1.0)))
    assert over == 600 - 256


# --- Which frames detectors see: motion, light, noise, and how often without motion


STREET = 360, 640
FPS = 10


def street(seed=0):
    """A street as coarse texture, float32 (H, W, 3)."""
    coarse = np.random.default_rng(seed).uniform(60, 170, (18, 32, 3))
    return np.kron(coarse, np.ones((20, 20, 1))).astype(np.float32)


STRONG_NOISE = np.random.default_rng(9).normal(0, 4, (8, *STREET, 3)).astype(np.float32)


def noisy(picture, random):
    noise = STRONG_NOISE[random.integers(len(STRONG_NOISE))]
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def searched(pictures, fps=FPS, has_tracks=False, **options):
    """Return the numbers of the frames that a detector sees, and why it does not see others."""
    schedule = DetectionSchedule(PipelineSettings(**options), may_skip=True)
    seen, reasons = [], set()
    for index, picture in enumerate(pictures):
        frame = Frame(image=picture, index=index, time=START, clock=index / fps, arrived=0.0)
        reason = schedule.skips(frame, has_tracks)
        seen += [index] if reason is None else []
        reasons.add(reason)
    return seen, reasons - {None}


def test_without_motion_a_frame_every_five_seconds_is_searched_and_more_while_there_are_tracks():
    random, picture = np.random.default_rng(1), street()
    still = [noisy(picture, random) for _ in range(14 * FPS)]
    for has_tracks, every_s in ((False, 5.0), (True, 1.0)):
        seen, reasons = searched(still, has_tracks=has_tracks)
        late = [index for index in seen if index > 3 * FPS]
        assert set(np.diff(late)) == {every_s * FPS}
        assert reasons == {"no_motion"}
    assert searched(still, motion_gate=False) == ([*range(len(still))], set())


def test_whoever_walks_past_is_searched_for_in_every_frame():
    random, background, pictures = np.random.default_rng(2), street(), []
    for index in range(20 * FPS):
        picture = background.copy()
        x0 = 12 * (index - 10 * FPS)  # From 10 s on; 64 pixels high, the least that counts.
        if x0 >= 0:
            picture[200:264, x0 : x0 + 24] -= 25
        pictures.append(noisy(picture, random))
    seen, _ = searched(pictures)
    walking = range(10 * FPS + 1, 10 * FPS + STREET[1] // 12)
    assert set(walking) <= set(seen)


def test_slow_changes_of_light_are_no_motion_and_sudden_ones_are():
    random, picture = np.random.default_rng(3), street()
    frames = 30 * FPS
    seen, _ = searched(noisy(picture * (1 - 0.15 * n / frames), random) for n in range(frames))
    assert len(seen) < 0.1 * frames
    lamp = (noisy(picture * (0.5 if n < 10 * FPS else 1.0), random) for n in range(20 * FPS))
    seen, _ = searched(lamp)
    assert {*range(10 * FPS, 11 * FPS)} <= set(seen)


@pytest.mark.parametrize(("fps", "limit", "count"), [(25, 10, 100), (5, 10, 50)])
def test_the_rate_of_a_detector_is_limited_on_average(fps, limit, count):
    frames = [np.zeros((90, 160, 3), np.uint8)] * (10 * fps)
    seen, reasons = searched(frames, fps, motion_gate=False, detect_fps=limit)
    assert len(seen) == count
    assert reasons == ({"detect_fps"} if limit < fps else set())
    with refused("setting_out_of_range", UsageError, setting="detect_fps"):
        PipelineSettings(detect_fps=0.0)


def test_pictures_of_any_size_and_times_that_stand_still_are_searched_or_skipped():
    random = np.random.default_rng(4)
    sizes = [(1, 1), (720, 1280), (2, 4000), (90, 160), (90, 160)]
    pictures = [random.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    assert searched(pictures)[0][0] == 0
    assert searched(pictures, fps=float("inf"))[0][0] == 0


def test_a_person_who_stands_still_from_the_first_frame_on_is_one_track(encoder, gallery):
    frames = [person_frame()] * (20 * FPS)
    options = {"start_time": START, "opener": FakeOpener(frames)}
    with Pipeline(encoder, gallery) as pipeline:
        pipeline.add_camera("yard", FILE, lambda frame: [BOX], **options)
        assert pipeline.wait()
    camera = pipeline.stats().cameras["yard"]
    assert camera.frames_skipped == {"no_motion": len(frames) - camera.frames_processed}
    assert camera.frames_processed < len(frames) / 4
    assert (camera.tracks, camera.frames_dropped) == (1, {})
    assert camera.committed >= 1


def test_submitted_frames_are_all_searched_unless_there_is_a_rate(encoder, gallery):
    for detect_fps, wanted in ((None, 30), (5.0, 15)):
        calls = []
        with Pipeline(encoder, gallery, detect_fps=detect_fps) as pipeline:
            pipeline.add_camera("hall", detector=calls.append, drop="block")
            for index in range(3 * FPS):
                pipeline.submit("hall", person_frame(), time=START + index / FPS)
        assert len(calls) == wanted
