"""Retrieval evaluation of a model in torch; the metrics themselves are the runtime's.

Shapes: Q captions, G images, E embedding width, N batch, H image height, W image width.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from upperson.data.batches import pad_ids, tokenize, usable_workers
from upperson.data.images import require_images
from upperson.data.pictures import PictureBatches, Pictures
from upperson.data.records import Record, Split, read_dataset
from upperson.data.transforms import prepare_pixels
from upperson.model.encoder import UPPerson
from upperson_rt.encoder import Progress
from upperson_rt.errors import InputError, UppersonError
from upperson_rt.metrics import RetrievalMetrics, retrieval_metrics
from upperson_rt.phrases import parse
from upperson_rt.phrases.wording import describe
from upperson_rt.tokenizer import Tokenizer


class Evaluation(NamedTuple):
    """Accuracy in both directions, matched by identity."""

    text_to_image: RetrievalMetrics
    """Every caption queries all images: what the literature reports."""

    image_to_text: RetrievalMetrics
    """Every image queries all captions; right is any caption of the same person."""

    def as_dict(self) -> dict[str, dict[str, float]]:
        """Return the metrics by direction and by the names used in reports."""
        return {
            "text_to_image": self.text_to_image.as_dict(),
            "image_to_text": self.image_to_text.as_dict(),
        }


def read_split(dataset: str, root: Path, split: Split) -> list[Record]:
    """Read one split of a data set; InputError if it is empty or images are missing."""
    splits = read_dataset(dataset, root)
    if not splits[split]:
        found = ", ".join(f"{name} {len(records)}" for name, records in splits.items())
        raise InputError(f"{root} has no image in split '{split}' (found: {found})")
    require_images(record.image for record in splits[split])
    return splits[split]


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
    """Encode every caption and every image of records, where the model is and in its own dtype.

    Under ``torch.autocast`` the towers run in the caller's precision.

    Returns:
        Unit-norm float32 captions [Q, E], in the order of records and their captions, and images
        [G, E], in the order of records.

    Raises:
        InputError: An image cannot be decoded, here or in a worker; the model is left as it was.
    """
    was_training = model.training
    model.eval()
    try:
        texts = [text for record in records for text in record.captions]
        total = len(texts) + len(records)
        text_QE = _embed_texts(
            model,
            tokenizer,
            texts,
            batch_size,
            None if progress is None else lambda done, _: progress(done, total),
        )
        image_GE = np.empty((len(records), model.embed_dim), dtype=np.float32)
        device = next(model.parameters()).device
        dtype = model.dtype
        start = 0
        pictures = Pictures([record.image for record in records], model.image_size)
        for pixels_NHW3 in _load(pictures, batch_size, workers, device):
            image_N3HW = prepare_pixels(pixels_NHW3, None, model.statistics)
            embeds = model.encode_image(image_N3HW.to(dtype))
            image_GE[start : start + len(embeds)] = embeds.cpu().numpy()
            start += len(embeds)
            if progress is not None:
                progress(len(texts) + start, total)
    finally:
        model.train(was_training)
    return text_QE, image_GE


@torch.inference_mode()
def embed_texts(
    model: UPPerson, tokenizer: Tokenizer, texts: Sequence[str], *, batch_size: int = 64
) -> npt.NDArray[np.float32]:
    """Encode sentences, where the model is and in its own dtype: unit-norm float32 [Q, E]."""
    was_training = model.training
    model.eval()
    try:
        return _embed_texts(model, tokenizer, texts, batch_size)
    finally:
        model.train(was_training)


def _embed_texts(
    model: UPPerson,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    batch_size: int,
    progress: Progress | None = None,
) -> npt.NDArray[np.float32]:
    ids = tokenize(tokenizer, texts)
    text_QE = np.empty((len(ids), model.embed_dim), dtype=np.float32)
    device = next(model.parameters()).device
    # Sentences of like length share a batch, so short ones are not padded to the longest of all.
    order = np.argsort(ids.lengths(), kind="stable")
    for start in range(0, len(ids), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad_ids([ids[index] for index in chosen]).to(device)
        text_QE[chosen] = model.encode_text(batch).cpu().numpy()
        if progress is not None:
            progress(start + len(chosen), len(ids))
    return text_QE


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
    """Text-to-image retrieval: every caption queries all images of the split.

    Arguments and errors as for `embed_records`.
    """
    text_QE, image_GE = embed_records(model, tokenizer, records, workers=workers, progress=progress)
    return retrieval_metrics(text_QE, image_GE, *pids_of(records))


def evaluate_both(
    model: UPPerson,
    tokenizer: Tokenizer,
    records: Sequence[Record],
    *,
    workers: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """Both directions from one pass over the split; arguments and errors as for `embed_records`."""
    text_QE, image_GE = embed_records(model, tokenizer, records, workers=workers, progress=progress)
    return both_directions(text_QE, image_GE, records)


def both_directions(
    text_QE: npt.NDArray[np.float32],
    image_GE: npt.NDArray[np.float32],
    records: Sequence[Record],
) -> Evaluation:
    """Measure embeddings of the captions and images of records, in `embed_records`' order.

    Raises:
        InputError: The embeddings are not those of these records, or not finite.
    """
    pids_Q, pids_G = pids_of(records)
    return Evaluation(
        text_to_image=retrieval_metrics(text_QE, image_GE, pids_Q, pids_G),
        image_to_text=retrieval_metrics(image_GE, text_QE, pids_G, pids_Q),
    )


class LengthResult(NamedTuple):
    """Retrieval by questions of one length."""

    questions: int
    metrics: RetrievalMetrics


def measure_by_length(
    records: Sequence[Record],
    image_GE: npt.NDArray[np.float32],
    embed_texts: Callable[[Sequence[str]], npt.NDArray[np.float32]],
) -> dict[str, LengthResult]:
    """Measure short and long questions that are made of the same captions.

    Each caption is cut to the person and its first thing, to two things, and so on: *woman in red
    coat*. Right is, as for captions, a picture of the very person, so short questions, which fit
    many people, cannot reach the figures of long ones.

    Returns:
        By number of things, from "1"; last "as written", of all captions.

    Raises:
        InputError: The grammar reads no thing in any caption.
    """
    pids_Q, pids_G = pids_of(records)
    captions = [text for record in records for text in record.captions]
    asked: dict[str, list[tuple[int, str]]] = {}
    for row, caption in enumerate(captions):
        phrases = [phrase for phrase in parse(caption).understood if phrase.noun]
        person = [phrase for phrase in phrases if phrase.kind == "person"][:1]
        things = [phrase for phrase in phrases if phrase.kind != "person"]
        for count in range(1, len(things) + 1):
            text = describe([*person, *things[:count]], "bare")
            asked.setdefault(str(count), []).append((row, text))
    if not asked:
        raise InputError(
            f"no caption of {len(captions)} has a phrase that the grammar reads, such as 'red "
            "coat': their length cannot be told"
        )
    found = {}
    for length, questions in [*sorted(asked.items()), ("as written", list(enumerate(captions)))]:
        rows, texts = zip(*questions, strict=True)
        metrics = retrieval_metrics(embed_texts(texts), image_GE, pids_Q[list(rows)], pids_G)
        found[length] = LengthResult(len(texts), metrics)
    return found


def _load(
    pictures: Pictures, batch_size: int, workers: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield pictures on a device, uint8 [N, H, W, 3], in their order."""
    starts = range(0, len(pictures), batch_size)
    places = [range(start, min(start + batch_size, len(pictures))) for start in starts]
    loader: DataLoader[Tensor | UppersonError] = DataLoader(
        PictureBatches(pictures, places),
        batch_size=None,
        num_workers=usable_workers(workers),
        pin_memory=device.type == "cuda",
    )
    for batch in loader:
        if isinstance(batch, UppersonError):
            raise batch
        yield batch.to(device, non_blocking=True)
