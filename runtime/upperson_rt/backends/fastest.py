"""What `auto` takes on a CPU: the backend that is measured as the fastest, once a machine.

No fixed order is right: which one is faster depends on the processor, the number format and the
versions of the libraries, by up to three times either way. So the installed ones embed a camera's
batch in turns, and the fastest that passes the canaries is taken, then and from then on.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cached_property, partial
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from upperson_rt.backends.measurement import (
    BATCH,
    Conditions,
    Measured,
    Measurement,
    Timing,
    measuring_alone,
    read,
    time_in_turns,
    write,
)
from upperson_rt.errors import BackendError, InputError, IntegrityError
from upperson_rt.printable import get_logger
from upperson_rt.towers import Backend, run_tower

__all__ = ["Choice", "Contest"]

T = TypeVar("T")
_Problems: TypeAlias = dict[str, BackendError | IntegrityError]

TIMED_S, MOST_S = 0.75, 0.75
"""How long runs are timed, and what a run of the batch in each backend may take in all. On a slower
processor single pictures have to do."""

UNDISTURBED = 0.9
"""A process that computes has at least one processor all the time. With less than this share of it
others were in the way, and processor time tells more than the clock."""

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Why a backend runs a tower."""

    why: str
    """In one line."""
    measurement: Measurement | None = None
    file: Path | None = None
    """Where the measurement is kept; None if there is none, or nowhere to keep it."""
    problem: str | None = None
    """Why it is not kept."""


