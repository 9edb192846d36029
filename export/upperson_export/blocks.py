"""Transformer blocks as they are deployed: plain layers with constants, no trained part left.

Written for ONNX: weights are stored the way MatMul reads them ([in, out]), and attention is spelled
out with the scale already inside the query rows.

A block describes which of its Linears int8 covers, and the sites where smoothing factors can go.
Smoothing, calibration and quantization rely on that description alone, so another kind of block
needs no more than it.

Shapes: N batch, L tokens, Q query rows, D width, H heads, d head width, P prefix rows.
"""

from collections.abc import Callable, Iterator
from typing import Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from upperson_adapter.weights import Site


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
        self.down, self.up = down, up

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D] to [..., D]."""
        out: Tensor = self.up(torch.relu(self.down(x)))
        return out


Rotary: TypeAlias = tuple[Tensor, Tensor]
"""Tables [L, d] that rotate queries and keys by their positions: the cosines of the angles, and
their sines, negative in the first half. Channel i and channel i + d / 2 of a head make a pair."""


class Attention(nn.Module):
    """Multi-head attention over constant prefix rows, [P, D] each, and the projected tokens.

    The query projection is already divided by sqrt(d); keys and values are one projection D -> 2D.
    If ``packed``, every row is a query: one projection D -> 3D, one activation scale.
    """

    def __init__(
        self,
        query: Linear,
        key_value: Linear,
        out: Linear,
        prefix: tuple[Tensor, Tensor] | None,
        heads: int,
        *,
        packed: bool = False,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.width = query.weight.shape[0]
        self.packed = packed
        if not packed:
            self.q, self.kv = query, key_value
        self.out = out
        self.prefix_k: nn.Parameter | None = None
        self.prefix_v: nn.Parameter | None = None
        if prefix is not None:
            self.prefix_k, self.prefix_v = (
                constant(self._heads_of(rows_PD[None])) for rows_PD in prefix
            )
        if packed:
            self.qkv = Linear(
                torch.cat([query.weight, key_value.weight], dim=1),
                torch.cat([query.bias, key_value.bias]),
            )

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the projections of the rows; values are the last D columns of the last one."""
        return ("qkv",) if self.packed else ("q", "kv")

    def forward(
        self,
        u_NLD: Tensor,
        queries_NQD: Tensor,
        mask: Tensor | None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Attend from query rows to all rows; return [N, Q, D].

        A mask is added to the scores, and is broadcastable to [N, H, Q, P + L]. Rotary embeddings
        need all rows as queries.
        """
        if self.packed:
            q_NQD, k_NLD, v_NLD = self.qkv(u_NLD).split(self.width, dim=-1)
        else:
            k_NLD, v_NLD = self.kv(u_NLD).split(self.width, dim=-1)
            q_NQD = self.q(queries_NQD)
        q_NHQd, k_NHLd, v_NHLd = map(self._heads_of, (q_NQD, k_NLD, v_NLD))
        if rotary is not None:
            q_NHQd, k_NHLd = _rotated(q_NHQd, rotary), _rotated(k_NHLd, rotary)
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


def _rotated(x_NHLd: Tensor, rotary: Rotary) -> Tensor:
    cosine_Ld, sine_Ld = rotary
    first, second = x_NHLd.chunk(2, dim=-1)
    return x_NHLd * cosine_Ld + torch.cat([second, first], dim=-1) * sine_Ld


Activation: TypeAlias = Literal["quick_gelu", "gelu", "gelu_tanh"]


def activated(x: Tensor, activation: Activation) -> Tensor:
    """Apply an activation to x of any shape."""
    if activation == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if activation == "gelu_tanh" else "none")


class Mlp(nn.Module):
    """Two Linears with an activation between them."""

    def __init__(self, fc1: Linear, fc2: Linear, activation: Activation) -> None:
        super().__init__()
        self.fc1 = fc1
        self.fc2 = fc2
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., D] to [..., D]."""
        out: Tensor = self.fc2(activated(self.fc1(x), self.activation))
        return out


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

    def linears(self) -> tuple[Linear, ...]:
        """Return the Linears that int8 covers."""
        attention = self.attention
        inputs = (attention.get_submodule(name) for name in attention.inputs)
        return (*cast("Iterator[Linear]", inputs), attention.out, self.mlp.fc1, self.mlp.fc2)

    def sites(self) -> dict[str, Site]:
        """Return where channels can be divided. fc2 reads a GELU, which no factor can pass."""
        inputs = [f"attention.{name}" for name in self.attention.inputs]
        after_ln_1 = () if self.adapter_attn is None else ("adapter_attn.up",)
        after_ln_2 = () if self.adapter_mlp is None else ("adapter_mlp.up",)
        values = _weight_and_bias(inputs[-1])
        if self.attention.prefix_v is not None:
            values += ("attention.prefix_v",)
        return {
            "ln_1": Site(
                _weight_and_bias("ln_1", *after_ln_1), tuple(f"{name}.weight" for name in inputs)
            ),
            "ln_2": Site(_weight_and_bias("ln_2", *after_ln_2), ("mlp.fc1.weight",)),
            "attention.out": Site(values, ("attention.out.weight",)),
        }

    def forward(
        self,
        x_NLD: Tensor,
        mask: Tensor | None,
        take: TakeRows | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """Return the output of all rows [N, L, D], or of the rows ``take`` selects."""
        u_NLD = _normed(x_NLD, self.ln_1, self.adapter_attn)
        x_NQD, u_NQD = (x_NLD, u_NLD) if take is None else (take(x_NLD), take(u_NLD))
        x_NQD = x_NQD + self.attention(u_NLD, u_NQD, mask, rotary)
        out: Tensor = x_NQD + self.mlp(_normed(x_NQD, self.ln_2, self.adapter_mlp))
        return out


class AttentionPool(nn.Module):
    """One embedding from all tokens: a constant query row attends to them, and an MLP follows.

    The query [1, D] is already divided by sqrt(d).
    """

    def __init__(
        self,
        *,
        norm: nn.Module,
        query: Tensor,
        key_value: Linear,
        out: Linear,
        mlp_norm: nn.Module,
        mlp: Mlp,
        heads: int,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.width = query.shape[1]
        self.norm = norm
        self.query = constant(torch.unflatten(query, 1, (heads, -1)).transpose(0, 1)[None])
        self.kv = key_value
        self.out = out
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def linears(self) -> tuple[Linear, ...]:
        """Return the Linears that int8 covers."""
        return (self.kv, self.out, self.mlp.fc1, self.mlp.fc2)

    def sites(self) -> dict[str, Site]:
        """Return where channels can be divided, as `PlainBlock.sites`."""
        return {
            "norm": Site(_weight_and_bias("norm"), ("kv.weight",)),
            "mlp_norm": Site(_weight_and_bias("mlp_norm"), ("mlp.fc1.weight",)),
            "out": Site(_weight_and_bias("kv"), ("out.weight",)),
        }

    def forward(self, x_NLD: Tensor) -> Tensor:
        """Map tokens [N, L, D] to [N, D]."""
        k_NLD, v_NLD = self.kv(self.norm(x_NLD)).split(self.width, dim=-1)
        k_NHLd, v_NHLd = (
            torch.unflatten(rows, -1, (self.heads, -1)).transpose(1, 2) for rows in (k_NLD, v_NLD)
        )
        scores = self.query @ k_NHLd.transpose(-1, -2)
        attended_NQD = (scores.softmax(dim=-1) @ v_NHLd).transpose(1, 2).flatten(2)
        x_N1D: Tensor = self.out(attended_NQD)
        pooled_N1D: Tensor = x_N1D + self.mlp(self.mlp_norm(x_N1D))
        return pooled_N1D[:, 0]


def _normed(x: Tensor, norm: nn.Module, adapter: Adapter | None) -> Tensor:
    normed: Tensor = norm(x)
    return normed if adapter is None else normed + adapter(x)


def _weight_and_bias(*modules: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for module in modules for name in ("weight", "bias"))


def constant(value: Tensor) -> nn.Parameter:
    """Return a frozen float32 copy."""
    return nn.Parameter(value.detach().float().contiguous().clone(), requires_grad=False)
