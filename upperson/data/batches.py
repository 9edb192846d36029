"""Records as batches of tensors, decided by seed, epoch and step alone.

The number of processes, the number of loader workers and an interruption change neither a batch
nor its random numbers: two processes train as one does, and a resumed run continues exactly.

Workers get a data set as a few arrays, whatever its size: a Python object or a tensor for each
caption would be copied, and would take a file handle, in every worker.

Shapes: N batch, H image height, W image width, L tokens of the longest caption in the batch,
P pairs of a data set, K facts (`upperson.data.rewording`).
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from upperson.data.pictures import Pictures, StoredPictures, pixels_of
from upperson.data.records import Record
from upperson.data.rewording import CaptionAttributes, shorter, wrong
from upperson.data.transforms import (
    AUGMENTATION_UNIFORMS,
    PixelStatistics,
    draw_augmentation,
    mask_caption,
    prepare_pixels,
)
from upperson_rt.errors import UppersonError
from upperson_rt.tokenizer import Tokenizer, token_lengths

_TOKENIZED_AT_A_TIME = 4096
_PREFETCHED = 2
"""Batches that every worker has ready."""
_SHARED_MEMORY = Path("/dev/shm")


class Sample(NamedTuple):
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

    wrong_NL: Tensor | None = None
    """As ``ids_NL``, of a wrong version of each caption; None without."""

    mentioned_NK: Tensor | None = None
    known_NK: Tensor | None = None
    """bool: attributes that each caption mentions, and that any caption of its person mentions;
    None without."""


class BatchSampler(Sampler[list[Sample]]):
    """The share of one process in every batch of an epoch.

    Pairs are shuffled anew each epoch and each is seen once; the last batch is smaller. A last
    batch with fewer pairs than processes is left out. If pairs are left out, the others are seen
    more often: an epoch keeps its length.

    ``batch_size`` counts the pairs over all processes; ``process`` is this one, from 0.
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

    def __iter__(self) -> Iterator[list[Sample]]:
        order = np.random.default_rng([self._seed, self._epoch]).permutation(self._pairs)
        if len(self._left_out):
            order = np.resize(order[np.isin(order, self._left_out, invert=True)], self._pairs)
        for step in range(self._first_step, len(self)):
            batch = order[step * self._batch_size :][: self._batch_size]
            share = np.array_split(batch, self._processes)[self._process]
            yield [Sample(int(pair), self._sample_seed(int(pair))) for pair in share]

    def _sample_seed(self, pair: int) -> int:
        state = np.random.SeedSequence([self._seed, self._epoch, pair]).generate_state(1)
        return int(state[0])


class LoadedBatch(NamedTuple):
    """A batch from a loader: bytes, and the augmentation parameters drawn for them."""

    pixels_NHW3: Tensor | StoredPictures
    """uint8 RGB, or where in a cache it is: see `pixels_of`."""

    augmentation_N7: Tensor | None
    """int32, see `draw_augmentation`; None without augmentation."""

    ids_NL: Tensor
    """int64 token ids, masked if wanted, zero-padded."""

    labels_N: Tensor
    """int64 identities, numbered from 0."""

    wrong_NL: Tensor | None = None
    """As ``ids_NL``, of a wrong version of each caption; None if not wanted."""

    mentioned_NK: Tensor | None = None
    known_NK: Tensor | None = None
    """As in `Batch`."""

    def to(self, device: torch.device, statistics: PixelStatistics) -> Batch:
        """Move it to a device, and augment and normalise the images there.

        Raises:
            IntegrityError: The cache of its pictures was cut short, or is gone.
        """
        pixels_NHW3, augmentation_N7, ids_NL, labels_N, *others = (
            None if part is None else part.to(device, non_blocking=True)
            for part in (pixels_of(self.pixels_NHW3), *self[1:])
        )
        assert pixels_NHW3 is not None
        assert ids_NL is not None
        assert labels_N is not None
        images_N3HW = prepare_pixels(pixels_NHW3, augmentation_N7, statistics)
        return Batch(images_N3HW, ids_NL, labels_N, *others)


