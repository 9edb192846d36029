"""L-Adapter: a bottleneck beside a LayerNorm, fed with the raw residual stream (eq. 17)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LAdapter(nn.Module):
    """Compute s * (W_up relu(W_down x + b_down) + b_up), zero at the start.

    Args:
        width: Width D of the residual stream.
        reduction: The bottleneck is ``width // reduction`` wide.
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

    def forward(self, x: Tensor) -> Tensor:
        """Map the residual stream x [..., D] to what is added to its LayerNorm, [..., D].

        The scale meets the bottleneck and the bias, so that its gradient needs no [..., D] tensor.
        """
        hidden = self.scale * torch.relu(self.down(x))
        return F.linear(hidden, self.up.weight, self.scale * self.up.bias)
