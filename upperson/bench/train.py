"""Time of a training step: every contender in one process, in turns, over the same weights."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from upperson.bench.memory import peak_extra_bytes
from upperson.bench.training_step import CONTENDERS, LITERAL, StepSpec, TrainingStep, random_base
from upperson_rt.errors import IntegrityError

LOSS_TOLERANCE = 1e-4
CHECKED_STEPS = 5
"""The losses of two float32 contenders may differ by this much in each of the first steps, warm-up
included. Later on rounding grows, as in any training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One contender."""

    losses: list[float]
    """Of every step, warm-up included."""

    seconds: list[float]
    """Of every timed step, by the wall clock."""

    cpu_seconds: list[float]
    """Of every timed step, spent by all threads of this process: other load hardly changes it."""

    peak_extra_bytes: int | None
    """See :mod:`upperson.bench.memory`; None where it cannot be measured."""

    @property
    def median_s(self) -> float:
        """Median time of a step."""
        return statistics.median(self.seconds)

    @property
    def median_cpu_s(self) -> float:
        """Median processor time of a step."""
        return statistics.median(self.cpu_seconds)

    def percentile_s(self, percent: int) -> float:
        """Time of a step by percentile, interpolated between the measured ones."""
        if len(self.seconds) == 1:
            return self.seconds[0]
        cuts = statistics.quantiles(self.seconds, n=100, method="inclusive")
        return cuts[percent - 1]


def bench_train(
    spec: StepSpec,
    contenders: Sequence[str] = CONTENDERS,
    *,
    steps: int,
    warmup: int,
    threads: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, Measured]:
    """Measure contenders; all start from equal weights and see the same batch in every step.

    Args:
        spec: What is trained.
        contenders: Some of ``CONTENDERS``, the literal one among them.
        steps: Timed steps of each.
        warmup: Steps of each before that, not timed.
        threads: Threads of torch, in this process and in those that measure memory.
        progress: Called with what is being done, how many are done and how many there are.

    Raises:
        IntegrityError: A float32 contender's losses are not the literal ones.
        UsageError: The base is unknown or the image size does not fit it.
    """
    torch.set_num_threads(threads)
    clip = random_base(spec)
    ready = {name: TrainingStep(spec, name, clip) for name in contenders}
    peaks = {}
    for number, name in enumerate(contenders):
        progress("measuring memory", number, len(contenders))
        peaks[name] = peak_extra_bytes(spec, name, threads)
    losses: dict[str, list[float]] = {name: [] for name in contenders}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(warmup + steps):
        progress("taking steps in turns", number, warmup + steps)
        for turn in range(len(contenders)):
            name = contenders[(number + turn) % len(contenders)]
            started, cpu_started = time.perf_counter(), time.process_time()
            losses[name].append(ready[name].run())
            if number >= warmup:
                seconds[name].append(time.perf_counter() - started)
                cpu_seconds[name].append(time.process_time() - cpu_started)
    found = {
        name: Measured(
            losses=losses[name],
            seconds=seconds[name],
            cpu_seconds=cpu_seconds[name],
            peak_extra_bytes=peaks[name],
        )
        for name in contenders
    }
    _check_losses(found)
    return found


def loss_difference(found: Measured, expected: Measured) -> float:
    """Return the largest difference between the first losses of two contenders."""
    return max(
        abs(ours - literal)
        for ours, literal in zip(
            found.losses[:CHECKED_STEPS], expected.losses[:CHECKED_STEPS], strict=True
        )
    )


def as_dict(found: dict[str, Measured]) -> dict[str, Any]:
    """Return the measurements and their ratios to the literal contender, by contender."""
    literal = found[LITERAL]
    return {
        name: {
            "median_s": measured.median_s,
            "p10_s": measured.percentile_s(10),
            "p90_s": measured.percentile_s(90),
            "speedup": literal.median_s / measured.median_s,
            "cpu_s": measured.median_cpu_s,
            "cpu_speedup": literal.median_cpu_s / measured.median_cpu_s,
            "peak_extra_bytes": measured.peak_extra_bytes,
            "memory_ratio": measured.peak_extra_bytes / literal.peak_extra_bytes
            if measured.peak_extra_bytes is not None and literal.peak_extra_bytes
            else None,
            "loss_difference": loss_difference(measured, literal),
            "seconds": measured.seconds,
            "cpu_seconds": measured.cpu_seconds,
            "losses": measured.losses,
        }
        for name, measured in found.items()
    }


def _check_losses(found: dict[str, Measured]) -> None:
    for name, measured in found.items():
        difference = loss_difference(measured, found[LITERAL])
        # "not <=" also refuses a loss that is not a number.
        if "fp32" in name and not difference <= LOSS_TOLERANCE:
            raise IntegrityError(
                f"'{name}' does not train as '{LITERAL}': expected losses equal to "
                f"{LOSS_TOLERANCE:g} in the first {CHECKED_STEPS} steps, found a difference of "
                f"{difference:.1e}: its times mean nothing; please report this with the versions "
                "of torch and upperson"
            )
