"""Tracks: which boxes of a camera belong to one person crossing its view."""

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from upperson_rt.camera.frames import Boxes
from upperson_rt.camera.roboflow import RoboflowTracker
from upperson_rt.errors import UsageError
from upperson_rt.printable import shown

__all__ = ["TRACKERS", "Follower", "Tracker", "TrackerName", "check_tracker", "new_tracker"]

TrackerName: TypeAlias = Literal["upperson", "bytetrack", "ocsort", "botsort"]
"""Our own `Tracker`, and those of the package ``trackers``."""
TRACKERS: tuple[TrackerName, ...] = get_args(TrackerName)

_LIKENESS = np.array([0.2, 0.1, 0.15])
"""How well a box is known beforehand: its middle and its lower edge in heights of the person, its
height as a logarithm. Standard deviations, roughly."""
_GATE = 3.0
"""In those; a box further off is somebody else."""
_LEAST_GAINS = 0.5, 0.2
"""How much a long track still learns from each box: position and size, velocity."""
_LEAVING_SPEED = 0.05
"""From so many heights a second towards the border, a person at it is on the way out."""


class Follower(Protocol):
    """What a pipeline needs of a tracker; each camera has one of its own."""

    @property
    def count(self) -> int:
        """Tracks so far."""

    def update(
        self, boxes: Boxes, clock: float, size: tuple[int, int]
    ) -> tuple[list[int], list[int]]:
        """Take the boxes of the next frame.

        Args:
            boxes: With N rows.
            clock: Seconds; not less than at the last call.
            size: Width and height of the frame.

        Returns:
            The number of each box's track, -1 for none, and the numbers of the tracks that have
            ended. The first track is 0; no number comes again after its end.
        """


def check_tracker(name: str) -> TrackerName:
    """Return the name of a tracker.

    Raises:
        UsageError: There is none of this name.
    """
    for known in TRACKERS:
        if isinstance(name, str) and name == known:
            return known
    raise UsageError(f"no tracker {shown(name)}: it is one of {', '.join(TRACKERS)}")


def new_tracker(name: TrackerName, lost_after_s: float) -> Follower:
    """Return a new tracker, without tracks.

    Raises:
        BackendError: The package it comes from is not installed.
    """
    if name == "upperson":
        return Tracker(lost_after_s)
    return RoboflowTracker(name, lost_after_s)


@dataclass(slots=True)
class _Track:
    number: int
    box: NDArray[np.float64]
    velocity: NDArray[np.float64]
    """How the whole box moves, in pixels a second."""
    seen: float
    sightings: int = 1

    def expected(self, clock: float) -> NDArray[np.float64]:
        """Return where the box should be."""
        return self.box + np.tile(self.velocity * (clock - self.seen), 2)

    def correct(self, box: NDArray[np.float64], clock: float) -> None:
        """Learn from a box: an alpha-beta filter, with the least-squares gains at the start."""
        self.sightings += 1
        n, expected = self.sightings, self.expected(clock)
        surprise = box - expected
        if clock > self.seen:
            gain = max(_LEAST_GAINS[1], 6 / (n * (n + 1)))
            shift = (surprise[:2] + surprise[2:]) / 2
            self.velocity = self.velocity + gain * shift / (clock - self.seen)
        self.box = expected + max(_LEAST_GAINS[0], 2 * (2 * n - 1) / (n * (n + 1))) * surprise
        self.seen = clock

    def is_leaving(self, size: tuple[int, int]) -> bool:
        """Tell whether the person touches the border and moves towards it."""
        x0, y0, x1, y1 = self.box
        across, down = self.velocity / max(1.0, y1 - y0)
        return bool(
            (x0 <= 1 and across < -_LEAVING_SPEED)
            or (x1 >= size[0] - 1 and across > _LEAVING_SPEED)
            or (y0 <= 1 and down < -_LEAVING_SPEED)
            or (y1 >= size[1] - 1 and down > _LEAVING_SPEED)
        )


class Tracker:
    """Follows boxes by place, size and constant velocity, without looking at pixels.

    Boxes are compared with where each person is expected, best pairs first. The lower edge and the
    height of a walking person hardly change, so they count more than the middle, which swings with
    the legs; how much two boxes overlap says less. A person who is not seen for a while is expected
    further along the way, and gone after ``lost_after_s``, or after three frames of a camera that
    is slower than that. Who walked out at the border is gone at once, so that the next one to come
    in there is somebody else.
    """

    def __init__(self, lost_after_s: float = 2.0) -> None:
        self.lost_after_s = lost_after_s
        self._tracks: list[_Track] = []
        self._count = 0
        self._clock: float | None = None
        self._interval_s = 0.0

    @property
    def count(self) -> int:
        """Tracks so far."""
        return self._count

    def update(
        self, boxes: Boxes, clock: float, size: tuple[int, int]
    ) -> tuple[list[int], list[int]]:
        """Take the boxes of the next frame; see `Follower`. Every box has a track."""
        ended: list[int] = []
        if self._clock is not None:
            ended = self._end(clock, size)
            # A gap is no frame rate: it must not make the tracker more patient.
            step = min(clock - self._clock, self.lost_after_s)
            share = 0.5 if self._interval_s else 1.0
            self._interval_s += share * (step - self._interval_s)
        self._clock = clock
        found = boxes.edges.astype(np.float64)
        numbers = [-1] * len(found)
        for row, column in _pairs([t.expected(clock) for t in self._tracks], found):
            self._tracks[row].correct(found[column], clock)
            numbers[column] = self._tracks[row].number
        for column, number in enumerate(numbers):
            if number == -1:
                self._tracks.append(_Track(self._count, found[column], np.zeros(2), clock))
                numbers[column] = self._count
                self._count += 1
        return numbers, ended

    def _end(self, clock: float, size: tuple[int, int]) -> list[int]:
        patience = max(self.lost_after_s, 3 * self._interval_s)
        kept: list[_Track] = []
        gone: list[int] = []
        for track in self._tracks:
            unseen_s = clock - track.seen
            is_out = unseen_s > 1.5 * self._interval_s > 0 and track.is_leaving(size)
            if is_out or unseen_s > patience:
                gone.append(track.number)
            else:
                kept.append(track)
        self._tracks = kept
        return gone


def _pairs(
    expected: list[NDArray[np.float64]], boxes: NDArray[np.float64]
) -> list[tuple[int, int]]:
    """Return pairs of expected and (N, 4) found boxes, each used once at most."""
    if not expected or not len(boxes):
        return []
    old, new = _features(np.stack(expected)), _features(boxes)
    heights = np.exp(old[:, None, 2])
    distance = (old[:, None] - new[None]) / np.stack(
        [heights, heights, np.ones_like(heights)], axis=2
    )
    squares = ((distance / _LIKENESS) ** 2).sum(axis=2)
    pairs: list[tuple[int, int]] = []
    used_rows: set[int] = set()
    used_columns: set[int] = set()
    for flat in np.argsort(squares, axis=None, kind="stable").tolist():
        row, column = divmod(flat, len(boxes))
        if squares[row, column] > _GATE**2:
            break
        if row not in used_rows and column not in used_columns:
            used_rows.add(row)
            used_columns.add(column)
            pairs.append((row, column))
    return pairs


def _features(boxes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return (N, 3): middle, lower edge, logarithm of the height."""
    heights = np.maximum(boxes[:, 3] - boxes[:, 1], 1.0)
    middles = (boxes[:, 0] + boxes[:, 2]) / 2
    return np.stack([middles, boxes[:, 3], np.log(heights)], axis=1)
