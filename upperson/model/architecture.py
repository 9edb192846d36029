"""The parts of a base in one description, for open_clip and timm alike.

UP-Person's parts fit any transformer block that normalises first. What differs between bases lies
around the blocks: how pictures become patches, whether there is a class token, what text may look
at, which token or tokens give the embedding. A base whose forward pass differs in anything else is
refused, with the reason.

Shapes: N batch, D width, E embedding, L tokens, d width of a head.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from upperson_rt.errors import UsageError

_UNKNOWN_STEM = "its image tower makes patches in an unknown way"
_CUSTOM_BLOCKS = "its blocks use custom attention, layer scale or activation"


@dataclass(frozen=True, slots=True)
class FrozenBlock:
    """A block of a base by the names that open_clip gives its parts."""

    ln_1: nn.Module
    attn: nn.MultiheadAttention
    ln_2: nn.Module
    mlp: nn.Module
    """Has c_fc, gelu and c_proj."""


@dataclass(frozen=True, slots=True)
class ImageArchitecture:
    """An image tower."""

    stem: nn.Module
    """Pictures [N, 3, H, W] to patches [N, D, rows, columns]: convolutions that do not overlap."""

    patch_px: tuple[int, int]
    grid: tuple[int, int]
    """(rows, columns) of patches that the positions are for."""

    class_embedding: nn.Parameter | None
    """[D], the first token, if there is one. It is pooled where `pool` is None."""

    positions: nn.Parameter
    """[L, D]; the class token's, if there is one, is the first row."""

    rotary: Callable[[tuple[int, int]], Tensor] | None
    """(rows, columns) of patches to the tables [2, L, d] of `upperson.model.parts.rotated`, which
    all blocks share; None without rotary embeddings. Only with `pool`."""

    ln_pre: nn.Module
    blocks: Sequence[FrozenBlock]
    ln_post: nn.Module
    pool: nn.Module | None
    """Tokens after the norm [N, L, D] to one [N, D]; None: the class token is taken."""

    projection: nn.Parameter | None
    """[D, E]; None where D is E and nothing is projected."""

    projection_bias: nn.Parameter | None


@dataclass(frozen=True, slots=True)
class TextArchitecture:
    """A text tower."""

    token_embedding: nn.Embedding
    positions: nn.Parameter
    """[context length, D]."""

    blocks: Sequence[FrozenBlock]
    ln_final: nn.Module
    projection: nn.Parameter
    projection_bias: nn.Parameter | None
    causal: bool
    """Whether a token looks at earlier ones alone. If not, padding counts: it was trained on
    captions padded to the context, and gives another embedding with less."""

    pooled: Literal["eot", "last"]
    """The token that gives the embedding: the end token, which has the largest id, or the last."""


def image_architecture(clip: Any) -> ImageArchitecture:
    """Describe the image tower of an open_clip model; its modules are shared, not copied.

    UsageError if its forward pass differs from what can be described.
    """
    visual: Any = getattr(clip, "visual", None)
    if hasattr(visual, "trunk"):
        return _of_timm(visual)
    if not hasattr(visual, "conv1"):
        raise _unsupported("not an open_clip CLIP with a ViT image tower")
    if getattr(visual, "pool_type", None) != "tok" or visual.attn_pool is not None:
        raise _unsupported("its image tower does not pool the class token")
    if visual.proj is None:
        raise _unsupported("its image tower has no plain projection matrix")
    return ImageArchitecture(
        stem=visual.conv1,
        patch_px=tuple(visual.conv1.kernel_size),
        grid=tuple(visual.grid_size),
        class_embedding=visual.class_embedding,
        positions=visual.positional_embedding,
        rotary=None,
        ln_pre=visual.ln_pre,
        blocks=_blocks(visual.transformer),
        ln_post=visual.ln_post,
        pool=None,
        projection=visual.proj,
        projection_bias=None,
    )


def text_architecture(clip: Any) -> TextArchitecture:
    """Describe the text tower; as `image_architecture`."""
    text: Any = getattr(clip, "text", clip)
    if not hasattr(text, "token_embedding") or not hasattr(text, "transformer"):
        raise _unsupported("its text tower is not a transformer of open_clip")
    pooled = getattr(text, "text_pool_type", getattr(text, "pool_type", "argmax"))
    causal = text.attn_mask is not None
    projection: Any = text.text_projection
    bias = None
    if isinstance(projection, nn.Linear):
        projection, bias = _frozen(projection.weight.detach().T), projection.bias
    found = []
    if pooled not in ("argmax", "last"):
        found.append(f"its text tower pools by '{pooled}', neither by EOT nor by the last token")
    if pooled == "last" and causal:
        found.append("its text tower pools the last token but is causal")
    if getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False):
        found.append("its text tower has a class token or masks padding")
    if getattr(text, "pad_id", 0) != 0:
        found.append(f"its text tower is padded with {text.pad_id}, not 0")
    if not isinstance(projection, nn.Parameter):
        found.append("its text tower has no plain projection matrix")
    if found:
        raise _unsupported(*found)
    return TextArchitecture(
        token_embedding=text.token_embedding,
        positions=text.positional_embedding,
        blocks=_blocks(text.transformer),
        ln_final=text.ln_final,
        projection=projection,
        projection_bias=bias,
        causal=causal,
        pooled="eot" if pooled == "argmax" else "last",
    )


