"""One optimisation step over a global batch.

The towers run on a share of the batch, in parts if memory asks for it; the loss always sees the
whole batch. That is exact, because gradients of the loss stop at the features first:

    features of every part  ->  gathered batch  ->  loss  ->  gradient of the own features
    for every part: features again, backward from their gradient   (once only, if it is one part)
"""

from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from upperson.data.batches import Batch
from upperson.distributed import gather
from upperson.losses import Objective


def backward_through_batch(
    accelerator: Accelerator,
    model: nn.Module,
    objective: Objective,
    share: Batch,
    sizes: list[int],
    parts: int,
) -> Tensor:
    """Add the gradients of the global batch's loss and return the loss, detached.

    Args:
        accelerator: Engine that prepared ``model``.
        model: Maps images and ids to features of both, not unit norm.
        objective: The loss, the same on every process.
        share: Pairs of this process, on its device.
        sizes: Pairs of every process.
        parts: Parts in which the share passes the towers.
    """
    pieces = [
        piece
        for piece in zip(
            share.image_N3HW.tensor_split(parts), share.ids_NL.tensor_split(parts), strict=True
        )
        if len(piece[0])
    ]
    in_one = len(pieces) == 1
    with torch.set_grad_enabled(in_one):
        outputs = [model(*piece) for piece in pieces]
    image_nE, text_nE = (
        torch.cat([output[side].detach() for output in outputs]).requires_grad_() for side in (0, 1)
    )
    loss: Tensor = objective(
        gather(image_nE, sizes), gather(text_nE, sizes), gather(share.labels_N, sizes)
    )
    image_grad_nE, text_grad_nE = _gradients(accelerator, loss, image_nE, text_nE)
    rows = [len(images) for images, _ in pieces]
    gradients = zip(torch.split(image_grad_nE, rows), torch.split(text_grad_nE, rows), strict=True)
    for number, (piece, gradient) in enumerate(zip(pieces, gradients, strict=True), start=1):
        # Processes exchange gradients once, with the last part.
        with nullcontext() if number == len(pieces) else accelerator.no_sync(model):
            torch.autograd.backward(outputs[0] if in_one else model(*piece), gradient)
    return loss.detach()


def _gradients(
    accelerator: Accelerator, loss: Tensor, image_nE: Tensor, text_nE: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the loss backward to the features, and to the classifier's weights if it has one."""
    accelerator.backward(loss)
    if image_nE.grad is None or text_nE.grad is None:
        raise RuntimeError("the loss does not depend on the features")
    return image_nE.grad, text_nE.grad
