"""Records as batches of tensors.

Shapes: N batch, H image height, W image width, L tokens of the longest caption in the batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from upperson.data.records import Record
from upperson.data.transforms import ImageTransform
from upperson_rt.preprocess import load_image, resize_image
from upperson_rt.tokenizer import Tokenizer


class Batch(NamedTuple):
    """Matching images, captions and identities."""

    image_N3HW: Tensor
    """float32, normalised."""

    ids_NL: Tensor
    """int64 token ids, zero-padded."""

    pids_N: Tensor
    """int64 identities."""


class Sample(NamedTuple):
    """One image with one of its captions."""

    image_3HW: Tensor
    ids_L: Tensor
    pid: int


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
        pixels_HW3 = resize_image(load_image(self._records[index].image), *self._image_size)
        return self._transform(torch.from_numpy(pixels_HW3).permute(2, 0, 1))


class PairDataset(Dataset[Sample]):
    """Every (image, caption) pair of records, for training.

    Args:
        records: The split to train on.
        images: The same records' images.
        tokenizer: Captions are tokenized once, here.
    """

    def __init__(
        self, records: Sequence[Record], images: ImageDataset, tokenizer: Tokenizer
    ) -> None:
        self._images = images
        self._pairs = [
            (index, record.pid) for index, record in enumerate(records) for _ in record.captions
        ]
        self._ids = tokenize(tokenizer, [text for record in records for text in record.captions])

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> Sample:
        """Return one pair; the caption's ids are not padded."""
        image, pid = self._pairs[index]
        return Sample(self._images[image], self._ids[index], pid)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Tensor]:
    """Tokenize captions into int64 id vectors, each as long as its own text."""
    batch = tokenizer.encode(texts)
    lengths = np.argmax(batch.input_ids, axis=1) + 1  # EOT has the largest id
    return [
        torch.from_numpy(row[:length].astype(np.int64))
        for row, length in zip(batch.input_ids, lengths, strict=True)
    ]


def pad_ids(ids: Sequence[Tensor]) -> Tensor:
    """Stack id vectors to int64 [N, L], zero-padded to the longest."""
    return torch.nn.utils.rnn.pad_sequence(list(ids), batch_first=True)


def collate(samples: Sequence[Sample]) -> Batch:
    """Stack samples; captions are padded to the longest among them, not to the context length."""
    return Batch(
        torch.stack([sample.image_3HW for sample in samples]),
        pad_ids([sample.ids_L for sample in samples]),
        torch.tensor([sample.pid for sample in samples]),
    )
