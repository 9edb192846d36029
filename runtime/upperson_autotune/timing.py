"""Times of contenders that run in turns, so that whatever else the machine does meets all alike."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """The timed runs of one contender; there is at least one."""

    seconds: Sequence[float]
    """By the wall clock, one a run."""
    cpu_seconds: Sequence[float] = ()
    """Processor time, one a run; empty where the system does not report it."""

    def percentile_s(self, percent: float) -> float:
        """Return a percentile of the runs' wall time, interpolated between runs."""
        return float(np.percentile(self.seconds, percent))

    @property
    def median_s(self) -> float:
        """Median wall time of a run."""
        return self.percentile_s(50)

    @property
    def median_cpu_s(self) -> float:
        """Median processor time of a run, where it was measured."""
        return float(np.median(self.cpu_seconds))

    def as_dict(self, items: int = 1) -> dict[str, Any]:
        """Return percentiles, and rates for runs of ``items`` items, as plain values."""
        return {
            "runs": len(self.seconds),
            **{f"p{n}_ms": 1000 * self.percentile_s(n) for n in (50, 90, 99)},
            "items_per_s": items / self.median_s,
            "cpu_ms": 1000 * self.median_cpu_s if self.cpu_seconds else None,
        }


def time_in_turns(
    contenders: Mapping[str, Callable[[], object]],
    *,
    warmup: int,
    rounds: int,
    seconds: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    cpu_clock: Callable[[], float] | None = time.process_time,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Timing]:
    """Run every contender once a round; each round begins with the next one.

    After ``warmup`` rounds come ``rounds`` timed ones, and more until they took ``seconds``.
    ``progress`` gets the number of rounds that are over. The usual ``cpu_clock`` counts all threads
    of this process; other processes hardly change it.
    """
    names = list(contenders)
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    done, began = 0, clock()
    while done < warmup + rounds or clock() - began < seconds:
        if done == warmup:
            began = clock()
        first = done % len(names)
        for name in names[first:] + names[:first]:
            started, cpu_started = clock(), cpu_clock() if cpu_clock else 0.0
            contenders[name]()
            if done >= warmup:
                wall[name].append(clock() - started)
                if cpu_clock:
                    cpu[name].append(cpu_clock() - cpu_started)
        done += 1
        if progress is not None:
            progress(done)
    return {name: Timing(seconds=wall[name], cpu_seconds=cpu[name]) for name in names}
