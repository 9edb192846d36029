"""A training step against the literal formulas: time, memory, equal losses.

Every contender runs in one process, in turns, over the same weights and batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any

import torch
import typer

from benchmarks.random_model import (
    BaseOption,
    HeightOption,
    ModelSpec,
    WidthOption,
    random_base,
)
from benchmarks.report import (
    SPEEDS,
    TIMES,
    Column,
    conditions,
    print_report,
    table,
    timed_rows,
)
from benchmarks.training_step import (
    CONTENDERS,
    LITERAL,
    OURS_BF16,
    TrainingStep,
    peak_extra_bytes,
)
from upperson_rt.backends.autotune import Timing, time_in_turns
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug, Threads
from upperson_rt.cli.output import show_progress
from upperson_rt.errors import IntegrityError

LOSS_TOLERANCE = 1e-4
CHECKED_STEPS = 5
"""The losses of two float32 contenders may differ by this much in each of the first steps, warm-up
included. Later on rounding grows, as in any training."""

COLUMNS = (
    TIMES
    | SPEEDS
    | {
        "peak extra MB": Column("peak_extra_bytes", "{:.0f}", 1e-6),
        "memory": Column("memory_ratio", "{:.0%}"),
        "losses differ by": Column("loss_difference", "{:.1e}"),
    }
)

app = new_app("Time a training step against a literal implementation of the formulas.")


@app.command(cls=Command)
def training(
    base: BaseOption = ModelSpec.base,
    height: HeightOption = ModelSpec.height_px,
    width: WidthOption = ModelSpec.width_px,
    batch_size: Annotated[int, typer.Option(min=2, help="Pairs in a step.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of every contender.")] = 5,
    warmup: Annotated[int, typer.Option(min=0, help="Steps before them, not timed.")] = 1,
    threads: Threads = None,
    debug: Debug = False,
) -> None:
    """Time a training step on the CPU against a literal implementation of the formulas.

    Weights, images and captions of 20 to 30 tokens are random. Contenders start from equal weights,
    step in turns in one process, and must have equal losses. Peak memory is measured in a process
    of its own for each: resident memory during two steps on top of the loaded model.

    Example: `python -m benchmarks.training --steps 10 --threads 1`
    """
    spec = ModelSpec(base=base, height_px=height, width_px=width, batch_size=batch_size)
    threads = threads or torch.get_num_threads()
    with show_progress() as progress:
        found = measure(spec, steps=steps, warmup=warmup, threads=threads, progress=progress)
    result = conditions(
        "training", "torch", "open_clip_torch",
        threads=threads, batch_size=batch_size, warmup=warmup,
    ) | {
        "spec": asdict(spec),
        "torch_kernels": torch.backends.cpu.get_cpu_capability(),
        "contenders": as_dict(found),
    }  # fmt: skip
    facts = [
        f"training step of {base} at {height}x{width}, batch {batch_size}; {warmup} + {steps} "
        f"steps in turns, the last {steps} timed"
    ]
    if OURS_BF16 not in found:
        facts.append(f"no instructions for bf16 here: '{OURS_BF16}' is left out")
    print_report(result, facts, [table("", result["contenders"], COLUMNS)])


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One contender."""

    losses: Sequence[float]
    """Loss of every step, warm-up included."""
    timing: Timing
    peak_extra_bytes: int | None
    """See :mod:`benchmarks.training_step`; None where it cannot be measured."""


def measure(
    spec: ModelSpec,
    *,
    steps: int,
    warmup: int,
    threads: int,
    progress: Callable[[str, int, int], None],
) -> dict[str, Measured]:
    """Measure all contenders, over equal weights and the same batch in every step.

    Raises:
        IntegrityError: A float32 contender's losses are not the literal ones.
        UsageError: The base is unknown or the image size does not fit it.
    """
    torch.set_num_threads(threads)
    # A base of its own for each, with equal weights: ours carry a factor in theirs.
    ready = {name: TrainingStep(spec, name, random_base(spec)) for name in CONTENDERS}
    peaks = {}
    for number, name in enumerate(CONTENDERS):
        progress("measuring memory", number, len(CONTENDERS))
        peaks[name] = peak_extra_bytes(spec, name, threads)
    losses: dict[str, list[float]] = {name: [] for name in CONTENDERS}

    def step_and_note(name: str) -> None:
        losses[name].append(ready[name].run())

    timings = time_in_turns(
        {name: partial(step_and_note, name) for name in CONTENDERS},
        warmup=warmup,
        rounds=steps,
        progress=lambda done: progress("taking steps in turns", done, warmup + steps),
    )
    found = {
        name: Measured(losses=losses[name], timing=timings[name], peak_extra_bytes=peaks[name])
        for name in CONTENDERS
    }
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
    return found


def loss_difference(found: Measured, expected: Measured) -> float:
    """Return the largest difference between the first losses of two contenders."""
    first = zip(found.losses[:CHECKED_STEPS], expected.losses[:CHECKED_STEPS], strict=True)
    return max(abs(ours - theirs) for ours, theirs in first)


def as_dict(found: Mapping[str, Measured]) -> dict[str, Any]:
    """Return the measurements and their ratios to the literal contender, by contender."""
    literal = found[LITERAL]
    rows = timed_rows({name: measured.timing for name, measured in found.items()}, LITERAL)
    for name, measured in found.items():
        peak, base = measured.peak_extra_bytes, literal.peak_extra_bytes
        rows[name] |= {
            "peak_extra_bytes": peak,
            "memory_ratio": peak / base if peak is not None and base else None,
            "loss_difference": loss_difference(measured, literal),
            "losses": measured.losses,
        }
    return rows


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.training")
