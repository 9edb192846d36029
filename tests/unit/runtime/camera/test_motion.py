"""Which frames detectors see: motion, light, noise, and how often without motion."""

import numpy as np
import pytest

from tests.helpers.fake_camera import (
    BOX,
    FILE,
    START,
    FakeOpener,
    check_sums,
    person_frame,
)
from tests.helpers.refused import refused
from upperson_camera import Pipeline, PipelineSettings
from upperson_camera.frames import Frame
from upperson_camera.motion import DetectionSchedule
from upperson_rt.errors import UsageError

SIZE = 360, 640
FPS = 10


def street(seed=0):
    """A street as coarse texture, float32 (H, W, 3)."""
    coarse = np.random.default_rng(seed).uniform(60, 170, (18, 32, 3))
    return np.kron(coarse, np.ones((20, 20, 1))).astype(np.float32)


NOISE = np.random.default_rng(9).normal(0, 4, (8, *SIZE, 3)).astype(np.float32)


def noisy(picture, random):
    noise = NOISE[random.integers(len(NOISE))]
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def searched(pictures, fps=FPS, has_tracks=False, **options):
    """Return the numbers of the frames that a detector sees, and why it does not see others."""
    schedule = DetectionSchedule(PipelineSettings(**options), may_skip=True)
    seen, reasons = [], set()
    for index, picture in enumerate(pictures):
        frame = Frame(
            image=picture, index=index, time=START + index / fps, clock=index / fps, arrived=0.0
        )
        reason = schedule.skips(frame, has_tracks)
        if reason is None:
            seen.append(index)
        else:
            reasons.add(reason)
    return seen, reasons


def test_without_motion_a_frame_every_five_seconds_is_searched_and_more_while_there_are_tracks():
    random, picture = np.random.default_rng(1), street()
    still = [noisy(picture, random) for _ in range(20 * FPS)]
    for has_tracks, every_s in ((False, 5.0), (True, 1.0)):
        seen, reasons = searched(still, has_tracks=has_tracks)
        late = [index for index in seen if index > 3 * FPS]
        assert set(np.diff(late)) == {every_s * FPS}
        assert reasons == {"no_motion"}
    assert searched(still, motion_gate=False) == ([*range(len(still))], set())


@pytest.mark.parametrize("contrast", [25, -25])
def test_whoever_walks_past_is_searched_for_in_every_frame(contrast):
    random, picture = np.random.default_rng(2), street()
    pictures = []
    for index in range(20 * FPS):
        now = picture.copy()
        x0 = 12 * (index - 10 * FPS)  # From 10 s on; 64 pixels high, the least that counts.
        if x0 >= 0:
            now[200:264, x0 : x0 + 24] = picture[200:264, x0 : x0 + 24] + contrast
        pictures.append(noisy(now, random))
    seen, _ = searched(pictures)
    walking = range(10 * FPS + 1, 10 * FPS + SIZE[1] // 12)
    assert set(walking) <= set(seen)


def test_slow_changes_of_light_are_no_motion_and_sudden_ones_are():
    random, picture = np.random.default_rng(3), street()
    frames = 40 * FPS
    seen, _ = searched(noisy(picture * (1 - 0.2 * n / frames), random) for n in range(frames))
    assert len(seen) < 0.1 * frames
    lamp = (noisy(picture * (0.5 if n < 10 * FPS else 1.0), random) for n in range(20 * FPS))
    seen, _ = searched(lamp)
    assert {*range(10 * FPS, 11 * FPS)} <= set(seen)


@pytest.mark.parametrize(("fps", "limit", "count"), [(10, 4, 40), (25, 10, 100), (5, 10, 50)])
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
    calls = []

    def detector(frame):
        calls.append(frame)
        return [BOX]

    frames = [person_frame()] * (20 * FPS)
    with Pipeline(encoder, gallery) as pipeline:
        pipeline.add_camera("yard", FILE, detector, start_time=START, opener=FakeOpener(frames))
        assert pipeline.wait()
    stats = pipeline.stats()
    check_sums(stats)
    camera = stats.cameras["yard"]
    assert camera.frames_skipped == {"no_motion": len(frames) - camera.frames_processed}
    assert camera.frames_processed == len(calls) < len(frames) / 4
    assert (camera.tracks, camera.frames_dropped) == (1, {})
    assert camera.committed >= 1


def test_submitted_frames_are_all_searched_unless_there_is_a_rate(encoder, gallery):
    for detect_fps, wanted in ((None, 30), (5.0, 15)):
        calls = []
        with Pipeline(encoder, gallery, detect_fps=detect_fps) as pipeline:
            pipeline.add_camera("hall", detector=calls.append, drop="block")
            for index in range(3 * FPS):
                pipeline.submit("hall", person_frame(), time=START + index / FPS)
        check_sums(pipeline.stats())
        assert len(calls) == wanted
