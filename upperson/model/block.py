"""One transformer block of UP-Person: a frozen CLIP block and its three trained parts.

    u = LN1(x) + A_attn(x)
    q = u Wq;  k = u (Wk + dWk);  v = u (Wv + dWv)
    x = x + softmax(q [K_prefix ; k]^T / sqrt(head)) [V_prefix ; v] Wo
    x = x + MLP(LN2(x) + A_mlp(x))

The prefix rows come first, so that the causal mask of the text tower is the ordinary one, aligned
to the last key, over P + L keys. (Their place does not change the result, only the mask.)

Shapes: N batch, L tokens, D width, H heads, P prefix length.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upperson.model.adapter import LAdapter
from upperson.model.lora import KVLora
from upperson.model.mlp import frozen_mlp
from upperson.model.prefix import SPrefix
from upperson_rt.errors import UsageError

MOST_ROWS = 10_000
"""Prefix rows or rank beyond any use: a typing mistake ends here, not in the allocator."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UPPersonConfig:
    """Sizes and places of the trained parts, the same in both towers. Size 0 leaves a part out.

    Places are blocks counted from 1 at the input: ``all``, one number, or ``first-last``, both
    included.
    """

    prefix_length: int = 10
    """Prefix rows P per attention layer."""

    prefix_scale: float = 10.0
    """Initial S. The paper's notes give 10; the official code's last state uses 100."""

    lora_rank: int = 32
    """Rank of the key and value updates."""

    adapter_reduction: int = 8
    """An L-Adapter's bottleneck is width // reduction."""

    prefix_blocks: str = "all"
    lora_blocks: str = "all"
    adapter_blocks: str = "all"

    def __post_init__(self) -> None:
        for name in ("prefix_length", "lora_rank", "adapter_reduction"):
            if getattr(self, name) < 0:
                raise UsageError(
                    f"{name} must be 0 (part left out) or more, found {getattr(self, name)}"
                )
        if not math.isfinite(self.prefix_scale):
            raise UsageError(f"prefix_scale must be a finite number, found {self.prefix_scale}")
        for name in ("prefix_length", "lora_rank"):
            if getattr(self, name) > MOST_ROWS:
                raise UsageError(f"{name} must be at most {MOST_ROWS}, found {getattr(self, name)}")
        for name in ("prefix_blocks", "lora_blocks", "adapter_blocks"):
            block_range(getattr(self, name), name)

    def at(self, number: int, blocks: int) -> "UPPersonConfig":
        """Return the sizes in one block: 0 for every part that does not reach it.

        Args:
            number: The block, from 1 at the input.
            blocks: Blocks of its tower.

        Raises:
            UsageError: A part is to sit in blocks that the tower does not have.
        """
        sizes: dict[str, Any] = {}
        for size, name in (
            ("prefix_length", "prefix_blocks"),
            ("lora_rank", "lora_blocks"),
            ("adapter_reduction", "adapter_blocks"),
        ):
            first, last = block_range(getattr(self, name), name) or (1, blocks)
            if last > blocks:
                raise UsageError(
                    f"{name} is '{getattr(self, name)}', but a tower of this base has "
                    f"{blocks} blocks: choose blocks from 1 to {blocks}"
                )
            sizes[size] = getattr(self, size) if first <= number <= last else 0
        return replace(self, **sizes)


def block_range(text: str, name: str) -> tuple[int, int] | None:
    """Read ``all`` (None), ``n`` or ``first-last`` as (first, last), both included, from 1."""
    if text == "all":
        return None
    match = re.fullmatch(r"([1-9]\d{0,3})(?:-([1-9]\d{0,3}))?", text)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise UsageError(
            f"{name} must be 'all' or blocks such as 1-12, counted from 1, found '{text}'"
        )
    return int(match[1]), int(match[2] or match[1])


PLAIN_CLIP = UPPersonConfig(prefix_length=0, lora_rank=0, adapter_reduction=0)
"""No trained part at all: the frozen base itself, for zero-shot baselines."""


class Block(nn.Module):
    """A frozen CLIP block with S-Prefix, K/V LoRA and two L-Adapters.

    Args:
        base: A residual attention block of open_clip. Its modules are shared, not copied.
        config: Sizes of the trained parts in this block.
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

        In one product [N, L, 3D] the queries would keep all of it alive for the backward pass.
        """
        queries = [self.attn.embed_dim]
        weight_q, weight_kv = self.attn.in_proj_weight.tensor_split(queries)
        bias_q, bias_kv = self.attn.in_proj_bias.tensor_split(queries)
        q_NQD = F.linear(u_NQD, weight_q, bias_q)
        k_NLD, v_NLD = F.linear(u_NLD, weight_kv, bias_kv).chunk(2, dim=-1)
        if self.lora is not None:
            key_update_NLD, value_update_NLD = self.lora(u_NLD)
            k_NLD = k_NLD + key_update_NLD
            v_NLD = v_NLD + value_update_NLD
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


def _normed(x_NLD: Tensor, norm: nn.Module, adapter: LAdapter | None) -> Tensor:
    normed: Tensor = norm(x_NLD)
    return normed if adapter is None else normed + adapter(x_NLD)


def _pick(x_NLD: Tensor, index_N: Tensor) -> Tensor:
    """Return one token of each sample, [N, 1, D]."""
    return x_NLD[torch.arange(x_NLD.shape[0], device=x_NLD.device), index_N][:, None]


def _prepend(rows_PD: Tensor, x_NLD: Tensor) -> Tensor:
    rows_NPD = rows_PD.to(x_NLD.dtype).expand(x_NLD.shape[0], -1, -1)
    return torch.cat([rows_NPD, x_NLD], dim=1)
