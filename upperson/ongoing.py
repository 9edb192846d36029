"""A run while it goes on: what it keeps, what it tells, and what is measured at its end.

Training and distilling differ in what a step does. The rest, which they share, is here.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor

from upperson.checkpoint import Checkpointer, RunState
from upperson.components import Splits
from upperson.config import TrainConfig
from upperson.data.pictures import Pictures
from upperson.data.records import SPLITS, Split
from upperson.evaluate import Evaluation, both_directions, embed_records
from upperson.model.base import load_base
from upperson.model.encoder import UPPerson
from upperson.observer import Observer, Step
from upperson.run import load_run
from upperson.run_writer import RunWriter
from upperson_rt.errors import InputError
from upperson_rt.metrics import RetrievalMetrics
from upperson_rt.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """What a finished run measured. Only the main process has the metrics."""

    best_epoch: int
    val: RetrievalMetrics | None
    test: RetrievalMetrics | None
    seconds: float
    """Work on the run, added up over interrupted and resumed processes."""


@dataclass(kw_only=True)
class OngoingRun:
    """A run between its first and its last step. Only the main process writes and tells."""

    path: Path
    config: TrainConfig
    splits: Splits
    tokenizer: Tokenizer
    accelerator: Accelerator
    writer: RunWriter
    checkpointer: Checkpointer
    observer: Observer

    epoch_steps: int
    """Steps in an epoch."""

    started: float
    """Of `time.perf_counter`: the run's beginning; moved back by what earlier processes took."""

    state: RunState = field(default_factory=RunState)
    _lap_began: float = 0.0

    @property
    def steps(self) -> int:
        """Steps done, over all epochs."""
        return self.state.epoch * self.epoch_steps + self.state.step

    @property
    def seconds(self) -> float:
        """Work on the run so far."""
        return time.perf_counter() - self.started

    @property
    def main(self) -> bool:
        """Whether this is the main process."""
        return bool(self.accelerator.is_main_process)

    def resume(self) -> None:
        """Bring the run back to its newest checkpoint; a run without one starts anew."""
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
        """Begin to write; close the writer whatever happens then."""
        if self.main:
            self.writer.begin(self.state.best, self.steps + 1)
        self.started -= self.state.seconds

    def save(self) -> None:
        """Write a checkpoint."""
        self.state.seconds = self.seconds
        if self.main:
            self.checkpointer.save(self.state, self.steps)

    def start_lap(self) -> None:
        """Measure the speed of the next step from now on."""
        self._lap_began = time.perf_counter()

    def tell_step(self, number: int, loss: float, lr: float, images: int) -> None:
        """Count a step's loss and tell of it.

        Args:
            number: In the epoch that is under way, from 1.
            loss: Of the global batch.
            lr: Its learning rate.
            images: In the global batch.
        """
        before, self._lap_began = self._lap_began, time.perf_counter()
        speed = images / (self._lap_began - before)
        epoch = self.state.epoch
        self.state.loss_sum += loss
        if self.main:
            self.observer.step(
                Step(
                    epoch=epoch, number=number - 1, steps=self.epoch_steps, loss=loss, lr=lr,
                    images_per_s=speed,
                )
            )  # fmt: skip
            self.writer.log_step(epoch * self.epoch_steps + number, loss, lr, speed)

    def keep_best(self, best: dict[str, Tensor], r1: float | None = None) -> None:
        """Keep trained tensors as those of the best epoch: the one that is under way."""
        self.state.best_epoch = self.state.epoch + 1
        self.state.best_r1 = self.state.best_r1 if r1 is None else r1
        self.state.best = best
        self.writer.save_adapter(best)

    def end_epoch(self, row: dict[str, float]) -> None:
        """End an epoch: its line goes to the tables, and a checkpoint is written."""
        state = self.state
        if self.main:
            state.rows.append(row)
            self.writer.log_epoch(state.rows, (state.epoch + 1) * self.epoch_steps)
        state.epoch, state.step, state.loss_sum = state.epoch + 1, 0, 0.0
        self.save()

    def measure(self, pictures: dict[Split, Pictures] | None = None) -> dict[Split, Evaluation]:
        """Load the run as anyone will, in float32, and measure val and test as far as they exist.

        The main process reads the files, which no other may see, and tells the others what is in
        them; all encode a share. Only the main process measures. Where there is neither, nothing is
        loaded: the base would be in memory twice for nothing.
        """
        if not (self.splits["val"] or self.splits["test"]):
            return {}
        model = load_run(self.path).model if self.main else _untrained(self.config)
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
                    f"{error} ({split} split; training is done): mend it, then measure with "
                    f"--resume {self.path}"
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
        """Write what the run came to; see `RunWriter.finish`."""
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


def _untrained(config: TrainConfig) -> UPPerson:
    image_size = (config.height_px, config.width_px)
    base = load_base(config.base, config.pretrained, image_size)
    return UPPerson(base.clip, config.model, image_size, base.statistics).eval()
