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

from upperson_export.blocks import PlainBlock, Site, constant

MASKED = -1e4
"""Added to scores of hidden keys: zero after softmax in float32, finite in float16."""

PIXEL_CENTRE = 128.0
"""Subtracted from pixel values, which are then divided by it."""


class PatchProjection(nn.Module):
    """uint8 pixels to one row a patch; mean and standard deviation are in the weights.

    Pixels are centred to [-1, 1) first: exact in float16, and the weights keep a magnitude that
    float16 stores with full precision, which weights for raw pixels (1e-5) would not.

    Args:
        weight: [rows * columns * 3, D] for a patch of centred pixels, RGB last.
        positions: Positions of the patches with the patch bias added, [1, L - 1, D].
        patch_size: (rows, columns) of a patch in pixels.
    """

    def __init__(self, weight: Tensor, positions: Tensor, patch_size: tuple[int, int]) -> None:
        super().__init__()
        self.weight = constant(weight)
        self.positions = constant(positions)
        self.patch_size = patch_size

    def forward(self, image: Tensor) -> Tensor:
        """Map uint8 RGB [N, H, W, 3] to [N, L - 1, D]."""
        # TensorRT lets a uint8 input feed nothing but a Cast, so the cast comes first.
        x = (image.float() - PIXEL_CENTRE) * (1 / PIXEL_CENTRE)
        batch, height, width, _ = x.shape
        rows, columns = self.patch_size
        x = x.reshape(batch, height // rows, rows, width // columns, columns, 3)
        x_NLC = x.permute(0, 1, 3, 2, 4, 5).flatten(3).flatten(1, 2)
        return x_NLC @ self.weight + self.positions


class Projection(nn.Module):
    """Pooled rows to unit-norm embeddings.

    Args:
        weight: [D, E] into the shared space.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = constant(weight)

    def forward(self, x_ND: Tensor) -> Tensor:
        """Map [N, D] to [N, E] of length 1."""
        return F.normalize(x_ND @ self.weight, dim=-1)


class PlainTower(nn.Module):
    """A tower made of blocks that describe themselves."""

    blocks: nn.ModuleList
    """`PlainBlock`s, or blocks with the same description."""

    def sites(self) -> dict[str, Site]:
        """Return where channels can be divided, by names such as ``blocks.0.ln_1``."""
        return {
            f"blocks.{index}.{name}": site
            for index, block in enumerate(self.blocks)
            for name, site in cast("PlainBlock", block).sites().items()
        }

    def block_linears(self) -> dict[str, str | None]:
        """Return the Linears that int8 covers, by module path, with the site of their input."""
        paths = {module: path for path, module in self.named_modules()}
        site_of = {reader: name for name, site in self.sites().items() for reader in site.readers}
        return {
            paths[linear]: site_of.get(linear)
            for block in self.blocks
            for linear in cast("PlainBlock", block).linears()
        }


class PlainImageTower(PlainTower):
    """uint8 pixels to unit-norm embeddings.

    Args:
        patch: Projection of the pixels.
        class_row: Class token with its position added, [1, 1, D].
        ln_pre: Norm before the first block.
        blocks: At least one block.
        ln_post: Norm of the class row after the last block.
        projection: Projection [D, E] into the shared space.
    """

    def __init__(
        self,
        *,
        patch: PatchProjection,
        class_row: Tensor,
        ln_pre: nn.Module,
        blocks: Sequence[PlainBlock],
        ln_post: nn.Module,
        projection: Tensor,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.class_row = constant(class_row)
        self.ln_pre = ln_pre
        self.blocks = nn.ModuleList(blocks)
        self.ln_post = ln_post
        self.projection = Projection(projection)

    def forward(self, image: Tensor) -> Tensor:
        """Encode uint8 RGB [N, H, W, 3], already of the model's size, to float32 [N, E]."""
        x_NLD = self.patch(image)
        x_NLD = torch.cat([self.class_row.expand(x_NLD.shape[0], -1, -1), x_NLD], dim=1)
        x_NLD = self.ln_pre(x_NLD)
        *blocks, last = self.blocks
        for block in blocks:
            x_NLD = block(x_NLD, None)
        x_N1D = last(x_NLD, None, lambda rows_NLD: rows_NLD[:, :1])
        embeds_NE: Tensor = self.projection(self.ln_post(x_N1D[:, 0]))
        return embeds_NE


class PlainTextTower(PlainTower):
    """Token ids to unit-norm embeddings; the EOT row is found inside.

    Args:
        embedding: Token embedding [V, D].
        positions: Positions [context, D].
        visible: bool [context, P + context], True where a row may look at a key.
        prefix_length: Prefix rows P of the blocks that have them; the mask's first P columns.
        blocks: At least one block.
        ln_final: Norm of the pooled row after the last block.
        projection: Projection [D, E] into the shared space.
    """

    def __init__(
        self,
        *,
        embedding: Tensor,
        positions: Tensor,
        visible: Tensor,
        prefix_length: int,
        blocks: Sequence[PlainBlock],
        ln_final: nn.Module,
        projection: Tensor,
    ) -> None:
        super().__init__()
        self.prefix_length = prefix_length
        self.embedding = constant(embedding)
        self.positions = constant(positions)
        self.mask = constant(torch.where(visible, 0.0, MASKED))
        self.blocks = nn.ModuleList(blocks)
        self.ln_final = ln_final
        self.projection = Projection(projection)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Encode int32 ids [N, L], zero-padded, to float32 [N, E]."""
        length = input_ids.shape[1]
        eot_N = input_ids.argmax(dim=-1)
        x_NLD = F.embedding(input_ids, self.embedding) + self.positions[:length]
        mask_LK = self.mask[:, : self.prefix_length + length]
        *blocks, last = self.blocks
        for block in blocks:
            x_NLD = block(x_NLD, self._mask_of(block, mask_LK[:length]))
        mask_N11K = self._mask_of(last, mask_LK[eot_N][:, None, None])
        x_N1D = last(x_NLD, mask_N11K, lambda rows_NLD: _take_row(rows_NLD, eot_N))
        embeds_NE: Tensor = self.projection(self.ln_final(x_N1D[:, 0]))
        return embeds_NE

    def _mask_of(self, block: nn.Module, mask: Tensor) -> Tensor:
        has_prefix = cast("PlainBlock", block).attention.prefix_k is not None
        return mask if has_prefix else mask[..., self.prefix_length :]


def _take_row(x_NLD: Tensor, index_N: Tensor) -> Tensor:
    return torch.gather(x_NLD, 1, index_N[:, None, None].expand(-1, 1, x_NLD.shape[2]))
