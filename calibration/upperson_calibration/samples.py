"""Choose calibration samples and record which they were."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from upperson_calibration.coverage import cover, image_features
from upperson_rt.errors import InputError
from upperson_rt.preprocess import load_image, resize_image
from upperson_rt.tokenizer import Tokenizer, token_lengths

Progress = Callable[[int, int], None]
"""Called with (done, total) pictures."""

CANDIDATES_PER_SAMPLE = 8
"""Pictures looked at for each one chosen: all of a small set, a seeded draw of a large one."""


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Inputs that set activation ranges."""

    images: npt.NDArray[np.uint8]
    """RGB [N, H, W, 3], of the model's size."""

    input_ids: npt.NDArray[np.int32]
    """[M, L], zero-padded to the longest."""

    image_source: str
    """Where the pictures came from, for the report."""

    text_source: str

    @property
    def image_sha256(self) -> list[str]:
        """SHA-256 of each picture's pixels at the model's size."""
        return [hashlib.sha256(image.tobytes()).hexdigest() for image in self.images]

    @property
    def text_sha256(self) -> list[str]:
        """SHA-256 of each caption's ids without padding."""
        return [
            hashlib.sha256(np.trim_zeros(ids, "b").tobytes()).hexdigest() for ids in self.input_ids
        ]


def choose_samples(
    image_files: Sequence[Path],
    texts: Sequence[str],
    tokenizer: Tokenizer,
    *,
    height_px: int,
    width_px: int,
    count: int,
    seed: int,
    image_source: str,
    text_source: str,
    cameras: Sequence[str | None] | None = None,
    progress: Progress | None = None,
) -> CalibrationSet:
    """Choose up to ``count`` pictures and as many captions that span what there is.

    Pictures span brightness, contrast, two colour axes, size, shape and camera, captions their
    length in tokens: the darkest picture looked at and the longest caption are always among them.

    Args:
        image_files: Candidates; more than ``CANDIDATES_PER_SAMPLE * count`` are thinned at random
            first, so that large sets need not be decoded whole.
        texts: Captions, of those pictures or of others.
        tokenizer: Of the model.
        height_px: Height of the model's input.
        width_px: Width of the model's input.
        count: Number of pictures, and of captions.
        seed: Equal seeds give equal samples.
        image_source: Where the pictures come from; recorded with the samples.
        text_source: The same of the captions.
        cameras: None, or a camera (or None) for each picture.
        progress: Told after each picture looked at.

    Raises:
        InputError: There is no image or no text, or an image cannot be read.
    """
    if not image_files or not texts:
        raise InputError(
            f"calibration needs images and texts, found {len(image_files)} images in "
            f"{image_source} and {len(texts)} texts in {text_source}: pass a data set with a "
            "training split"
        )
    rng = np.random.default_rng(seed)
    looked_at = np.sort(rng.permutation(len(image_files))[: CANDIDATES_PER_SAMPLE * count])
    features = []
    for done, row in enumerate(looked_at, 1):
        features.append(image_features(load_image(image_files[row])))
        if progress is not None:
            progress(done, len(looked_at))
    groups = None if cameras is None else [cameras[row] for row in looked_at]
    chosen = looked_at[cover(np.array(features), count, rng, groups)]
    # Filled in place: a list of pictures beside their stack would be all of them twice.
    images = np.empty((len(chosen), height_px, width_px, 3), np.uint8)
    for place, row in enumerate(chosen):
        images[place] = resize_image(load_image(image_files[row]), height_px, width_px)
    input_ids = tokenizer.encode(texts).input_ids
    lengths = token_lengths(input_ids)
    rows = cover(lengths[:, None].astype(np.float64), count, rng)
    return CalibrationSet(images, input_ids[rows, : lengths[rows].max()], image_source, text_source)
