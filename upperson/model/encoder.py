"""UP-Person: the two towers of a frozen CLIP with trained parts in every block.

Shapes: N batch, H image height, W image width, L tokens, P prefix length, D width, E embedding.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from upperson.data.transforms import CLIP_STATISTICS, PixelStatistics
from upperson.model.architecture import (
    FrozenBlock,
    ImageArchitecture,
    TextArchitecture,
    image_architecture,
    text_architecture,
)
from upperson.model.parts import (
    TRAINED_PARTS,
    Block,
    GrownEmbedding,
    LAdapter,
    LowRank,
    UPPersonConfig,
)
from upperson_rt.errors import UsageError

TOKEN_IDS = "text.token_embedding.ids"
"""Name of the tensor that says which tokens have trained rows."""


class ImageEncoder(nn.Module):
    """The image tower: patches of a crop to one feature. Positions are interpolated to its size."""

    rotary: Tensor | None

    def __init__(
        self, base: ImageArchitecture, config: UPPersonConfig, height_px: int, width_px: int
    ) -> None:
        super().__init__()
        self.stem = base.stem
        self.class_embedding = base.class_embedding
        grid = patch_grid(base.patch_px, height_px, width_px)
        self.positional_embedding = interpolate_positions(base.positions, base.grid, grid)
        rotary_2Ld = None if base.rotary is None else base.rotary(grid)
        self.register_buffer("rotary", rotary_2Ld, persistent=False)
        self.checkpoint_activations = False
        self.ln_pre = base.ln_pre
        self.blocks = build_blocks(base.blocks, config)
        self.ln_post = base.ln_post
        self.pool = base.pool
        self.proj = base.projection
        self.proj_bias = base.projection_bias

    def forward(self, image_N3HW: Tensor) -> Tensor:
        """Encode normalised float images [N, 3, H, W] to features [N, E], not unit norm."""
        x_NLD = self.stem(image_N3HW).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            cls_N1D = self.class_embedding.to(x_NLD.dtype).expand(x_NLD.shape[0], 1, -1)
            x_NLD = torch.cat([cls_N1D, x_NLD], dim=1)
        x_NLD = self.ln_pre(x_NLD + self.positional_embedding.to(x_NLD.dtype))
        pooled_N = None
        if self.pool is None:
            pooled_N = torch.zeros(x_NLD.shape[0], dtype=torch.int64, device=x_NLD.device)
        x = self.ln_post(
            run_blocks(self.blocks, x_NLD, None, pooled_N, self.checkpoint_activations, self.rotary)
        )
        if self.pool is not None:
            x = self.pool(x)
        return _projected(x, self.proj, self.proj_bias)


class TextEncoder(nn.Module):
    """The text tower: token ids of a caption to one feature."""

    mask: Tensor | None

    def __init__(self, base: TextArchitecture, config: UPPersonConfig) -> None:
        super().__init__()
        self.token_embedding: nn.Embedding | GrownEmbedding = base.token_embedding
        self.positional_embedding = base.positions
        self.blocks = build_blocks(base.blocks, config)
        self.ln_final = base.ln_final
        self.text_projection = base.projection
        self.text_projection_bias = base.projection_bias
        self.context_length = len(base.positions)
        self.pools_last = base.pooled == "last"
        mask = causal_mask(self.context_length, config.prefix_length) if base.causal else None
        self.register_buffer("mask", mask, persistent=False)
        self.prefix_length = config.prefix_length
        self.checkpoint_activations = False

    def learn_tokens(self, ids_T: Tensor) -> None:
        """Put trained rows beside the frozen ones for T tokens, int64; there are none so far."""
        if not isinstance(self.token_embedding, nn.Embedding):
            raise ValueError("the tower has trained rows already")
        self.token_embedding = GrownEmbedding(self.token_embedding, ids_T)

    def forward(self, ids_NL: Tensor) -> Tensor:
        """Encode token ids [N, L], zero-padded, to features [N, E], not unit norm.

        L may be anything up to the context length. Padding changes nothing: a causal mask hides
        what comes after the end token, and a tower without one, which was trained on captions
        padded to the context, gets them so.
        """
        if self.mask is None:
            ids_NL = F.pad(ids_NL, (0, self.context_length - ids_NL.shape[1]))
        length = ids_NL.shape[1]
        x_NLD = self.token_embedding(ids_NL) + self.positional_embedding[:length]
        mask = None if self.mask is None else self.mask[:length, : self.prefix_length + length]
        if self.pools_last:
            pooled_N = torch.full_like(ids_NL[:, 0], length - 1)
        else:
            # EOT has the largest id of the vocabulary, so argmax finds its first place.
            pooled_N = ids_NL.argmax(dim=-1)
        pooled_ND = run_blocks(self.blocks, x_NLD, mask, pooled_N, self.checkpoint_activations)
        return _projected(self.ln_final(pooled_ND), self.text_projection, self.text_projection_bias)


class UPPerson(nn.Module):
    """Dual encoder with everything frozen but the trained parts.

    Args:
        clip: A CLIP of open_clip with ViT towers; see `upperson.model.architecture`.
        config: Sizes of the trained parts.
        image_size: (height_px, width_px) of the person crops.
        statistics: The base's own, which images are normalised with.
    """

    def __init__(
        self,
        clip: Any,
        config: UPPersonConfig,
        image_size: tuple[int, int],
        statistics: PixelStatistics = CLIP_STATISTICS,
    ) -> None:
        super().__init__()
        self.config = config
        self.image_size = image_size
        self.statistics = statistics
        self.image_mean, self.image_std = statistics
        self.image = ImageEncoder(image_architecture(clip), config, *image_size)
        self.text = TextEncoder(text_architecture(clip), config)
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
        return self.text.text_projection.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """What the patches are computed in, and images have to be."""
        return next(self.image.stem.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.image.stem.parameters()).device

    def encode_image(self, image_N3HW: Tensor) -> Tensor:
        """Encode normalised images [N, 3, H, W] to unit-norm float32 [N, E]."""
        return F.normalize(self.image(image_N3HW).float(), dim=-1)

    def encode_text(self, ids_NL: Tensor) -> Tensor:
        """Encode token ids [N, L] to unit-norm float32 [N, E]."""
        return F.normalize(self.text(ids_NL).float(), dim=-1)

    @contextmanager
    def keeping(self, share: float) -> Iterator[None]:
        """For a while, keep only a share of what LoRA and L-Adapters add to the base.

        What they add is linear in their scales, so a share of those is a share of it: a model on
        the line from the base to its fine-tuned version (WiSE-FT, arXiv 2109.01903). Prefixes stay
        as they are. Afterwards the scales are to the bit what they were.
        """
        scales = [
            module.scale for module in self.modules() if isinstance(module, LowRank | LAdapter)
        ]
        whole = [scale.detach().clone() for scale in scales]
        for scale in scales:
            scale.detach().mul_(share)
        try:
            yield
        finally:
            for scale, before in zip(scales, whole, strict=True):
                scale.detach().copy_(before)

    def trained_state(self) -> dict[str, Tensor]:
        """Return copies of the trained tensors by name, on the CPU: what a run saves.

        Where tokens have trained rows, `TOKEN_IDS` says which.
        """
        state = {
            name: parameter.detach().cpu().clone()
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }
        if isinstance(self.text.token_embedding, GrownEmbedding):
            state[TOKEN_IDS] = self.text.token_embedding.ids.cpu().clone()
        return state


def build_blocks(bases: Sequence[FrozenBlock], config: UPPersonConfig) -> nn.ModuleList:
    """Put the trained parts into every block of a tower that the configuration names."""
    return nn.ModuleList(
        Block(base, config.at(number, len(bases))) for number, base in enumerate(bases, start=1)
    )


def run_blocks(
    blocks: nn.ModuleList,
    x_NLD: Tensor,
    mask: Tensor | None,
    pooled_N: Tensor | None,
    checkpoint_activations: bool,
    rotary_2Ld: Tensor | None = None,
) -> Tensor:
    """Run a tower's blocks and return the pooled token of each sample, [N, D].

    The last block computes nothing else for the other tokens than their keys and values. Without a
    pooled token it computes and returns all of them, [N, L, D].
    """
    for block in blocks:
        only_N = pooled_N if block is blocks[-1] else None
        if checkpoint_activations and torch.is_grad_enabled():
            x_NLD = checkpoint(block, x_NLD, mask, only_N, rotary_2Ld, use_reentrant=False)
        else:
            x_NLD = block(x_NLD, mask, only_N, rotary_2Ld)
    return x_NLD if pooled_N is None else x_NLD[:, 0]


def patch_grid(patch_size: tuple[int, int], height_px: int, width_px: int) -> tuple[int, int]:
    """Return (rows, columns) of patches; raise UsageError when the image does not divide."""
    rows, row_rest = divmod(height_px, patch_size[0])
    columns, column_rest = divmod(width_px, patch_size[1])
    if row_rest or column_rest or not rows or not columns:
        raise UsageError(
            f"image size {height_px}x{width_px} (height x width) does not divide into patches of "
            f"{patch_size[0]}x{patch_size[1]}: choose multiples of the patch",
            code="image_size_indivisible",
            image_size=(height_px, width_px),
            patch=tuple(patch_size),
        )
    return rows, columns


def interpolate_positions(
    positions: nn.Parameter, source: tuple[int, int], target: tuple[int, int]
) -> nn.Parameter:
    """Resize a positional grid [rows*columns, D] bilinearly; a class row before it is kept.

    As the paper does: align_corners off, no antialias, rows first. Equal grids share the parameter.
    """
    if source == target:
        return positions
    width = positions.shape[1]
    before = len(positions) - source[0] * source[1]
    grid = positions.detach()[before:].reshape(1, *source, width).permute(0, 3, 1, 2)
    grid = F.interpolate(grid.float(), size=target, mode="bilinear", align_corners=False)
    rows = grid.permute(0, 2, 3, 1).reshape(-1, width).to(positions.dtype)
    return nn.Parameter(torch.cat([positions.detach()[:before], rows]))


def causal_mask(length: int, prefix_length: int) -> Tensor:
    """Return bool [length, prefix_length + length]: every prefix row, and no later token."""
    visible = torch.ones(length, prefix_length + length, dtype=torch.bool)
    return visible.tril(prefix_length)


def _projected(x_ND: Tensor, matrix: Tensor | None, bias: Tensor | None) -> Tensor:
    """Map pooled features [N, D] into the shared space."""
    if matrix is None:
        return x_ND
    projected = x_ND @ matrix
    return projected if bias is None else projected + bias
