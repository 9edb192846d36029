"""Fold a trained UP-Person, and smoothing factors, into plain towers, exactly.

    1 / sqrt(head width)         -> query rows and bias
    pairs that rotate            -> halves of a head: query and key rows
    mean, std and 1/255          -> patch projection and patch bias

and the trained parts as `upperson_adapter.weights` says. Arithmetic is done in float64 and rounded
once. The model is read through the attributes named in :class:`TrainedModel`; nothing of the
training package is imported.
"""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from upperson_adapter import weights
from upperson_adapter.weights import TRAINED, fold_trained
from upperson_export.blocks import (
    Activation,
    Adapter,
    Attention,
    AttentionPool,
    Linear,
    Mlp,
    PlainBlock,
    Rotary,
)
from upperson_export.plain import (
    PIXEL_CENTRE,
    PatchProjection,
    PlainImageTower,
    PlainTextTower,
    PlainTower,
    Projection,
    StemStep,
)
from upperson_rt.errors import InputError, UsageError

_ACTIVATIONS: dict[tuple[str, str], Activation] = {
    ("QuickGELU", "none"): "quick_gelu",
    ("GELU", "none"): "gelu",
    ("GELU", "tanh"): "gelu_tanh",
    ("GELUTanh", "none"): "gelu_tanh",
}
"""By name of the module and how it approximates."""

AnyPlainTower = TypeVar("AnyPlainTower", bound=PlainTower)


class TrainedModel(Protocol):
    """Attributes that folding reads of a model, such as ``upperson.model.encoder.UPPerson``.

    ``image`` has stem (convolutions that do not overlap, with activations between them),
    class_embedding, positional_embedding, rotary (tables [2, L, d], as in
    `upperson.model.parts.rotated`), ln_pre, blocks, ln_post, pool, proj and proj_bias;
    ``text`` has token_embedding, positional_embedding, mask, pools_last, prefix_length, blocks,
    ln_final, text_projection and text_projection_bias. Class embedding, rotary, pool, projections,
    biases and mask may be None. A block has ln_1, attn (in_proj_weight, in_proj_bias, out_proj),
    ln_2, mlp (c_fc, gelu, c_proj), heads, and prefix, lora, adapter_attn, adapter_mlp, each
    of which may be None; `upperson_adapter.weights.fold_trained` names their tensors.
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
    positions_LD = tower.positional_embedding.double()
    class_row = None
    head: nn.Module = tower.ln_post
    if tower.class_embedding is not None:
        class_row = (tower.class_embedding.double() + positions_LD[0])[None, None]
        positions_LD = positions_LD[1:]
    if tower.pool is not None:
        head = _fold_pool(tower.ln_post, tower.pool)
    plain = PlainImageTower(
        patch=_fold_stem(model, positions_LD),
        class_row=class_row,
        ln_pre=tower.ln_pre,
        blocks=_fold_blocks(
            tower.blocks, pooled=tower.pool is None, rotates=tower.rotary is not None
        ),
        head=head,
        projection=Projection(tower.proj, tower.proj_bias),
        rotary=None if tower.rotary is None else _fold_rotary(tower.rotary),
    )
    plain.replace(fold_trained(plain.weights(), trained_tensors(tower), heads_of(tower)))
    return plain.eval()


@torch.no_grad()
def fold_text_tower(model: TrainedModel) -> PlainTextTower:
    """Fold the text tower; its input becomes int32 [N, L]."""
    tower = model.text
    _require_finite(tower, "text")
    # Rows of new words lie apart and are folded in with all that is trained.
    embedding = getattr(tower.token_embedding, "frozen", tower.token_embedding)
    plain = PlainTextTower(
        embedding=embedding.weight,
        positions=tower.positional_embedding,
        visible=tower.mask,
        pools_last=tower.pools_last,
        prefix_length=tower.prefix_length,
        blocks=_fold_blocks(tower.blocks, pooled=True),
        ln_final=tower.ln_final,
        projection=Projection(tower.text_projection, tower.text_projection_bias),
    )
    plain.replace(fold_trained(plain.weights(), trained_tensors(tower), heads_of(tower)))
    return plain.eval()


def trained_tensors(tower: Any) -> dict[str, npt.NDArray[Any]]:
    """Return the trained tensors of a model's tower, by names such as ``blocks.0.lora.key.up``.

    Where keys rotate, their channels have the order of the folded tower.
    """
    found = {name: value for name, value in tower.state_dict().items() if TRAINED.fullmatch(name)}
    if getattr(tower, "rotary", None) is not None:
        for name, value in found.items():
            if name.endswith(".lora.key.up"):
                found[name] = value[_pairs_as_halves(len(value), heads_of(tower))]
            elif name.endswith(".prefix.key_tokens"):
                found[name] = value[:, _pairs_as_halves(value.shape[1], heads_of(tower))]
    return {name: value.numpy() for name, value in found.items()}


def heads_of(tower: Any) -> int:
    """Return the attention heads of a model's tower."""
    return int(tower.blocks[0].heads)


