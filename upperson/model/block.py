"""One transformer block of UP-Person: a frozen CLIP block and its three trained parts.

    u = LN1(x) + A_attn(x)
    q = u Wq;  k = u (Wk + dWk);  v = u (Wv + dWv)
    x = x + softmax(q [K_prefix ; k]^T / sqrt(head)) [V_prefix ; v] Wo
    x = x + MLP(LN2(x) + A_mlp(x))

The prefix rows come first, so that the causal mask of the text tower is the ordinary one, aligned
to the last key, over P + L keys. (Their place does not change the result, only the mask.)

Shapes: N batch, L tokens, D width, H heads, P prefix length.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upperson.model.adapter import LAdapter
from upperson.model.lora import KVLora
from upperson.model.prefix import SPrefix
from upperson_rt.errors import UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class UPPersonConfig:
    """Sizes of the trained parts, equal in every block of both towers. 0 leaves a part out."""

    prefix_length: int = 10
    """Prefix rows P per attention layer."""

    prefix_scale: float = 10.0
    """Initial S. The paper's notes give 10; the official code's last state uses 100."""

    lora_rank: int = 32
    """Rank of the key and value updates."""

    adapter_reduction: int = 8
    """An L-Adapter's bottleneck is width // reduction."""

    def __post_init__(self) -> None:
        for name in ("prefix_length", "lora_rank", "adapter_reduction"):
            if getattr(self, name) < 0:
                raise UsageError(
                    f"{name} must be 0 (part left out) or more, found {getattr(self, name)}"
                )


PLAIN_CLIP = UPPersonConfig(prefix_length=0, lora_rank=0, adapter_reduction=0)
"""No trained part at all: the frozen base itself, for zero-shot baselines."""


class Block(nn.Module):
    """A frozen CLIP block with S-Prefix, K/V LoRA and two L-Adapters.

    Args:
        base: A residual attention block of open_clip. Its modules are shared, not copied.
        config: Sizes of the trained parts.
    """

    ln_1: nn.Module
    attn: nn.MultiheadAttention
    ln_2: nn.Module
    mlp: nn.Module

    def __init__(self, base: Any, config: UPPersonConfig) -> None:
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

    def forward(self, x_NLD: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run the block.

        Args:
            x_NLD: Residual stream [N, L, D].
            mask: None, or bool [L, P + L], True where a query may look at a key.
        """
        x_NLD = x_NLD + self._attention(_normed(x_NLD, self.ln_1, self.adapter_attn), mask)
        out: Tensor = x_NLD + self.mlp(_normed(x_NLD, self.ln_2, self.adapter_mlp))
        return out

    def _attention(self, u_NLD: Tensor, mask: Tensor | None) -> Tensor:
        q_NLD, k_NLD, v_NLD = F.linear(
            u_NLD, self.attn.in_proj_weight, self.attn.in_proj_bias
        ).chunk(3, dim=-1)
        if self.lora is not None:
            k_NLD = k_NLD + self.lora.key(u_NLD)
            v_NLD = v_NLD + self.lora.value(u_NLD)
        if self.prefix is not None:
            keys_PD, values_PD = self.prefix()
            k_NLD = _prepend(keys_PD, k_NLD)
            v_NLD = _prepend(values_PD, v_NLD)
        out_NHLd = F.scaled_dot_product_attention(
            self._split(q_NLD), self._split(k_NLD), self._split(v_NLD), attn_mask=mask
        )
        out: Tensor = self.attn.out_proj(out_NHLd.transpose(1, 2).flatten(2))
        return out

    def _split(self, x_NLD: Tensor) -> Tensor:
        return torch.unflatten(x_NLD, -1, (self.heads, -1)).transpose(1, 2)


def _normed(x_NLD: Tensor, norm: nn.Module, adapter: LAdapter | None) -> Tensor:
    normed: Tensor = norm(x_NLD)
    return normed if adapter is None else normed + adapter(x_NLD)


def _prepend(rows_PD: Tensor, x_NLD: Tensor) -> Tensor:
    rows_NPD = rows_PD.to(x_NLD.dtype).expand(x_NLD.shape[0], -1, -1)
    return torch.cat([rows_NPD, x_NLD], dim=1)
