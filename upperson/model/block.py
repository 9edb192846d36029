"""One transformer block of UP-Person: a frozen CLIP block and its three trained parts.

    u = LN1(x) + A_attn(x)
    q = u Wq;  k = u (Wk + dWk);  v = u (Wv + dWv)
    x = x + softmax(q [K_prefix ; k]^T / sqrt(head)) [V_prefix ; v] Wo
    x = x + MLP(LN2(x) + A_mlp(x))

The prefix rows come first, so that the causal mask of the text tower is the ordinary one, aligned
to the last key, over P + L keys. (Their place does not change the result, only the mask.)

Shapes: N batch, L tokens, M rows (N * L), D width, H heads, P prefix length.
"""

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from upperson.model.architecture import FrozenBlock
from upperson.model.parts import KVLora, LAdapter, SPrefix, UPPersonConfig
from upperson_rt.errors import UsageError

TRAINED_PARTS = {
    "prefix": "S-Prefix",
    "lora": "LoRA",
    "adapter_attn": "L-Adapter",
    "adapter_mlp": "L-Adapter",
}
"""Attributes of a block that hold trained tensors, to the part each is; all else is frozen."""

QUICK_GELU_SLOPE = 1.702


class Block(nn.Module):
    """A frozen CLIP block with S-Prefix, K/V LoRA and two L-Adapters.

    Args:
        base: A block of the base. Its modules are shared, not copied.
        config: Sizes of the trained parts in this block.
    """

    ln_1: nn.Module
    attn: nn.MultiheadAttention
    ln_2: nn.Module
    mlp: nn.Module

    def __init__(self, base: FrozenBlock, config: UPPersonConfig) -> None:
        super().__init__()
        self.ln_1 = base.ln_1
        self.attn = base.attn
        self.ln_2 = base.ln_2
        self.mlp = base.mlp
        self.heads: int = base.attn.num_heads
        width: int = base.attn.embed_dim
        if config.adapter_reduction > width:
            raise UsageError(
                f"adapter_reduction {config.adapter_reduction} leaves no bottleneck in a tower of "
                f"width {width}: choose at most {width}"
            )
        self.prefix = (
            SPrefix(width, config.prefix_length, config.prefix_scale)
            if config.prefix_length
            else None
        )
        self.lora = KVLora(width, config.lora_rank) if config.lora_rank else None
        self.adapter_attn: LAdapter | None = None
        self.adapter_mlp: LAdapter | None = None
        if config.adapter_reduction:
            self.adapter_attn = LAdapter(width, config.adapter_reduction)
            self.adapter_mlp = LAdapter(width, config.adapter_reduction)

    def forward(
        self, x_NLD: Tensor, mask: Tensor | None = None, only_N: Tensor | None = None
    ) -> Tensor:
        """Run the block.

        Args:
            x_NLD: Residual stream [N, L, D].
            mask: None, or bool [L, P + L], True where a query may look at a key. A block without
                prefix leaves out its first P columns.
            only_N: None, or the index of the one token of each sample whose output is wanted. All
                tokens are its keys and values; queries and MLP are computed for it alone.

        Returns:
            The residual stream [N, L, D] after the block, or [N, 1, D].
        """
        u_NLD = _normed(x_NLD, self.ln_1, self.adapter_attn)
        if mask is not None and self.prefix is None:
            mask = mask[:, -x_NLD.shape[1] :]
        x_NQD, u_NQD = x_NLD, u_NLD
        if only_N is not None:
            x_NQD, u_NQD = _pick(x_NLD, only_N), _pick(u_NLD, only_N)
            mask = None if mask is None else mask[only_N][:, None, None]
        x_NQD = x_NQD + self._attention(u_NQD, u_NLD, mask)
        return x_NQD + frozen_mlp(self.mlp, _normed(x_NQD, self.ln_2, self.adapter_mlp))

    def _attention(self, u_NQD: Tensor, u_NLD: Tensor, mask: Tensor | None) -> Tensor:
        """Attend from Q tokens to all; queries and keys are projected apart.

        In one product [N, L, 3D] the queries would keep all of it alive for the backward pass, and
        keys and values be parts of it that are copied.
        """
        weight_q, weight_k, weight_v = self.attn.in_proj_weight.chunk(3)
        bias_q, bias_k, bias_v = self.attn.in_proj_bias.chunk(3)
        q_NQD = F.linear(u_NQD, weight_q, bias_q)
        u_MD = u_NLD.flatten(0, 1)
        k_MD, v_MD = F.linear(u_MD, weight_k, bias_k), F.linear(u_MD, weight_v, bias_v)
        if self.lora is not None:
            k_MD, v_MD = self.lora(u_MD, k_MD, v_MD)
        k_NLD, v_NLD = k_MD.view(u_NLD.shape), v_MD.view(u_NLD.shape)
        if self.prefix is not None:
            keys_PD, values_PD = self.prefix()
            k_NLD = _prepend(keys_PD, k_NLD)
            v_NLD = _prepend(values_PD, v_NLD)
        out_NHQd = F.scaled_dot_product_attention(
            self._split(q_NQD), self._split(k_NLD), self._split(v_NLD), attn_mask=mask
        )
        out: Tensor = self.attn.out_proj(out_NHQd.transpose(1, 2).flatten(2))
        return out

    def _split(self, x_NLD: Tensor) -> Tensor:
        return torch.unflatten(x_NLD, -1, (self.heads, -1)).transpose(1, 2)


def frozen_mlp(mlp: Any, u_NLD: Tensor) -> Tensor:
    """Compute the MLP of an open_clip block (c_fc, gelu, c_proj) for u [N, L, D].

    CLIP's QuickGELU is h * sigmoid(1.702 h) = silu(1.702 h) / 1.702. Both factors ride along in the
    matrix products, and a fused silu stays, which keeps its input alone for the backward pass; as
    written in open_clip it is three passes over [N, L, 4D] and keeps two such tensors.
    """
    if not isinstance(mlp.gelu, QuickGELU):
        out: Tensor = mlp(u_NLD)
        return out
    slope = QUICK_GELU_SLOPE
    rows = u_NLD.flatten(0, 1)
    hidden = torch.addmm(mlp.c_fc.bias, rows, mlp.c_fc.weight.T, beta=slope, alpha=slope)
    rows = torch.addmm(mlp.c_proj.bias, F.silu(hidden), mlp.c_proj.weight.T, alpha=1 / slope)
    return rows.view(u_NLD.shape)


def _normed(x_NLD: Tensor, norm: nn.Module, adapter: LAdapter | None) -> Tensor:
    x_MD = x_NLD.flatten(0, 1)
    normed_MD: Tensor = norm(x_MD)
    if adapter is not None:
        normed_MD = adapter(x_MD, normed_MD)
    return normed_MD.view(x_NLD.shape)


def _pick(x_NLD: Tensor, index_N: Tensor) -> Tensor:
    """Return one token of each sample, [N, 1, D]."""
    return x_NLD[torch.arange(x_NLD.shape[0], device=x_NLD.device), index_N][:, None]


def _prepend(rows_PD: Tensor, x_NLD: Tensor) -> Tensor:
    rows_NPD = rows_PD.to(x_NLD.dtype).expand(x_NLD.shape[0], -1, -1)
    return torch.cat([rows_NPD, x_NLD], dim=1)
