"""Does a file become the same pixels in training and at run time?

Shapes: N images, H height, W width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

ROUNDING_LEVELS = 0.01
"""Training normalises in float32; undoing that is this exact, in levels of 0 to 255."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelPaths:
    """The largest difference between the two ways from file to pixels."""

    max_difference: float
    """In levels of 0 to 255."""
    worst: str
    """The image it is in."""

    @property
    def are_equal(self) -> bool:
        """Whether both give the same bytes."""
        return self.max_difference <= ROUNDING_LEVELS

    def message(self) -> str:
        """Say in one line what differs."""
        return (
            f"image {self.worst} becomes other pixels in training than at run time: they differ by "
            f"up to {self.max_difference:.3g} of 255 levels, expected none; install the same "
            "versions of upperson and upperson-rt, and report it"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {
            "equal": self.are_equal,
            "max_difference_levels": self.max_difference,
            "worst_image": self.worst,
        }


def compare_pixels(
    training_NHW3: npt.NDArray[Any], runtime_NHW3: npt.NDArray[np.uint8], names: Sequence[str]
) -> PixelPaths:
    """Compare pixels in levels of 0 to 255, the training's ones as uint8 or un-normalised floats.

    Args:
        training_NHW3: From the training's data set and transform.
        runtime_NHW3: From the runtime's preprocessing.
        names: What messages call the N images.
    """
    difference = np.abs(training_NHW3.astype(np.float64) - runtime_NHW3.astype(np.float64))
    difference_N = difference.max(axis=(1, 2, 3))
    worst = int(difference_N.argmax())
    return PixelPaths(max_difference=float(difference_N[worst]), worst=names[worst])
