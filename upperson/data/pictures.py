"""Pictures of a data set, resized to the input of the image tower.

Shapes: N batch, H picture height, W picture width.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ImageFile
from torch import Tensor
from torch.utils.data import Dataset

from upperson.data.images import truncated_images
from upperson_rt.errors import UppersonError
from upperson_rt.preprocess import prepare_image


class Pictures:
    """Files as uint8 RGB of one size, read in any order and as often as wanted.

    Args:
        files: Picture files.
        image_size: (height_px, width_px) that they are resized to.
    """

    def __init__(self, files: Sequence[Path], image_size: tuple[int, int]) -> None:
        self.image_size = image_size
        # One array of bytes: an object for each would be copied in every process that loads.
        self._files = np.array([os.fsencode(file) for file in files])
        # A spawned worker has only what it is given.
        self._truncated = ImageFile.LOAD_TRUNCATED_IMAGES

    def __len__(self) -> int:
        return len(self._files)

    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.uint8]:
        """Return the pictures at some places, uint8 [N, H, W, 3].

        Raises:
            InputError: One of them cannot be decoded.
        """
        pixels_NHW3 = np.empty((len(indices), *self.image_size, 3), dtype=np.uint8)
        with truncated_images(self._truncated):
            for pixels_HW3, index in zip(pixels_NHW3, indices, strict=True):
                pixels_HW3[:] = prepare_image(os.fsdecode(self._files[index]), *self.image_size)
        return pixels_NHW3


class PictureBatches(Dataset["Tensor | UppersonError"]):
    """Pictures in their own order, in batches; for a loader with ``batch_size=None``.

    An error is the item, for the main process to raise: torch would raise it again with the whole
    traceback of a worker as its message.

    Args:
        pictures: What is read.
        places: Which of them each batch has.
    """

    def __init__(self, pictures: Pictures, places: Sequence[Sequence[int]]) -> None:
        self._pictures = pictures
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Tensor | UppersonError:
        """Return one batch, uint8 [N, H, W, 3], or why it cannot be read."""
        try:
            return torch.from_numpy(self._pictures.read(self._places[index]))
        except UppersonError as error:
            return error
