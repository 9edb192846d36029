"""Which frames a detector sees: those with motion, some without, and at most so many a second."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_camera.frames import Frame
from upperson_camera.settings import PipelineSettings
from upperson_camera.source import import_cv2

_PERSON_PX = 8
"""Frames are scaled so that the lowest person who counts is so high."""
_MOST_WIDE = 320
_LEAST_PIXELS = 4
"""Changed pixels, after a median filter, from which a frame has motion. A person of 8 x 3 pixels
changes more, grass in the wind and the noise of a camera by night mostly fewer."""
_LEVELS = 5.0
"""Standard deviations from which a pixel has changed."""
_LEAST_VARIANCE = 2.0
"""Of a pixel of the scaled frame, in square levels."""
_LEARNING_S = 60.0
"""Time constant of the background. What stands still is part of it after a tenth."""
_HOLD_S = 1.0
"""For so long after motion a detector sees every frame."""
_CHECK_S = 5.0
"""Without motion a detector sees a frame after so long, and while there are tracks after half of
``lost_after_s``, so that none of them ends."""


class MotionDetector:
    """Background subtraction on small frames: a mixture of Gaussians (OpenCV's MOG2).

    It goes by the time between frames, so that their rate may change.
    """

    def __init__(self, min_height_px: int) -> None:
        self._scale = max(1.0, min_height_px / _PERSON_PX)
        self._background: Any = import_cv2().createBackgroundSubtractorMOG2(
            varThreshold=_LEVELS**2, detectShadows=False
        )
        self._background.setVarMin(_LEAST_VARIANCE)
        self._frames = 0
        self._clock = 0.0

    def sees(self, image: NDArray[np.uint8], clock: float) -> bool:
        """Return whether something in a frame, BGR [H, W, 3], differs from the frames before."""
        cv2 = import_cv2()
        height, width = image.shape[:2]
        scale = max(self._scale, width / _MOST_WIDE)
        size = max(1, round(width / scale)), max(1, round(height / scale))
        small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        share = 1 - math.exp((self._clock - clock) / _LEARNING_S)
        self._frames, self._clock = self._frames + 1, clock
        # The first frames count alike.
        rate = max(share, 1 / self._frames)
        changed = self._background.apply(small, learningRate=rate)
        return bool(cv2.countNonZero(cv2.medianBlur(changed, 3)) >= _LEAST_PIXELS)


class DetectionSchedule:
    """Decides for each frame of a camera whether its detector sees it."""

    def __init__(self, settings: PipelineSettings, may_skip: bool) -> None:
        self._motion: MotionDetector | None = None
        if settings.motion_gate and may_skip:
            self._motion = MotionDetector(settings.quality.min_height_px)
        self._interval_s = 1 / settings.detect_fps if settings.detect_fps else 0.0
        self._track_check_s = min(_CHECK_S, settings.lost_after_s / 2)
        self._due = -math.inf
        """From then on the rate permits the next frame."""
        self._moved = -math.inf
        self._seen = -math.inf

    def skips(self, frame: Frame, has_tracks: bool) -> str | None:
        """Return why the detector does not see a frame, as `CameraStats.frames_skipped`."""
        clock = frame.clock
        if clock < self._due - 1e-6:
            return "detect_fps"
        if self._motion is not None:
            if self._motion.sees(frame.image, clock):
                self._moved = clock
            check_s = self._track_check_s if has_tracks else _CHECK_S
            if clock - self._moved > _HOLD_S and clock - self._seen < check_s - 1e-6:
                return "no_motion"
        self._seen = clock
        is_late = clock - self._due >= self._interval_s
        self._due = (clock if is_late else self._due) + self._interval_s
        return None
