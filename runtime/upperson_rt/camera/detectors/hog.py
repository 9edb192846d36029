"""OpenCV's own detector."""

import numpy as np
from numpy.typing import NDArray

from upperson_rt.camera.source import import_cv2

__all__ = ["HogDetector"]

_SHRINK = (0.2, 0.08)
"""Margins that HOG was trained with, to each side, as shares of width and height."""


class HogDetector:
    """OpenCV's people detector: histograms of gradients, no download, no GPU, many misses.

    Frames are scaled to at most ``width_px``; people lower than 128 pixels there are not found.
    """

    def __init__(self, width_px: int = 640, min_score: float = 0.3) -> None:
        cv2 = import_cv2()
        self.width_px = width_px
        self.min_score = min_score
        self._hog = cv2.HOGDescriptor()
        self._hog.setSVMDetector(cv2.HOGDescriptor_getDefaultPeopleDetector())

    @property
    def identity(self) -> str:
        """What its boxes depend on."""
        return f"hog (width {self.width_px}, scores from {self.min_score:g})"

    def __call__(self, frame: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return (N, 5) boxes with scores (distances from the separating plane)."""
        cv2 = import_cv2()
        scale = min(1.0, self.width_px / frame.shape[1])
        small = frame if scale == 1.0 else cv2.resize(frame, None, fx=scale, fy=scale)
        if small.shape[0] < 128 or small.shape[1] < 64:
            return np.zeros((0, 5), np.float32)
        found, weights = self._hog.detectMultiScale(
            small, winStride=(8, 8), padding=(8, 8), scale=1.05
        )
        if len(found) == 0:
            return np.zeros((0, 5), np.float32)
        scores = np.asarray(weights, np.float32).reshape(-1)
        kept = cv2.dnn.NMSBoxes(found.tolist(), scores.tolist(), self.min_score, 0.5)
        x, y, width, height = np.asarray(found, np.float32)[np.asarray(kept, int)].T
        across, down = _SHRINK
        edges = np.stack(
            [
                x + across * width,
                y + down * height,
                x + (1 - across) * width,
                y + (1 - down) * height,
            ],
            axis=1,
        )
        boxes = np.column_stack([edges / scale, scores[np.asarray(kept, int)]])
        return boxes.astype(np.float32)
