"""A tower as it is deployed: plain layers with constants, no trained part left.

Masks are finite, and the last block computes queries and MLP for the pooled token only, since
nothing else of its output is used.

Shapes: N batch, L tokens, D width, H heads, P prefix rows, E embedding.
"""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upperson_export.blocks import (
    Activation,
    AttentionPool,
    Linear,
    PlainBlock,
    Rotary,
    Site,
    activated,
    constant,
)

MASKED = -1e4
"""Added to scores of hidden keys: zero after softmax in float32, finite in float16."""

PIXEL_CENTRE = 128.0
"""Subtracted from pixel values, which are then divided by it."""


class PatchProjection(nn.Module):
    """uint8 pixels to one row a patch; mean and standard deviation are in the weights.

    Pixels are centred to [-1, 1) first: exact in float16, and the weights keep a magnitude that
    float16 stores with full precision, which weights for raw pixels (1e-5) would not.

    The weight is [rows * columns * 3, D], RGB last; positions [1, P, D] have the patch bias added.
    If a patch is made in several steps, ``stem`` has those before the last, and weight and patch
    size belong to the last.
    """

    def __init__(
        self,
        weight: Tensor,
        positions: Tensor,
        patch_size: tuple[int, int],
        stem: Sequence["StemStep"] = (),
    ) -> None:
        super().__init__()
        self.stem = nn.ModuleList(stem)
        self.weight = constant(weight)
        self.positions = constant(positions)
        self.patch_size = patch_size

    def forward(self, image: Tensor) -> Tensor:
        """Map uint8 RGB [N, H, W, 3] to [N, P, D]."""
        # TensorRT lets a uint8 input feed nothing but a Cast, so the cast comes first.
        x = (image.float() - PIXEL_CENTRE) * (1 / PIXEL_CENTRE)
        for step in self.stem:
            x = step(x)
        return _patches(x, self.patch_size).flatten(1, 2) @ self.weight + self.positions


class StemStep(nn.Module):
    """Patches of pixels, or of smaller patches, to what the next step makes patches of."""

    def __init__(self, linear: Linear, patch_size: tuple[int, int], activation: Activation) -> None:
        super().__init__()
        self.linear = linear
        self.patch_size = patch_size
        self.activation = activation

    def forward(self, x_NHWC: Tensor) -> Tensor:
        """Map [N, H, W, C] to [N, H / rows, W / columns, D]."""
        return activated(self.linear(_patches(x_NHWC, self.patch_size)), self.activation)


