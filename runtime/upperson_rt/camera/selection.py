"""Which views of a track are worth embedding."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from upperson_rt.camera.frames import View
from upperson_rt.errors import UsageError

__all__ = ["BorderRule", "QualityRules", "Selection", "sharpness"]

BorderRule: TypeAlias = Literal["keep", "last", "drop"]
"""Views that touch the border: like others, only if there is no other, or never."""

_SHARPNESS_HEIGHT_PX = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class QualityRules:
    """What a view must have to be embedded.

    Raises:
        UsageError: On construction, if a number is negative or the border rule unknown.
    """

    min_height_px: int = 64
    min_width_px: int = 24
    min_sharpness: float = 20.0
    """Variance of the Laplacian of the grey view, scaled down to 128 pixels of height."""
    border: BorderRule = "last"

    def __post_init__(self) -> None:
        if min(self.min_height_px, self.min_width_px, self.min_sharpness) < 0:
            raise UsageError("smallest height, width and sharpness must not be negative")
        if self.border not in get_args(BorderRule):
            raise UsageError(
                f"no border rule '{self.border}': it is one of {', '.join(get_args(BorderRule))}"
            )

    def size_problem(self, height_px: int, width_px: int) -> str | None:
        """Return why a box is not looked at any further, or None."""
        small = height_px < self.min_height_px or width_px < self.min_width_px
        return "too_small" if small else None

    def problem(self, sharpness: float, at_border: bool) -> str | None:
        """Return why a view is not used, or None."""
        if at_border and self.border == "drop":
            return "at_border"
        return "blurred" if sharpness < self.min_sharpness else None


def sharpness(image: NDArray[np.uint8]) -> float:
    """Return the variance of the Laplacian of a BGR picture, comparable between sizes."""
    import cv2

    grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    height, width = grey.shape
    if height > _SHARPNESS_HEIGHT_PX:
        size = (max(1, round(width * _SHARPNESS_HEIGHT_PX / height)), _SHARPNESS_HEIGHT_PX)
        grey = cv2.resize(grey, size, interpolation=cv2.INTER_AREA)
    return float(cv2.Laplacian(grey, cv2.CV_64F).var())


@dataclass(slots=True)
class _Window:
    opened: float
    best: View | None = None
    sightings: int = 0
    given: int = 0


class Selection:
    """Keeps the best view of every track, and gives one away every so often.

    A window opens with the first view of a track that passes, closes ``every_s`` later, and the
    best view in it is chosen. A track that ends closes its window early. A track that was seen in
    fewer than ``min_views`` frames gives nothing.
    """

    def __init__(self, every_s: float, min_views: int, drop: Callable[[str], None]) -> None:
        """Put a selection together.

        Args:
            every_s: Seconds of a window; 0 chooses every view.
            min_views: Frames that a track must be seen in.
            drop: Told the reason for every view that is given up: ``not_best``, ``seen_once``.
        """
        self.every_s = every_s
        self.min_views = min_views
        self._drop = drop
        self._windows: dict[str, _Window] = {}

    def saw(self, track: str, clock: float) -> None:
        """Note that a track is in this frame, whether its view is usable or not."""
        self._windows.setdefault(track, _Window(clock)).sightings += 1

    def offer(self, view: View, clock: float) -> None:
        """Consider a view of a track that was `saw`."""
        window = self._windows[view.track]
        if window.best is None:
            if window.given == 0 or clock - window.opened >= self.every_s:
                window.opened = clock
            window.best = view
            return
        if view.rank > window.best.rank:
            window.best = view
        self._drop("not_best")

    def due(self, clock: float) -> list[View]:
        """Return the views whose windows are over."""
        return [
            view
            for window in self._windows.values()
            if window.sightings >= self.min_views
            and clock - window.opened >= self.every_s
            and (view := self._take(window)) is not None
        ]

    def end(self, track: str) -> View | None:
        """Forget a track; return its last view, if there is one and it was seen often enough."""
        window = self._windows.pop(track, None)
        view = None if window is None else self._take(window)
        if window is not None and view is not None and window.sightings < self.min_views:
            self._drop("seen_once")
            return None
        return view

    def end_all(self) -> list[View]:
        """Forget all tracks; return their last views."""
        return [view for track in list(self._windows) if (view := self.end(track)) is not None]

    def flush(self) -> list[View]:
        """Close all windows of tracks that were seen often enough; the tracks go on."""
        return [
            view
            for window in self._windows.values()
            if window.sightings >= self.min_views and (view := self._take(window)) is not None
        ]

    @staticmethod
    def _take(window: _Window) -> View | None:
        view, window.best = window.best, None
        window.given += view is not None
        return view
