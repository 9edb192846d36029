"""Backend autotuning: `auto` on a CPU runs the backend that is measured as the fastest.

No fixed order is right: which one is faster depends on the processor, the number format and the
versions of the libraries, by up to three times either way. So the installed ones embed a camera's
batch in turns, and the fastest that passes the golden samples runs, then and from then on. The file
of a measurement names everything that the times depend on: if any of it changes, the file is no
longer found, and one that is damaged or was renamed is refused.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Generic, Literal, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from upperson_autotune.timing import Timing, time_in_turns
from upperson_rt import __version__
from upperson_rt.backends import Choice
from upperson_rt.errors import BackendError, InputError, IntegrityError
from upperson_rt.files import cache_folder, write_atomically
from upperson_rt.locks import lock_or_wait
from upperson_rt.machine import processor, version_of
from upperson_rt.printable import get_logger, safe_repr
from upperson_rt.strict import Constraint, Positive, Sha256, read_fields, read_json, require_version
from upperson_rt.towers import Backend, Tower, run_tower

Measured: TypeAlias = Literal[Tower, "detector"]
"""What is measured."""

BATCH = 8
"""Pictures that are embedded at once: a camera's batch, and a piece of OpenVINO's."""

_SCHEMA_VERSION = 1
_MOST_BYTES = 1 << 20

_DISTRIBUTIONS = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")}
_QUOTAS = (Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))

_Milliseconds = Annotated[float, Constraint(lambda value: value > 0, "a number above 0")]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """All that a measurement depends on: if any of it changes, it is made again."""

    processor: str
    flags_sha256: Sha256
    """Of the processor's instruction sets."""
    cpus: str
    """Those that this process may use."""
    quota: str
    """How much of them a container may use, as the system says it."""
    threads: Positive | None
    """None where the libraries choose."""
    backends: dict[str, str]
    """Versions of those that are installed."""
    upperson: str
    tower: Measured
    graph_sha256: Sha256
    batch: Positive

    @classmethod
    def here(
        cls,
        names: Sequence[str],
        tower: Measured,
        graph_sha256: str,
        threads: int | None,
        batch: int = BATCH,
    ) -> "Conditions":
        """Return those of this process."""
        cpu = processor()
        every = range(os.cpu_count() or 1)
        usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else every
        quotas = [path.read_text("utf-8").strip() for path in _QUOTAS if path.is_file()]
        return cls(
            processor=cpu.name or "unknown",
            flags_sha256=_sha256(" ".join(sorted(cpu.flags or ()))),
            cpus=",".join(map(str, sorted(usable))),
            quota=next(filter(None, quotas), "unknown"),
            threads=threads,
            backends={name: _version(name) for name in names},
            upperson=__version__,
            tower=tower,
            graph_sha256=graph_sha256,
            batch=batch,
        )

    @property
    def file(self) -> Path:
        """Where their measurement is kept."""
        digest = _sha256(json.dumps(asdict(self), sort_keys=True))
        return _folder() / f"{self.tower}-{self.graph_sha256[:16]}-{digest[:16]}.json"


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What came out for one tower."""

    conditions: Conditions
    milliseconds: dict[str, _Milliseconds]
    """What each backend took, the fastest first: to embed ``pictures``, or to load the text tower
    and embed a sentence, which is what a query waits for."""
    pictures: Positive | None
    """None for the text tower."""
    busy: bool
    """Others had the processors, so that these are milliseconds of processor time."""
    left_out: dict[str, str]
    """Why a backend is not taken, whatever time it took."""
    chosen: str
    measured: str
    """ISO 8601, UTC."""

    def __post_init__(self) -> None:
        if self.chosen not in self.milliseconds or self.chosen in self.left_out:
            raise InputError(f"chosen: {safe_repr(self.chosen)} was not measured, or was left out")

    def __str__(self) -> str:
        times = (f"{name} {ms:.{int(ms < 10)}f} ms" for name, ms in self.milliseconds.items())
        fixed = {None: "to load and embed a sentence", 1: "for a picture"}
        what = fixed.get(self.pictures, f"for {self.pictures} pictures")
        busy = " of processor time" if self.busy else ""
        gone = f"; {', '.join(self.left_out)} left out" if self.left_out else ""
        return f"{', '.join(times)}{busy} {what}, measured {self.measured[:10]}{gone}"


def read(conditions: Conditions) -> Measurement | None:
    """Read the measurement of these conditions; None if there is none."""
    file = conditions.file
    try:
        if not file.exists():
            return None
    except OSError as error:
        raise InputError(f"cannot read {file}: {error.strerror}") from error
    where = os.fspath(file)
    if not file.is_file() or file.stat().st_size > _MOST_BYTES:
        raise InputError(f"{where} is no file of {_MOST_BYTES} bytes at most: delete it")
    content = read_json(file)
    require_version(content, where, (_SCHEMA_VERSION,), "delete it")
    fields = {key: content[key] for key in content if key != "schema_version"}
    found = read_fields(Measurement, fields, where)
    if found.conditions != conditions:
        raise InputError(f"{where}: conditions: not those that the file is named after")
    for name in found.milliseconds:
        if name not in conditions.backends:
            raise InputError(f"{where}: milliseconds: {safe_repr(name)} is none of the backends")
    return found


def write(measurement: Measurement) -> None:
    """Keep a measurement."""
    fields = {"schema_version": _SCHEMA_VERSION, **asdict(measurement)}
    text = json.dumps(fields, indent=2, allow_nan=False) + "\n"
    write_atomically(measurement.conditions.file, text)


@contextmanager
def measuring_alone(on_wait: Callable[[], None]) -> Iterator[None]:
    """Let one process measure, whose result the others then find; without a cache folder all do."""
    try:
        folder = _folder()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    except (InputError, OSError):
        yield
        return
    try:
        lock_or_wait(handle, on_wait)
        yield
    finally:
        os.close(handle)  # And with it the lock.


def _folder() -> Path:
    return cache_folder() / "backends"


def _version(backend: str) -> str:
    named = {name: version_of(name) for name in _DISTRIBUTIONS.get(backend, (backend,))}
    return ", ".join(f"{name} {version}" for name, version in named.items() if version) or "unknown"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# --- From a measurement to a choice

T = TypeVar("T")
_Problems: TypeAlias = dict[str, BackendError | IntegrityError]

TIMED_S, MOST_S = 0.75, 0.75
"""How long runs are timed, and what a run of the batch in each backend may take in all. On a slower
processor single pictures have to do."""

UNDISTURBED = 0.9
"""A process that computes has at least one processor all the time. With less than this share of it
others were in the way, and processor time says more than the clock."""

_log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class MeasuredChoice(Choice):
    """A choice by a measurement."""

    measurement: Measurement
    file: Path | None = None
    """Where the measurement is kept; None if there is none, or nowhere to keep it."""
    problem: str | None = None
    """Why it is not kept."""


@dataclass(frozen=True, kw_only=True)
class Autotuner(Generic[T]):
    """The installed backends, and a tower or a detector to run."""

    names: Sequence[str]
    tower: Measured
    graph_sha256: str
    threads: int | None
    inputs: NDArray[np.generic]
    """[N, ...], N from 1; they are repeated."""
    load: Callable[[str], Backend]
    check: Callable[[Backend], T]
    """Runs the golden samples and returns what came out."""
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
        """Load the fastest backend that passes the golden samples; measure unless it is known."""
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
        file = found.conditions.file
        return backend, checks, MeasuredChoice(why=f"auto: {found}", measurement=found, file=file)

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
        file, problem = None, None
        try:
            write(measurement)
            file = self._conditions.file
        except InputError as error:
            problem = str(error)
            _log.warning("a measurement is not kept, and made again next time: %s", error)
        why = f"auto: {measurement}"
        choice = MeasuredChoice(why=why, measurement=measurement, file=file, problem=problem)
        return loaded[chosen], checks, choice

    def _load_all(self, problems: _Problems) -> tuple[dict[str, Backend], dict[str, float]]:
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
        """Return the first that passes the golden samples, and what they gave; warn of others."""
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
