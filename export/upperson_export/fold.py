"""Fold a trained UP-Person, and factors that smooth its activations, into plain towers, exactly.

    LoRA dW                      -> rows of the key and value projection
    1 / sqrt(head width)         -> query rows and bias
    ck, cv and S of the prefix   -> constant key and value rows
    adapter scales s1, s2        -> adapter up projection
    mean, std and 1/255          -> patch projection and patch bias

Arithmetic is done in float64 and rounded once. The model is read through the attributes named in
:class:`TrainedModel`; nothing of the training package is imported.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from upperson_export.blocks import Adapter, Attention, Linear, Mlp, PackedAttention, PlainBlock
from upperson_export.plain import (
    PIXEL_CENTRE,
    PatchProjection,
    PlainImageTower,
    PlainTextTower,
    PlainTower,
)
from upperson_rt.errors import InputError, UsageError

AnyPlainTower = TypeVar("AnyPlainTower", bound=PlainTower)


class TrainedModel(Protocol):
    """What folding reads of a model; ``upperson.model.encoder.UPPerson`` is one.

    ``image`` has conv1, class_embedding, positional_embedding, ln_pre, blocks, ln_post and proj;
    ``text`` has token_embedding, positional_embedding, mask, prefix_length, blocks, ln_final and
    text_projection. A block has ln_1, attn (in_proj_weight, in_proj_bias, out_proj), ln_2,
    mlp (c_fc, gelu, c_proj), heads, and prefix (a call gives its rows), lora (key and value, each
    with scale, up and down), adapter_attn, adapter_mlp, each of which may be None.
    """

    image: Any
    text: Any
    image_size: tuple[int, int]
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


@torch.no_grad()
def fold_image_tower(model: TrainedModel) -> PlainImageTower:
    """Fold the image tower; its input becomes uint8 RGB [N, H, W, 3].

    Raises:
        InputError: A weight is not finite.
        UsageError: The MLP's activation is neither QuickGELU nor GELU.
    """
    tower = model.image
    _require_finite(tower, "image")
    kernel_D3rc = tower.conv1.weight.double()
    std_3 = torch.tensor(model.image_std, dtype=torch.float64)
    mean_3 = torch.tensor(model.image_mean, dtype=torch.float64)
    # (x / 255 - mean) / std of x = centre + centre * centred, pushed through the convolution.
    scaled_D3rc = kernel_D3rc / std_3[None, :, None, None]
    centre_3 = PIXEL_CENTRE / 255 - mean_3
    bias_D = (scaled_D3rc * centre_3[None, :, None, None]).sum(dim=(1, 2, 3))
    weight_rc3D = (scaled_D3rc * (PIXEL_CENTRE / 255)).permute(2, 3, 1, 0)
    positions_LD = tower.positional_embedding.double()
    return PlainImageTower(
        patch=PatchProjection(
            weight=weight_rc3D.reshape(-1, len(kernel_D3rc)),
            positions=(positions_LD[1:] + bias_D)[None],
            patch_size=tuple(tower.conv1.kernel_size),
        ),
        class_row=(tower.class_embedding.double() + positions_LD[0])[None, None],
        ln_pre=tower.ln_pre,
        blocks=_fold_blocks(tower.blocks),
        ln_post=tower.ln_post,
        projection=tower.proj,
    ).eval()


@torch.no_grad()
def fold_text_tower(model: TrainedModel) -> PlainTextTower:
    """Fold the text tower; its input becomes int32 [N, L]. Raises as :func:`fold_image_tower`."""
    tower = model.text
    _require_finite(tower, "text")
    return PlainTextTower(
        embedding=tower.token_embedding.weight,
        positions=tower.positional_embedding,
        visible=tower.mask,
        prefix_length=tower.prefix_length,
        blocks=_fold_blocks(tower.blocks),
        ln_final=tower.ln_final,
        projection=tower.text_projection,
    ).eval()


@torch.no_grad()
def smooth(tower: AnyPlainTower, factors: Mapping[str, npt.NDArray[np.float32]]) -> AnyPlainTower:
    """Return a copy of a folded tower that computes the same from smoother activations.

    At a site, what Linears read is divided by s_c in channel c, by changing the weights that
    compute it, and row c of each reader is multiplied by s_c; see `upperson_calibration.smoothing`.

    Args:
        tower: A folded tower; left as it is.
        factors: s by channel [C] for each site; one that is missing stays.

    Raises:
        InputError: A site is not in the tower, or its factors do not fit.
    """
    smoothed = deepcopy(tower)
    sites = smoothed.sites()
    if unknown := [name for name in factors if name not in sites]:
        raise InputError(
            f"smoothing factors for '{unknown[0]}', but the tower has {len(smoothed.blocks)} "
            "blocks and no such site: calibrate this model again"
        )
    for name, site in sites.items():
        if (s_C := factors.get(name)) is None:
            continue
        width = len(site.readers[0].weight)
        if s_C.shape != (width,) or not (np.isfinite(s_C) & (s_C > 0)).all():
            raise InputError(
                f"smoothing factors of '{name}' must be {width} positive numbers, found shape "
                f"{s_C.shape}: calibrate this model again"
            )
        factors_C = torch.from_numpy(s_C.astype(np.float32))
        site.divide(factors_C)
        for reader in site.readers:
            reader.weight.mul_(factors_C[:, None])
    return smoothed


def _fold_blocks(blocks: nn.ModuleList) -> list[PlainBlock]:
    """Fold all blocks; in the last one queries are a projection of their own."""
    last = len(blocks) - 1
    return [
        _fold_block(block, Attention if index == last else PackedAttention)
        for index, block in enumerate(blocks)
    ]


def _fold_block(block: Any, attention: type[Attention]) -> PlainBlock:
    query_DD, key_DD, value_DD = block.attn.in_proj_weight.double().chunk(3)
    query_D, key_D, value_D = block.attn.in_proj_bias.double().chunk(3)
    if block.lora is not None:
        key_DD = key_DD + _delta(block.lora.key)
        value_DD = value_DD + _delta(block.lora.value)
    head_scale = (query_DD.shape[0] // block.heads) ** -0.5
    return PlainBlock(
        ln_1=block.ln_1,
        adapter_attn=_fold_adapter(block.adapter_attn),
        attention=attention(
            query=Linear((query_DD * head_scale).T, query_D * head_scale),
            key_value=Linear(torch.cat([key_DD, value_DD]).T, torch.cat([key_D, value_D])),
            out=_linear(block.attn.out_proj),
            prefix=None if block.prefix is None else block.prefix(),
            heads=block.heads,
        ),
        ln_2=block.ln_2,
        adapter_mlp=_fold_adapter(block.adapter_mlp),
        mlp=Mlp(_linear(block.mlp.c_fc), _linear(block.mlp.c_proj), _is_quick_gelu(block.mlp.gelu)),
    )


def _delta(update: Any) -> Tensor:
    """Return dW = c * B A in float64."""
    delta: Tensor = update.scale.double() * (update.up.double() @ update.down.double())
    return delta


def _fold_adapter(adapter: Any) -> Adapter | None:
    if adapter is None:
        return None
    scale = adapter.scale.double()
    return Adapter(
        _linear(adapter.down),
        Linear(adapter.up.weight.double().T * scale, adapter.up.bias.double() * scale),
    )


def _linear(layer: Any) -> Linear:
    return Linear(layer.weight.T, layer.bias)


def _is_quick_gelu(activation: nn.Module) -> bool:
    name = type(activation).__name__
    if name not in ("QuickGELU", "GELU"):
        raise UsageError(f"expected an MLP with QuickGELU or GELU, found {name}: not exportable")
    return name == "QuickGELU"


def _require_finite(tower: nn.Module, name: str) -> None:
    for key, value in tower.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise InputError(
                f"the {name} tower's tensor '{key}' has NaN or infinite values: "
                "the run diverged, train again with a lower rate"
            )
