"""What somebody wears, as colours: enough to tell two people of one camera apart."""

import numpy as np
from numpy.typing import NDArray

from upperson_rt.camera.source import import_cv2

__all__ = ["COLOURS", "colours_of"]

_BINS = 8, 3, 4
"""Of hue, saturation and value."""
COLOURS = 2 * _BINS[0] * _BINS[1] * _BINS[2]
"""Length of a histogram."""
_SIZE = 16, 48
"""Width and height that a person is scaled to; the sides and the head are left out."""
_PARTS = slice(8, 24), slice(24, 48)
_MIDDLE = slice(3, 13)


def colours_of(image: NDArray[np.uint8], edges: NDArray[np.int64]) -> NDArray[np.float32]:
    """Return (N, `COLOURS`) unit histograms of the upper and lower halves of people.

    The product of two is 1 for equal colours and 0 for none in common (Bhattacharyya).

    Args:
        image: BGR [H, W, 3].
        edges: (N, 4) x0, y0, x1, y1 inside the image, at least one pixel each.
    """
    cv2 = import_cv2()
    found = np.zeros((len(edges), COLOURS), np.float32)
    for row, (x0, y0, x1, y1) in zip(found, edges.tolist(), strict=True):
        small = cv2.resize(image[y0:y1, x0:x1], _SIZE, interpolation=cv2.INTER_AREA)
        hsv = cv2.cvtColor(small, cv2.COLOR_BGR2HSV)[:, _MIDDLE]
        halves = [
            cv2.calcHist(
                [np.ascontiguousarray(hsv[part])],
                [0, 1, 2],
                None,
                _BINS,
                [0, 180, 0, 256, 0, 256],
            ).ravel()
            for part in _PARTS
        ]
        row[:] = np.sqrt(np.concatenate([half / half.sum() for half in halves]) / 2)
    return found
