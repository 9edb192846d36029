"""Find noisy training pairs, whose caption probably describes another person.

As in RDE (arXiv 2308.09911): a mixture of two Gaussians is fitted to the losses of all pairs, and a
pair is clean if the Gaussian with the lower mean explains it better. RDE requires consensus of two
embeddings; there is one here.

Shapes: P pairs, E embedding width.
"""

import numpy as np
import numpy.typing as npt
import torch

_ROUNDS = 100


def matching_losses(
    text_PE: npt.NDArray[np.float32],
    image_PE: npt.NDArray[np.float32],
    pids_P: npt.NDArray[np.int64],
    batch_size: int,
    temperature: float,
    seed: list[int],
) -> npt.NDArray[np.float64]:
    """Return the loss of every pair in a random batch, [P].

    It is -log of the probability of the same identity, summed over both directions: every training
    loss makes it small. Captions and images are unit norm; ``batch_size`` pairs compete with each
    other in batches of an order that the seed draws.
    """
    losses_P = np.empty(len(pids_P))
    order = np.random.default_rng(seed).permutation(len(pids_P))
    # No small rest: with few competitors a loss would be lower.
    for batch in np.array_split(order, max(1, len(order) // batch_size)):
        logits_NN = torch.from_numpy(text_PE[batch] @ image_PE[batch].T / temperature)
        other_NN = torch.from_numpy(pids_P[batch][:, None] != pids_P[batch][None, :])
        total_N = torch.zeros(len(batch))
        for rows_NN in (logits_NN, logits_NN.T):
            right_N = rows_NN.masked_fill(other_NN, -torch.inf).logsumexp(dim=1)
            total_N += rows_NN.logsumexp(dim=1) - right_N
        losses_P[batch] = total_N.double().numpy()
    return losses_P


def noisy_pairs(losses_P: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return the indices of the pairs that are probably wrong, by expectation maximisation.

    None if all losses are equal.
    """
    spread = losses_P.var() if len(losses_P) else 0.0
    if not spread > 0:
        return np.empty(0, dtype=np.int64)
    mean_2 = np.quantile(losses_P, [0.25, 0.75])
    variance_2 = np.full(2, spread)
    weight_2 = np.full(2, 0.5)
    for _ in range(_ROUNDS):
        distance_2P = (losses_P - mean_2[:, None]) ** 2 / variance_2[:, None]
        log_2P = (np.log(weight_2) - np.log(variance_2) / 2)[:, None] - distance_2P / 2
        share_2P = np.exp(log_2P - np.logaddexp(*log_2P))
        # Neither component may vanish or shrink to a point.
        total_2 = np.maximum(share_2P.sum(axis=1), 1e-6)
        weight_2 = total_2 / total_2.sum()
        mean_2 = share_2P @ losses_P / total_2
        variance_2 = (share_2P * (losses_P - mean_2[:, None]) ** 2).sum(axis=1) / total_2
        variance_2 = np.maximum(variance_2, 1e-6 * spread)
    clean = int(mean_2.argmin())
    # The wider Gaussian also explains losses far below both: those pairs are right, too.
    return np.flatnonzero((share_2P[clean] <= 0.5) & (losses_P > mean_2[clean]))
