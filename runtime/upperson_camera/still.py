"""Tracks that stand still: who was written already, and what has never moved."""

import math
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from upperson_camera.settings import PipelineSettings
from upperson_camera.tracker import colours_of, coordinates
from upperson_rt.ingest.boxes import Boxes

_NEAR = 0.25
"""Largest distance of centre and lower edge in heights, and of the logarithm of the height, of two
boxes at one place."""
_MEAN_S = 1.0
"""Time constant of a track's mean place, so that a box that trembles does not move."""
_MOST_SHARE = 0.3
"""Of a new box in it, after however long."""
_COLOURS_S = 2.0
"""The same of its colours, which are compared with those of `_USUAL_S`: light changes slowly,
another person at the place at once."""
_USUAL_S = 30.0
_COLOURS_EVERY_S = 0.5
_SAME_COLOURS = 0.7
"""Least product of colours of one person. On two drawn streets it was 0.93 to 1.00 for one person
and below 0.7 for 97 % of the pairs of two."""
_GLIMPSE_S = 2.0
"""Tracks that ended sooner are not taken for things that never move."""
_KEPT_S = 300.0
"""For so long after its end a still track can go on at its place."""
_MOST_KEPT = 256


@dataclass(slots=True)
class _Known:
    """What is known of a track; places are (3,) as `coordinates`, times on the camera's clock."""

    first: NDArray[np.float64]
    began: float
    colours: NDArray[np.float32]
    seen: float
    place: NDArray[np.float64] = field(init=False)
    usual: NDArray[np.float32] = field(init=False)
    coloured: float = field(init=False)
    """When the colours were taken last."""
    score: float = -math.inf
    """The highest."""
    frames: int = 0
    moved: bool = False
    written: NDArray[np.float64] | None = None
    """Its place at its last row."""
    written_at: float = -math.inf

    def __post_init__(self) -> None:
        self.place, self.usual, self.coloured = self.first, self.colours, self.seen

    def move(self, place: NDArray[np.float64], score: float, clock: float) -> None:
        share = min(_share(clock - self.seen, _MEAN_S), _MOST_SHARE)
        self.place = self.place + share * (place - self.place)
        self.moved = self.moved or not _near(self.place, self.first)
        self.score, self.seen = max(self.score, score), clock
        self.frames += 1

    def recolour(self, colours: NDArray[np.float32], clock: float) -> None:
        passed_s, self.coloured = clock - self.coloured, clock
        self.colours = _mixed(self.colours, colours, _share(passed_s, _COLOURS_S))
        self.usual = _mixed(self.usual, colours, _share(passed_s, _USUAL_S))

    @property
    def is_changed(self) -> bool:
        """Whether it looks like another person than at its last row."""
        return bool(self.colours @ self.usual < _SAME_COLOURS)

    @property
    def is_at_its_row(self) -> bool:
        """Whether it stands where it stood at its last row."""
        return self.written is not None and _near(self.place, self.written)


