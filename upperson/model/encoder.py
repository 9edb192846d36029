"""UP-Person: the two towers of a frozen CLIP with trained parts in every block.

Shapes: N batch, H image height, W image width, L tokens, P prefix length, D width, E embedding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from upperson.data.transforms import CLIP_STATISTICS, PixelStatistics
from upperson.model.block import TRAINED_PARTS, Block
from upperson.model.parts import UPPersonConfig
from upperson_rt.errors import UsageError


class ImageEncoder(nn.Module):
    """The image tower: patches of a crop to the feature of its class token.

    Args:
        visual: ``VisionTransformer`` of open_clip, pooling its class token.
        config: Sizes of the trained parts.
        height_px: Image height; the positional grid is interpolated to it.
        width_px: Image width.
    """

    conv1: nn.Conv2d
    class_embedding: nn.Parameter
    ln_pre: nn.Module
    ln_post: nn.Module
    proj: nn.Parameter

    def __init__(self, visual: Any, config: UPPersonConfig, height_px: int, width_px: int) -> None:
        super().__init__()
        self.conv1 = visual.conv1
        self.class_embedding = visual.class_embedding
        self.positional_embedding = interpolate_positions(
            visual.positional_embedding,
            visual.grid_size,
            patch_grid(visual.conv1.kernel_size, height_px, width_px),
        )
        self.checkpoint_activations = False
        self.ln_pre = visual.ln_pre
        self.blocks = build_blocks(visual.transformer.resblocks, config)
        self.ln_post = visual.ln_post
        self.proj = visual.proj

    def forward(self, image_N3HW: Tensor) -> Tensor:
        """Encode normalised float images [N, 3, H, W] to features [N, E], not unit norm."""
        x_NLD = self.conv1(image_N3HW).flatten(2).transpose(1, 2)
        cls_N1D = self.class_embedding.to(x_NLD.dtype).expand(x_NLD.shape[0], 1, -1)
        x_NLD = torch.cat([cls_N1D, x_NLD], dim=1)
        x_NLD = self.ln_pre(x_NLD + self.positional_embedding.to(x_NLD.dtype))
        cls_N = torch.zeros(x_NLD.shape[0], dtype=torch.int64, device=x_NLD.device)
        pooled_ND = run_blocks(self.blocks, x_NLD, None, cls_N, self.checkpoint_activations)
        out: Tensor = self.ln_post(pooled_ND) @ self.proj
        return out


class TextEncoder(nn.Module):
    """The text tower: token ids of a caption to the feature of its end token.

    Args:
        clip: ``CLIP`` of open_clip (the text tower's modules sit on it), pooling the EOT token.
        config: Sizes of the trained parts.
    """

    token_embedding: nn.Embedding
    positional_embedding: nn.Parameter
    ln_final: nn.Module
    text_projection: nn.Parameter
    context_length: int
    mask: Tensor

    def __init__(self, clip: Any, config: UPPersonConfig) -> None:
        super().__init__()
        self.token_embedding = clip.token_embedding
        self.positional_embedding = clip.positional_embedding
        self.blocks = build_blocks(clip.transformer.resblocks, config)
        self.ln_final = clip.ln_final
        self.text_projection = clip.text_projection
        self.context_length = clip.context_length
        self.register_buffer(
            "mask", causal_mask(self.context_length, config.prefix_length), persistent=False
        )
        self.prefix_length = config.prefix_length
        self.checkpoint_activations = False

    def forward(self, ids_NL: Tensor) -> Tensor:
        """Encode token ids [N, L], zero-padded, to features [N, E], not unit norm.

        L may be anything up to the context length: padding after the last EOT changes nothing,
        the causal mask hides it from the pooled token.
        """
        length = ids_NL.shape[1]
        x_NLD = self.token_embedding(ids_NL) + self.positional_embedding[:length]
        mask = self.mask[:length, : self.prefix_length + length]
        # EOT has the largest id of the vocabulary, so argmax finds its first place.
        eot_N = ids_NL.argmax(dim=-1)
        pooled_ND = run_blocks(self.blocks, x_NLD, mask, eot_N, self.checkpoint_activations)
        out: Tensor = self.ln_final(pooled_ND) @ self.text_projection
        return out


class UPPerson(nn.Module):
    """Dual encoder with everything frozen but the trained parts.

    Args:
        clip: A ``CLIP`` of open_clip with ViT towers.
        config: Sizes of the trained parts.
        image_size: (height_px, width_px) of the person crops.
        statistics: Mean and standard deviation per RGB channel, of pixels in 0..1, that images are
            normalised with; the base's own.

    Raises:
        UsageError: The base is not a plain ViT CLIP, or the size does not fit its patches.
    """

    def __init__(
        self,
        clip: Any,
        config: UPPersonConfig,
        image_size: tuple[int, int],
        statistics: PixelStatistics = CLIP_STATISTICS,
    ) -> None:
        super().__init__()
        _check_base(clip)
        self.config = config
        self.image_size = image_size
        self.statistics = statistics
        self.image_mean, self.image_std = statistics
        self.image = ImageEncoder(clip.visual, config, *image_size)
        self.text = TextEncoder(clip, config)
        self.requires_grad_(False)
        for tower in (self.image, self.text):
            for block in tower.blocks:
                for part in TRAINED_PARTS:
                    if (module := getattr(block, part)) is not None:
                        module.requires_grad_(True)

    def forward(self, image_N3HW: Tensor, ids_NL: Tensor) -> tuple[Tensor, Tensor]:
        """Encode both sides of N pairs to features [N, E] each, not unit norm."""
        return self.image(image_N3HW), self.text(ids_NL)

    @property
    def checkpoint_activations(self) -> bool:
        """Whether training keeps only the input of each block and computes the rest again.

        Gradients are the same; a step takes about a third longer and far less memory.
        """
        return self.image.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, wanted: bool) -> None:
        self.image.checkpoint_activations = self.text.checkpoint_activations = wanted

    @property
    def embed_dim(self) -> int:
        """Width E of the shared embedding space."""
        return self.image.proj.shape[1]

    def encode_image(self, image_N3HW: Tensor) -> Tensor:
        """Encode normalised images [N, 3, H, W] to unit-norm float32 [N, E]."""
        return F.normalize(self.image(image_N3HW).float(), dim=-1)

    def encode_text(self, ids_NL: Tensor) -> Tensor:
        """Encode token ids [N, L] to unit-norm float32 [N, E]."""
        return F.normalize(self.text(ids_NL).float(), dim=-1)

    def trained_state(self) -> dict[str, Tensor]:
        """Return copies of the trained tensors by name, on the CPU: what a run saves."""
        return {
            name: parameter.detach().cpu().clone()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }


def build_blocks(bases: nn.ModuleList, config: UPPersonConfig) -> nn.ModuleList:
    """Put the trained parts into every block of a tower that the configuration names."""
    return nn.ModuleList(
        Block(base, config.at(number, len(bases))) for number, base in enumerate(bases, start=1)
    )


def run_blocks(
    blocks: nn.ModuleList,
    x_NLD: Tensor,
    mask: Tensor | None,
    pooled_N: Tensor,
    checkpoint_activations: bool,
) -> Tensor:
    """Run a tower's blocks and return the pooled token of each sample, [N, D].

    The last block computes nothing else for the other tokens than their keys and values.

    Args:
        blocks: Blocks, at least one.
        x_NLD: Residual stream before the first.
        mask: Of :meth:`Block.forward`.
        pooled_N: Index of each sample's pooled token.
        checkpoint_activations: In training, keep only the input of each block.
    """
    for block in blocks:
        only_N = pooled_N if block is blocks[-1] else None
        if checkpoint_activations and torch.is_grad_enabled():
            x_NLD = checkpoint(block, x_NLD, mask, only_N, use_reentrant=False)
        else:
            x_NLD = block(x_NLD, mask, only_N)
    return x_NLD[:, 0]


def patch_grid(patch_size: tuple[int, int], height_px: int, width_px: int) -> tuple[int, int]:
    """Return (rows, columns) of patches; raise UsageError when the image does not divide."""
    rows, row_rest = divmod(height_px, patch_size[0])
    columns, column_rest = divmod(width_px, patch_size[1])
    if row_rest or column_rest or not rows or not columns:
        raise UsageError(
            f"image size {height_px}x{width_px} (height x width) does not divide into patches of "
            f"{patch_size[0]}x{patch_size[1]}: choose multiples of the patch"
        )
    return rows, columns


def interpolate_positions(
    positions: nn.Parameter, source: tuple[int, int], target: tuple[int, int]
) -> nn.Parameter:
    """Resize the positional grid [1 + rows*columns, D] bilinearly; the class row is kept.

    As the paper does: align_corners off, no antialias, rows first. Equal grids share the parameter.
    """
    if source == target:
        return positions
    width = positions.shape[1]
    grid = positions.detach()[1:].reshape(1, *source, width).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=target, mode="bilinear", align_corners=False)
    rows = grid.permute(0, 2, 3, 1).reshape(-1, width).to(positions.dtype)
    return nn.Parameter(torch.cat([positions.detach()[:1], rows]))


def causal_mask(length: int, prefix_length: int) -> Tensor:
    """Return bool [length, prefix_length + length]: every prefix row, and no later token."""
    visible = torch.ones(length, prefix_length + length, dtype=torch.bool)
    return visible.tril(prefix_length)


def _check_base(clip: Any) -> None:
    """Refuse bases whose forward pass differs from the one written here."""
    visual: Any = getattr(clip, "visual", None)
    found = []
    if not hasattr(clip, "token_embedding") or not hasattr(visual, "conv1"):
        found.append("not an open_clip CLIP with a ViT image tower")
    else:
        if getattr(visual, "pool_type", None) != "tok" or visual.attn_pool is not None:
            found.append("its image tower does not pool the class token")
        if getattr(clip, "text_pool_type", "argmax") != "argmax":
            found.append(f"its text tower pools by '{clip.text_pool_type}', not by EOT")
        if clip.attn_mask is None:
            found.append("its text tower is not causal")
        if not isinstance(clip.text_projection, nn.Parameter) or visual.proj is None:
            found.append("a tower has no plain projection matrix")
        for block in [*visual.transformer.resblocks, *clip.transformer.resblocks]:
            if not (
                isinstance(block.attn, nn.MultiheadAttention)
                and isinstance(block.ls_1, nn.Identity)
                and isinstance(block.ls_2, nn.Identity)
            ):
                found.append("its blocks use custom attention or layer scale")
                break
    if found:
        raise UsageError(
            "UP-Person needs a plain ViT CLIP such as ViT-B-16; this base is unsupported: "
            + "; ".join(found)
        )
