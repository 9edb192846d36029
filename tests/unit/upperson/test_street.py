"""A busy street, whose people are known at every moment."""

import numpy as np
import pytest

from upperson_synthetic.routes import straight_route, street_route
from upperson_synthetic.video import Street, VideoSpec

SPEC = VideoSpec(people=14, seconds=16, seed=2, busy=True)


@pytest.fixture(scope="module")
def street():
    return Street(SPEC)


def test_people_do_the_same_whatever_the_frame_rate(street):
    again = Street(VideoSpec(people=14, seconds=16, fps=25, seed=2, busy=True))
    for time_s in (2.0, 7.0):
        assert street.sightings(time_s) == again.sightings(time_s)
        assert np.array_equal(street.frame(time_s), again.frame(time_s))


def test_people_hide_one_another_and_what_is_visible_lies_in_the_box_and_the_frame(street):
    found = [one for step in range(32) for one in street.sightings(step / 2)]
    shares = [one.visible for one in found]
    assert (min(shares), max(shares)) == (0, 1)
    assert any(0.2 < share < 0.8 for share in shares)
    for one in found:
        x0, y0, x1, y1 = one.box
        assert 0 <= x0 < x1 <= SPEC.width
        assert 0 <= y0 < y1 <= SPEC.height
        assert (one.visible == 0) == (one.visible_box is None)
        if one.visible_box is not None:
            assert x0 <= one.visible_box[0] < one.visible_box[2] <= x1
            assert y0 <= one.visible_box[1] < one.visible_box[3] <= y1


def test_a_person_is_drawn_where_the_box_says(street):
    empty = np.asarray(street._background)
    clear = [
        (step, one) for step in range(16) for one in street.sightings(step) if one.visible == 1
    ]
    assert len(clear) > 10
    for step, one in clear:
        x0, y0, x1, y1 = one.box
        changed = (street.frame(step)[y0:y1, x0:x1] != empty[y0:y1, x0:x1]).any(axis=2)
        assert changed.mean() > 0.3


def test_ways_have_stops_turns_and_other_paces():
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(60):
        route = street_route(60.0, 960, 180.0, True, rng)
        speeds = np.diff(route.middles) / np.diff(route.times_s)
        assert (np.diff(route.times_s) > 0).all()
        assert np.abs(speeds).max() <= 180 * np.exp(0.5)
        kinds.add(
            (0 in speeds, bool((speeds < 0).any()), len(set(np.abs(speeds).round(6)) - {0.0}))
        )
    assert kinds == {(False, False, 1), (True, False, 1), (False, True, 1), (False, False, 2)}


def test_a_place_has_steps_and_turns():
    route = straight_route(2.0, 4.0, (0.0, 100.0))
    assert route.at(1.9) is None
    assert route.at(6.0) is None
    place = route.at(3.0)
    assert (place.middle, place.size, place.walked_s, place.is_turned) == (25.0, 1.0, 1.0, False)
    beside = route.beside(10.0).at(3.0)
    assert beside.middle == 35.0
