"""UP-Person's block: a frozen CLIP block and its three trained parts (arXiv 2504.10084).

    S-Prefix    P rows before keys and values:  [ck*TK ; k]  and  [S*cv*TV ; v]      eq. 15-16
    LoRA        dW = c * B A  beside the key and the value projection, each          eq. 9
    L-Adapter   A(x) = s * (W_up relu(W_down x + b_down) + b_up)  beside a LayerNorm  eq. 17

    u = LN1(x) + A_attn(x)
    q = u Wq;  k = u (Wk + dWk);  v = u (Wv + dWv);  q and k rotated, if the base does so
    x = x + softmax(q [K_prefix ; k]^T / sqrt(head)) [V_prefix ; v] Wo
    x = x + MLP(LN2(x) + A_mlp(x))

Fresh LoRA and L-Adapters add nothing: B and W_up, b_up start at zero. The prefix rows come first,
so that the causal mask of the text tower is the ordinary one, aligned to the last key, over P + L
keys. (Their place does not change the result, only the mask.) They have no position, so rotary
embeddings do not rotate them.

Shapes: N batch, L tokens, M rows (N * L), D width, H heads, d width of a head, P prefix length,
R rank or width of a bottleneck.
"""

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor, nn

from upperson.model.architecture import FrozenBlock
from upperson_rt.errors import UsageError
from upperson_rt.printable import safe_repr

MOST_ROWS = 10_000
"""Prefix rows or rank beyond any use: a typing mistake ends here, not in the allocator."""

_PLACES = {
    "prefix_length": "prefix_blocks",
    "lora_rank": "lora_blocks",
    "adapter_reduction": "adapter_blocks",
}
"""The field with the size of each part, to the field with its blocks."""


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
        for size, place in _PLACES.items():
            value = getattr(self, size)
            if value < 0:
                raise _out_of_range(size, value, "0 (part left out) or more")
            if size != "adapter_reduction" and value > MOST_ROWS:
                raise _out_of_range(size, value, f"at most {MOST_ROWS}")
            _block_range(getattr(self, place), place)
        if not math.isfinite(self.prefix_scale):
            raise _out_of_range("prefix_scale", self.prefix_scale, "a finite number")

    @property
    def is_plain(self) -> bool:
        """Whether every part is left out."""
        return not any(getattr(self, size) for size in _PLACES)

    def at(self, number: int, blocks: int) -> "UPPersonConfig":
        """Return the sizes in a block of a tower, counted from 1: 0 for parts not in it."""
        sizes: dict[str, Any] = {}
        for size, place in _PLACES.items():
            first, last = _block_range(getattr(self, place), place) or (1, blocks)
            if last > blocks:
                raise UsageError(
                    f"{place} is '{getattr(self, place)}', but a tower of this base has "
                    f"{blocks} blocks: choose blocks from 1 to {blocks}",
                    code="blocks_out_of_range",
                    setting=place,
                    blocks=blocks,
                )
            sizes[size] = getattr(self, size) if first <= number <= last else 0
        return replace(self, **sizes)


def _out_of_range(setting: str, found: float, expected: str) -> UsageError:
    return UsageError(
        f"{setting} must be {expected}, found {found}",
        code="size_out_of_range",
        setting=setting,
        found=found,
    )


def _block_range(text: str, name: str) -> tuple[int, int] | None:
    """Read ``all`` (None), ``n`` or ``first-last`` as (first, last), both included, from 1."""
    if text == "all":
        return None
    match = re.fullmatch(r"([1-9]\d{0,3})(?:-([1-9]\d{0,3}))?", text)
    if match is None or int(match[2] or match[1]) < int(match[1]):
        raise UsageError(
            f"{name} must be 'all' or blocks such as 1-12, counted from 1, found {safe_repr(text)}",
            code="blocks_malformed",
            setting=name,
            found=text,
        )
    return int(match[1]), int(match[2] or match[1])


PLAIN_CLIP = UPPersonConfig(prefix_length=0, lora_rank=0, adapter_reduction=0)
"""No trained part at all: the frozen base itself, for zero-shot baselines."""


class SPrefix(nn.Module):
    """Learned key and value rows whose value side is multiplied by a learned scale S.

    The paper multiplies the prefix columns of the attention matrix by S after the softmax, without
    normalising again (eq. 15-16). S meets nothing but the prefix values there, so

        softmax(q [ck*TK ; k]^T)  with columns scaled by S, times [cv*TV ; v]
      = softmax(q [ck*TK ; k]^T)  times [S*cv*TV ; v]

    which is ordinary attention with P more rows and runs on a fused kernel. The factors stay
    separate parameters: training the product instead would change the gradient that S exists to
    amplify. Heads split the rows as they split keys and values.
    """

    def __init__(self, width: int, length: int, scale: float) -> None:
        super().__init__()
        self.key_tokens = nn.Parameter(torch.empty(length, width))
        self.value_tokens = nn.Parameter(torch.empty(length, width))
        self.key_scale = nn.Parameter(torch.tensor(1.0))
        self.value_scale = nn.Parameter(torch.tensor(1.0))
        self.scale = nn.Parameter(torch.tensor(float(scale)))
        nn.init.uniform_(self.key_tokens, 0.0, 0.01)
        nn.init.uniform_(self.value_tokens, 0.0, 0.01)

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the key and value rows to put before the projected tokens, each [P, D]."""
        keys_PD = self.key_scale * self.key_tokens
        values_PD = self.scale * self.value_scale * self.value_tokens
        return keys_PD, values_PD


class LowRank(nn.Module):
    """One update c * B A of a [D, D] projection, without an alpha / R factor (eq. 9)."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, width))
        self.up = nn.Parameter(torch.zeros(width, rank))
        self.scale = nn.Parameter(torch.tensor(1.0))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))


