"""ByteTrack, OC-SORT and BoT-SORT of the package ``trackers``, as trackers of a pipeline.

https://github.com/roboflow/trackers, Apache-2.0; the extra ``trackers``.
"""

import math
from collections.abc import Mapping
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.camera.frames import Boxes
from upperson_rt.errors import BackendError, install_command, missing_extra

__all__ = ["CLASSES", "RoboflowTracker"]

CLASSES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "bytetrack": ("ByteTrackTracker", {}),
    "ocsort": ("OCSORTTracker", {}),
    # Cameras hang on walls: nothing is gained by estimating how they move from every frame.
    "botsort": ("BoTSORTTracker", {"enable_cmc": False}),
}
"""The class of each, and how it differs from the defaults."""

_BUFFER_FPS = 30.0
"""Their unit for how long somebody may be lost is a frame of this rate."""
_FIRST_FRAMES = 5
"""So many tell a camera's frame rate, without which their filters expect too little of people."""
_INTERVALS_S = 1 / 60, 2.0
"""Between two frames; beyond these it is an accident of the first ones."""


def _import_tracker(kind: str) -> Any:
    """Return a class of the package ``trackers``.

    Raises:
        BackendError: The package, or what it needs, is not installed, or another one is.
    """
    try:
        import trackers
    except ImportError as error:
        name = error.name or "trackers"
        raise missing_extra(name, "trackers", "this tracker") from error
    found = getattr(trackers, kind, None)
    if found is None or "timestamp" not in signature(found.update).parameters:
        raise BackendError(
            f"the package 'trackers' that is installed has no {kind} that goes by time, as 2.6 "
            f"has: run  {install_command('trackers')}"
        )
    return found


class RoboflowTracker:
    """Follows boxes with a tracker of the package ``trackers``.

    They compare boxes by their overlap. Boxes below their threshold of score, the first ones of
    every track, and those of a camera's first frames, which tell its rate, have no track.
    """

    def __init__(self, name: str, lost_after_s: float) -> None:
        """Load the package; the tracker itself is made when the frame rate is known.

        Args:
            name: One of `CLASSES`.
            lost_after_s: A person not seen for so long, and then again, is a new track.

        Raises:
            BackendError: The package is not installed.
        """
        kind, options = CLASSES[name]
        tracker = _import_tracker(kind)
        import supervision  # What they take boxes in; comes with them.

        self._detections = supervision.Detections
        self._make = partial(
            tracker,
            lost_track_buffer=max(1, round(lost_after_s * _BUFFER_FPS)),
            **options,
        )
        self._tracker: Any = None
        self._first: list[tuple[Boxes, float]] = []
        self._clock = -math.inf
        self._alive: set[int] = set()

    def update(
        self, boxes: Boxes, clock: float, image: NDArray[np.uint8]
    ) -> tuple[list[int], list[int]]:
        """Take the boxes of the next frame; see `upperson_rt.camera.tracker.Follower`."""
        # They warn of a time that stands still, as a camera's clock may.
        self._clock = clock if clock > self._clock else math.nextafter(self._clock, math.inf)
        if self._tracker is not None:
            return self._follow(boxes, self._clock)
        self._first.append((boxes, self._clock))
        if len(self._first) < _FIRST_FRAMES:
            return [-1] * len(boxes.edges), []
        steps = np.diff([moment for _, moment in self._first])
        interval_s = float(np.clip(np.median(steps), *_INTERVALS_S))
        self._tracker = self._make(frame_rate=1 / interval_s)
        return [self._follow(*frame) for frame in self._first][-1]

    def _follow(self, boxes: Boxes, clock: float) -> tuple[list[int], list[int]]:
        scores = None if np.isnan(boxes.scores).any() else boxes.scores
        numbers = [-1] * len(boxes.edges)
        given = self._detections(
            xyxy=boxes.edges.astype(np.float64),
            confidence=scores,
            data={"row": np.arange(len(numbers))},
        )
        found = self._tracker.update(given, timestamp=clock)
        for row, number in zip(found.data.get("row", ()), found.tracker_id, strict=True):
            numbers[int(row)] = int(number)
        alive = {track.tracker_id for track in self._tracker.tracks if track.tracker_id >= 0}
        ended = sorted(self._alive - alive)
        self._alive = alive
        return numbers, ended
