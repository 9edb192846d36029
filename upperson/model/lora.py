"""Low-rank updates of the key and value projections (arXiv 2504.10084, eq. 9).

dW = c * B A with a learned scalar c and no alpha/r factor; the query projection has none.

Shapes: D width, R rank, any leading dimensions "...".
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LowRank(nn.Module):
    """One low-rank update c * B A of a [D, D] projection, zero at the start.

    Args:
        width: Input and output width D.
        rank: Rank R, at least 1.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, width))
        self.up = nn.Parameter(torch.zeros(width, rank))
        self.scale = nn.Parameter(torch.tensor(1.0))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))


class KVLora(nn.Module):
    """Updates of the key and the value projection of one attention layer."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.key = LowRank(width, rank)
        self.value = LowRank(width, rank)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map x [..., D] to the updates of its keys and of its values, [..., D] each.

        Thin products instead of building dW: the gradient of a full [D, D] matrix, as costly as
        training the projection itself, never exists. Both share the first one, and the scales meet
        its result, so that their gradients need no [..., D] tensor.
        """
        down_2RD = torch.cat([self.key.down, self.value.down])
        key, value = F.linear(x, down_2RD).chunk(2, dim=-1)
        return (
            F.linear(self.key.scale * key, self.key.up),
            F.linear(self.value.scale * value, self.value.up),
        )
