"""What happens to pictures and captions on their way to the model.

Pictures are resized by the runtime's own function (PIL bilinear, antialiased) in training and
evaluation, so what is trained on is what the edge sees. Normalised is (x / 255 - mean) / std with
the base's statistics. Training augments as in the paper: pictures are flipped, cropped and erased,
and tokens of captions are masked.

Augmentation parameters are drawn where pictures are read, from each pair's own seed; pictures are
augmented and normalised in whole batches on the model's device, so that bytes travel, not floats.

Shapes: N batch, H picture height, W picture width, L tokens of a caption.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

ImageTransform = Callable[[Tensor], Tensor]
"""Maps uint8 RGB [..., 3, H, W] to normalised float32 [..., 3, H, W]."""

PixelStatistics = tuple[tuple[float, float, float], tuple[float, float, float]]
"""Mean and standard deviation of the RGB channels, of pixels in 0..1."""

CLIP_STATISTICS: PixelStatistics = (
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
"""OpenAI's, written out: open_clip would take seconds to import in every loader worker."""

PICKED_SHARE = 0.15
MASKED_SHARE = 0.8
RANDOM_SHARE = 0.1

PADDING_PX = 10
FLIPPED_SHARE = ERASED_SHARE = 0.5
ERASED_AREA = (0.02, 0.4)
ERASED_RATIO = (0.3, 3.3)
"""Height by width of what is erased."""

_TRIES = 10
"""Rectangles that are drawn until one fits into the picture; without one nothing is erased."""

AUGMENTATION_UNIFORMS = 6 + 2 * _TRIES
"""Uniform numbers that decide the augmentation of one picture."""


def evaluation_transform(statistics: PixelStatistics = CLIP_STATISTICS) -> ImageTransform:
    """Normalise only."""
    mean_311, std_311 = (torch.tensor(values)[:, None, None] for values in statistics)

    def normalise(pixels_3HW: Tensor) -> Tensor:
        mean, std = mean_311.to(pixels_3HW.device), std_311.to(pixels_3HW.device)
        return pixels_3HW.float().mul_(1 / 255).sub_(mean).div_(std)

    return normalise


def draw_augmentation(uniform_NK: NDArray[np.float64], height_px: int, width_px: int) -> Tensor:
    """Draw the parameters of the paper's augmentation: flip, crop and erase.

    As torchvision's RandomHorizontalFlip, RandomCrop with padding and RandomErasing draw it.

    Args:
        uniform_NK: `AUGMENTATION_UNIFORMS` numbers of [0, 1) for each picture.
        height_px: Of the pictures.
        width_px: Of the pictures.

    Returns:
        int32 [N, 7]: whether it is flipped, top and left of the crop in the padded picture, and
        top, left, height and width of what is erased (no height and no width: nothing).
    """
    flip_N, top_N, left_N, erase_N, *place = uniform_NK[:, :6].T
    area_NT, ratio_NT = np.split(uniform_NK[:, 6:], 2, axis=1)
    area_NT = height_px * width_px * _between(area_NT, *ERASED_AREA)
    ratio_NT = np.exp(_between(ratio_NT, *np.log(ERASED_RATIO)))
    heights_NT = np.rint(np.sqrt(area_NT * ratio_NT))
    widths_NT = np.rint(np.sqrt(area_NT / ratio_NT))
    fits_NT = (heights_NT < height_px) & (widths_NT < width_px)
    first_N = np.arange(len(uniform_NK)), fits_NT.argmax(axis=1)
    erased_N = (erase_N < ERASED_SHARE) & fits_NT[first_N]
    erased_height_N = heights_NT[first_N] * erased_N
    erased_width_N = widths_NT[first_N] * erased_N
    augmentation_7N = (
        flip_N < FLIPPED_SHARE,
        top_N * (2 * PADDING_PX + 1),
        left_N * (2 * PADDING_PX + 1),
        place[0] * (height_px - erased_height_N + 1),
        place[1] * (width_px - erased_width_N + 1),
        erased_height_N,
        erased_width_N,
    )
    return torch.from_numpy(np.stack(augmentation_7N, axis=1).astype(np.int32))