def _fold_stem(model: TrainedModel, positions_LD: Tensor) -> PatchProjection:
    """Fold the way from pixels to patches; the normalisation goes into its first convolution."""
    layers = [layer for layer in model.image.stem.modules() if not list(layer.children())]
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    activations = [layer for layer in layers if not isinstance(layer, nn.Conv2d)]
    linears: list[tuple[Tensor, Tensor, tuple[int, int]]] = []
    for index, layer in enumerate(convolutions):
        kernel_DCrc = layer.weight.double()
        bias_D = kernel_DCrc.new_zeros(len(kernel_DCrc))
        if layer.bias is not None:
            bias_D = bias_D + layer.bias.double()
        if index == 0:
            kernel_DCrc, offset_D = _with_normalisation(model, kernel_DCrc)
            bias_D = bias_D + offset_D
        weight_CD = kernel_DCrc.permute(2, 3, 1, 0).reshape(-1, len(kernel_DCrc))
        rows, columns = layer.kernel_size
        linears.append((weight_CD, bias_D, (rows, columns)))
    *before, (weight, bias_D, patch_size) = linears
    return PatchProjection(
        weight=weight,
        positions=(positions_LD + bias_D)[None],
        patch_size=patch_size,
        stem=[
            StemStep(Linear(weight, bias), size, _activation(activation))
            for (weight, bias, size), activation in zip(before, activations, strict=True)
        ],
    )


def _with_normalisation(model: TrainedModel, kernel_D3rc: Tensor) -> tuple[Tensor, Tensor]:
    """Return a kernel for centred pixels, and what is added to its output [D]."""
    std_3 = torch.tensor(model.image_std, dtype=torch.float64)
    mean_3 = torch.tensor(model.image_mean, dtype=torch.float64)
    # (x / 255 - mean) / std of x = centre + centre * centred, pushed through the convolution.
    scaled_D3rc = kernel_D3rc / std_3[None, :, None, None]
    centre_3 = PIXEL_CENTRE / 255 - mean_3
    offset_D = (scaled_D3rc * centre_3[None, :, None, None]).sum(dim=(1, 2, 3))
    return scaled_D3rc * (PIXEL_CENTRE / 255), offset_D


