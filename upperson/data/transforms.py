"""Image transforms: evaluation exactly as in the runtime, training augmentation as in the paper.

Images are resized by the runtime's own function (PIL bilinear, antialiased) in both, so what is
trained on is what the edge sees. Normalised is (x / 255 - mean) / std with CLIP's constants.
"""

from collections.abc import Callable

import torch
from open_clip.constants import OPENAI_DATASET_MEAN as CLIP_MEAN
from open_clip.constants import OPENAI_DATASET_STD as CLIP_STD
from torch import Tensor
from torchvision.transforms import v2

ImageTransform = Callable[[Tensor], Tensor]
"""Maps uint8 RGB [3, H, W] to normalised float32 [3, H, W]."""


def evaluation_transform() -> ImageTransform:
    """Normalise only."""
    transform: ImageTransform = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(CLIP_MEAN), list(CLIP_STD))]
    )
    return transform


def training_transform(height_px: int, width_px: int, *, pad_px: int = 10) -> ImageTransform:
    """Flip, pad and crop, normalise, erase: the paper's augmentation.

    Padding is black before normalisation, and erasing fills with CLIP's mean *after* it, both as in
    the official code (``docs/decisions.md``).
    """
    transform: ImageTransform = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomCrop((height_px, width_px), padding=pad_px),
            evaluation_transform(),
            v2.RandomErasing(scale=(0.02, 0.4), value=list(CLIP_MEAN)),
        ]
    )
    return transform
