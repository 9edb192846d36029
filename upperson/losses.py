"""SDM, similarity distribution matching (arXiv 2504.10084, eq. 18-20)."""

import torch
from torch import Tensor

TEMPERATURE = 0.02
"""tau of the paper, fixed: the logit scale is 50."""

EPSILON = 1e-8
"""Keeps the logarithm of a zero target finite; it is added inside the logarithm only."""


def sdm_loss(image_NE: Tensor, text_NE: Tensor, pids_N: Tensor) -> Tensor:
    """Sum of KL(p || Q) from text to image and from image to text.

    p is the softmax over the batch of cosine / tau; Q shares its mass equally among all items of
    the same identity. Scalar float32.

    Args:
        image_NE: Unit-norm image embeddings [N, E].
        text_NE: Unit-norm text embeddings [N, E], the i-th belonging to the i-th image.
        pids_N: Integer identities [N].
    """
    logits_NN = text_NE.float() @ image_NE.float().T / TEMPERATURE
    same_NN = (pids_N[:, None] == pids_N[None, :]).float()
    log_target_NN = torch.log(same_NN / same_NN.sum(dim=1, keepdim=True) + EPSILON)
    return _divergence(logits_NN, log_target_NN) + _divergence(logits_NN.T, log_target_NN)


def _divergence(logits_NN: Tensor, log_target_NN: Tensor) -> Tensor:
    log_p_NN = logits_NN.log_softmax(dim=1)
    return (log_p_NN.exp() * (log_p_NN - log_target_NN)).sum(dim=1).mean()
