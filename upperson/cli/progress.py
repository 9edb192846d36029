"""Progress of long commands on stderr: a bar for people, a line now and then for logs."""

import json
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from upperson.cli.options import is_main_process
from upperson.observer import Observer, Step
from upperson_rt.cli.output import new_progress, print_note
from upperson_rt.printable import count_of
from upperson_scores.metrics import RetrievalMetrics

if TYPE_CHECKING:
    from upperson.config import TrainConfig

_LOG_EVERY_S = 10.0


class Display:
    """Shows what is being done and how far it is; use as a context manager.

    On a terminal one bar is redrawn. Elsewhere, for example in CI, a line is printed when the work
    changes and every ten seconds after that.
    """

    def __init__(self) -> None:
        self._bar = new_progress()
        self._task = self._bar.add_task("", total=None)
        self._work = ""
        self._logged = 0.0

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, work: str, done: int, total: int, detail: str = "") -> None:
        """Show that ``done`` of ``total`` steps of a piece of work are done."""
        self._bar.update(
            self._task, description=f"{work} {detail}".strip(), completed=done, total=total
        )
        if self._bar.disable:
            now = time.monotonic()
            if work != self._work or done == total or now - self._logged > _LOG_EVERY_S:
                print_note(f"{work}: {done}/{total} {detail}".rstrip())
                self._logged = now
        self._work = work

    def step(self, work: str, done: int, total: int) -> None:
        """Show a step of work that has many short parts: logs get one in ten seconds."""
        if not self._bar.disable or time.monotonic() - self._logged > _LOG_EVERY_S:
            self.update(work, done, total)

    def say(self, text: str) -> None:
        """Print a line that stays."""
        print_note(text)


def expected_time(step_s: float, steps: int) -> str:
    """Describe how long so many steps should take."""
    whole = timedelta(seconds=round(step_s * steps))
    return f"about {step_s:.2g} s a step, {whole} for {count_of(steps, 'step')}"


def run_shown(
    training: Callable[..., object],
    config: "TrainConfig",
    run: Path,
    device: str,
    *,
    resume: bool,
    command: Literal["train", "distill"],
) -> dict[str, Any]:
    """Train with a display; return the content of results.json, empty beside the main process."""
    from upperson.run import CONFIG, RESULTS

    with Display() as display:
        observer = TrainingDisplay(display, config.epochs)
        try:
            training(config, run, observer, device=device, resume=resume)
        except KeyboardInterrupt:
            if is_main_process() and (run / CONFIG).is_file():
                display.say(f"stopped; go on with:  upperson {command} --resume {run}")
            raise
    if not is_main_process():
        return {}
    results: dict[str, Any] = json.loads((run / RESULTS).read_text("utf-8"))
    return results


class TrainingDisplay(Observer):
    """Shows steps and prints every evaluation."""

    def __init__(self, display: Display, epochs: int) -> None:
        self._display = display
        self._epochs = epochs
        self._first: tuple[int, float] | None = None

    def note(self, text: str) -> None:
        """Print a line that stays."""
        self._display.say(f"note: {text}")

    def caching(self, done: int, total: int) -> None:
        """Show how many pictures are in the cache."""
        self._display.step("decoding pictures into the cache", done, total)

    def teaching(self, done: int, total: int) -> None:
        """Show how many pictures the teacher has embedded."""
        self._display.step("embedding with the teacher", done, total)

    def expecting(self, step_s: float, steps: int) -> None:
        """Print how long training should take."""
        self._display.say(f"{expected_time(step_s, steps)}, without loading and evaluation")

    def step(self, step: Step) -> None:
        """Show one optimisation step."""
        done, total = step.epoch * step.steps + step.number + 1, self._epochs * step.steps
        self._display.update(
            "training",
            done,
            total,
            f"epoch {step.epoch + 1}/{self._epochs}, loss {step.loss:.3f}, lr {step.lr:.1e}, "
            f"{step.images_per_s:.0f} images/s, {self._left(done, total)} left",
        )

    def _left(self, done: int, total: int) -> str:
        """Estimate the time to the end from the steps this display has seen, with evaluations."""
        self._first = self._first or (done - 1, time.monotonic())
        first, since = self._first
        seconds = (time.monotonic() - since) / max(1, done - first - 1) * (total - done)
        return str(timedelta(seconds=round(seconds))) if done > first + 1 else "?"

    def evaluated(self, epoch: int, split: str, metrics: RetrievalMetrics) -> None:
        """Print the accuracy of a split."""
        self._say(f"epoch {epoch + 1}/{self._epochs}", split, metrics)

    def measured(self, best_epoch: int, split: str, metrics: RetrievalMetrics) -> None:
        """Print the accuracy of the saved run."""
        self._say(f"saved run, epoch {best_epoch}", split, metrics)

    def _say(self, what: str, split: str, metrics: RetrievalMetrics) -> None:
        values = "  ".join(f"{name} {value:.2f}" for name, value in metrics.as_dict().items())
        self._display.say(f"{what}  {split}  {values}")
