"""Milliseconds an item of a variant takes on this machine, by backend: a hint, not a benchmark."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from upperson_calibration.samples import CalibrationSet
from upperson_export.graphs import float_type_of
from upperson_export.variants import VARIANTS, VariantName
from upperson_rt.backends import open_backend
from upperson_rt.machine import describe_machine
from upperson_rt.tokenizer import token_lengths
from upperson_rt.towers import Tower, run_tower

BATCH = 8
REPEATS = 3


@dataclass(frozen=True, slots=True)
class TowerTime:
    """How long a tower takes on a backend."""

    ms_per_item: float
    """Median."""

    float_type: str
    """What the backend computed floats in."""


Times = Mapping[str, Mapping[Tower, TowerTime]]
"""What each tower takes, by backend."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """What times depend on."""

    machine: Mapping[str, Any]
    """What `describe_machine` says."""

    threads: int
    backends: Mapping[str, str]
    """Versions of those that ran, by name."""

    batch: Mapping[Tower, int]
    caption_tokens: int
    """Length of the longest caption."""

    repeats: int


class Stopwatch:
    """Times towers on every CPU backend that is installed, all under the same conditions.

    Args:
        calibration: Its first samples are what is embedded.
    """

    def __init__(self, calibration: CalibrationSet) -> None:
        captions = calibration.input_ids[:BATCH]
        self._inputs: dict[Tower, Any] = {
            "image": calibration.images[:BATCH],
            "text": captions[:, : token_lengths(captions).max()],
        }
        self._machine = describe_machine()
        self._threads: int = self._machine["cpus_available"]
        self._versions: dict[str, str] = {}

    def measure(self, files: Mapping[Tower, Path], variant: VariantName) -> Times:
        """Time a variant; one that is made for GPUs has no times on a CPU."""
        if VARIANTS[variant].made_for == "gpu" or not files:
            return {}
        return {
            name: {tower: self._time(name, tower, path) for tower, path in files.items()}
            for name in ("onnxruntime", "openvino")
            if find_spec(name) is not None
        }

    def _time(self, name: str, tower: Tower, path: Path) -> TowerTime:
        backend = open_backend(path, name, threads=self._threads)
        self._versions[name] = backend.version
        inputs = self._inputs[tower]
        times = []
        for _ in range(REPEATS + 1):  # The first is for warming up.
            started = time.perf_counter()
            run_tower(backend, tower, inputs)
            times.append((time.perf_counter() - started) / len(inputs))
        return TowerTime(round(1000 * median(times[1:]), 3), float_type_of(backend))

    def conditions(self) -> Conditions:
        """Return what the times so far depend on."""
        return Conditions(
            machine=self._machine,
            threads=self._threads,
            backends=self._versions,
            batch={tower: len(inputs) for tower, inputs in self._inputs.items()},
            caption_tokens=self._inputs["text"].shape[1],
            repeats=REPEATS,
        )
