"""S-Prefix: learned key and value rows whose value side is multiplied by a learned scale.

The paper multiplies the prefix columns of the attention matrix by ``S`` after the softmax, without
normalising again (arXiv 2504.10084, eq. 15-16). ``S`` meets nothing but the prefix values there, so

    softmax(q [ck*TK ; k]^T)  with columns scaled by S, times [cv*TV ; v]
  = softmax(q [ck*TK ; k]^T)  times [S*cv*TV ; v]

which is ordinary attention with P more rows and runs on a fused kernel. The factors stay separate
parameters: training the product instead would change the gradient that S exists to amplify.

Shapes: P prefix length, D width.
"""

import torch
from torch import Tensor, nn


class SPrefix(nn.Module):
    """Prefix of one attention layer.

    Args:
        width: Width D of the transformer; heads split the rows as they split keys and values.
        length: Number P of prefix rows, at least 1.
        scale: Initial value of the learned scale S.
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
