"""Records as batches of tensors, decided by seed, epoch and step alone.

Neither the number of processes nor of loader workers nor an interruption changes a batch or the
random numbers its samples draw: two processes train as one does, and a resumed run goes on as if
nothing had happened.

Shapes: N batch, H image height, W image width, L tokens of the longest caption in the batch.
"""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from upperson.data.records import Record
from upperson.data.transforms import ImageTransform, mask_caption
from upperson_rt.errors import UppersonError
from upperson_rt.preprocess import prepare_image
from upperson_rt.tokenizer import Tokenizer, token_lengths


class Draw(NamedTuple):
    """One pair of a batch, with the seed of its augmentation."""

    pair: int
    seed: int


class Batch(NamedTuple):
    """Matching images, captions and identities."""

    image_N3HW: Tensor
    """float32, normalised."""

    ids_NL: Tensor
    """int64 token ids, zero-padded."""

    labels_N: Tensor
    """int64 identities, numbered from 0."""


class BatchSampler(Sampler[list[Draw]]):
    """The share of one process in every batch of an epoch.

    Pairs are shuffled anew each epoch and each is seen once; the last batch is smaller. A last
    batch with fewer pairs than processes is left out. If pairs are left out, the others are seen
    more often: an epoch keeps its length.

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
        self._left_out: Sequence[int] = ()

    def start_at(self, epoch: int, step: int, left_out: Sequence[int] = ()) -> None:
        """Set where the next iteration begins, both from 0, and pairs that its epoch leaves out."""
        self._epoch = epoch
        self._first_step = step
        self._left_out = left_out

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
        if len(self._left_out):
            order = np.resize(order[np.isin(order, self._left_out, invert=True)], self._pairs)
        for step in range(self._first_step, len(self)):
            batch = order[step * self._batch_size :][: self._batch_size]
            share = np.array_split(batch, self._processes)[self._process]
            yield [Draw(int(pair), self._sample_seed(int(pair))) for pair in share]

    def _sample_seed(self, pair: int) -> int:
        state = np.random.SeedSequence([self._seed, self._epoch, pair]).generate_state(1)
        return int(state[0])


class ImageDataset(Dataset[Tensor]):
    """The images of records, resized and transformed."""

    def __init__(
        self, records: Sequence[Record], image_size: tuple[int, int], transform: ImageTransform
    ) -> None:
        self._records = records
        self._image_size = image_size
        self._transform = transform

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Tensor:
        """Return one normalised image, float32 [3, H, W]; InputError if it cannot be decoded."""
        pixels_HW3 = prepare_image(self._records[index].image, *self._image_size)
        return self._transform(torch.from_numpy(pixels_HW3).permute(2, 0, 1))


class PairDataset(Dataset["Batch | UppersonError"]):
    """Every (image, caption) pair of records, drawn as whole batches, for training.

    A loader reads it with ``batch_size=None`` and a :class:`BatchSampler`: every item is a batch,
    built where the images are decoded. An image that cannot be decoded gives the error as the
    item, for the main process to raise; torch would wrap a raised one in a worker's traceback.

    Args:
        records: The split to train on.
        images: The same records' images.
        tokenizer: Captions are tokenized once, here.
        mask_captions: Whether to mask caption tokens, with `mask_caption`.
    """

    def __init__(
        self,
        records: Sequence[Record],
        images: ImageDataset,
        tokenizer: Tokenizer,
        *,
        mask_captions: bool,
    ) -> None:
        self._images = images
        labels = identity_labels(records)
        self._pairs = [
            (index, labels[record.pid])
            for index, record in enumerate(records)
            for _ in record.captions
        ]
        self._ids = tokenize(tokenizer, [text for record in records for text in record.captions])
        self._mask_captions = mask_captions

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, draws: Sequence[Draw]) -> Batch | UppersonError:
        """Return the batch of some draws; captions are padded to the longest among them."""
        try:
            samples = [self._sample(draw) for draw in draws]
        except UppersonError as error:
            return error
        images, ids, labels = zip(*samples, strict=True)
        return Batch(torch.stack(images), pad_ids(ids), torch.tensor(labels))

    def _sample(self, draw: Draw) -> tuple[Tensor, Tensor, int]:
        image, label = self._pairs[draw.pair]
        ids_L = self._ids[draw.pair]
        # torchvision draws from torch's global generator: it is lent out and put back.
        with torch.random.fork_rng(devices=[]):
            generator = torch.default_generator.manual_seed(draw.seed)
            image_3HW = self._images[image]
            if self._mask_captions:
                ids_L = mask_caption(ids_L, generator)
        return image_3HW, ids_L, label


def usable_workers(wanted: int) -> int:
    """Return how many loader processes to start: no more than CPUs, which changes no result."""
    return min(wanted, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else wanted)


def identity_labels(records: Sequence[Record]) -> dict[int, int]:
    """Number the identities of a split from 0, in their own order: gaps do not matter."""
    return {pid: label for label, pid in enumerate(sorted({record.pid for record in records}))}


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Tensor]:
    """Tokenize captions into int64 id vectors, each as long as its own text."""
    ids_NL = tokenizer.encode(texts).input_ids
    return [
        torch.from_numpy(ids_L[:length].astype(np.int64))
        for ids_L, length in zip(ids_NL, token_lengths(ids_NL), strict=True)
    ]


def pad_ids(ids: Sequence[Tensor]) -> Tensor:
    """Stack id vectors to int64 [N, L], zero-padded to the longest."""
    return torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True)