class KVLora(nn.Module):
    """Low-rank updates of the key and the value projection of an attention layer; none for q."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.key = LowRank(width, rank)
        self.value = LowRank(width, rank)

    def forward(self, x_MD: Tensor, keys_MD: Tensor, values_MD: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values with the updates for x; those given are used up.

        Thin products instead of building dW: the gradient of a full [D, D] matrix, as costly as
        training the projection itself, never exists. Both share the first one, and the scales meet
        its result, so that their gradients need no [M, D] tensor.
        """
        down_2RD = torch.cat([self.key.down, self.value.down])
        key_MR, value_MR = F.linear(x_MD, down_2RD).chunk(2, dim=-1)
        return (
            _add_product(keys_MD, self.key.scale * key_MR, self.key.up),
            _add_product(values_MD, self.value.scale * value_MR, self.value.up),
        )


class LAdapter(nn.Module):
    """A bottleneck of ``width // reduction`` beside a LayerNorm, fed with the raw residual stream.

    See eq. 17.
    """

    def __init__(self, width: int, reduction: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, width // reduction)
        self.up = nn.Linear(width // reduction, width)
        self.scale = nn.Parameter(torch.tensor(1.0))
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x_MD: Tensor, normed_MD: Tensor) -> Tensor:
        """Return the LayerNorm of the residual stream x with what x adds to it; it is used up.

        The scale meets the bottleneck and the bias, so that its gradient needs no [M, D] tensor.
        """
        hidden_MR = self.scale * torch.relu(self.down(x_MD))
        return _add_product(normed_MD.add_(self.scale * self.up.bias), hidden_MR, self.up.weight)


def _add_product(to_MD: Tensor, x_MR: Tensor, weight_DR: Tensor) -> Tensor:
    """Return to + x W^T, in the place of the first, which saves a pass over all rows.

    Autocast, which knows no product in place, makes a tensor of its own.
    """
    if torch.is_autocast_enabled(to_MD.device.type):
        return to_MD + F.linear(x_MR, weight_DR)
    return to_MD.addmm_(x_MR, weight_DR.T)


TRAINED_PARTS = {
    "prefix": "S-Prefix",
    "lora": "LoRA",
    "adapter_attn": "L-Adapter",
    "adapter_mlp": "L-Adapter",
}
"""Attributes of a block that hold trained tensors, to the part each is; all else is frozen."""

QUICK_GELU_SLOPE = 1.702


class Block(nn.Module):
    """A block of the base, whose modules are shared, with S-Prefix, K/V LoRA and two L-Adapters."""

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
        self,
        x_NLD: Tensor,
        mask: Tensor | None = None,
        only_N: Tensor | None = None,
        rotary_2Ld: Tensor | None = None,
    ) -> Tensor:
        """Run the block.

        Args:
            x_NLD: Residual stream [N, L, D].
            mask: None, or bool [L, P + L], True where a query may look at a key. A block without
                prefix leaves out its first P columns.
            only_N: None, or the index of the one token of each sample whose output is wanted. All
                tokens are its keys and values; queries and MLP are computed for it alone.
            rotary_2Ld: None, or the tables of `rotated`; not together with ``only_N``.

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
        x_NQD = x_NQD + self._attention(u_NQD, u_NLD, mask, rotary_2Ld)
        return x_NQD + frozen_mlp(self.mlp, _normed(x_NQD, self.ln_2, self.adapter_mlp))

    def _attention(
        self, u_NQD: Tensor, u_NLD: Tensor, mask: Tensor | None, rotary_2Ld: Tensor | None
    ) -> Tensor:
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
        if rotary_2Ld is not None:
            q_NQD, k_NLD = rotated(q_NQD, rotary_2Ld), rotated(k_NLD, rotary_2Ld)
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


def rotated(x_NLD: Tensor, rotary_2Ld: Tensor) -> Tensor:
    """Rotate each pair of neighbouring channels of queries or keys by an angle of its position.

    The tables have the cosines of the angles, and their sines, negative for the first of a pair.
    Computed in their type, and returned in that of x [N, L, D].
    """
    cosine_L1d, sine_L1d = rotary_2Ld[:, :, None]
    x_NLHd = torch.unflatten(x_NLD, -1, (-1, rotary_2Ld.shape[-1]))
    exchanged_NLHd = torch.unflatten(x_NLHd, -1, (-1, 2)).flip(-1).flatten(-2)
    out_NLHd: Tensor = x_NLHd * cosine_L1d + exchanged_NLHd * sine_L1d
    return out_NLHd.to(x_NLD.dtype).flatten(2)


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
