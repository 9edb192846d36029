"""The training loop that training and distillation share: steps, checkpoints, logs, evaluation."""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from upperson.checkpoint import Checkpointer, RunState
from upperson.components import Splits
from upperson.config import TrainConfig
from upperson.data.batches import BatchSampler
from upperson.data.pictures import Pictures, cached_pictures
from upperson.data.records import SPLITS, Split
from upperson.evaluate import Evaluation, both_directions, embed_records
from upperson.model.base import load_base
from upperson.model.encoder import UPPerson
from upperson.observer import Observer, Step
from upperson.run import load_run
from upperson.run_writer import RunWriter
from upperson.step import set_learning_rate
from upperson_rt.errors import InputError, UppersonError
from upperson_rt.tokenizer import Tokenizer
from upperson_scores.metrics import RetrievalMetrics


def pictures_of(
    config: TrainConfig, files: list[list[Path]], image_size: tuple[int, int], observer: Observer
) -> Sequence[Pictures]:
    """Return the pictures of lists of files, from the run's cache if it has one."""
    if config.cache is None:
        return [Pictures(images, image_size) for images in files]
    root = Path(config.root)
    return cached_pictures(Path(config.cache), root, files, image_size, observer.caching)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a finished run measured. Only the main process has the metrics."""

    best_epoch: int
    val: RetrievalMetrics | None
    test: RetrievalMetrics | None
    seconds: float  # Work on the run, added up over interrupted and resumed processes.


class Method(Protocol):
    """What a training method does in the loop of a `Trainer`."""

    def start_epoch(self, state: RunState) -> None:
        """Prepare an epoch, of which ``state.step`` steps are done."""

    def step(self, batch: Any, step: int) -> tuple[Tensor, int]:
        """Optimise on a loaded batch; return its loss, detached, and its global size."""
        ...

    def end_epoch(self, trainer: "Trainer") -> dict[str, float]:
        """Evaluate the epoch and keep its weights if they are best; return further metrics."""
        ...


@dataclass(kw_only=True)
class Trainer:
    """Runs the steps of a method. Only the main process writes and reports."""

    path: Path
    config: TrainConfig
    splits: Splits
    tokenizer: Tokenizer
    accelerator: Accelerator
    writer: RunWriter
    checkpointer: Checkpointer
    observer: Observer
    optimizer: Any
    sampler: BatchSampler

    started: float
    """`time.perf_counter` at the beginning; moved back by what earlier processes took."""

    state: RunState = field(default_factory=RunState)
    _last_step_s: float = 0.0

    @property
    def steps(self) -> int:
        """Steps done, over all epochs."""
        return self.state.epoch * len(self.sampler) + self.state.step

    @property
    def seconds(self) -> float:
        """Work on the run so far."""
        return time.perf_counter() - self.started

    @property
    def main(self) -> bool:
        """Whether this is the main process."""
        return bool(self.accelerator.is_main_process)

    def resume(self) -> None:
        """Restore the newest checkpoint; a run without one starts from the beginning."""
        found, damaged = self.checkpointer.load()
        self.state = found or RunState()
        if not self.main:
            return
        for problem in damaged:
            self.observer.note(f"{problem}; going on from the one before it")
        if found is None:
            self.observer.note("no checkpoint yet: starting from the beginning")
        elif found.epoch == self.config.epochs:
            self.observer.note("all epochs are done: only measuring the saved run")
        else:
            self.observer.note(f"resuming at epoch {found.epoch + 1}, step {found.step + 1}")

    def begin(self) -> None:
        """Open the run folder for writing; the caller closes the writer."""
        if self.main:
            self.writer.begin(self.state.best, self.steps + 1)
        self.started -= self.state.seconds

    def fit(self, loader: Any, method: Method) -> None:
        """Run all steps that are left, on the sampler's batches or an error in place of one.

        Raises:
            InputError: The loss is not finite, a picture cannot be decoded, or the disk is full;
                the last checkpoint and the best epoch so far stay in the run folder.
        """
        state, config = self.state, self.config
        # On a GPU the next step is queued before the loss of this one is read.
        late = 1 if self.accelerator.device.type == "cuda" else 0
        while state.epoch < config.epochs:
            rate = set_learning_rate(self.optimizer, state.epoch, config)
            method.start_epoch(state)
            self.sampler.start_at(state.epoch, state.step, state.left_out)
            self._last_step_s = time.perf_counter()
            pending: deque[tuple[int, Tensor, int]] = deque()
            for batch in loader:
                if isinstance(batch, UppersonError):
                    self._report(pending, rate)
                    self.save()
                    raise self.input_error(batch)
                loss, size = method.step(batch, state.step)
                state.step += 1
                pending.append((state.step, loss, size))
                # Also before an evaluation, which may find a broken picture.
                checkpoint = state.step % config.checkpoint_every == 0 or state.step == len(
                    self.sampler
                )
                self._report(pending, rate, 0 if checkpoint else late)
                if checkpoint:
                    self.save()
            row = {"epoch": state.epoch + 1, "lr": rate, "loss": state.loss_sum / state.step}
            row |= method.end_epoch(self)
            if self.main:
                state.rows.append(row)
                self.writer.log_epoch(state.rows, (state.epoch + 1) * len(self.sampler))
            state.epoch, state.step, state.loss_sum = state.epoch + 1, 0, 0.0
            self.save()
            self.accelerator.wait_for_everyone()

    def input_error(self, error: Exception) -> InputError:
        """Return an error of the data with its place in the run and how to go on."""
        return InputError(
            f"{error} (epoch {self.state.epoch + 1}, step {self.state.step + 1}): repair it, then "
            f"go on with --resume {self.path}",
            code="training_data_unreadable",
            epoch=self.state.epoch + 1,
            step=self.state.step + 1,
        )

    def save(self) -> None:
        """Write a checkpoint."""
        self.state.seconds = self.seconds
        if self.main:
            self.checkpointer.save(self.state, self.steps)

    def keep_best(self, best: dict[str, Tensor], r1: float | None = None) -> None:
        """Keep trained tensors as those of the best epoch: the current one."""
        self.state.best_epoch = self.state.epoch + 1
        self.state.best_r1 = self.state.best_r1 if r1 is None else r1
        self.state.best = best
        self.writer.save_adapter(best)

    def _report(self, pending: deque[tuple[int, Tensor, int]], lr: float, late: int = 0) -> None:
        """Read and log the losses of all pending steps but the last few."""
        while len(pending) > late:
            number, tensor, size = pending.popleft()
            loss, epoch = float(tensor), self.state.epoch
            if not math.isfinite(loss):
                raise InputError(
                    f"the loss became {loss} in epoch {epoch + 1}, step {number}: start a new run "
                    f"with a lower lr ({self.config.lr}) or prefix_scale "
                    f"({self.config.model.prefix_scale}); the best epoch so far, if there is one, "
                    f"is kept in {self.path}",
                    code="loss_not_finite",
                    epoch=epoch + 1,
                    step=number,
                )
            before, self._last_step_s = self._last_step_s, time.perf_counter()
            speed = size / (self._last_step_s - before)
            self.state.loss_sum += loss
            if not self.main:
                continue
            steps = len(self.sampler)
            step = Step(
                epoch=epoch, number=number - 1, steps=steps, loss=loss, lr=lr, images_per_s=speed
            )
            self.observer.step(step)
            self.writer.log_step(epoch * steps + number, loss, lr, speed)

    def measure(self, pictures: dict[Split, Pictures] | None = None) -> dict[Split, Evaluation]:
        """Load the saved run, in float32, and measure val and test if they exist.

        The main process reads the files and broadcasts the weights; each process encodes a share,
        and only the main process measures. Without either split, nothing is loaded.
        """
        if not (self.splits["val"] or self.splits["test"]):
            return {}
        if self.main:
            model = load_run(self.path).model
        else:
            image_size = (self.config.height_px, self.config.width_px)
            base = load_base(self.config.base, self.config.pretrained, image_size)
            model = UPPerson(base.clip, self.config.model, image_size, base.statistics).eval()
        model.to(self.accelerator.device)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = broadcast(parameter.data)
        measured: dict[Split, Evaluation] = {}
        for split in SPLITS:
            records = self.splits[split]
            if split == "train" or not records:
                continue
            try:
                embeds = embed_records(
                    model,
                    self.tokenizer,
                    records,
                    workers=self.config.workers,
                    pictures=None if pictures is None else pictures[split],
                    together=True,
                )
            except InputError as error:
                raise InputError(
                    f"{error} ({split} split; training is done): repair it, then measure with "
                    f"--resume {self.path}",
                    code=error.code,
                    **(error.fields | {"split": split}),
                ) from error
            if self.main:
                measured[split] = both_directions(*embeds, records, self.accelerator.device)
                metrics = measured[split].text_to_image
                self.observer.measured(self.state.best_epoch, split, metrics)
        return measured

    def finish(
        self,
        selected_on: str,
        measured: dict[Split, Evaluation],
        distilled: dict[str, Any] | None = None,
    ) -> TrainResult:
        """Write the results; see `RunWriter.finish`."""
        best_epoch, seconds = self.state.best_epoch, self.seconds
        if self.main:
            self.writer.finish(best_epoch, selected_on, measured, self.splits, seconds, distilled)
        self.accelerator.wait_for_everyone()
        return TrainResult(
            best_epoch=best_epoch,
            val=measured["val"].text_to_image if "val" in measured else None,
            test=measured["test"].text_to_image if "test" in measured else None,
            seconds=self.seconds,
        )