def _fold_pool(norm: nn.Module, pool: Any) -> AttentionPool:
    """Fold attention pooling (latent, q, kv, proj, norm, mlp): its query is a constant."""
    width = pool.q.in_features
    query_1D = pool.latent[0].double() @ pool.q.weight.double().T + pool.q.bias.double()
    return AttentionPool(
        norm=norm,
        query=query_1D * (width // pool.num_heads) ** -0.5,
        key_value=_linear(pool.kv),
        out=_linear(pool.proj),
        mlp_norm=pool.norm,
        mlp=Mlp(_linear(pool.mlp.fc1), _linear(pool.mlp.fc2), _activation(pool.mlp.act)),
        heads=pool.num_heads,
    )


@torch.no_grad()
def smooth(tower: AnyPlainTower, factors: Mapping[str, npt.NDArray[np.float32]]) -> AnyPlainTower:
    """Return a copy of a folded tower that computes the same from smoother activations.

    See `upperson_adapter.weights.smooth`.
    """
    smoothed = deepcopy(tower)
    smoothed.replace(weights.smooth(tower.weights(), tower.sites(), factors))
    return smoothed


def _fold_rotary(rotary_2Ld: Tensor) -> Rotary:
    cosine_Ld, sine_Ld = rotary_2Ld[..., _pairs_as_halves(rotary_2Ld.shape[-1], 1)]
    return cosine_Ld, sine_Ld


def _pairs_as_halves(width: int, heads: int) -> Tensor:
    """Return the order that puts the first channels of all pairs of a head before the second ones.

    Rotation then exchanges halves instead of neighbours. Queries and keys in the same order have
    the same products.
    """
    return torch.arange(width).view(heads, -1, 2).transpose(1, 2).flatten()


def _fold_blocks(blocks: nn.ModuleList, *, pooled: bool, rotates: bool = False) -> list[PlainBlock]:
    """Fold all blocks; where one row is pooled, the last one projects its query apart."""
    last = len(blocks) - 1 if pooled else None
    return [
        _fold_block(block, packed=index != last, rotates=rotates)
        for index, block in enumerate(blocks)
    ]


def _fold_block(block: Any, *, packed: bool, rotates: bool) -> PlainBlock:
    """Build a block; its trained parts have their shapes, and no values yet."""
    width = block.attn.in_proj_weight.shape[1]
    rows = torch.arange(3 * width)
    if rotates:
        order_D = _pairs_as_halves(width, block.heads)
        rows[: 2 * width] = torch.cat([order_D, width + order_D])
    sizes = (width, 2 * width)
    query_DD, key_value_DD = block.attn.in_proj_weight.double()[rows].split(sizes)
    query_D, key_value_D = block.attn.in_proj_bias.double()[rows].split(sizes)
    head_scale = (width // block.heads) ** -0.5
    return PlainBlock(
        ln_1=block.ln_1,
        adapter_attn=_adapter(block.adapter_attn),
        attention=Attention(
            query=Linear((query_DD * head_scale).T, query_D * head_scale),
            key_value=Linear(key_value_DD.T, key_value_D),
            out=_linear(block.attn.out_proj),
            prefix=_prefix(block.prefix),
            heads=block.heads,
            packed=packed,
        ),
        ln_2=block.ln_2,
        adapter_mlp=_adapter(block.adapter_mlp),
        mlp=Mlp(_linear(block.mlp.c_fc), _linear(block.mlp.c_proj), _activation(block.mlp.gelu)),
    )


def _prefix(prefix: Any) -> tuple[Tensor, Tensor] | None:
    return None if prefix is None else (prefix.key_tokens, prefix.value_tokens)


def _adapter(adapter: Any) -> Adapter | None:
    return None if adapter is None else Adapter(_linear(adapter.down), _linear(adapter.up))


def _linear(layer: Any) -> Linear:
    return Linear(layer.weight.T, layer.bias)


def _activation(activation: nn.Module) -> Activation:
    name = type(activation).__name__
    found = _ACTIVATIONS.get((name, getattr(activation, "approximate", "none")))
    if found is None:
        raise UsageError(
            f"expected an MLP with QuickGELU or GELU, found {name}: not exportable",
            code="activation_unknown",
            found=name,
        )
    return found


def _require_finite(tower: nn.Module, name: str) -> None:
    for key, value in tower.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise InputError(
                f"the {name} tower's tensor '{key}' has NaN or infinite values: "
                "the run diverged, train again with a lower rate",
                code="weight_not_finite",
                tower=name,
                tensor=key,
            )
