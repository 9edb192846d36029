"""A detector: one box around all that differs from the edge of the picture.

upperson-rt index scenes --detector contrast
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import UsageError

_CONTRAST = 40


def make_contrast(
    name: str,
    layout: str | None,
    person: str | None,
    min_score: float | None,
    threads: int | None,
    pixels: str | None = None,
) -> Callable[[NDArray[np.uint8]], NDArray[np.float64]]:
    """Return the detector; it refuses the options of ``--detector-*``."""
    if (layout, person, min_score, pixels) != (None, None, None, None):
        raise UsageError(f"the detector {name} takes none of the options --detector-*")
    return find


def find(frame_HWC: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return (N, 5) rows of x0, y0, x1, y1 and a score for a frame, BGR [H, W, 3]."""
    grey = frame_HWC.mean(axis=2)
    edge = np.median(np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]]))
    rows, columns = np.nonzero(np.abs(grey - edge) > _CONTRAST)
    if not len(rows):
        return np.empty((0, 5))
    return np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1, 1.0]])
