"""Retrieval evaluation of a model in torch; the metrics themselves are the runtime's.

Shapes: Q captions, G images, E embedding width, N batch, H image height, W image width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

from upperson.data.batches import pad_ids, tokenize, usable_workers
from upperson.data.images import require_images
from upperson.data.pictures import PictureBatches, Pictures, StoredPictures, pixels_of
from upperson.data.records import Record, Split, read_dataset
from upperson.data.transforms import prepare_pixels
from upperson.model.encoder import UPPerson
from upperson_phrases import parse
from upperson_phrases.evidence import EmbedTexts, describe
from upperson_rt.encoder import Progress
from upperson_rt.errors import InputError, UppersonError
from upperson_rt.tokenizer import Tokenizer
from upperson_scores.metrics import RetrievalMetrics, per_query_metrics, retrieval_metrics

Embeds: TypeAlias = npt.NDArray[np.float32]  # Unit-norm rows of captions or images.
Embeddings: TypeAlias = tuple[Embeds, Embeds]
"""Captions [Q, E] and pictures [G, E] of one model."""
Numbers: TypeAlias = npt.NDArray[np.int64]  # Identities or places.

ALL = (0, 1)  # The share of a process that works alone: the first of one.
CPU = torch.device("cpu")

_COMPARED_AT_A_TIME = 1 << 28


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
        raise InputError(
            f"{root} has no image in split '{split}' (found: {found})",
            code="split_empty",
            split=split,
            found=found,
        )
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
    pictures: Pictures | None = None,
    together: bool = False,
) -> tuple[Embeds, Embeds]:
    """Encode every caption and every image of records, where the model is and in its own dtype.

    Under ``torch.autocast`` the towers run in the caller's precision. ``workers`` processes decode
    images, ``batch_size`` at a time, unless ``pictures`` has those of the records. ``progress`` is
    called with the items done and in all. All processes of a distributed run call this
    ``together``, with the same model and records: each encodes a share, and all get everything.

    Returns:
        Unit-norm float32 captions [Q, E], in the order of records and their captions, and images
        [G, E], in the order of records.

    Raises:
        InputError: An image cannot be decoded, here or in a worker; the model is left as it was.
    """
    share = (dist.get_rank(), dist.get_world_size()) if together and dist.is_initialized() else ALL
    texts = [text for record in records for text in record.captions]
    total = len(texts) + len(records)
    if pictures is None:
        pictures = Pictures([record.image for record in records], model.image_size)
    failed: UppersonError | None = None
    text_QE, image_GE = (
        np.zeros((count, model.embed_dim), dtype=np.float32) for count in (len(texts), len(records))
    )

    def count(done: int) -> None:
        if progress is not None:
            progress(done, total)

    try:
        with _evaluating(model):
            _embed_texts(model, tokenizer, texts, batch_size, text_QE, share, count)
            for places, pixels_NHW3 in _load(pictures, batch_size, workers, model.device, share):
                image_N3HW = prepare_pixels(pixels_NHW3, None, model.statistics)
                embeds_NE = model.encode_image(image_N3HW.to(model.dtype))
                image_GE[places] = embeds_NE.cpu().numpy()
                count(len(texts) + places.stop)
    except UppersonError as error:
        if share == ALL:
            raise
        failed = error
    if share != ALL:
        # What failed in one process is raised in all of them: the others would wait for it.
        errors: list[UppersonError | None] = [None] * dist.get_world_size()
        dist.all_gather_object(errors, failed)
        for found in filter(None, errors):
            raise found
        # A row is zero in all processes but one.
        rows = [torch.from_numpy(embeds).to(model.device) for embeds in (text_QE, image_GE)]
        for part in rows:
            dist.all_reduce(part)
        text_QE, image_GE = (part.cpu().numpy() for part in rows)
    return text_QE, image_GE


@contextmanager
def _evaluating(model: UPPerson) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.inference_mode()
def embed_texts(
    model: UPPerson, tokenizer: Tokenizer, texts: Sequence[str], *, batch_size: int = 64
) -> Embeds:
    """Encode sentences, where the model is and in its own dtype: unit-norm float32 [Q, E]."""
    text_QE = np.empty((len(texts), model.embed_dim), dtype=np.float32)
    with _evaluating(model):
        _embed_texts(model, tokenizer, texts, batch_size, text_QE)
    return text_QE


def _embed_texts(
    model: UPPerson,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    batch_size: int,
    text_QE: Embeds,
    share: tuple[int, int] = ALL,
    count: Callable[[int], None] = lambda done: None,
) -> None:
    """Fill in the rows of a share of the batches."""
    ids = tokenize(tokenizer, texts)
    # Sentences of like length share a batch, so short ones are not padded to the longest of all.
    order = np.argsort(ids.lengths(), kind="stable")
    for start in range(0, len(ids), batch_size)[share[0] :: share[1]]:
        chosen = order[start : start + batch_size]
        batch = pad_ids([ids[index] for index in chosen]).to(model.device)
        text_QE[chosen] = model.encode_text(batch).cpu().numpy()
        count(start + len(chosen))


def pids_of(records: Sequence[Record]) -> tuple[Numbers, Numbers]:
    """Return the identities of all captions [Q] and of all images [G], in embedding order."""
    queries = [record.pid for record in records for _ in record.captions]
    return np.array(queries, dtype=np.int64), np.array([r.pid for r in records], dtype=np.int64)


def evaluate(
    model: UPPerson, tokenizer: Tokenizer, records: Sequence[Record], *, workers: int = 0
) -> Evaluation:
    """Both directions from one pass over the split; arguments and errors as for `embed_records`."""
    embeds = embed_records(model, tokenizer, records, workers=workers)
    return both_directions(*embeds, records, model.device)


def both_directions(
    text_QE: Embeds, image_GE: Embeds, records: Sequence[Record], device: torch.device = CPU
) -> Evaluation:
    """Measure what `embed_records` returned; InputError for that of others, or not finite."""
    pids_Q, pids_G = pids_of(records)
    return Evaluation(
        text_to_image=rank_and_average(text_QE, image_GE, pids_Q, pids_G, device),
        image_to_text=rank_and_average(image_GE, text_QE, pids_G, pids_Q, device),
    )


def rank_and_average(
    query_QE: Embeds, gallery_GE: Embeds, pids_Q: Numbers, pids_G: Numbers, device: torch.device
) -> RetrievalMetrics:
    """Rank the gallery for every query; arguments and errors as for `retrieval_metrics`.

    Scores are computed and compared on the device if that is a GPU, where equal scores keep the
    order of the gallery as well.
    """
    if device.type == "cpu":
        return retrieval_metrics(query_QE, gallery_GE, pids_Q, pids_G)
    return per_query_metrics(
        query_QE, gallery_GE, pids_Q, pids_G, rank=lambda *parts: _rank_on(device, *parts)
    ).mean()


def _rank_on(
    device: torch.device, query_NE: Embeds, gallery_GE: Embeds, query_P: Numbers, image_P: Numbers
) -> Numbers:
    """Return the rank, from 1, of each (query, image) pair; see `per_query_metrics`."""
    gallery = torch.from_numpy(gallery_GE).to(device)
    scores_NG = torch.from_numpy(query_NE).to(device) @ gallery.T
    places_G = torch.arange(len(gallery), device=device)
    ranks = []
    step = max(1, _COMPARED_AT_A_TIME // len(gallery))
    for start in range(0, len(query_P), step):
        query, image = (
            torch.from_numpy(pairs[start : start + step]).to(device) for pairs in (query_P, image_P)
        )
        rows, own = scores_NG[query], scores_NG[query, image][:, None]
        before = (rows > own) | ((rows == own) & (places_G < image[:, None]))
        ranks.append(before.sum(dim=1) + 1)
    return torch.cat(ranks).cpu().numpy()


class LengthResult(NamedTuple):
    """Retrieval by questions of one length."""

    questions: int
    metrics: RetrievalMetrics


def measure_by_length(
    records: Sequence[Record], image_GE: Embeds, embed_texts: EmbedTexts
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
    by_length: dict[str, list[tuple[int, str]]] = {}
    for row, caption in enumerate(captions):
        phrases = [phrase for phrase in parse(caption).understood if phrase.noun]
        person = [phrase for phrase in phrases if phrase.kind == "person"][:1]
        things = [phrase for phrase in phrases if phrase.kind != "person"]
        for count in range(1, len(things) + 1):
            text = describe([*person, *things[:count]], "bare")
            by_length.setdefault(str(count), []).append((row, text))
    if not by_length:
        raise InputError(
            f"no caption of {len(captions)} has a phrase that the grammar reads, such as 'red "
            "coat': their length is unknown",
            code="captions_not_readable",
            captions=len(captions),
        )
    found = {}
    by_length = dict(sorted(by_length.items())) | {"as written": list(enumerate(captions))}
    for length, questions in by_length.items():
        rows, texts = zip(*questions, strict=True)
        metrics = retrieval_metrics(embed_texts(texts), image_GE, pids_Q[list(rows)], pids_G)
        found[length] = LengthResult(len(texts), metrics)
    return found


def _load(
    pictures: Pictures, batch_size: int, workers: int, device: torch.device, share: tuple[int, int]
) -> Iterator[tuple[slice, Tensor]]:
    """Yield pictures on a device, uint8 [N, H, W, 3], with their places."""
    starts = range(0, len(pictures), batch_size)[share[0] :: share[1]]
    places = [range(len(pictures))[start : start + batch_size] for start in starts]
    batch_bytes = batch_size * pictures.transfer_bytes
    loader: DataLoader[Tensor | StoredPictures | UppersonError] = DataLoader(
        PictureBatches(pictures, places),
        batch_size=None,
        num_workers=usable_workers(workers, batch_bytes),
        pin_memory=device.type == "cuda",
    )
    for place, batch in zip(places, loader, strict=True):
        if isinstance(batch, UppersonError):
            raise batch
        yield slice(place.start, place.stop), pixels_of(batch).to(device, non_blocking=True)
