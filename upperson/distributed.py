"""The features of all processes as one batch, so that the loss sees every pair.

Shapes: N pairs of the global batch, n pairs of this process, E embedding width.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather(x_nE: Tensor, sizes: list[int]) -> Tensor:
    """Concatenate the rows of all processes, in their order, to [N, E].

    The gradient of the own rows is multiplied by the number of processes: every process computes
    the same loss of the same N rows, and averaging parameter gradients over the processes, as
    ``DistributedDataParallel`` does, then gives exactly the gradient of one process with N rows.

    Args:
        x_nE: Rows of this process [n, ...].
        sizes: Rows of every process; they may differ.
    """
    if len(sizes) == 1:
        return x_nE
    gathered: Tensor = _Gather.apply(x_nE, sizes)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nE: Tensor, sizes: list[int]) -> Tensor:
        ctx.sizes = sizes
        # Collectives want equal shapes; shares differ by one row at most.
        padded = x_nE.new_zeros(max(sizes), *x_nE.shape[1:])
        padded[: len(x_nE)] = x_nE
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        start = sum(ctx.sizes[: dist.get_rank()])
        own = grads[0][start : start + ctx.sizes[dist.get_rank()]]
        return own * len(ctx.sizes), None
