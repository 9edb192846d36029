"""A model and a batch that cost what real ones do: shapes are real, weights and inputs random.

Shapes: N batch, H image height, W image width, L tokens.
"""

from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any, TypeAlias

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import Tensor

from upperson.model.base import build_clip
from upperson.model.encoder import UPPerson
from upperson.model.parts import UPPersonConfig
from upperson_rt.preprocess import resize_image
from upperson_rt.towers import Tower
from upperson_synthetic import SyntheticSpec, iter_samples

SHORTEST_CAPTION, LONGEST_CAPTION = 20, 30
"""Tokens of a caption, SOT and EOT included."""

_NOISE = 0.02

BaseOption: TypeAlias = Annotated[
    str, typer.Option("--base", help="Shapes to run: upperson-small or a ViT CLIP of open_clip.")
]
HeightOption: TypeAlias = Annotated[int, typer.Option("--height", min=1, help="Image height, px.")]
WidthOption: TypeAlias = Annotated[int, typer.Option("--width", min=1, help="Image width, px.")]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Shapes are the base's, weights and inputs are random by seed."""

    base: str = "ViT-B-16-quickgelu"
    height_px: int = 384
    width_px: int = 128
    batch_size: int = 8
    seed: int = 0


def random_base(spec: ModelSpec) -> Any:
    """Build the frozen CLIP; UsageError if open_clip knows no such base."""
    torch.manual_seed(spec.seed)
    return build_clip(spec.base).eval()


def spread(clip: Any) -> None:
    """Let the matrices of timm's image tower, if there is one, pass on what they get.

    timm's first values, of 0.02 whatever the width, leave attention nearly even and embeddings
    nearly alike.
    """
    with torch.no_grad():
        for name, tensor in clip.state_dict().items():
            if name.startswith("visual.trunk.") and tensor.ndim == 2:
                tensor.mul_(tensor.shape[1] ** -0.5 / tensor.std())


def random_model(spec: ModelSpec, clip: Any) -> UPPerson:
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


def random_batch(spec: ModelSpec) -> tuple[Tensor, Tensor, Tensor]:
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


def tower_inputs(spec: ModelSpec) -> dict[Tower, NDArray[Any]]:
    """Return rendered people uint8 [N, H, W, 3], and random captions int32 [N, L]."""
    people = SyntheticSpec(
        look="street",
        train_ids=spec.batch_size,
        val_ids=0,
        test_ids=0,
        views=1,
        captions_per_image=1,
        seed=spec.seed,
    )
    images = [
        resize_image(np.asarray(image), spec.height_px, spec.width_px)
        for image, _, _ in islice(iter_samples(people, "train"), spec.batch_size)
    ]
    _, ids_NL, _ = random_batch(spec)
    return {"image": np.stack(images), "text": ids_NL.numpy().astype(np.int32)}
