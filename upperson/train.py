"""Fine-tune the trained parts of UP-Person with SDM, top to bottom in one file.

The epoch with the best validation R@1 is kept; the test split is looked at once, at the end. A data
set without a validation split keeps the last epoch.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from upperson.config import TrainConfig
from upperson.data.dataset import Batch, ImageDataset, PairDataset, collate
from upperson.data.records import Record, read_dataset
from upperson.data.transforms import evaluation_transform, training_transform
from upperson.data.vocabulary import clip_tokenizer
from upperson.evaluate import evaluate
from upperson.losses import sdm_loss
from upperson.model.base import load_base
from upperson.model.encoder import UPPerson
from upperson.optim import build_optimizer, learning_rate
from upperson.run import RunWriter
from upperson_rt.errors import InputError, UsageError
from upperson_rt.metrics import RetrievalMetrics
from upperson_rt.tokenizer import Tokenizer


class Observer(Protocol):
    """Who wants to see a run while it goes: a progress display, a test."""

    def note(self, text: str) -> None:
        """Something a person should know, in one line."""

    def step(self, epoch: int, step: int, steps: int, loss: float, images_per_s: float) -> None:
        """One optimisation step is done; epochs and steps count from 0."""

    def evaluated(self, epoch: int, split: str, metrics: RetrievalMetrics) -> None:
        """A split was evaluated after an epoch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a finished run measured."""

    best_epoch: int
    val: RetrievalMetrics | None
    test: RetrievalMetrics | None
    seconds: float


def train(config: TrainConfig, run_path: Path, observer: Observer) -> TrainResult:
    """Train one run into a run folder.

    Raises:
        UsageError, InputError: The base, the recipe or the data cannot be used; nothing is written.
        InputError: The loss is not finite; the best epoch so far stays in the run folder.
    """
    started = time.perf_counter()
    torch.manual_seed(config.seed)
    splits = read_dataset(config.dataset, Path(config.root))
    if not splits["train"]:
        raise InputError(f"{config.root} has no image in split 'train': check 'split' in its lines")
    base = load_base(config.base, config.pretrained)
    model = UPPerson(base.clip, config.model, (config.height_px, config.width_px))
    if not model.trained_state():
        raise UsageError("no part is trained: set prefix_length, lora_rank or adapter_reduction")
    tokenizer = clip_tokenizer(model.text.context_length)
    captions = [text for split in splits.values() for row in split for text in row.captions]
    if cut := len(tokenizer.encode(captions).truncated):
        observer.note(
            f"{cut} of {len(captions)} captions are longer than {tokenizer.context_length} tokens "
            "and are cut there"
        )
    loader = _training_loader(config, splits["train"], tokenizer)
    optimizer = build_optimizer(model, config)
    writer = RunWriter(run_path, config, base, model)

    best: tuple[float, int, RetrievalMetrics | None] = (-1.0, 0, None)
    best_state = model.trained_state()
    model.train()
    for epoch in range(config.epochs):
        rate = learning_rate(epoch, config)
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses = []
        for step, batch in enumerate(loader):
            step_started = time.perf_counter()
            loss = _loss(model, batch, config.precision)
            if not torch.isfinite(loss):
                raise InputError(
                    f"the loss became {loss.item()} in epoch {epoch + 1}, step {step + 1}: lower "
                    f"lr ({config.lr}) or prefix_scale ({config.model.prefix_scale}); "
                    f"the best epoch so far, if there is one, is kept in {run_path}"
                )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
            speed = len(batch.pids_N) / (time.perf_counter() - step_started)
            observer.step(epoch, step, len(loader), losses[-1], speed)
        row = {"epoch": epoch + 1, "lr": rate, "loss": sum(losses) / len(losses)}
        last = epoch + 1 == config.epochs
        if splits["val"] and ((epoch + 1) % config.eval_every == 0 or last):
            metrics = evaluate(model, tokenizer, splits["val"], workers=config.workers)
            observer.evaluated(epoch, "val", metrics)
            row |= {f"val {name}": value for name, value in metrics.as_dict().items()}
            if metrics.r1 > best[0]:
                best = (metrics.r1, epoch + 1, metrics)
                best_state = model.trained_state()
                writer.save_adapter(best_state)
        elif last:
            best = (-1.0, epoch + 1, None)
            best_state = model.trained_state()
            writer.save_adapter(best_state)
        writer.log(row)

    model.load_state_dict(best_state, strict=False)
    test = None
    if splits["test"]:
        test = evaluate(model, tokenizer, splits["test"], workers=config.workers)
        observer.evaluated(best[1] - 1, "test", test)
    result = TrainResult(
        best_epoch=best[1], val=best[2], test=test, seconds=time.perf_counter() - started
    )
    writer.finish(result.best_epoch, result.val, result.test, result.seconds)
    return result


def _loss(model: UPPerson, batch: Batch, precision: str) -> Tensor:
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        image_NE = model.encode_image(batch.image_N3HW.to(device))
        text_NE = model.encode_text(batch.ids_NL.to(device))
    return sdm_loss(image_NE, text_NE, batch.pids_N.to(device))


def _training_loader(
    config: TrainConfig, records: list[Record], tokenizer: Tokenizer
) -> "DataLoader[Batch]":
    size = (config.height_px, config.width_px)
    transform = training_transform(*size) if config.augment else evaluation_transform()
    images = ImageDataset(records, size, transform)
    pairs = PairDataset(records, images, tokenizer)
    loader: DataLoader[Batch] = DataLoader(
        pairs,  # type: ignore[arg-type]
        batch_size=config.batch_size,
        shuffle=True,
        collate_fn=collate,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
    )
    return loader