def flips_only(augmentation_N7: Tensor) -> Tensor:
    """Return augmentation parameters reduced to the flips."""
    flips_N7 = torch.zeros_like(augmentation_N7)
    flips_N7[:, 0] = augmentation_N7[:, 0]
    flips_N7[:, 1:3] = PADDING_PX
    return flips_N7


def prepare_pixels(
    pixels_NHW3: Tensor, augmentation_N7: Tensor | None, statistics: PixelStatistics
) -> Tensor:
    """Augment and normalise a batch where it is, to float32 [N, 3, H, W].

    Padding is black before normalisation, and erasing fills with the mean *after* it, both as in
    the official code (``docs/explanation/decisions.md``).

    Args:
        pixels_NHW3: uint8 RGB.
        augmentation_N7: From `draw_augmentation`; None only normalises.
        statistics: Mean and standard deviation to normalise with.
    """
    normalise = evaluation_transform(statistics)
    pixels_N3HW = pixels_NHW3.permute(0, 3, 1, 2).contiguous()
    if augmentation_N7 is None:
        return normalise(pixels_N3HW)
    size = pixels_N3HW.shape[2:]
    flip_N, top_N, left_N, *erased = augmentation_N7.long().unbind(dim=1)
    padded_N3HW = F.pad(pixels_N3HW, [PADDING_PX] * 4)
    padded_N3HW = torch.where(flip_N.bool()[:, None, None, None], padded_N3HW.flip(3), padded_N3HW)
    # Views of every crop there is; only the chosen ones are copied.
    crops = padded_N3HW.unfold(2, size[0], 1).unfold(3, size[1], 1)
    each_N = torch.arange(len(flip_N), device=flip_N.device)
    image_N3HW = normalise(crops[each_N, :, top_N, left_N].contiguous())
    rows_NH, columns_NW = (
        _inside(start_N, length_N, total)
        for start_N, length_N, total in zip(erased[:2], erased[2:], size, strict=True)
    )
    erased_N1HW = rows_NH[:, None, :, None] & columns_NW[:, None, None, :]
    mean_311 = image_N3HW.new_tensor(statistics[0])[:, None, None]
    return torch.where(erased_N1HW, mean_311, image_N3HW)


def _between(uniform: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return low + (high - low) * uniform


def _inside(start_N: Tensor, length_N: Tensor, total: int) -> Tensor:
    """Return bool [N, total], True at the places from a start on."""
    places = torch.arange(total, device=start_N.device)
    return (places >= start_N[:, None]) & (places < (start_N + length_N)[:, None])


def mask_caption(ids_L: NDArray[np.int32], rng: np.random.Generator) -> NDArray[np.int32]:
    """Return a copy of one caption with masked tokens, the paper's augmentation of text.

    It is BERT's scheme: of the words 15 % are picked; of those 80 % become the mask token, 10 % a
    random token, 10 % stay. A caption in which nothing was picked loses its first word. Start and
    end are never touched, and the masked caption is what the loss sees.

    CLIP has no mask token. As in the official code the id before the start token stands in for it
    (49405, "jekyll</w>"): its frozen embedding is as good as any rare word's.

    Args:
        ids_L: int32 ids, start token first and end token, which is the largest id, last; no
            padding.
        rng: Source of randomness.
    """
    mask_id = int(ids_L[-1]) - 2
    # A word that is the mask token itself stays.
    words_W = np.flatnonzero((ids_L > 0) & (ids_L < mask_id))
    if not len(words_W):
        return ids_L
    masked = ids_L.copy()
    picked_W = rng.random(len(words_W)) < PICKED_SHARE
    if not picked_W.any():
        masked[words_W[0]] = mask_id
        return masked
    fate_W = rng.random(len(words_W))
    random_W = rng.integers(1, mask_id, len(words_W), dtype=np.int32)
    masked[words_W[picked_W & (fate_W < MASKED_SHARE)]] = mask_id
    replaced_W = picked_W & (fate_W >= MASKED_SHARE) & (fate_W < MASKED_SHARE + RANDOM_SHARE)
    masked[words_W[replaced_W]] = random_W[replaced_W]
    return masked
