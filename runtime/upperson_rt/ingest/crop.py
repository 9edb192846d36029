"""A crop: a picture of one person, on its way to a row."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from upperson_rt.gallery import Item

__all__ = ["Crop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop:
    """A picture of one person, ready for the image tower."""

    item: Item
    pixels: NDArray[np.uint8]
    """RGB [H, W, 3] of the model's size, see `Encoder.prepare_image`."""
    jpeg: bytes | None = None
    """The picture to save as ``item.crop``, or None."""
