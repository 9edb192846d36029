"""The deployed form of a tower: plain layers with constants, no trained part left.

Written for ONNX: weights are stored the way MatMul reads them ([in, out]), attention is spelled out
with the scale already inside the query rows, masks are finite, and the last block computes queries
and MLP for the pooled token only, since nothing else of its output is used.

Shapes: N batch, L tokens, D width, H heads, d head width, P prefix rows, E embedding.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MASKED = -1e4
"""Added to scores of hidden keys: zero after softmax in float32, finite in float16."""


class Linear(nn.Module):
    """y = x W + b with W [in, out]."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight = constant(weight)
        self.bias = constant(bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]."""
        return x @ self.weight + self.bias


class Adapter(nn.Module):
    """Bottleneck with its scale inside the up projection."""

    def __init__(self, down: Linear, up: Linear) -> None:
        super().__init__()
        self.down = down
        self.up = up

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D] to [..., D]."""
        out: Tensor = self.up(torch.relu(self.down(x)))
        return out


class Attention(nn.Module):
    """Multi-head attention over constant prefix rows and the projected tokens.

    Args:
        query: Query projection, already divided by sqrt(d).
        key_value: Keys and values in one projection D -> 2D.
        out: Output projection.
        prefix: Key and value rows [P, D] each, or None.
        heads: Number of heads H.
    """

    def __init__(
        self,
        query: Linear,
        key_value: Linear,
        out: Linear,
        prefix: tuple[Tensor, Tensor] | None,
        heads: int,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.width = query.weight.shape[0]
        self.q = query
        self.kv = key_value
        self.out = out
        self.prefix_k: nn.Parameter | None = None
        self.prefix_v: nn.Parameter | None = None
        if prefix is not None:
            self.prefix_k, self.prefix_v = (
                constant(self._heads_of(rows_PD[None])) for rows_PD in prefix
            )

    def forward(self, u_NLD: Tensor, queries_NQD: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from some rows to all rows; return [N, Q, D].

        Args:
            u_NLD: Rows that give keys and values.
            queries_NQD: Rows that ask.
            mask: None, or what is added to the scores, broadcastable to [N, H, Q, P + L].
        """
        k_NLD, v_NLD = self.kv(u_NLD).split(self.width, dim=-1)
        return self._attend(self.q(queries_NQD), k_NLD, v_NLD, mask)

    def _attend(self, q_NQD: Tensor, k_NLD: Tensor, v_NLD: Tensor, mask: Tensor | None) -> Tensor:
        q_NHQd, k_NHLd, v_NHLd = map(self._heads_of, (q_NQD, k_NLD, v_NLD))
        if self.prefix_k is not None and self.prefix_v is not None:
            batch = k_NHLd.shape[0]
            k_NHLd = torch.cat([self.prefix_k.expand(batch, -1, -1, -1), k_NHLd], dim=2)
            v_NHLd = torch.cat([self.prefix_v.expand(batch, -1, -1, -1), v_NHLd], dim=2)
        scores = q_NHQd @ k_NHLd.transpose(-1, -2)
        if mask is not None:
            scores = scores + mask
        attended_NQD = (scores.softmax(dim=-1) @ v_NHLd).transpose(1, 2).flatten(2)
        out: Tensor = self.out(attended_NQD)
        return out

    def _heads_of(self, x_NLD: Tensor) -> Tensor:
        x_NLHd = torch.unflatten(x_NLD, -1, (self.heads, self.width // self.heads))
        return x_NLHd.transpose(1, 2)


class PackedAttention(Attention):
    """Attention in which every row asks: one projection D -> 3D, one activation scale in INT8."""

    def __init__(
        self,
        query: Linear,
        key_value: Linear,
        out: Linear,
        prefix: tuple[Tensor, Tensor] | None,
        heads: int,
    ) -> None:
        super().__init__(query, key_value, out, prefix, heads)
        del self.q, self.kv
        self.qkv = Linear(
            torch.cat([query.weight, key_value.weight], dim=1),
            torch.cat([query.bias, key_value.bias]),
        )

    def forward(self, u_NLD: Tensor, queries_NQD: Tensor, mask: Tensor | None) -> Tensor:
        """As in the base class, with ``queries_NQD`` the same rows as ``u_NLD``."""
        q_NLD, k_NLD, v_NLD = self.qkv(u_NLD).split(self.width, dim=-1)
        return self._attend(q_NLD, k_NLD, v_NLD, mask)


class Mlp(nn.Module):
    """Two Linears with CLIP's activation between them."""

    def __init__(self, fc1: Linear, fc2: Linear, quick_gelu: bool) -> None:
        super().__init__()
        self.fc1 = fc1
        self.fc2 = fc2
        self.quick_gelu = quick_gelu

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D] to [..., D]."""
        hidden = self.fc1(x)
        hidden = hidden * torch.sigmoid(1.702 * hidden) if self.quick_gelu else F.gelu(hidden)
        out: Tensor = self.fc2(hidden)
        return out


PIXEL_CENTRE = 128.0
"""Subtracted from pixel values, which are then divided by it."""

TakeRows = Callable[[Tensor], Tensor]
"""Selects the rows of [N, L, D] whose output is wanted, [N, Q, D]."""


class PlainBlock(nn.Module):
    """One block of either tower."""

    def __init__(
        self,
        ln_1: nn.Module,
        adapter_attn: Adapter | None,
        attention: Attention,
        ln_2: nn.Module,
        adapter_mlp: Adapter | None,
        mlp: Mlp,
    ) -> None:
        super().__init__()
        self.ln_1 = ln_1
        self.adapter_attn = adapter_attn
        self.attention = attention
        self.ln_2 = ln_2
        self.adapter_mlp = adapter_mlp
        self.mlp = mlp

    def forward(self, x_NLD: Tensor, mask: Tensor | None, take: TakeRows | None = None) -> Tensor:
        """Return the output of all rows [N, L, D], or of the rows ``take`` selects."""
        u_NLD = _normed(x_NLD, self.ln_1, self.adapter_attn)
        x_NQD, u_NQD = (x_NLD, u_NLD) if take is None else (take(x_NLD), take(u_NLD))
        x_NQD = x_NQD + self.attention(u_NLD, u_NQD, mask)
        out: Tensor = x_NQD + self.mlp(_normed(x_NQD, self.ln_2, self.adapter_mlp))
        return out


def _normed(x: Tensor, norm: nn.Module, adapter: Adapter | None) -> Tensor:
    normed: Tensor = norm(x)
    return normed if adapter is None else normed + adapter(x)


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


class PlainImageTower(nn.Module):
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
        blocks: list[PlainBlock],
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


class PlainTextTower(nn.Module):
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
        blocks: list[PlainBlock],
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


def constant(value: Tensor) -> nn.Parameter:
    """Return a frozen float32 copy."""
    return nn.Parameter(value.detach().float().contiguous().clone(), requires_grad=False)
