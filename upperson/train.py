"""Fine-tune the trained parts of UP-Person, top to bottom in one file.

The epoch with the best R@1 on the selecting split is kept. What a run reports at its end is
measured on the files it leaves behind, in float32, exactly as anyone who loads them will.
"""

import math
import time
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn
from torch.utils.data import DataLoader

from upperson.checkpoint import Checkpointer, RunState, identity_of
from upperson.components import Components, Splits, build_components, start_accelerator
from upperson.config import TrainConfig, settings_from
from upperson.data.batches import (
    BatchSampler,
    LoadedBatch,
    PairDataset,
    pair_loader,
    usable_workers,
)
from upperson.data.images import truncated_images
from upperson.data.pictures import Pictures
from upperson.data.records import SPLITS, Record, Split
from upperson.division import find_noisy
from upperson.evaluate import Evaluation, evaluate, evaluate_both
from upperson.model.encoder import UPPerson
from upperson.run import CONFIG, LAST, load_run, start_from
from upperson.run_writer import RunWriter
from upperson.step import backward_through_batch, build_optimizer, set_learning_rate
from upperson_rt.errors import InputError, UppersonError, UsageError
from upperson_rt.metrics import RetrievalMetrics
from upperson_rt.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One optimisation step that is done."""

    epoch: int
    """From 0."""

    number: int
    """In its epoch, from 0."""

    steps: int
    """Steps in an epoch."""

    loss: float
    lr: float
    images_per_s: float
    """Pairs of the global batch, by the time since the step before; loading is in it."""


class Observer(Protocol):
    """Who wants to see a run while it goes: a progress display, a test."""

    def note(self, text: str) -> None:
        """Something a person should know, in one line."""

    def step(self, step: Step) -> None:
        """An optimisation step is done."""

    def evaluated(self, epoch: int, split: str, metrics: RetrievalMetrics) -> None:
        """A split was evaluated after an epoch, counted from 0."""

    def measured(self, best_epoch: int, split: str, metrics: RetrievalMetrics) -> None:
        """A split was measured on the saved run, whose epoch counts from 1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a finished run measured. Only the main process has the metrics."""

    best_epoch: int
    val: RetrievalMetrics | None
    test: RetrievalMetrics | None
    seconds: float
    """Work on the run, added up over interrupted and resumed processes."""


def train(
    config: TrainConfig,
    run_path: Path,
    observer: Observer,
    *,
    device: str = "auto",
    resume: bool = False,
) -> TrainResult:
    """Train one run into a run folder.

    With ``resume`` the run in the folder goes on from its newest checkpoint and ends as if it had
    never stopped: bit for bit on a CPU with as many threads.

    Raises:
        UsageError, InputError: The base, the recipe or the data cannot be used; nothing is written.
        BackendError: The device or the precision is not available.
        IntegrityError: Data or base are not those that the run to resume began with.
        InputError: The loss is not finite, an image cannot be decoded, or the disk is full; the
            last checkpoint and the best epoch so far stay in the run folder.
    """
    with ExitStack() as closing:
        return _train(config, run_path, observer, device, resume, closing)


def _train(
    config: TrainConfig,
    run_path: Path,
    observer: Observer,
    device: str,
    resume: bool,
    closing: ExitStack,
) -> TrainResult:
    started = time.perf_counter()
    closing.enter_context(truncated_images(config.load_truncated))
    accelerator = start_accelerator(config.precision, device)
    main = accelerator.is_main_process
    if config.batch_size < accelerator.num_processes:
        raise UsageError(
            f"batch_size ({config.batch_size}) must be at least the number of processes "
            f"({accelerator.num_processes}): each needs a pair"
        )
    with settings_from(run_path / CONFIG) if resume else nullcontext():
        components = build_components(config)
    splits, model, tokenizer = components.splits, components.model, components.tokenizer
    # Without a split to select on the last epoch is kept.
    selecting = config.select_on if splits[config.select_on] else None
    loader, sampler = _training_loader(config, model, splits["train"], tokenizer, accelerator)

    objective = components.objective
    trained = nn.ModuleDict({"model": model, "objective": objective}).to(accelerator.device)
    optimizer = build_optimizer(trained.named_parameters(), config)
    towers, optimizer = accelerator.prepare(model, optimizer)
    identity = identity_of(config, components.base.sha256, splits)
    checkpointer = Checkpointer(run_path / LAST, trained, optimizer, accelerator.scaler, identity)
    writer = RunWriter(run_path, config, components.base, trained, resume=resume)
    if main:
        _tell_cut_captions(splits, tokenizer, observer)
    state = RunState()
    if resume:
        state = load_state(checkpointer, config.epochs, observer if main else None)
    if config.init_from is not None and state.epoch == state.step == 0:
        start_from(Path(config.init_from), model, components.base, config.model)
        if main:
            observer.note(f"starting from the trained tensors of {config.init_from}")
    accelerator.wait_for_everyone()
    if main:
        closing.callback(writer.close)
        writer.begin(state.best, state.epoch * len(sampler) + state.step + 1)
    started -= state.seconds

    def save() -> None:
        state.seconds = time.perf_counter() - started
        if main:
            checkpointer.save(state, state.epoch * len(sampler) + state.step)

    while state.epoch < config.epochs:
        epoch = state.epoch
        rate = set_learning_rate(optimizer, epoch, config)
        if config.leave_out_noisy and epoch >= config.warmup_epochs and state.step == 0:
            state.left_out = _find_noisy(config, components, accelerator, epoch)
            if main:
                observer.note(f"epoch {epoch + 1}: {len(state.left_out)} pairs left out as noisy")
        model.train()
        sampler.start_at(epoch, state.step, state.left_out)
        last_step_at = time.perf_counter()
        for item in loader:
            place = f"epoch {epoch + 1}, step {state.step + 1}"
            if isinstance(item, UppersonError):
                save()
                raise InputError(f"{item} ({place}): mend it, then go on with --resume {run_path}")
            share = item.to(accelerator.device, model.statistics)
            sizes = sampler.share_sizes(state.step)
            optimizer.zero_grad()
            loss = float(
                backward_through_batch(
                    accelerator, towers, objective, share, sizes, config.accumulate
                )
            )
            if not math.isfinite(loss):
                raise InputError(
                    f"the loss became {loss} in {place}: start a new run with a lower lr "
                    f"({config.lr}) or prefix_scale ({config.model.prefix_scale}); the best epoch "
                    f"so far, if there is one, is kept in {run_path}"
                )
            optimizer.step()
            state.step += 1
            state.loss_sum += loss
            now = time.perf_counter()
            speed, last_step_at = sum(sizes) / (now - last_step_at), now
            if main:
                step = Step(
                    epoch=epoch, number=state.step - 1, steps=len(sampler), loss=loss, lr=rate,
                    images_per_s=speed,
                )  # fmt: skip
                observer.step(step)
                writer.log_step(epoch * len(sampler) + state.step, loss, rate, speed)
            # Before an evaluation, too: a picture of its split may turn out broken.
            if state.step % config.checkpoint_every == 0 or state.step == len(sampler):
                save()

        if main:
            row = {"epoch": epoch + 1, "lr": rate, "loss": state.loss_sum / state.step}
            if config.leave_out_noisy:
                row["left out"] = len(state.left_out)
            last = epoch + 1 == config.epochs
            metrics = None
            if selecting is not None and ((epoch + 1) % config.eval_every == 0 or last):
                with accelerator.autocast():
                    metrics = evaluate(model, tokenizer, splits[selecting], workers=config.workers)
                observer.evaluated(epoch, selecting, metrics)
                row |= {f"{selecting} {name}": value for name, value in metrics.as_dict().items()}
            if (metrics is not None and metrics.r1 > state.best_r1) or (selecting is None and last):
                state.best_epoch = epoch + 1
                state.best_r1 = state.best_r1 if metrics is None else metrics.r1
                state.best = model.trained_state()
                writer.save_adapter(state.best)
            state.rows.append(row)
            writer.log_epoch(state.rows, (epoch + 1) * len(sampler))
        state.epoch, state.step, state.loss_sum = epoch + 1, 0, 0.0
        save()
        accelerator.wait_for_everyone()

    measured = {}
    if main:
        measured = measure_saved_run(
            run_path, splits, tokenizer, config, accelerator, observer, state.best_epoch
        )
        seconds = time.perf_counter() - started
        writer.finish(state.best_epoch, selecting or "last epoch", measured, splits, seconds)
    accelerator.wait_for_everyone()
    return TrainResult(
        best_epoch=state.best_epoch,
        val=measured["val"].text_to_image if "val" in measured else None,
        test=measured["test"].text_to_image if "test" in measured else None,
        seconds=time.perf_counter() - started,
    )


def load_state(checkpointer: Checkpointer, epochs: int, observer: Observer | None) -> RunState:
    """Bring the run back to its newest checkpoint; a run without one starts anew."""
    found, damaged = checkpointer.load()
    state = found or RunState()
    if observer is not None:
        for problem in damaged:
            observer.note(f"{problem}; going on from the one before it")
        if found is None:
            observer.note("no checkpoint yet: starting from the beginning")
        elif state.epoch == epochs:
            observer.note("all epochs are done: only measuring the saved run")
        else:
            observer.note(f"resuming at epoch {state.epoch + 1}, step {state.step + 1}")
    return state


def _find_noisy(
    config: TrainConfig, components: Components, accelerator: Accelerator, epoch: int
) -> list[int]:
    """Divide the training pairs by what the model makes of them now; the same on all processes."""
    found: list[list[int]] = [[]]
    if accelerator.is_main_process:
        with accelerator.autocast():
            found = [
                find_noisy(
                    components.model,
                    components.tokenizer,
                    components.splits["train"],
                    config.batch_size,
                    seed=[config.seed, epoch],
                    workers=config.workers,
                )
            ]
    broadcast_object_list(found)
    return found[0]


def measure_saved_run(
    run_path: Path,
    splits: Splits,
    tokenizer: Tokenizer,
    config: TrainConfig,
    accelerator: Accelerator,
    observer: Observer,
    best_epoch: int,
) -> dict[Split, Evaluation]:
    """Load the run as anyone will, in float32, and measure val and test as far as they exist."""
    model = load_run(run_path).model.to(accelerator.device)
    measured: dict[Split, Evaluation] = {}
    for split in SPLITS:
        if split != "train" and splits[split]:
            try:
                measured[split] = evaluate_both(
                    model, tokenizer, splits[split], workers=config.workers
                )
            except InputError as error:
                raise InputError(
                    f"{error} ({split} split; training is done): mend it, then measure with "
                    f"--resume {run_path}"
                ) from error
            observer.measured(best_epoch, split, measured[split].text_to_image)
    return measured


def _training_loader(
    config: TrainConfig,
    model: UPPerson,
    records: list[Record],
    tokenizer: Tokenizer,
    accelerator: Accelerator,
) -> tuple["DataLoader[LoadedBatch | UppersonError]", BatchSampler]:
    pairs = PairDataset(
        records,
        Pictures([record.image for record in records], model.image_size),
        tokenizer,
        augment=config.augment,
        mask_captions=config.mask_captions,
        shorten_captions=config.shorten_captions,
        wrong_captions=config.wrong_captions,
    )
    sampler = BatchSampler(
        len(pairs),
        config.batch_size,
        config.seed,
        accelerator.process_index,
        accelerator.num_processes,
    )
    workers = usable_workers(config.workers)
    return pair_loader(pairs, sampler, accelerator.device, workers), sampler


def _tell_cut_captions(splits: Splits, tokenizer: Tokenizer, observer: Observer) -> None:
    captions = [text for split in splits.values() for row in split for text in row.captions]
    if cut := len(tokenizer.encode(captions).truncated):
        observer.note(
            f"{cut} of {len(captions)} captions are longer than {tokenizer.context_length} tokens "
            "and are cut there"
        )
