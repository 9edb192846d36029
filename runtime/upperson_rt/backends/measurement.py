"""How long each backend takes for a tower on this machine: timed in turns, kept in a cache folder.

The file names everything that the times depend on; where anything of it has changed it is no longer
found, and one that is damaged or was renamed is refused.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np

from upperson_rt import __version__
from upperson_rt.errors import InputError
from upperson_rt.files import cache_folder, write_atomically
from upperson_rt.locks import lock_or_wait
from upperson_rt.machine import processor, version_of
from upperson_rt.printable import shown
from upperson_rt.strict import (
    Constraint,
    Positive,
    Sha256,
    read_fields,
    read_json,
    require_version,
)
from upperson_rt.towers import Tower

__all__ = [
    "BATCH",
    "Conditions",
    "Measured",
    "Measurement",
    "Timing",
    "measuring_alone",
    "read",
    "time_in_turns",
    "write",
]

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
        """Where their measurement is kept.

        Raises:
            InputError: The user has no cache folder.
        """
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
            raise InputError(f"chosen: {shown(self.chosen)} was not measured, or was left out")

    def __str__(self) -> str:
        times = (f"{name} {ms:.{int(ms < 10)}f} ms" for name, ms in self.milliseconds.items())
        what = {None: "to load and embed a sentence", 1: "for a picture"}.get(
            self.pictures, f"for {self.pictures} pictures"
        )
        busy = " of processor time" if self.busy else ""
        gone = f"; {', '.join(self.left_out)} left out" if self.left_out else ""
        return f"{', '.join(times)}{busy} {what}, measured {self.measured[:10]}{gone}"


def read(conditions: Conditions) -> Measurement | None:
    """Read the measurement of these conditions; None if there is none.

    Raises:
        InputError: The file is damaged, or belongs to other conditions.
    """
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
            raise InputError(f"{where}: milliseconds: {shown(name)} is none of the backends")
    return found


def write(measurement: Measurement) -> None:
    """Keep a measurement.

    Raises:
        InputError: The folder cannot be written to.
    """
    fields = {"schema_version": _SCHEMA_VERSION, **asdict(measurement)}
    text = json.dumps(fields, indent=2, allow_nan=False) + "\n"
    write_atomically(measurement.conditions.file, text)


@contextmanager
def measuring_alone(on_wait: Callable[[], None]) -> Iterator[None]:
    """Let one process measure, whose result the others then find.

    Without a folder for its lock work goes on: measurements may then disturb each other.
    """
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


# --- Time contenders in turns, so that whatever else the machine does meets all of them alike


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """The timed runs of one contender; there is at least one."""

    seconds: Sequence[float]
    """By the wall clock, one a run."""
    cpu_seconds: Sequence[float] = ()
    """Processor time, one a run; empty where the system does not tell."""

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

    Args:
        contenders: What to run, by name.
        warmup: Rounds before the timed ones.
        rounds: Timed rounds, at least one.
        seconds: Go on with more rounds until the timed ones took this long.
        clock: Wall time in seconds.
        cpu_clock: Processor time in seconds. The usual one counts all threads of this process, and
            other processes hardly change it.
        progress: Told the number of rounds that are over, warm-up included.

    Returns:
        Timings by name, in the order given.
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
