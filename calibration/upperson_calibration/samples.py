"""Choose calibration samples and record which they were."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from upperson_rt.errors import InputError
from upperson_rt.preprocess import load_image, resize_image
from upperson_rt.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Inputs that set activation ranges."""

    images: npt.NDArray[np.uint8]
    """RGB [N, H, W, 3], of the model's size."""

    input_ids: npt.NDArray[np.int32]
    """[M, L], zero-padded to the longest."""

    sha256: str
    """Hash over all inputs: tells whether two calibrations saw the same data."""

    source: str
    """Where they came from, for the report."""

    def describe(self) -> dict[str, Any]:
        """Return what a manifest records of the calibration."""
        return {
            "images": len(self.images),
            "texts": len(self.input_ids),
            "sha256": self.sha256,
            "source": self.source,
        }


def choose_samples(
    image_files: Sequence[Path],
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    height_px: int,
    width_px: int,
    count: int,
    seed: int,
    source: str,
) -> CalibrationSet:
    """Draw up to ``count`` images and as many texts without replacement, equal for equal seeds.

    Raises:
        InputError: There is no image or no text, or an image cannot be read.
    """
    if not image_files or not texts:
        raise InputError(
            f"calibration needs images and texts, found {len(image_files)} and {len(texts)} in "
            f"{source}: pass a data set with a training split"
        )
    rng = np.random.default_rng(seed)
    image_rows = np.sort(rng.permutation(len(image_files))[:count])
    text_rows = np.sort(rng.permutation(len(texts))[:count])
    images = np.stack(
        [resize_image(load_image(image_files[row]), height_px, width_px) for row in image_rows]
    )
    input_ids = tokenizer.encode([texts[row] for row in text_rows]).input_ids
    digest = hashlib.sha256(images.tobytes())
    digest.update(input_ids.tobytes())
    return CalibrationSet(images, input_ids, digest.hexdigest(), source)
