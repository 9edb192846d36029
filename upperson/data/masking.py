"""Masking of caption tokens, the paper's text augmentation (BERT's scheme).

Of the words of a caption 15 % are picked; of those 80 % become the mask token, 10 % a random token,
10 % stay. A caption in which nothing was picked loses its first word. Start, end and padding are
never touched, and the masked caption is what the loss sees.

CLIP has no mask token. As in the official code the id before the start token stands in for it
(49405, "jekyll</w>"): its frozen embedding is as good as any rare word's.
"""

import torch
from torch import Tensor

PICKED = 0.15
MASKED = 0.8
RANDOM = 0.1


def mask_caption(ids_L: Tensor, generator: torch.Generator) -> Tensor:
    """Return a masked copy of one caption.

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
    picked_W = torch.rand(len(words_W), generator=generator) < PICKED
    if not picked_W.any():
        masked = ids_L.clone()
        masked[words_W[0]] = mask_id
        return masked
    fate_W = torch.rand(len(words_W), generator=generator)
    random_W = torch.randint(1, mask_id, (len(words_W),), generator=generator)
    new_W = ids_L[words_W]
    new_W = torch.where(picked_W & (fate_W < MASKED + RANDOM), random_W, new_W)
    new_W = torch.where(picked_W & (fate_W < MASKED), mask_id, new_W)
    masked = ids_L.clone()
    masked[words_W] = new_W
    return masked
