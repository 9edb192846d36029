"""Trackers: which boxes of a camera belong to one person."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from inspect import signature
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from upperson_camera.queues import known_name
from upperson_camera.source import import_cv2
from upperson_rt.arguments import check_name, check_number
from upperson_rt.errors import BackendError, UsageError, install_command, missing_extra
from upperson_rt.ingest.boxes import Boxes
from upperson_rt.printable import safe_repr

# --- ByteTrack, OC-SORT and BoT-SORT of the package ``trackers``, as trackers of a pipeline
#
# https://github.com/roboflow/trackers, Apache-2.0; the extra ``trackers``.

Numbers: TypeAlias = tuple[list[int], list[int]]
"""Of each box's track, -1 for none, and of the tracks that have ended; see `Tracker`."""

CLASSES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "bytetrack": ("ByteTrackTracker", {}),
    "ocsort": ("OCSORTTracker", {}),
    # Mounted cameras do not move: no compensation of camera motion.
    "botsort": ("BoTSORTTracker", {"enable_cmc": False}),
}
"""Class and options that differ from its defaults, by name."""

_BUFFER_FPS = 30.0
"""Their ``lost_track_buffer`` counts frames of this rate."""
_FIRST_FRAMES = 5
"""Frames that give a camera's frame rate, which their filters need."""
_INTERVALS_S = 1 / 60, 2.0
"""Limits of the interval between two frames."""


_IOUS = "IoU", "GIoU", "DIoU", "CIoU"
"""Measures of overlap that their option ``iou`` names."""


def _import_tracker(kind: str) -> Any:
    """Return a class of the package ``trackers``."""
    try:
        import trackers
    except ImportError as error:
        name = error.name or "trackers"
        raise missing_extra(name, "trackers", "this tracker") from error
    found = getattr(trackers, kind, None)
    if found is None or "timestamp" not in signature(found.update).parameters:
        text = (
            f"the package 'trackers' that is installed has no {kind} that goes by time, as 2.6 "
            f"has: run  {install_command('trackers')}"
        )
        raise BackendError(text, code="trackers_too_old")
    return found


def _parse_options(tracker: Any, text: str) -> dict[str, Any]:
    """Return the options in ``NAME=VALUE,...``: numbers among the keywords of a class, and iou."""
    defaults = {name: value.default for name, value in signature(tracker).parameters.items()}
    kinds: dict[str, Any] = {name: type(default) for name, default in defaults.items()}
    kinds |= {"frame_rate": None, "lost_after_s": None}  # The pipeline gives those.
    known = [name for name, kind in kinds.items() if kind in (int, float) or name == "iou"]
    found: dict[str, Any] = {}
    for part in text.split(",") if text else ():
        name, _, value = part.partition("=")
        known_name(name, known, "option of this tracker", "unknown_tracker_option")
        if name == "iou":
            value = known_name(value, _IOUS, "overlap", "unknown_tracker_option")
            found[name] = getattr(import_module("trackers"), value)()
            continue
        try:
            found[name] = kinds[name](value)
            check_number(found[name], name)
        except ValueError as error:
            message = f"{name} of a tracker must be a number, found {safe_repr(value)}"
            raise UsageError(message, code="no_number", what=name) from error
    return found


class RoboflowTracker:
    """A tracker of the package ``trackers``, which compares boxes by their overlap.

    Boxes below its score threshold, the first ones of every track, and those of a camera's first
    frames, which give its frame rate, have no track.
    """

    def __init__(self, name: str, lost_after_s: float, options: str = "") -> None:
        """Load the package; the tracker itself is made when the frame rate is known."""
        kind, fixed = CLASSES[name]
        tracker = _import_tracker(kind)
        import supervision  # What they take boxes in; comes with them.

        self._detections = supervision.Detections
        frames = max(1, round(lost_after_s * _BUFFER_FPS))
        given = _parse_options(tracker, options)
        self._make = partial(tracker, **{"lost_track_buffer": frames, **fixed, **given})
        try:
            self._make(frame_rate=_BUFFER_FPS)
        except ValueError as error:
            message = f"{name} cannot take {options}: {error}"
            raise UsageError(message, code="tracker_option_refused") from error
        self._tracker: Any = None
        self._first: list[tuple[Boxes, float]] = []
        self._clock = -math.inf
        self._alive: set[int] = set()

    def update(self, boxes: Boxes, clock: float, image: NDArray[np.uint8]) -> Numbers:
        """Take the boxes of the next frame; see `Tracker`."""
        # They warn if time stands still, as a camera's clock may.
        self._clock = clock if clock > self._clock else math.nextafter(self._clock, math.inf)
        if self._tracker is not None:
            return self._update(boxes, self._clock)
        self._first.append((boxes, self._clock))
        if len(self._first) < _FIRST_FRAMES:
            return [-1] * len(boxes.edges), []
        steps = np.diff([moment for _, moment in self._first])
        interval_s = float(np.clip(np.median(steps), *_INTERVALS_S))
        self._tracker = self._make(frame_rate=1 / interval_s)
        return [self._update(*frame) for frame in self._first][-1]

    def _update(self, boxes: Boxes, clock: float) -> Numbers:
        scores = None if np.isnan(boxes.scores).any() else boxes.scores
        numbers = [-1] * len(boxes.edges)
        edges, rows = boxes.edges.astype(np.float64), np.arange(len(numbers))
        given = self._detections(xyxy=edges, confidence=scores, data={"row": rows})
        found = self._tracker.update(given, timestamp=clock)
        for row, number in zip(found.data.get("row", ()), found.tracker_id, strict=True):
            numbers[int(row)] = int(number)
        alive = {track.tracker_id for track in self._tracker.tracks if track.tracker_id >= 0}
        ended = sorted(self._alive - alive)
        self._alive = alive
        return numbers, ended