class StillTracks:
    """Knows which tracks of a camera stand still, whatever the tracker.

    A tracker ends the track of a person who is hidden or not detected for some seconds. If that
    person stood still, the next track at the place with the same colours gets the name of the first
    one, so that it goes on.
    """

    def __init__(self, settings: PipelineSettings) -> None:
        # An interval of 0 takes all.
        self._every_s = settings.still_every_s if settings.every_s else 0.0
        self._min_views = settings.min_views
        self._least_score = settings.still_score if settings.every_s else -math.inf
        self._known: dict[str, _Known] = {}
        self._names: dict[str, str] = {}
        """Of living tracks, by the tracker's names of them."""
        self._kept: dict[str, None] = {}
        """Names of ended tracks that can go on, the last one to end last."""

    def update(
        self,
        names: Sequence[str | None],
        boxes: Boxes,
        image: NDArray[np.uint8],
        clock: float,
        rename: bool = True,
    ) -> list[str | None]:
        """Take the boxes of a frame and the tracker's names of their tracks; return our names.

        Call `end` before. With ``rename`` a new track may get the name of one that is not seen.
        """
        places = coordinates(boxes.edges)
        seen = {self._names.get(given) for given in names if given is not None}
        found: list[str | None] = []
        for row, given in enumerate(names):
            if given is None:
                found.append(None)
                continue
            edges = boxes.edges[row : row + 1]
            name = self._names.get(given)
            if name is None:
                colours = colours_of(image, edges)[0]
                lost = self._lost_at(places[row], colours, seen) if rename else None
                name = self._names[given] = lost or given
                self._kept.pop(name, None)
                seen.add(name)
                self._known.setdefault(name, _Known(places[row], clock, colours, clock))
            known = self._known[name]
            known.move(places[row], _or_most(float(boxes.scores[row])), clock)
            if clock - known.coloured >= _COLOURS_EVERY_S:
                known.recolour(colours_of(image, edges)[0], clock)
            found.append(name)
        return found

    def end(self, names: Sequence[str], clock: float) -> Iterator[str]:
        """Take the tracker's names of tracks that ended; give our names of those that are over.

        Still tracks are over when they have not gone on for some minutes. Each is forgotten when
        the iterator goes on.
        """
        for given in names:
            name = self._names.pop(given, given)
            if name in self._names.values():  # It goes on as another track of the tracker.
                continue
            if (known := self._known.get(name)) is not None and self._can_go_on(known):
                self._kept[name] = None
            else:
                yield name
                self._known.pop(name, None)
        while self._kept:
            oldest = next(iter(self._kept))
            if len(self._kept) <= _MOST_KEPT and clock - self._known[oldest].seen <= _KEPT_S:
                return
            yield oldest
            del self._kept[oldest], self._known[oldest]

    def _can_go_on(self, known: _Known) -> bool:
        return known.frames >= self._min_views and (known.is_at_its_row or not known.moved)

    def wrote(self, name: str, clock: float) -> None:
        """Note that a track gets a row."""
        known = self._known.get(name)
        if known is not None:
            known.written, known.written_at, known.usual = known.place, clock, known.colours

    def was_written(self, name: str, clock: float) -> bool:
        """Return whether the track stands where its last row shows it, and that is enough."""
        known = self._known[name]
        is_recent = clock - known.written_at < self._every_s
        return is_recent and known.is_at_its_row and not known.is_changed

    def is_doubtful(self, name: str, at_end: bool = False) -> bool:
        """Return whether a track is more likely a thing: it scores low and has never moved."""
        known = self._known.get(name)
        if known is None or known.moved or known.score >= self._least_score:
            return False
        return not at_end or known.seen - known.began >= _GLIMPSE_S

    def _lost_at(
        self, place: NDArray[np.float64], colours: NDArray[np.float32], seen: Set[str | None]
    ) -> str | None:
        """Return the name of the still track that goes on at a place; not of those that are seen.

        A tracker may begin a new track before it ends the first.
        """
        alike = {
            name: float(colours @ known.usual)
            for name, known in self._known.items()
            if name not in seen and self._can_go_on(known) and _near(place, known.place)
        }
        best = max(alike, key=lambda name: alike[name], default=None)
        return best if best is not None and alike[best] >= _SAME_COLOURS else None


def _near(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    steps = one - other
    steps[:2] /= math.exp(other[2])
    return bool(np.abs(steps).max() <= _NEAR)


def _share(passed_s: float, constant_s: float) -> float:
    return 1 - math.exp(-passed_s / constant_s)


def _mixed(old: NDArray[np.float32], new: NDArray[np.float32], share: float) -> NDArray[np.float32]:
    mixed: NDArray[np.float32] = old + np.float32(share) * (new - old)
    mixed /= np.linalg.norm(mixed)
    return mixed


def _or_most(score: float) -> float:
    """Detectors without scores are sure."""
    return math.inf if math.isnan(score) else score
