"""A two-layer CLIP and an UP-Person over it with every trained tensor away from its start."""

from __future__ import annotations

import torch
from open_clip.model import CLIP
from torch import Tensor

from upperson.model.encoder import UPPerson
from upperson.model.parts import UPPersonConfig

IMAGE_SIZE = (48, 32)
EOT = 49407
SOT = 49406
TOY = {
    "embed_dim": 24,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": list(IMAGE_SIZE),
        "layers": 2,
        "width": 64,
        "patch_size": 16,
        "head_width": 32,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 48, "heads": 3, "layers": 2},
}


def toy_clip(seed: int = 0) -> CLIP:
    """Build the base; biases and norms, which start at 0 and 1, are moved away from it."""
    torch.manual_seed(seed)
    clip = CLIP(**TOY).eval()
    with torch.no_grad():
        for name, parameter in clip.named_parameters():
            if parameter.ndim == 1 and name != "logit_scale":
                parameter.add_(0.1 * torch.randn_like(parameter))
    return clip


def toy_model(config: UPPersonConfig | None = None, *, seed: int = 0) -> UPPerson:
    """Build UP-Person with random trained tensors: fresh adapters are zero and hide mistakes."""
    config = config or UPPersonConfig(prefix_length=3, lora_rank=4, adapter_reduction=4)
    model = UPPerson(toy_clip(seed), config, IMAGE_SIZE).eval()
    disturb(model)
    return model


@torch.no_grad()
def disturb(model: UPPerson) -> None:
    """Move every trained tensor away from its first value."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            if parameter.ndim == 0:
                parameter.mul_(0.5 + torch.rand(()))
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))


def toy_pixels(count: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *IMAGE_SIZE, 3), dtype=torch.uint8, generator=generator)


def normalised(model: UPPerson, pixels: Tensor) -> Tensor:
    """Return what the trained image tower reads, float32 [N, 3, H, W]."""
    mean = torch.tensor(model.image_mean)[:, None, None]
    std = torch.tensor(model.image_std)[:, None, None]
    return (pixels.permute(0, 3, 1, 2).float() / 255 - mean) / std


def toy_ids(lengths: list[int], seed: int = 2) -> Tensor:
    """Return int32 ids, one row a length (SOT and EOT included), zero-padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.int32)
    for row, length in zip(ids, lengths, strict=True):
        row[:length] = torch.randint(1, SOT, (length,), dtype=torch.int32, generator=generator)
        row[0], row[length - 1] = SOT, EOT
    return ids
