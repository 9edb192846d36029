"""The frozen MLP of a CLIP block, computed so that training keeps one tensor of it."""

from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import QuickGELU
from torch import Tensor

_SLOPE = 1.702


def frozen_mlp(mlp: Any, u_NLD: Tensor) -> Tensor:
    """Compute ``mlp(u)`` for [N, L, D].

    CLIP's QuickGELU is h * sigmoid(1.702 h) = silu(1.702 h) / 1.702. Both factors ride along in the
    matrix products, and a fused silu stays, which keeps its input alone for the backward pass; as
    written in open_clip it is three passes over [N, L, 4D] and keeps two such tensors.

    Args:
        mlp: MLP of an open_clip block: c_fc, gelu, c_proj.
        u_NLD: Its input.
    """
    if not isinstance(mlp.gelu, QuickGELU):
        out: Tensor = mlp(u_NLD)
        return out
    rows = u_NLD.flatten(0, 1)
    hidden = torch.addmm(mlp.c_fc.bias, rows, mlp.c_fc.weight.T, beta=_SLOPE, alpha=_SLOPE)
    rows = torch.addmm(mlp.c_proj.bias, F.silu(hidden), mlp.c_proj.weight.T, alpha=1 / _SLOPE)
    return rows.view(u_NLD.shape)
