"""Retrieval evaluation of a model in torch; the metrics themselves are the runtime's."""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader

from upperson.data.dataset import ImageDataset, pad_ids, tokenize
from upperson.data.records import Record
from upperson.data.transforms import evaluation_transform
from upperson.model.encoder import UPPerson
from upperson_rt.metrics import RetrievalMetrics, retrieval_metrics
from upperson_rt.tokenizer import Tokenizer

Progress = Callable[[int, int], None]
"""Called with (done, total) items."""


@torch.inference_mode()
def embed_records(
    model: UPPerson,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    *,
    batch_size: int = 64,
    workers: int = 0,
    progress: Progress | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Encode every caption and every image of records.

    Returns:
        Unit-norm float32 captions [Q, E], in the order of records and their captions, and images
        [G, E], in the order of records.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    ids = tokenize(tokenizer, [text for record in records for text in record.captions])
    images = ImageDataset(records, model.image_size, evaluation_transform())
    total, done = len(ids) + len(images), 0
    # Captions of like length share a batch, so short ones are not padded to the longest of all.
    order = np.argsort([len(row) for row in ids], kind="stable")
    text_QE = np.empty((len(ids), model.embed_dim), dtype=np.float32)
    for start in range(0, len(ids), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad_ids([ids[index] for index in chosen]).to(device)
        text_QE[chosen] = model.encode_text(batch).cpu().numpy()
        done += len(chosen)
        if progress is not None:
            progress(done, total)
    image_GE = np.empty((len(images), model.embed_dim), dtype=np.float32)
    start = 0
    for batch in DataLoader(images, batch_size=batch_size, num_workers=workers):
        image_GE[start : start + len(batch)] = model.encode_image(batch.to(device)).cpu().numpy()
        start += len(batch)
        if progress is not None:
            progress(done + start, total)
    model.train(was_training)
    return text_QE, image_GE


def pids_of(
    records: Sequence[Record],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the identities of all captions [Q] and of all images [G], in embedding order."""
    queries = [record.pid for record in records for _ in record.captions]
    return np.array(queries, dtype=np.int64), np.array([r.pid for r in records], dtype=np.int64)


def evaluate(
    model: UPPerson,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    *,
    workers: int = 0,
    progress: Progress | None = None,
) -> RetrievalMetrics:
    """Text-to-image retrieval: every caption queries all images of the split."""
    text_QE, image_GE = embed_records(model, tokenizer, records, workers=workers, progress=progress)
    return retrieval_metrics(text_QE, image_GE, *pids_of(records))
