"""What happens to images and captions on their way to the model.

Images are resized by the runtime's own function (PIL bilinear, antialiased) in training and
evaluation, so what is trained on is what the edge sees. Normalised is (x / 255 - mean) / std with
the base's statistics. Training augments as in the paper: images are flipped, cropped and erased,
and tokens of captions are masked.
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

PICKED_SHARE = 0.15
MASKED_SHARE = 0.8
RANDOM_SHARE = 0.1


def evaluation_transform(statistics: PixelStatistics = CLIP_STATISTICS) -> ImageTransform:
    """Normalise only."""
    mean, std = statistics
    transform: ImageTransform = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    )
    return transform


def training_transform(
    height_px: int, width_px: int, statistics: PixelStatistics = CLIP_STATISTICS
) -> ImageTransform:
    """Flip, pad and crop, normalise, erase: the paper's augmentation.

    Padding is black before normalisation, and erasing fills with the mean *after* it, both as in
    the official code (``docs/decisions.md``).
    """
    transform: ImageTransform = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomCrop((height_px, width_px), padding=10),
            evaluation_transform(statistics),
            v2.RandomErasing(scale=(0.02, 0.4), value=list(statistics[0])),
        ]
    )
    return transform


def mask_caption(ids_L: Tensor, generator: torch.Generator) -> Tensor:
    """Return a copy of one caption with masked tokens, the paper's augmentation of text.

    It is BERT's scheme: of the words 15 % are picked; of those 80 % become the mask token, 10 % a
    random token, 10 % stay. A caption in which nothing was picked loses its first word. Start and
    end are never touched, and the masked caption is what the loss sees.

    CLIP has no mask token. As in the official code the id before the start token stands in for it
    (49405, "jekyll</w>"): its frozen embedding is as good as any rare word's.

    Args:
        ids_L: int64 ids, start token first and end token, which is the largest id, last; no
            padding.
        generator: Source of randomness.
    """
    mask_id = int(ids_L[-1]) - 2
    # A word that is the mask token itself stays: it says nothing that could be hidden.
    words_W = torch.nonzero((ids_L > 0) & (ids_L < mask_id)).flatten()
    if not len(words_W):
        return ids_L
    picked_W = torch.rand(len(words_W), generator=generator) < PICKED_SHARE
    if not picked_W.any():
        masked = ids_L.clone()
        masked[words_W[0]] = mask_id
        return masked
    fate_W = torch.rand(len(words_W), generator=generator)
    random_W = torch.randint(1, mask_id, (len(words_W),), generator=generator)
    new_W = ids_L[words_W]
    new_W = torch.where(picked_W & (fate_W < MASKED_SHARE + RANDOM_SHARE), random_W, new_W)
    new_W = torch.where(picked_W & (fate_W < MASKED_SHARE), mask_id, new_W)
    masked = ids_L.clone()
    masked[words_W] = new_W
    return masked