def _blocks(transformer: Any) -> list[FrozenBlock]:
    """Take the blocks of a transformer of open_clip."""
    blocks = []
    for block in transformer.resblocks:
        plain = (
            isinstance(block.attn, nn.MultiheadAttention)
            and isinstance(block.ls_1, nn.Identity)
            and isinstance(block.ls_2, nn.Identity)
            and isinstance(block.mlp.gelu, (nn.GELU, QuickGELU))
        )
        if not plain:
            raise _unsupported(_CUSTOM_BLOCKS)
        blocks.append(FrozenBlock(block.ln_1, block.attn, block.ln_2, block.mlp))
    return blocks


# --- timm ---


def _of_timm(visual: Any) -> ImageArchitecture:
    """Describe a ViT of timm that pools its class token, or by SigLIP's attention over all tokens.

    The second kind may have rotary embeddings, as PE-Core has.
    """
    from timm.layers.attention_pool import AttentionPoolLatent
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    trunk: Any = visual.trunk
    if (kind := type(trunk)) not in (VisionTransformer, Eva):
        raise _unsupported(f"its image tower is timm's {kind.__name__}, not a ViT")
    pool = trunk.attn_pool
    has_class_token = trunk.cls_token is not None
    found = []
    if len(visual.head):
        found.append("its image tower has a projection behind timm's")
    if trunk.reg_token is not None or trunk.num_prefix_tokens != int(has_class_token):
        found.append("its image tower has register tokens")
    if trunk.pos_embed is None:
        found.append("its image tower has no table of positions")
    if not isinstance(trunk.fc_norm, nn.Identity):
        found.append("its image tower norms what it has pooled")
    if trunk.global_pool == "map":
        if not (isinstance(pool, AttentionPoolLatent) and _is_plain_pool(pool)):
            found.append("its attention pooling is of another kind than SigLIP's")
    elif trunk.global_pool != "token" or not has_class_token or kind is Eva:
        found.append(f"its image tower pools by '{trunk.global_pool}'")
    if found:
        raise _unsupported(*found)
    positions_LD = trunk.pos_embed.detach()[0]
    if has_class_token and trunk.no_embed_class:
        positions_LD = torch.cat([torch.zeros_like(positions_LD[:1]), positions_LD])
    stem, patch_px = _stem_of_timm(trunk.patch_embed)
    head = trunk.head
    projected = isinstance(head, nn.Linear)
    return ImageArchitecture(
        stem=stem,
        patch_px=patch_px,
        grid=tuple(trunk.patch_embed.grid_size),
        class_embedding=_frozen(trunk.cls_token.detach()[0, 0]) if has_class_token else None,
        positions=_frozen(positions_LD),
        rotary=_rotary_of_timm(trunk),
        ln_pre=trunk.norm_pre,
        blocks=[_block_of_timm(block) for block in trunk.blocks],
        ln_post=trunk.norm,
        pool=pool,
        projection=_frozen(head.weight.detach().T) if projected else None,
        projection_bias=head.bias if projected else None,
    )