@dataclass(frozen=True, kw_only=True)
class Contest(Generic[T]):
    """The installed backends, and a tower or a detector to run."""

    names: Sequence[str]
    tower: Measured
    graph_sha256: str
    threads: int | None
    inputs: NDArray[np.generic]
    """[N, ...], N from 1; they are repeated."""
    load: Callable[[str], Backend]
    check: Callable[[Backend], T]
    """Runs the canaries and returns what came out."""
    run: Callable[[Backend, NDArray[np.generic]], object] | None = None
    """Runs some of the inputs; None runs the tower."""
    batch: int = BATCH
    """Pictures at once, as many as it will be given in use."""
    clock: Callable[[], float] = time.perf_counter
    cpu_clock: Callable[[], float] = time.process_time

    def known(self) -> tuple[Backend, T, Choice] | None:
        """Load what an earlier measurement chose; None if there is none, or it is of no use."""
        found = self._read(logging.WARNING)
        return None if found is None else self._take(found)

    def decide(self) -> tuple[Backend, T, Choice]:
        """Load the fastest backend that passes the canaries; measure unless it is known.

        Raises:
            BackendError: None can run the tower; the error is the first one's.
            IntegrityError: None computes it right; likewise.
        """
        before = self._read(logging.DEBUG)
        if before is not None and (taken := self._take(before)):
            return taken
        with measuring_alone(partial(_log.info, "another process is measuring backends")):
            found = self._read(logging.WARNING)
            if found is not None and found != before and (taken := self._take(found)):
                return taken
            return self._measure()

    def _read(self, level: int) -> Measurement | None:
        try:
            return read(self._conditions)
        except InputError as error:
            _log.log(level, "no measurement of backends: %s", error)
            return None

    def _take(self, found: Measurement) -> tuple[Backend, T, Choice] | None:
        try:
            backend = self.load(found.chosen)
            checks = self.check(backend)
        except (BackendError, IntegrityError) as error:
            text = "%s was the fastest for %s and does not run any more: %s"
            _log.warning(text, found.chosen, self._what, error)
            return None
        return backend, checks, _choice(found, None)

    @cached_property
    def _conditions(self) -> Conditions:
        return Conditions.here(self.names, self.tower, self.graph_sha256, self.threads, self.batch)

    def _measure(self) -> tuple[Backend, T, Choice]:
        _log.info("measuring %s for %s", " and ".join(self.names), self._what)
        problems: _Problems = {}
        loaded, starts = self._load_all(problems)
        if self.tower == "text" or not loaded:
            seconds, pictures, busy = starts, None, False
        else:
            timings, pictures = self._time_all(loaded, problems)
            busy = _disturbed(list(timings.values()))
            seconds = {
                name: min(timing.cpu_seconds if busy else timing.seconds)
                for name, timing in timings.items()
            }
        ranked = sorted(seconds, key=seconds.__getitem__)
        chosen, checks = self._first_sound(ranked, loaded, problems)
        measurement = Measurement(
            conditions=self._conditions,
            milliseconds={name: 1000 * seconds[name] for name in ranked},
            pictures=pictures,
            busy=busy,
            left_out={name: str(problem) for name, problem in problems.items()},
            chosen=chosen,
            measured=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        )
        unwritten = None
        try:
            write(measurement)
        except InputError as error:
            unwritten = str(error)
            _log.warning("a measurement is not kept, and made again next time: %s", error)
        return loaded[chosen], checks, _choice(measurement, unwritten)

    def _load_all(self, problems: _Problems) -> tuple[dict[str, Backend], dict[str, float]]:
        """Load all; return them, and the seconds until each has embedded one input."""
        loaded, seconds = {}, {}
        for name in self.names:
            began = self.clock()
            try:
                backend = self.load(name)
                self._embed(backend, self.inputs[:1])
            except (BackendError, IntegrityError) as error:
                problems[name] = error
            else:
                loaded[name], seconds[name] = backend, self.clock() - began
        return loaded, seconds

    def _time_all(
        self, loaded: dict[str, Backend], problems: _Problems
    ) -> tuple[dict[str, Timing], int]:
        """Time those that run, and return for how many pictures."""
        batch = np.resize(self.inputs, (self.batch, *self.inputs.shape[1:]))

        def run(name: str, rows: int) -> None:
            try:
                self._embed(loaded[name], batch[:rows])
            except (BackendError, IntegrityError) as error:
                problems[name] = error

        def race(rows: int, warmup: int, seconds: float) -> dict[str, Timing]:
            return time_in_turns(
                {name: partial(run, name, rows) for name in loaded},
                warmup=warmup,
                rounds=1,
                seconds=seconds,
                clock=self.clock,
                cpu_clock=self.cpu_clock,
            )

        single_s = sum(min(timing.seconds) for timing in race(1, 0, 0.0).values())
        fits = self.batch * single_s <= MOST_S
        pictures = self.batch if fits else 1
        timings = race(pictures, 1 if fits else 0, TIMED_S)
        return {name: timings[name] for name in loaded if name not in problems}, pictures

    def _embed(self, backend: Backend, inputs: NDArray[np.generic]) -> None:
        if self.run is not None:
            self.run(backend, inputs)
        else:
            assert self.tower != "detector"  # It brings a `run` of its own.
            run_tower(backend, self.tower, inputs)

    @property
    def _what(self) -> str:
        return "the detector" if self.tower == "detector" else f"the {self.tower} tower"

    def _first_sound(
        self, ranked: Sequence[str], loaded: dict[str, Backend], problems: _Problems
    ) -> tuple[str, T]:
        """Return the first that passes the canaries, and what they gave; tell what is left out."""
        for name in ranked:
            try:
                checks = self.check(loaded[name])
            except (BackendError, IntegrityError) as error:
                problems[name] = error
                continue
            for other, problem in problems.items():
                _log.warning("%s is left out for %s: %s", other, self._what, problem)
            return name, checks
        raise next(problems[name] for name in self.names if name in problems)


def _disturbed(timings: Sequence[Timing]) -> bool:
    """Whether other programs used the processors while these runs wanted them."""
    spent = sum(sum(timing.seconds) for timing in timings)
    return sum(sum(timing.cpu_seconds) for timing in timings) < UNDISTURBED * spent


def _choice(measurement: Measurement, unwritten: str | None) -> Choice:
    return Choice(
        why=f"auto: {measurement}",
        measurement=measurement,
        file=None if unwritten else measurement.conditions.file,
        problem=unwritten,
    )