class Captions(Sequence[NDArray[np.int32]]):
    """Token ids of many captions in a single array, in which ``ends_P`` are their ends."""

    def __init__(self, ids: NDArray[np.int32], ends_P: NDArray[np.int64]) -> None:
        self._ids = ids
        self._ends_P = ends_P

    def __len__(self) -> int:
        return len(self._ends_P)

    @overload
    def __getitem__(self, index: int) -> NDArray[np.int32]: ...

    @overload
    def __getitem__(self, index: slice) -> list[NDArray[np.int32]]: ...

    def __getitem__(self, index: int | slice) -> NDArray[np.int32] | list[NDArray[np.int32]]:
        """Return views of one caption or of some, each as long as its own text."""
        place = range(len(self))[index]
        if isinstance(place, range):
            return [self[each] for each in place]
        return self._ids[self._ends_P[place - 1] if place else 0 : self._ends_P[place]]

    def lengths(self) -> NDArray[np.int64]:
        """Return the tokens of each caption, [P]."""
        return np.diff(self._ends_P, prepend=0)


class PairDataset(Dataset["LoadedBatch | UppersonError"]):
    """Every (image, caption) pair of records, drawn as whole batches, for training.

    A loader reads it with ``batch_size=None`` and a :class:`BatchSampler`: every item is a batch,
    built where the images are decoded. An image that cannot be decoded gives the error as the
    item, for the main process to raise; torch would wrap a raised one in a worker's traceback.

    Args:
        records: The split to train on.
        pictures: The same records' pictures.
        tokenizer: Captions are tokenized once, here.
        augment: Whether to draw augmentation parameters, with `draw_augmentation`.
        mask_captions: Whether to mask caption tokens, with `mask_caption`.
        shorten_captions: Share of captions to draw with a random part of their phrases only; if
            there are any, batches have the caption attributes, too.
        wrong_captions: Whether to make a wrong version of every caption.
        length_step: Captions of a batch are padded to a multiple of it, or to the context length.
    """

    def __init__(
        self,
        records: Sequence[Record],
        pictures: Pictures,
        tokenizer: Tokenizer,
        *,
        augment: bool,
        mask_captions: bool,
        shorten_captions: float = 0.0,
        wrong_captions: bool = False,
        length_step: int = 1,
    ) -> None:
        self._pictures = pictures
        labels = identity_labels(records)
        captions = [len(record.captions) for record in records]
        self._image_P = np.repeat(np.arange(len(records)), captions)
        self._label_P = np.repeat([labels[record.pid] for record in records], captions)
        texts = [text for record in records for text in record.captions]
        self._captions = tokenize(tokenizer, texts)
        self._wrong_captions = wrong_captions
        self._shorten_captions = shorten_captions
        rewords = bool(shorten_captions or wrong_captions)
        self._rewording = (texts, tokenizer) if rewords else None
        self._attributes = CaptionAttributes(texts, self._label_P) if shorten_captions else None
        self._augment = augment
        self._mask_captions = mask_captions
        self._length_step = length_step
        self._context_length = tokenizer.context_length

    def __len__(self) -> int:
        return len(self._captions)

    def __getitem__(self, samples: Sequence[Sample]) -> LoadedBatch | UppersonError:
        """Return the batch of some samples; captions are padded to the longest among them."""
        pairs = [sample.pair for sample in samples]
        try:
            pixels_NHW3 = self._pictures.for_batch(self._image_P[pairs])
        except UppersonError as error:
            return error
        augmentation_N7, ids = None, [self._captions[pair] for pair in pairs]
        rngs = [np.random.default_rng(sample.seed) for sample in samples]
        if self._augment:
            uniform_NK = np.stack([rng.random(AUGMENTATION_UNIFORMS) for rng in rngs])
            augmentation_N7 = draw_augmentation(uniform_NK, *self._pictures.image_size)
        texts: list[str] = []
        if self._rewording is not None:
            captions, tokenizer = self._rewording
            for pair, rng in zip(pairs, rngs, strict=True):
                shortened = rng.random() < self._shorten_captions
                texts.append(shorter(captions[pair], rng) if shortened else captions[pair])
            ids = tokenize(tokenizer, texts)[:]
        if self._mask_captions:
            ids = [mask_caption(ids_L, rng) for ids_L, rng in zip(ids, rngs, strict=True)]
        if self._wrong_captions and self._rewording is not None:
            false = [wrong(text, rng) for text, rng in zip(texts, rngs, strict=True)]
            false_ids = tokenize(tokenizer, false)[:]
            for i, text in enumerate(texts):
                # What cannot be made false stays, masked as it is: no gradient comes of it.
                ids.append(ids[i] if false[i] == text else false_ids[i])
        length = -(-max(map(len, ids)) // self._length_step) * self._length_step
        ids_ML = pad_ids(ids, min(length, self._context_length))
        mentioned_NK = known_NK = None
        if self._attributes is not None:
            mentioned_NK = torch.from_numpy(self._attributes.mentioned_by(texts))
            known_NK = torch.from_numpy(self._attributes.known_of(self._label_P[pairs]))
        return LoadedBatch(
            pixels_NHW3,
            augmentation_N7,
            ids_ML[: len(pairs)],
            torch.from_numpy(self._label_P[pairs]),
            ids_ML[len(pairs) :] if self._wrong_captions else None,
            mentioned_NK,
            known_NK,
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest caption."""
        return int(self._captions.lengths().max())


def pair_loader(
    pairs: PairDataset, sampler: BatchSampler, device: torch.device, workers: int
) -> "DataLoader[LoadedBatch | UppersonError]":
    """Return a loader of the sampler's batches, whose workers stay from epoch to epoch.

    ``device`` is where batches will go; ``workers`` are the processes that read pictures, and 0
    reads in this one.
    """
    return DataLoader(
        pairs,
        sampler=sampler,
        batch_size=None,  # The sampler gives whole batches.
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=_PREFETCHED if workers else None,
        pin_memory=device.type == "cuda",
    )


def usable_workers(wanted: int, batch_bytes: int) -> int:
    """Return how many loader processes this training process starts; it changes no result.

    Those of a machine are shared out over its training processes (torchrun's LOCAL_WORLD_SIZE).
    There are at most as many as CPUs, and as shared memory holds batches of: a worker dies if it is
    full. Docker gives 64 MB by default (``--shm-size``).

    ``wanted`` are processes of the machine, each of which hands over ``batch_bytes`` at a time.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = -(-min(wanted, cpus or 1) // processes)
    if not _SHARED_MEMORY.is_dir():
        return workers
    batches = shutil.disk_usage(_SHARED_MEMORY).free // processes // batch_bytes
    # Besides, the training process holds one or two that it takes from the workers.
    return min(workers, max(0, batches - 2) // _PREFETCHED)


def identity_labels(records: Sequence[Record]) -> dict[int, int]:
    """Number the identities of a split from 0, in their own order: gaps do not matter."""
    return {pid: label for label, pid in enumerate(sorted({record.pid for record in records}))}


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> Captions:
    """Tokenize captions, each as long as its own text."""
    ids, lengths = [np.empty(0, dtype=np.int32)], [np.empty(0, dtype=np.int64)]
    for start in range(0, len(texts), _TOKENIZED_AT_A_TIME):
        ids_NL = tokenizer.encode(texts[start : start + _TOKENIZED_AT_A_TIME]).input_ids
        lengths.append(token_lengths(ids_NL))
        ids.append(ids_NL[np.arange(ids_NL.shape[1]) < lengths[-1][:, None]])
    return Captions(np.concatenate(ids), np.cumsum(np.concatenate(lengths)))


def pad_ids(ids: Sequence[NDArray[np.int32]], length: int = 0) -> Tensor:
    """Stack the ids of captions to int64 [N, L], zero-padded to the longest or to a length."""
    longest = max(map(len, ids), default=0)
    ids_NL = torch.zeros(len(ids), max(longest, length), dtype=torch.int64)
    for row_L, ids_L in zip(ids_NL.numpy(), ids, strict=True):
        row_L[: len(ids_L)] = ids_L
    return ids_NL