def _patches(x_NHWC: Tensor, patch_size: tuple[int, int]) -> Tensor:
    """Put each patch into one row: [N, H / rows, W / columns, rows * columns * C]."""
    batch, height, width, channels = x_NHWC.shape
    rows, columns = patch_size
    x = x_NHWC.reshape(batch, height // rows, rows, width // columns, columns, channels)
    return x.permute(0, 1, 3, 2, 4, 5).flatten(3)


class Projection(nn.Module):
    """Pooled rows to unit-norm embeddings; without a weight [D, E], rows are in that space."""

    def __init__(self, weight: Tensor | None, bias: Tensor | None = None) -> None:
        super().__init__()
        self.weight = None if weight is None else constant(weight)
        self.bias = None if bias is None else constant(bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Map [N, D] to [N, E] of length 1."""
        if self.weight is not None:
            x_ND = x_ND @ self.weight
        return F.normalize(x_ND if self.bias is None else x_ND + self.bias, dim=-1)


class PlainTower(nn.Module):
    """A tower made of blocks that describe themselves."""

    blocks: nn.ModuleList
    """`PlainBlock`s, or blocks with the same description."""

    padding_counts = False
    """Whether the tower pads captions to the context, and attends to the padding."""

    def described(self) -> dict[str, "PlainBlock | AttentionPool"]:
        """Return what describes its Linears, by module path, such as ``blocks.0``."""
        return {
            f"blocks.{index}": cast("PlainBlock", block) for index, block in enumerate(self.blocks)
        }

    def sites(self) -> dict[str, Site]:
        """Return where channels can be divided, by names such as ``blocks.0.ln_1``."""
        return {
            f"{path}.{name}": site
            for path, part in self.described().items()
            for name, site in part.sites().items()
        }

    def block_linears(self) -> dict[str, str | None]:
        """Return the Linears that int8 covers, by module path, with the site of their input."""
        paths = {module: path for path, module in self.named_modules()}
        site_of = {reader: name for name, site in self.sites().items() for reader in site.readers}
        return {
            paths[linear]: site_of.get(linear)
            for part in self.described().values()
            for linear in part.linears()
        }


class PlainImageTower(PlainTower):
    """uint8 pixels to unit-norm embeddings.

    The class row [1, 1, D] has its position added. ``head`` is the norm of its output, or attention
    over all rows. The latter may go with rotary embeddings, whose tables all blocks share.
    """

    def __init__(
        self,
        *,
        patch: PatchProjection,
        class_row: Tensor | None,
        ln_pre: nn.Module,
        blocks: Sequence[PlainBlock],
        head: nn.Module,
        projection: Projection,
        rotary: Rotary | None = None,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.class_row = None if class_row is None else constant(class_row)
        self.ln_pre = ln_pre
        self.blocks = nn.ModuleList(blocks)
        self.pool: AttentionPool | None = None
        if isinstance(head, AttentionPool):
            self.pool = head
        else:
            self.ln_post = head
        self.projection = projection
        self.cosine: nn.Parameter | None = None
        self.sine: nn.Parameter | None = None
        if rotary is not None:
            self.cosine, self.sine = map(constant, rotary)

    def described(self) -> dict[str, PlainBlock | AttentionPool]:
        """Return the blocks and, if there is one, the pool."""
        return super().described() | ({} if self.pool is None else {"pool": self.pool})

    def forward(self, image: Tensor) -> Tensor:
        """Encode uint8 RGB [N, H, W, 3], already of the model's size, to float32 [N, E]."""
        x_NLD = self.patch(image)
        if self.class_row is not None:
            x_NLD = torch.cat([self.class_row.expand(x_NLD.shape[0], -1, -1), x_NLD], dim=1)
        x_NLD = self.ln_pre(x_NLD)
        *blocks, last = self.blocks
        rotary = None
        if self.cosine is not None and self.sine is not None:
            rotary = self.cosine, self.sine
        for block in blocks:
            x_NLD = block(x_NLD, None, rotary=rotary)
        if self.pool is not None:
            pooled_ND = self.pool(last(x_NLD, None, rotary=rotary))
        else:
            pooled_ND = self.ln_post(last(x_NLD, None, lambda rows_NLD: rows_NLD[:, :1])[:, 0])
        embeds_NE: Tensor = self.projection(pooled_ND)
        return embeds_NE


class PlainTextTower(PlainTower):
    """Token ids to unit-norm embeddings; the pooled row, the last one or EOT's, is found inside.

    ``visible`` is True where a row may look at a key, [context, P + context]; its first P columns
    are the prefix of the blocks that have one. Without it every row looks at every key, and this
    tower pads captions to the context.
    """

    def __init__(
        self,
        *,
        embedding: Tensor,
        positions: Tensor,
        visible: Tensor | None,
        prefix_length: int,
        blocks: Sequence[PlainBlock],
        ln_final: nn.Module,
        projection: Projection,
        pools_last: bool = False,
    ) -> None:
        super().__init__()
        self.prefix_length = prefix_length
        self.pools_last = pools_last
        self.padding_counts = visible is None
        self.embedding = constant(embedding)
        self.positions = constant(positions)
        self.mask = None if visible is None else constant(torch.where(visible, 0.0, MASKED))
        self.blocks = nn.ModuleList(blocks)
        self.ln_final = ln_final
        self.projection = projection

    def forward(self, input_ids: Tensor) -> Tensor:
        """Encode int32 ids [N, L], zero-padded, to float32 [N, E]."""
        if self.padding_counts:
            # Padded and cut, so that whatever the input's length, this one is constant.
            padding = torch.zeros_like(input_ids[:, :1]).expand(-1, len(self.positions))
            input_ids = torch.cat([input_ids, padding], dim=1)[:, : len(self.positions)]
        length = input_ids.shape[1]
        x_NLD = F.embedding(input_ids, self.embedding) + self.positions[:length]
        mask_LK = None if self.mask is None else self.mask[:, : self.prefix_length + length]
        *blocks, last = self.blocks
        for block in blocks:
            x_NLD = block(x_NLD, self._mask_of(block, mask_LK, slice(length)))
        if self.pools_last:
            pooled_ND = last(x_NLD, None, lambda rows_NLD: rows_NLD[:, -1:])[:, 0]
        else:
            eot_N = input_ids.argmax(dim=-1)
            mask_N11K = self._mask_of(last, mask_LK, eot_N)
            mask_N11K = None if mask_N11K is None else mask_N11K[:, None, None]
            pooled_ND = last(x_NLD, mask_N11K, lambda rows_NLD: _take_row(rows_NLD, eot_N))[:, 0]
        embeds_NE: Tensor = self.projection(self.ln_final(pooled_ND))
        return embeds_NE

    def _mask_of(
        self, block: nn.Module, mask_LK: Tensor | None, rows: slice | Tensor
    ) -> Tensor | None:
        if mask_LK is None:
            return None
        has_prefix = cast("PlainBlock", block).attention.prefix_k is not None
        # As an index, the rows of a tensor become GatherND: OpenVINO reads wherever that says.
        mask = mask_LK[rows] if isinstance(rows, slice) else mask_LK.index_select(0, rows)
        return mask if has_prefix else mask[..., self.prefix_length :]


def _take_row(x_NLD: Tensor, index_N: Tensor) -> Tensor:
    return torch.gather(x_NLD, 1, index_N[:, None, None].expand(-1, 1, x_NLD.shape[2]))
