"""Who stands still is written seldom, a thing that never moves and scores low not at all."""

from collections import Counter

import numpy as np
import pytest

from tests.helpers.fake_camera import START, check_sums
from upperson_camera import Pipeline, PipelineSettings
from upperson_camera.still import StillTracks
from upperson_rt.ingest.boxes import clean_boxes

SIZE = 240, 480
PLACE = 100, 40, 160, 220
NOISE = np.random.default_rng(9).integers(0, 12, (8, *SIZE, 3), np.uint8)
RED, GREEN = (40, 30, 200), (40, 180, 40)
"""BGR."""


def drawn(figures, index):
    """A noisy frame with textured figures (box, colour) on grey."""
    frame = np.full((*SIZE, 3), 120, np.uint8)
    for (x0, y0, x1, y1), colour in figures:
        frame[y0:y1, x0:x1] = colour
        frame[y0 + 4 : y1 - 4 : 12, x0 + 4 : x1 - 4] = 240
    frame += NOISE[index % len(NOISE)]
    return frame


def trembling(box, random, share):
    """The box as a detector gives it."""
    return np.asarray(box) + random.normal(0, share * (box[3] - box[1]), 4)


def beside(box, pixels):
    return box[0] + pixels, box[1], box[2] + pixels, box[3]


def watched(encoder, gallery, film, fps, score=0.8, share=0.02, **options):
    """Submit a film of figures in each frame, None for a frame in which none is detected."""
    random = np.random.default_rng(0)
    with Pipeline(encoder, gallery, **options) as pipeline:
        pipeline.add_camera("yard", drop="block")
        for index, figures in enumerate(film):
            frame = drawn(figures or (), index)
            boxes = [[*trembling(box, random, share), score] for box, _ in figures or ()]
            pipeline.submit("yard", frame, boxes, START + index / fps)
        assert pipeline.drain(300)
    check_sums(pipeline.stats())
    rows = sorted(gallery.items(), key=lambda item: item.time)
    return pipeline.stats().cameras["yard"], rows


def test_who_stands_for_an_hour_is_one_track_of_twelve_rows_that_span_it(encoder, gallery):
    fps = 1
    camera, rows = watched(encoder, gallery, [[(PLACE, RED)]] * (3600 * fps), fps)
    assert camera.tracks == 1
    assert len({row.track for row in rows}) == 1
    assert 10 <= len(rows) <= 12
    assert rows[0].time - START <= 5
    assert START + 3600 - rows[-1].time <= 300 + 5
    assert camera.crops_dropped["still"] > 3000
    assert camera.committed == len(rows)


def test_a_still_person_whom_a_detector_loses_for_a_minute_goes_on_as_one_track(encoder, gallery):
    fps = 2
    film = [[(PLACE, RED)] if (index // (30 * fps)) % 3 else None for index in range(600 * fps)]
    camera, rows = watched(encoder, gallery, film, fps)
    assert (camera.tracks, len({row.track for row in rows})) == (1, 1)
    assert len(rows) <= 3


def test_a_still_person_whom_a_detector_finds_in_every_other_frame_is_one_track(encoder, gallery):
    fps, random = 2, np.random.default_rng(6)
    film = [[(PLACE, RED)] if random.random() < 0.5 else None for _ in range(900 * fps)]
    camera, rows = watched(encoder, gallery, film, fps, share=0.04)
    assert (camera.tracks, len({row.track for row in rows})) == (1, 1)
    assert 3 <= len(rows) <= 4


def test_a_thing_that_never_moves_and_scores_low_gives_no_row(encoder, gallery):
    fps, random = 2, np.random.default_rng(5)
    film = [[(PLACE, RED)] if random.random() < 0.5 else None for _ in range(300 * fps)]
    camera, rows = watched(encoder, gallery, film, fps, score=0.45)
    assert rows == []
    assert camera.crops_dropped["never_moved"] >= 1
    assert camera.tracks <= 1


def test_who_stops_and_walks_on_is_written_while_they_move(encoder, gallery):
    fps, film = 5, []
    for index in range(70 * fps):
        time_s = index / fps
        walked_s = min(time_s, 5) + max(0, time_s - 65)  # A minute's stop.
        film.append([(beside(PLACE, int(40 * walked_s) - 60), RED)])
    camera, rows = watched(encoder, gallery, film, fps)
    assert camera.tracks == 1
    times = Counter("stop" if 8 < row.time - START < 65 else "walk" for row in rows)
    assert times["stop"] <= 1
    assert times["walk"] >= 4
    assert rows[-1].time - START > 66


def test_whoever_takes_the_place_of_a_still_person_is_written(encoder, gallery):
    fps = 5
    film = [[(PLACE, RED)]] * (30 * fps) + [[(PLACE, GREEN)]] * (30 * fps)
    _, rows = watched(encoder, gallery, film, fps)
    assert any(30 < row.time - START < 40 for row in rows)
    assert len(rows) <= 3


def test_low_scores_of_who_moves_and_of_a_glimpse_are_written(encoder, gallery):
    fps = 5
    walk = [[(beside(PLACE, 30 * index - 60), RED)] for index in range(2 * fps)]
    empty = [None] * (4 * fps)
    glimpse = [[(beside(PLACE, 300), GREEN)]] * fps
    _, rows = watched(encoder, gallery, walk + empty + glimpse, fps, score=0.42)
    assert {row.time - START < 4 for row in rows} == {True, False}


@pytest.mark.parametrize("options", [{"every_s": 0.0}, {"still_every_s": 0.0}])
def test_the_rule_can_be_switched_off(encoder, gallery, options):
    fps = 2
    _, rows = watched(encoder, gallery, [[(PLACE, RED)]] * (30 * fps), fps, **options)
    assert len(rows) >= 10


def test_tracks_of_a_program_keep_their_names(encoder, gallery):
    still = StillTracks(PipelineSettings())
    image, boxes = np.full((*SIZE, 3), 90, np.uint8), clean_boxes([PLACE], SIZE[1], SIZE[0])
    for clock in range(5):
        assert still.update(["a"], boxes, image, clock, rename=False) == ["a"]
    assert list(still.end(["a"], 8)) == []
    assert still.update(["b"], boxes, image, 8, rename=False) == ["b"]
    assert list(still.end(["b"], 400)) == ["b", "a"]


def test_what_is_kept_of_ended_tracks_is_bounded():
    still, image = StillTracks(PipelineSettings()), np.full((*SIZE, 3), 90, np.uint8)
    boxes, over = clean_boxes([PLACE], SIZE[1], SIZE[0]), 0
    for number in range(600):
        for _ in range(2):
            still.update([str(number)], boxes, image, 1.0, rename=False)
        over += len(list(still.end([str(number)], 1.0)))
    assert over == 600 - 256
