"""Ways through the view of a camera: straight across, or as people on a street go."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from upperson_synthetic.sampling import between, chance, choose

_PACE = 0.5, 1.0  # In heights of an adult a second; 1.4 m/s is 0.8.
_ENCOUNTERS = {"straight": 4.0, "pause": 2.0, "turn": 1.5, "pace": 2.0}
"""What happens on the way, and how often."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a person is at one moment."""

    middle: float  # Pixels from the left.
    size: float  # How many times as tall as drawn.
    walked_s: float  # Seconds of walking so far, which the legs go by.
    is_turned: bool  # Whether the person goes the other way than at first.


@dataclass(frozen=True, slots=True)
class Route:
    """The way of one person; between its K knots everything changes evenly."""

    times_s: NDArray[np.float64]  # (K,) rising.
    middles: NDArray[np.float64]  # (K,) pixels from the left.
    sizes: NDArray[np.float64]  # (K,) as `Place.size`.

    def at(self, time_s: float) -> Place | None:
        """Return where the person is; None before and after the way."""
        if not self.times_s[0] <= time_s < self.times_s[-1]:
            return None
        leg = int(np.searchsorted(self.times_s, time_s, side="right")) - 1
        steps = np.diff(self.middles)
        moving = steps != 0
        walked = np.append(0.0, np.cumsum(np.diff(self.times_s) * moving))
        latest = int(np.flatnonzero(moving[: leg + 1])[-1]) if moving[: leg + 1].any() else 0
        return Place(
            middle=float(np.interp(time_s, self.times_s, self.middles)),
            size=float(np.interp(time_s, self.times_s, self.sizes)),
            walked_s=float(np.interp(time_s, self.times_s, walked)),
            is_turned=bool(steps[latest] * steps[0] < 0),
        )

    def beside(self, offset: float) -> "Route":
        """Return the way of a companion, so many pixels to the right."""
        return Route(self.times_s, self.middles + offset, self.sizes)


def straight_route(start_s: float, duration_s: float, middle: tuple[float, float]) -> Route:
    """Return a way from one middle to another one at an even pace."""
    times_s = np.array([start_s, start_s + duration_s])
    return Route(times_s, np.array(middle), np.ones(2))


def street_route(
    seconds: float, width: int, adult_px: float, rightwards: bool, rng: np.random.Generator
) -> Route:
    """Draw a way by chance: at a walking pace, with a stop, a turn or another pace, or without.

    ``seconds`` is the length of the video; some are on their way when it begins or ends. ``width``
    is the view's in pixels, ``adult_px`` the height of an adult at that distance, ``rightwards``
    where the way begins to lead.
    """
    margin = 0.4 * adult_px
    ends = (-margin, width + margin) if rightwards else (width + margin, -margin)
    speed = between(rng, _PACE) * adult_px
    spot = ends[0] + between(rng, (0.3, 0.75)) * (ends[1] - ends[0])
    encounter = choose(rng, _ENCOUNTERS)
    stop_s = between(rng, (1.0, 4.0))
    later = speed * math.exp(between(rng, (-0.7, 0.5)))
    middles, speeds = [ends[0], spot, ends[1]], [speed, speed]
    if encounter == "turn":
        middles[2] = ends[0]
    elif encounter == "pace":
        speeds[1] = later
    legs_s = [
        abs(after - before) / pace
        for before, after, pace in zip(middles, middles[1:], speeds, strict=False)
    ]
    if encounter == "pause":
        middles.insert(2, spot)
        legs_s.insert(1, stop_s)
    duration_s = sum(legs_s)
    start_s = between(rng, (-0.5 * duration_s, seconds - 0.3 * duration_s))
    times_s = start_s + np.append(0.0, np.cumsum(legs_s))
    # Some come nearer or go away while they cross; a standing person does neither.
    grown = math.exp(between(rng, (-0.22, 0.22))) if chance(rng, 0.4) else 1.0
    way = np.append(0.0, np.cumsum(np.abs(np.diff(middles))))
    return Route(times_s, np.array(middles), grown ** (way / way[-1]))