# --- Colour histograms of clothes

_BINS = 8, 3, 4
"""Of hue, saturation and value."""
_RANGES = [0, 180, 0, 256, 0, 256]
COLOURS = 2 * _BINS[0] * _BINS[1] * _BINS[2]
"""Length of a histogram."""
_SIZE = 16, 48
"""Width and height that a box is scaled to; the sides and the head are left out."""
_PARTS = slice(8, 24), slice(24, 48)
_MIDDLE = slice(3, 13)


def colours_of(image: NDArray[np.uint8], edges: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return (N, `COLOURS`) unit histograms of the upper and lower halves of people.

    The product of two is 1 for equal colours and 0 for none in common (Bhattacharyya). Edges are
    (N, 4) x0, y0, x1, y1 inside the BGR image, at least one pixel each.
    """
    cv2 = import_cv2()
    found = np.zeros((len(edges), COLOURS), np.float32)
    for row, (x0, y0, x1, y1) in zip(found, edges.tolist(), strict=True):
        small = cv2.resize(image[y0:y1, x0:x1], _SIZE, interpolation=cv2.INTER_AREA)
        hsv = cv2.cvtColor(small, cv2.COLOR_BGR2HSV)[:, _MIDDLE]
        parts = [np.ascontiguousarray(hsv[part]) for part in _PARTS]
        halves = [cv2.calcHist([part], [0, 1, 2], None, _BINS, _RANGES).ravel() for part in parts]
        row[:] = np.sqrt(np.concatenate([half / half.sum() for half in halves]) / 2)
    return found


# --- Our own tracker


TrackerName: TypeAlias = Literal["upperson", "bytetrack", "ocsort", "botsort"]
"""`UppersonTracker`, and those of the package ``trackers``."""
TRACKERS: tuple[TrackerName, ...] = get_args(TrackerName)

_MEASURED = np.array([0.05, 0.04, 0.04])
"""Standard deviations of a box: centre and lower edge in heights of the person, and the height as a
logarithm; the next ones have the same units."""
_DOUBT = np.array([0.06, 0.04, 0.06])
"""Added when a box is compared with a track: legs swing, and objects hide people."""
_START = np.array([0.7, 0.12, 0.1])
"""Speed of a new track, per second."""
_CHANGE = np.array([0.3, 0.03, 0.03])
"""Change of the speed in a second. Fitted on drawn streets of seeds 100 to 103: with 0.2, tracks
of people who turn round are lost at 10 frames a second and more."""
_COLOURS = 0.2
"""Of the colours of one person, as 1 minus their product."""
_MOST_BY_COLOURS = 8.0
"""Largest square of the colours; below the default gate, since light changes, too."""
_NEW_COLOURS = 0.2
"""Weight of a new box in the colours of a track."""
VIEW_S = 0.45
"""A track is tentative for so long, or for two frames."""
_LEAVING_SPEED = 0.05
"""From so many heights a second towards the border, a person at the border is leaving."""


class Tracker(Protocol):
    """A tracker; each camera has one of its own."""

    def update(self, boxes: Boxes, clock: float, image: NDArray[np.uint8]) -> Numbers:
        """Take the boxes of the next frame.

        Args:
            boxes: With N rows.
            clock: Seconds; not less than at the last call.
            image: The frame, BGR [H, W, 3].

        Returns:
            The number of each box's track, -1 for none, and the numbers of the tracks that have
            ended. The first track is 0; no number comes again after its end.
        """


def new_tracker(tracker: str, lost_after_s: float) -> Tracker:
    """Return a new tracker, without tracks.

    Args:
        tracker: One of `TRACKERS`, with options or without: ``NAME:OPTION=VALUE,...``. Ours are
            the keywords of `UppersonTracker`, theirs the numbers among those of the class, and
            ``iou``.
        lost_after_s: A track ends when no box belongs to it for so long.

    Raises:
        UsageError: There is no such tracker or option, or its value is none.
        BackendError: The package of the tracker is not installed.
    """
    given, _, options = check_name(tracker, "a tracker", UsageError).partition(":")
    name = known_name(given, TRACKERS, "tracker", "unknown_tracker")
    if name == "upperson":
        return UppersonTracker(lost_after_s, **_parse_options(UppersonTracker, options))
    return RoboflowTracker(name, lost_after_s, options)


@dataclass(slots=True)
class _Track:
    """A Kalman filter for each coordinate of `coordinates`, with a constant velocity."""

    number: int
    box: NDArray[np.int64]
    """The last box."""
    place: NDArray[np.float64]
    """(3,) the expected coordinates."""
    colours: NDArray[np.float32]
    first: float
    """Time of the first box, and of the last one."""
    seen: float
    sightings: int = 1
    speed: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    """(3,) in heights a second, and that of the height's logarithm."""
    variance: NDArray[np.float64] = field(default_factory=lambda: _MEASURED**2)
    covariance: NDArray[np.float64] = field(default_factory=lambda: np.zeros(3))
    """Of place and speed."""
    speed_variance: NDArray[np.float64] = field(default_factory=lambda: _START**2)

    @property
    def scale(self) -> NDArray[np.float64]:
        """The units of the coordinates in pixels; the logarithm has none."""
        height = np.exp(self.place[2])
        return np.array([height, height, 1.0])

    def advance(self, seconds: float) -> None:
        """Predict."""
        change = _CHANGE**2
        self.place = self.place + seconds * self.speed * self.scale
        self.variance = (
            self.variance
            + 2 * seconds * self.covariance
            + seconds**2 * self.speed_variance
            + change * seconds**3 / 3
        )
        self.covariance = self.covariance + seconds * self.speed_variance + change * seconds**2 / 2
        self.speed_variance = self.speed_variance + change * seconds

    def correct(
        self,
        box: NDArray[np.int64],
        place: NDArray[np.float64],
        colours: NDArray[np.float32],
        clock: float,
    ) -> None:
        """Correct the prediction by a box."""
        total = self.variance + _MEASURED**2
        scale = self.scale
        surprise = (place - self.place) / scale
        gain, speed_gain = self.variance / total, self.covariance / total
        self.place = self.place + gain * surprise * scale
        self.speed = self.speed + speed_gain * surprise
        self.speed_variance = self.speed_variance - speed_gain * self.covariance
        self.variance = (1 - gain) * self.variance
        self.covariance = (1 - gain) * self.covariance
        mixed = (1 - _NEW_COLOURS) * self.colours + _NEW_COLOURS * colours
        self.colours = mixed / np.linalg.norm(mixed)
        self.box, self.seen = box, clock
        self.sightings += 1

    def is_leaving(self, size: tuple[int, int]) -> bool:
        """Return whether the person touches the border and moves towards it."""
        x0, y0, x1, y1 = self.box
        across, down, _ = self.speed
        return bool(
            (x0 <= 1 and across < -_LEAVING_SPEED)
            or (x1 >= size[0] - 1 and across > _LEAVING_SPEED)
            or (y0 <= 1 and down < -_LEAVING_SPEED)
            or (y1 >= size[1] - 1 and down > _LEAVING_SPEED)
        )


class UppersonTracker:
    """Tracks boxes by place, size and constant velocity, and by the colours of clothes.

    A Kalman filter predicts each track; boxes are assigned to the most likely tracks, best pairs
    first. The lower edge and the height of a walking person hardly change, so they count more than
    the centre, which swings with the legs. Colours distinguish people who cross or reappear; alone
    they end no track. A track without boxes ends after ``lost_after_s``, or after three frames of
    a slower camera. A track that leaves at the border ends at once, so that the next person there
    is a new one.

    Args:
        lost_after_s: As above.
        gate: Sum of squares of the differences, in standard deviations, from which a box is another
            person.
        seen_share: Share of the frames of a tentative track, two at least, that it needs to go on.
            Fitted with `VIEW_S` on drawn streets of seeds 100 to 103: false boxes appear again at
            one place, but not in most frames.
        same_person_iou: From this overlap with a tracked box, a box is a second one of the same
            person. No two of 120 people labelled by hand on a street share as much.
    """

    def __init__(
        self,
        lost_after_s: float = 2.0,
        gate: float = 12.0,
        seen_share: float = 0.6,
        same_person_iou: float = 0.4,
    ) -> None:
        self.lost_after_s = lost_after_s
        self.gate = check_number(gate, "gate", least=0.0)
        self.seen_share = check_number(seen_share, "seen_share", least=0.0, most=1.0)
        self.same_person_iou = check_number(same_person_iou, "same_person_iou", least=0.0, most=1.0)
        self._tracks: list[_Track] = []
        self._count = 0
        self._clock: float | None = None
        self._interval_s = 0.0

    def update(self, boxes: Boxes, clock: float, image: NDArray[np.uint8]) -> Numbers:
        """Take the boxes of the next frame; see `Tracker`.

        Every box has a track, except a second one of the same person.
        """
        size = image.shape[1], image.shape[0]
        ended: list[int] = []
        if self._clock is not None:
            ended = self._end(clock, size)
            for track in self._tracks:
                track.advance(clock - self._clock)
            # A gap is no frame rate.
            step = min(clock - self._clock, self.lost_after_s)
            share = 0.5 if self._interval_s else 1.0
            self._interval_s += share * (step - self._interval_s)
        self._clock = clock
        places, colours = coordinates(boxes.edges), colours_of(image, boxes.edges)
        numbers = [-1] * len(places)
        for row, column in _pairs(_costs(self._tracks, places, colours, self.gate)):
            track = self._tracks[row]
            track.correct(boxes.edges[column], places[column], colours[column], clock)
            numbers[column] = track.number
        tracked = boxes.edges[[number >= 0 for number in numbers]]
        for column, number in enumerate(numbers):
            box = boxes.edges[column]
            if number == -1 and _most_overlap(box, tracked) < self.same_person_iou:
                track = _Track(self._count, box, places[column], colours[column], clock, clock)
                self._tracks.append(track)
                numbers[column] = self._count
                self._count += 1
        return numbers, ended

    def _end(self, clock: float, size: tuple[int, int]) -> list[int]:
        patience = max(self.lost_after_s, 3 * self._interval_s)
        tentative, least = patience, 2.0
        if self._interval_s:
            tentative = min(patience, max(VIEW_S, 2.5 * self._interval_s))
            least = max(least, self.seen_share * tentative / self._interval_s)
        kept: list[_Track] = []
        gone: list[int] = []
        for track in self._tracks:
            unseen_s = clock - track.seen
            is_out = unseen_s > 1.5 * self._interval_s > 0 and track.is_leaving(size)
            is_false = track.sightings < least and clock - track.first > tentative
            if is_out or is_false or unseen_s > patience:
                gone.append(track.number)
            else:
                kept.append(track)
        self._tracks = kept
        return gone


def _costs(
    tracks: Sequence[_Track],
    places: NDArray[np.float64],
    colours: NDArray[np.float32],
    gate: float,
) -> NDArray[np.float64]:
    """Return (T, N) negative log-likelihoods of boxes for tracks; infinite beyond the gate."""
    costs = np.full((len(tracks), len(places)), np.inf)
    if not costs.size:
        return costs
    for row, track in zip(costs, tracks, strict=True):
        variance = track.variance + _DOUBT**2
        squares = (((places - track.place) / track.scale) ** 2 / variance).sum(axis=1)
        unlike = (1 - colours @ track.colours) / _COLOURS
        squares += np.minimum(unlike**2, _MOST_BY_COLOURS)
        near = squares <= gate
        row[near] = squares[near] + np.log(variance).sum()
    return costs


def _pairs(costs: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Return rows and columns with the least costs, each used once at most."""
    pairs: list[tuple[int, int]] = []
    used_rows: set[int] = set()
    used_columns: set[int] = set()
    for flat in np.argsort(costs, axis=None, kind="stable").tolist():
        row, column = divmod(flat, costs.shape[1])
        if not np.isfinite(costs[row, column]):
            break
        if row not in used_rows and column not in used_columns:
            used_rows.add(row)
            used_columns.add(column)
            pairs.append((row, column))
    return pairs


def coordinates(boxes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return (N, 3): centre, lower edge, logarithm of the height."""
    heights = np.maximum(boxes[:, 3] - boxes[:, 1], 1.0)
    middles = (boxes[:, 0] + boxes[:, 2]) / 2
    return np.stack([middles, boxes[:, 3], np.log(heights)], axis=1)


def _most_overlap(box: NDArray[np.int64], others: NDArray[np.int64]) -> float:
    """Return the largest intersection over union of a box with one of (M, 4) others."""
    least, most = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    common = np.prod(np.clip(most - least, 0, None), axis=1)
    areas = np.prod(others[:, 2:] - others[:, :2], axis=1) + np.prod(box[2:] - box[:2])
    return float(np.max(common / (areas - common), initial=0.0))