def _rotary_of_timm(trunk: Any) -> Callable[[tuple[int, int]], Tensor] | None:
    """Return what makes the tables of a trunk's rotary embeddings for a grid, as timm makes them.

    timm stretches the positions of any grid over the one that a base was trained with. The class
    token has no place in the grid, and is not rotated.
    """
    from timm.layers.pos_embed_sincos import RotaryEmbeddingCat

    rope: Any = getattr(trunk, "rope", None)
    if rope is None:
        return None
    if type(rope) is not RotaryEmbeddingCat or getattr(rope, "rotate_half", False):
        raise _unsupported("its rotary embeddings are of another kind than PE-Core's")

    def tables(grid: tuple[int, int]) -> Tensor:
        resized = deepcopy(rope)
        resized.update_feat_shape(list(grid))
        sine_Ld, cosine_Ld = resized.get_embed().detach().chunk(2, dim=-1)
        sine_Ld = sine_Ld * sine_Ld.new_tensor([-1.0, 1.0]).repeat(sine_Ld.shape[1] // 2)
        tables_2Ld = torch.stack([cosine_Ld, sine_Ld])
        if trunk.cls_token is None:
            return tables_2Ld
        still_21d = tables_2Ld.new_tensor([1.0, 0.0])[:, None, None].expand(-1, 1, rope.dim)
        return torch.cat([still_21d, tables_2Ld], dim=1)

    return tables


def _stem_of_timm(embed: Any) -> tuple[nn.Module, tuple[int, int]]:
    """Return the patch projection: one convolution, or several with GELU between them."""
    from timm.layers.patch_embed import PatchEmbed

    if isinstance(embed, PatchEmbed) and isinstance(embed.norm, nn.Identity):
        projection: Any = embed.proj
        return projection, _sides(projection)
    layers: list[nn.Module] = []
    rows, columns = 1, 1
    for layer in getattr(embed, "backbone", ()):
        convolution: Any = getattr(layer, "conv", None)
        norm: Any = getattr(layer, "bn", None)
        if not (isinstance(convolution, nn.Conv2d) and _is_patch_convolution(convolution)):
            raise _unsupported(_UNKNOWN_STEM)
        if isinstance(norm, nn.BatchNorm2d) and type(getattr(norm, "act", None)) is nn.GELU:
            layers += [_with_norm(convolution, norm), nn.GELU()]
        elif isinstance(norm, nn.Module) and not list(norm.modules())[1:]:
            layers.append(convolution)
        else:
            raise _unsupported(_UNKNOWN_STEM)
        more = _sides(convolution)
        rows, columns = rows * more[0], columns * more[1]
    if not layers or not isinstance(getattr(embed, "proj", None), nn.Identity):
        raise _unsupported(_UNKNOWN_STEM)
    return nn.Sequential(*layers), (rows, columns)


def _sides(convolution: nn.Conv2d) -> tuple[int, int]:
    rows, columns = convolution.kernel_size
    return rows, columns


def _is_patch_convolution(convolution: nn.Conv2d) -> bool:
    return (
        convolution.kernel_size == convolution.stride
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.padding in ((0, 0), "valid")
    )


def _with_norm(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """Return a convolution with a batch norm inside: frozen, its statistics are constants."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    gain_D = norm.weight.double() * (norm.running_var.double() + norm.eps).rsqrt()
    bias_D = norm.bias.double() - norm.running_mean.double() * gain_D
    if convolution.bias is not None:
        bias_D = bias_D + convolution.bias.double() * gain_D
    weight = convolution.weight.double() * gain_D[:, None, None, None]
    merged = nn.Conv2d(
        convolution.in_channels,
        convolution.out_channels,
        _sides(convolution),
        _sides(convolution),  # They do not overlap.
        device=weight.device,
    )
    merged.weight, merged.bias = _frozen(weight.float()), _frozen(bias_D.float())
    return merged


def _block_of_timm(block: Any) -> FrozenBlock:
    """Give the parts of a timm block the names of open_clip's; parameters are shared."""
    source = block.attn
    norm = getattr(source, "norm", nn.Identity())
    plain = _is_plain_block(block) and all(
        isinstance(part, nn.Identity) for part in (source.q_norm, source.k_norm, norm)
    )
    if not plain or not _is_plain_mlp(block.mlp) or source.qkv.bias is None:
        raise _unsupported(_CUSTOM_BLOCKS)
    width = source.qkv.in_features
    attention = nn.MultiheadAttention(width, source.num_heads, batch_first=True, device="meta")
    attention.in_proj_weight, attention.in_proj_bias = source.qkv.weight, source.qkv.bias
    attention.out_proj.weight, attention.out_proj.bias = source.proj.weight, source.proj.bias
    mlp = nn.Sequential(OrderedDict(c_fc=block.mlp.fc1, gelu=block.mlp.act, c_proj=block.mlp.fc2))
    return FrozenBlock(block.norm1, attention, block.norm2, mlp)


def _is_plain_block(block: Any) -> bool:
    """Return whether a block has attention of a known kind and no layer scale."""
    from timm.layers.attention import AttentionRope
    from timm.models.eva import EvaBlock
    from timm.models.vision_transformer import Block

    if type(block) is Block:
        return isinstance(block.ls1, nn.Identity) and isinstance(block.ls2, nn.Identity)
    return (
        type(block) is EvaBlock
        and type(block.attn) is AttentionRope
        and isinstance(block.attn.qkv, nn.Linear)
        and getattr(block.attn, "gate", None) is None
        and block.gamma_1 is None
        and block.gamma_2 is None
    )


def _is_plain_pool(pool: Any) -> bool:
    return (
        pool.pos_embed is None
        and pool.latent_len == 1
        and pool.pool == "token"
        and isinstance(pool.q, nn.Linear)
        and all(isinstance(norm, nn.Identity) for norm in (pool.q_norm, pool.k_norm))
        and pool.mlp is not None
        and _is_plain_mlp(pool.mlp)
        and pool.proj.out_features == pool.latent_dim
    )


def _is_plain_mlp(mlp: Any) -> bool:
    from timm.layers.activations import GELUTanh  # As in SigLIP 2's B/32 and So400m.
    from timm.layers.mlp import Mlp

    return (
        type(mlp) is Mlp
        and isinstance(mlp.fc1, nn.Linear)
        and isinstance(mlp.act, (nn.GELU, GELUTanh, QuickGELU))
        and isinstance(mlp.norm, nn.Identity)
    )


def _frozen(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value, requires_grad=False)


def _unsupported(*reasons: str) -> UsageError:
    return UsageError(
        "UP-Person needs a ViT CLIP with plain blocks, such as ViT-B-16; this base is unsupported: "
        + "; ".join(reasons),
        code="base_unsupported",
        reasons="; ".join(reasons),
    )
