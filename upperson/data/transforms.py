"""Image transforms: evaluation exactly as in the runtime, training augmentation as in the paper.

Images are resized by the runtime's own function (PIL bilinear, antialiased) in both, so what is
trained on is what the edge sees. Normalised is (x / 255 - mean) / std with the base's statistics.
"""

from collections.abc import Callable

import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor
from torchvision.transforms import v2

ImageTransform = Callable[[Tensor], Tensor]
"""Maps uint8 RGB [3, H, W] to normalised float32 [3, H, W]."""

PixelStatistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of the RGB channels, of pixels in 0..1."""

CLIP_STATISTICS: PixelStatistics = (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)


def evaluation_transform(statistics: PixelStatistics = CLIP_STATISTICS) -> ImageTransform:
    """Normalise only."""
    mean, std = statistics
    transform: ImageTransform = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    )
    return transform


def training_transform(
    height_px: int,
    width_px: int,
    statistics: PixelStatistics = CLIP_STATISTICS,
    *,
    pad_px: int = 10,
) -> ImageTransform:
    """Flip, pad and crop, normalise, erase: the paper's augmentation.

    Padding is black before normalisation, and erasing fills with the mean *after* it, both as in
    the official code (``docs/decisions.md``).
    """
    transform: ImageTransform = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomCrop((height_px, width_px), padding=pad_px),
            evaluation_transform(statistics),
            v2.RandomErasing(scale=(0.02, 0.4), value=list(statistics[0])),
        ]
    )
    return transform
