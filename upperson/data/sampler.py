"""Which pairs a step sees, decided by seed, epoch and step alone.

Neither the number of processes nor of loader workers nor an interruption changes a batch or the
random numbers its samples draw: two processes train as one does, and a resumed run goes on as if
nothing had happened.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


class Draw(NamedTuple):
    """One pair of a batch, with the seed of its augmentation."""

    pair: int
    seed: int


class BatchSampler(Sampler[list[Draw]]):
    """The share of one process in every batch of an epoch.

    Pairs are shuffled anew each epoch and each is seen once; the last batch is smaller. A last
    batch with fewer pairs than processes is left out.

    Args:
        pairs: Number of pairs in the training split.
        batch_size: Pairs of a batch, over all processes.
        seed: Seed of the run.
        process: This process, from 0.
        processes: Number of processes.
    """

    def __init__(
        self, pairs: int, batch_size: int, seed: int, process: int = 0, processes: int = 1
    ) -> None:
        self._pairs = pairs
        self._batch_size = batch_size
        self._seed = seed
        self._process = process
        self._processes = processes
        self._epoch = 0
        self._first_step = 0

    def start_at(self, epoch: int, step: int) -> None:
        """Set where the next iteration begins; both count from 0."""
        self._epoch = epoch
        self._first_step = step

    def __len__(self) -> int:
        """Return the steps of a whole epoch."""
        full, rest = divmod(self._pairs, self._batch_size)
        return full + (rest >= self._processes)

    def share_sizes(self, step: int) -> list[int]:
        """Return how many pairs of a step's batch each process has."""
        size = min(self._batch_size, self._pairs - step * self._batch_size)
        return [len(share) for share in np.array_split(np.empty(size), self._processes)]

    def __iter__(self) -> Iterator[list[Draw]]:
        order = np.random.default_rng([self._seed, self._epoch]).permutation(self._pairs)
        for step in range(self._first_step, len(self)):
            batch = order[step * self._batch_size :][: self._batch_size]
            share = np.array_split(batch, self._processes)[self._process]
            yield [Draw(int(pair), self._sample_seed(int(pair))) for pair in share]

    def _sample_seed(self, pair: int) -> int:
        state = np.random.SeedSequence([self._seed, self._epoch, pair]).generate_state(1)
        return int(state[0])
