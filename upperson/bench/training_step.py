"""One training step as a benchmark runs it: random weights, one batch, forward to optimiser.

Shapes: N batch, H image height, W image width, L tokens.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from upperson.bench import literal
from upperson.losses import sdm_loss
from upperson.model.base import build_clip
from upperson.model.block import UPPersonConfig
from upperson.model.encoder import UPPerson

LITERAL = "literal fp32"
OURS = "ours fp32"
OURS_BF16 = "ours bf16"
OURS_CHECKPOINTED = "ours fp32, checkpointed"
CONTENDERS = (LITERAL, OURS, OURS_BF16, OURS_CHECKPOINTED)
"""The step written literally from the formulas, and this package's: in float32, under bf16
autocast, and in float32 with every block's activations computed again in the backward pass."""

SHORTEST_CAPTION, LONGEST_CAPTION = 20, 30
"""Tokens of a caption, SOT and EOT included."""

_NOISE = 0.02


@dataclass(frozen=True, kw_only=True, slots=True)
class StepSpec:
    """What is trained: shapes are the base's, weights and inputs are random by seed."""

    base: str = "ViT-B-16-quickgelu"
    height_px: int = 384
    width_px: int = 128
    batch_size: int = 8
    lr: float = 1e-4
    seed: int = 0


class TrainingStep:
    """A model, a batch and an optimiser.

    Args:
        spec: What is trained.
        contender: One of ``CONTENDERS``.
        clip: The frozen base of :func:`random_base`; contenders may share it.
    """

    def __init__(self, spec: StepSpec, contender: str, clip: Any) -> None:
        self._literal = contender == LITERAL
        self._bf16 = contender == OURS_BF16
        self._model = random_model(spec, clip)
        self._model.checkpoint_activations = contender == OURS_CHECKPOINTED
        self._image_N3HW, self._ids_NL, self._pids_N = random_batch(spec)
        # As upperson.optim builds it: the paper's eps, and biases are not decayed.
        named = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
        groups = [
            {"params": [p for name, p in named if not name.endswith("bias")], "weight_decay": 4e-5},
            {"params": [p for name, p in named if name.endswith("bias")], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.Adam(groups, lr=spec.lr, eps=1e-3)

    def run(self) -> float:
        """Take one step and return its loss, computed before the update."""
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bf16):
            if self._literal:
                image_NE = literal.encode_image(self._model, self._image_N3HW)
                text_NE = literal.encode_text(self._model, self._ids_NL)
            else:
                image_NE, text_NE = (
                    F.normalize(features_NE.float(), dim=-1)
                    for features_NE in self._model(self._image_N3HW, self._ids_NL)
                )
        loss = sdm_loss(image_NE, text_NE, self._pids_N)
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return loss.item()


def random_base(spec: StepSpec) -> Any:
    """Build the frozen CLIP with random weights; UsageError if open_clip knows no such base."""
    torch.manual_seed(spec.seed)
    return build_clip(spec.base).eval()


def random_batch(spec: StepSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Return normalised images [N, 3, H, W], ids [N, L] and identities [N], two pairs each.

    Ids are zero-padded to the longest caption, as in training.
    """
    generator = torch.Generator().manual_seed(spec.seed)
    shape = (spec.batch_size, 3, spec.height_px, spec.width_px)
    pixels_N3HW = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (OPENAI_DATASET_MEAN, OPENAI_DATASET_STD)
    )
    lengths = torch.randint(
        SHORTEST_CAPTION, LONGEST_CAPTION + 1, (spec.batch_size,), generator=generator
    ).tolist()
    ids_NL = torch.zeros(spec.batch_size, max(lengths), dtype=torch.int64)
    for ids_L, length in zip(ids_NL, lengths, strict=True):
        ids_L[:length] = torch.randint(1, 49406, (length,), generator=generator)
        ids_L[0], ids_L[length - 1] = 49406, 49407
    return (pixels_N3HW / 255 - mean) / std, ids_NL, torch.arange(spec.batch_size) // 2


def random_model(spec: StepSpec, clip: Any) -> UPPerson:
    """Build UP-Person with no trained tensor at its start, where some do not matter yet."""
    torch.manual_seed(spec.seed)
    model = UPPerson(clip, UPPersonConfig(), (spec.height_px, spec.width_px)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.ndim:
                parameter.add_(_NOISE * torch.randn_like(parameter))
            elif parameter.requires_grad:
                parameter.mul_(0.8 + 0.4 * torch.rand(()))
    return model
