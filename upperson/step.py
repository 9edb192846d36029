"""One optimisation step over a global batch: gradients, the optimiser, its learning rate.

The towers run on a share of the batch, in pieces if memory asks for it; the loss always sees the
whole batch. That is exact, because gradients of the loss stop at the features first:

    features of every piece  ->  gathered batch  ->  loss  ->  gradient of the own features
    for every piece: features again, backward from their gradient  (once only, if it is one piece)

Shapes: N pairs of the global batch, n pairs of this process, E embedding width, K facts.
"""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from upperson.config import TrainConfig
from upperson.data.batches import Batch
from upperson.losses import Objective, wrong_caption_loss
from upperson.model.encoder import UPPerson

COMPILED_LENGTHS = 16
"""Compiled blocks get captions padded to multiples of so many tokens: each length is compiled."""


def compile_blocks(model: UPPerson) -> None:
    """Have every block compiled when it first runs with a shape; blocks of a tower share it."""
    # Each tower, its last block, each length of captions, and the last batch of an epoch.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    for block in (*model.image.blocks, *model.text.blocks):
        block.compile(dynamic=False)


def backward_through_batch(
    accelerator: Accelerator,
    model: nn.Module,
    objective: Objective,
    share: Batch,
    sizes: list[int],
    accumulate: int,
) -> Tensor:
    """Add the gradients of the global batch's loss and return the loss, detached.

    Args:
        accelerator: Prepared ``model``.
        model: Maps images and ids to features of both, not unit norm.
        objective: The same on every process.
        share: Pairs of this process, on its device.
        sizes: Pairs of every process.
        accumulate: Pieces in which the share passes the towers.
    """
    captions = [share.ids_NL] if share.wrong_NL is None else [share.ids_NL, share.wrong_NL]
    # Each image's captions follow one another: the text tower sees them as so many more captions.
    ids_nCL = torch.stack(captions, dim=1)
    pieces = [
        (images, ids.flatten(0, 1))
        for images, ids in zip(
            share.image_N3HW.tensor_split(accumulate), ids_nCL.tensor_split(accumulate), strict=True
        )
        if len(images)
    ]
    in_one = len(pieces) == 1
    with torch.set_grad_enabled(in_one):
        outputs = [model(*piece) for piece in pieces]
    image_nE, text_nE = (
        torch.cat([output[side].detach() for output in outputs]).requires_grad_() for side in (0, 1)
    )
    image_NE = gather(image_nE, sizes)
    text_NCE = gather(text_nE.reshape(len(image_nE), len(captions), -1), sizes)
    fits_NN = None
    if share.mentioned_NK is not None and share.known_NK is not None:
        unknown_NK = ~gather(share.known_NK, sizes)
        fits_NN = gather(share.mentioned_NK, sizes).float() @ unknown_NK.float().T == 0
    labels_N = gather(share.labels_N, sizes)
    loss: Tensor = objective(image_NE, text_NCE[:, 0], labels_N, fits_NN)
    if share.wrong_NL is not None:
        loss = loss + wrong_caption_loss(
            image_NE, text_NCE[:, 0], text_NCE[:, 1], objective.temperature
        )
    # To the features, and to the classifier's weights if the loss has one.
    accelerator.backward(loss)
    if image_nE.grad is None or text_nE.grad is None:
        raise RuntimeError("the loss does not depend on the features")
    gradients = zip(
        torch.split(image_nE.grad, [len(images) for images, _ in pieces]),
        torch.split(text_nE.grad, [len(ids) for _, ids in pieces]),
        strict=True,
    )
    for number, (piece, gradient) in enumerate(zip(pieces, gradients, strict=True), start=1):
        # Processes exchange gradients once, with the last piece.
        with nullcontext() if number == len(pieces) else accelerator.no_sync(model):
            torch.autograd.backward(outputs[0] if in_one else model(*piece), gradient)
    return loss.detach()


def gather(x_nE: Tensor, sizes: list[int]) -> Tensor:
    """Concatenate the rows of all processes, in their order, to [N, E].

    The gradient of the own rows is multiplied by the number of processes: every process computes
    the same loss of the same N rows, and averaging parameter gradients over the processes, as
    ``DistributedDataParallel`` does, then gives exactly the gradient of one process with N rows.
    ``sizes`` are the rows of every process; they may differ.
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


def build_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], config: TrainConfig
) -> torch.optim.Adam:
    """Adam with coupled weight decay over the trained tensors; biases are not decayed.

    Every group has its peak rate under ``peak_lr``: the prefixes may have one of their own.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            decay = 0.0 if name.endswith("bias") else config.weight_decay
            is_prefix = "prefix" in name.split(".")
            peak = config.prefix_lr if is_prefix and config.prefix_lr is not None else config.lr
            groups.setdefault((decay, peak), []).append(parameter)
    return torch.optim.Adam(
        [
            {"params": parameters, "weight_decay": decay, "lr": peak, "peak_lr": peak}
            for (decay, peak), parameters in groups.items()
        ],
        eps=config.adam_eps,
        # One pass over a tensor; it also knows fp16's scale, so nothing waits for a GPU.
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, epoch: int, config: TrainConfig) -> float:
    """Set the rate of an epoch, counted from 0, in every group; return the common one."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * schedule(epoch, config)
    return config.lr * schedule(epoch, config)


def schedule(epoch: int, config: TrainConfig) -> float:
    """Return an epoch's share of the peak rate: linear warm-up from 0.1, then cosine to 0."""
    if epoch < config.warmup_epochs:
        done = epoch / config.warmup_epochs
        return 0.1 * (1 - done) + done
    done = (epoch - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return 0.5 * (1 + math.cos(math.pi * done))
