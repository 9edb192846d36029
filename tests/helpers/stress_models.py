"""Outliers of real CLIP weights, put into any model on purpose.

Each function returns a changed copy of a model that computes the same in float32, or nearly so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from upperson.model.encoder import UPPerson


@torch.no_grad()
def with_loud_channels(
    model: UPPerson, *, largest: float = 64.0, blocks: Iterable[int] | None = None
) -> UPPerson:
    """Multiply three channels of the inputs of qkv and fc1, and divide the weights that read them.

    Factors are from ``largest / 8`` to ``largest``; float32 computes the same.
    """
    loud = deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    for tower in (loud.image, loud.text):
        for index in range(len(tower.blocks)) if blocks is None else blocks:
            block: Any = tower.blocks[index]
            width = len(block.ln_1.weight)
            readers_of_attention = [block.attn.in_proj_weight]
            if block.lora is not None:
                readers_of_attention += [block.lora.key.down, block.lora.value.down]
            for norm, adapter, readers in (
                (block.ln_1, block.adapter_attn, readers_of_attention),
                (block.ln_2, block.adapter_mlp, [block.mlp.c_fc.weight]),
            ):
                factor = torch.ones(width)
                chosen = torch.randperm(width, generator=generator)[:3]
                factor[chosen] = torch.logspace(0, -3, 3, base=2.0) * largest
                norm.weight.mul_(factor)
                norm.bias.mul_(factor)
                if adapter is not None:
                    adapter.up.weight.mul_(factor[:, None])
                    adapter.up.bias.mul_(factor)
                for weight in readers:
                    weight.div_(factor)
    return loud


@torch.no_grad()
def with_stream_outlier(
    model: UPPerson, images: Tensor, input_ids: Tensor, *, magnitude: float
) -> UPPerson:
    """Carry a constant of a large magnitude in one channel of the residual stream.

    It starts at the MLP of the first block and reaches every later norm and L-Adapter, whose
    weights are changed so that the model computes nearly the same: a norm now divides by a
    deviation that the outlier rules, so differences of deviation between tokens are lost.
    """
    changed = deepcopy(model)
    for tower, last_norm, inputs in (
        (changed.image, changed.image.ln_post, images),
        (changed.text, changed.text.ln_final, input_ids),
    ):
        start, *later = cast(list[Any], list(tower.blocks))
        norms = [norm for item in later for norm in (item.ln_1, item.ln_2)] + [last_norm]
        encode = changed.encode_image if tower is changed.image else changed.encode_text
        deviations = _deviations(norms, encode, inputs)
        width = len(last_norm.weight)
        channel = width // 3
        outlier = torch.zeros(width)
        outlier[channel] = magnitude
        start.mlp.c_proj.bias.add_(outlier)
        for norm, deviation in zip(norms, deviations, strict=True):
            new_deviation = (deviation**2 + outlier.var(unbiased=False)) ** 0.5
            norm.bias.sub_(norm.weight * (outlier - outlier.mean()) / deviation)
            norm.weight.mul_(new_deviation / deviation)
        for item in later:
            for adapter in (item.adapter_attn, item.adapter_mlp):
                if adapter is not None:
                    adapter.down.bias.sub_(adapter.down.weight @ outlier)
    return changed


@torch.no_grad()
def with_prefix_scale(model: UPPerson, scale: float = 100.0) -> UPPerson:
    """Set S of every prefix, as the last state of the official training has it."""
    scaled = deepcopy(model)
    for tower in (scaled.image, scaled.text):
        for item in tower.blocks:
            block: Any = item
            if block.prefix is not None:
                block.prefix.scale.fill_(scale)
    return scaled


def _deviations(
    norms: list[nn.Module], encode: Callable[[Tensor], Tensor], inputs: Tensor
) -> list[Tensor]:
    found: dict[nn.Module, Tensor] = {}

    def keep(norm: nn.Module, entering: tuple[Tensor]) -> None:
        found[norm] = entering[0].std(dim=-1, unbiased=False).mean()

    handles = [norm.register_forward_pre_hook(keep) for norm in norms]
    encode(inputs)
    for handle in handles:
        handle.remove()
    return [found[norm] for norm in norms]
