"""Fold smoothing factors into a plain tower, exactly.

The input of qkv and fc1 is u = LN(x) + adapter(x). Dividing u by s_c means dividing gain and bias
of the norm and the columns and bias of the adapter's up projection; the following Linear's row c is
multiplied by s_c. The input of the output projection is divided through the value columns and the
prefix values.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from upperson_export.plain import (
    Adapter,
    Attention,
    Linear,
    PackedAttention,
    PlainBlock,
    PlainImageTower,
    PlainTextTower,
)
from upperson_rt.errors import InputError

PlainTower = TypeVar("PlainTower", bound=PlainImageTower | PlainTextTower)

Factors = Mapping[str, npt.NDArray[np.float32]]
"""s by channel [D] for each site; see `upperson_calibration.smoothing` for their names."""


@torch.no_grad()
def smooth(tower: PlainTower, factors: Factors) -> PlainTower:
    """Return a copy of a folded tower that computes the same from smoother activations.

    Args:
        tower: A folded tower; left as it is.
        factors: Which channels are divided by what; a site that is missing stays.

    Raises:
        InputError: A site is not in the tower, or its factors do not fit.
    """
    smoothed = deepcopy(tower)
    remaining = dict(factors)
    for index, module in enumerate(smoothed.blocks):
        block = cast("PlainBlock", module)
        attention = block.attention
        inputs = (
            [attention.qkv]
            if isinstance(attention, PackedAttention)
            else [attention.q, attention.kv]
        )
        place = f"blocks.{index}"
        if (s_D := _take(remaining, f"{place}.ln_1", block.ln_1)) is not None:
            _divide_norm(block.ln_1, block.adapter_attn, s_D, inputs)
        if (s_D := _take(remaining, f"{place}.ln_2", block.ln_2)) is not None:
            _divide_norm(block.ln_2, block.adapter_mlp, s_D, [block.mlp.fc1])
        if (s_D := _take(remaining, f"{place}.attention.out", block.ln_1)) is not None:
            _divide_values(attention, inputs[-1], s_D)
    if remaining:
        raise InputError(
            f"smoothing factors for '{next(iter(remaining))}', but the tower has "
            f"{len(smoothed.blocks)} blocks and no such site: calibrate this model again"
        )
    return smoothed


def _take(
    remaining: dict[str, npt.NDArray[np.float32]], site: str, norm: nn.Module
) -> Tensor | None:
    factors = remaining.pop(site, None)
    if factors is None:
        return None
    width = len(norm.get_parameter("weight"))
    if factors.shape != (width,) or not (np.isfinite(factors) & (factors > 0)).all():
        raise InputError(
            f"smoothing factors of '{site}' must be {width} positive numbers, found shape "
            f"{factors.shape}: calibrate this model again"
        )
    return torch.from_numpy(factors.astype(np.float32))


def _divide_norm(
    norm: nn.Module, adapter: Adapter | None, s_D: Tensor, following: list[Linear]
) -> None:
    for name in ("weight", "bias"):
        norm.get_parameter(name).div_(s_D)
    if adapter is not None:
        adapter.up.weight.div_(s_D)
        adapter.up.bias.div_(s_D)
    for linear in following:
        linear.weight.mul_(s_D[:, None])


def _divide_values(attention: Attention, values: Linear, s_D: Tensor) -> None:
    """Divide the attended rows: values are the last D columns of what projects them."""
    values.weight[:, -attention.width :].div_(s_D)
    values.bias[-attention.width :].div_(s_D)
    if attention.prefix_v is not None:
        attention.prefix_v.div_(s_D.reshape(1, attention.heads, 1, -1))
    attention.out.weight.mul_(s_D[:, None])
