"""The report of an export: the content of a bundle's ``report.json``.

Keys of the file keep their names: ``ladder`` has the measured candidates, ``rungs`` the accepted
ones, ``half_sums`` the fp16 accumulation.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from upperson_calibration.calibration_file import Samples
from upperson_calibration.ranges import Estimator
from upperson_calibration.samples import CalibrationSet
from upperson_calibration.sensitivity import LayerSensitivity
from upperson_export.graphs import Fp16Accumulation, float_type_of
from upperson_export.precision_search import DRAWS, Accuracy, Compared, Measured
from upperson_export.variants import VARIANTS, VariantName
from upperson_machine.description import describe_machine
from upperson_rt.backends import open_backend
from upperson_rt.score_calibration import ScoreCalibration
from upperson_rt.tokenizer import token_lengths
from upperson_rt.towers import Tower, run_tower

# --- Milliseconds an item on this machine, by backend: a hint, not a benchmark

BATCH = 8
REPEATS = 3


@dataclass(frozen=True, slots=True)
class TowerTime:
    """Time of a tower on a backend."""

    ms_per_item: float
    """Median."""
    float_type: str


Times = Mapping[str, Mapping[Tower, TowerTime]]
"""Time of each tower, by backend."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """Conditions of the times."""

    machine: Mapping[str, Any]
    threads: int
    backends: Mapping[str, str]
    batch: Mapping[Tower, int]
    caption_tokens: int
    repeats: int


class Stopwatch:
    """Times towers on every CPU backend that is installed, all under the same conditions."""

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
        for _ in range(REPEATS + 1):  # The first warms up.
            started = time.perf_counter()
            run_tower(backend, tower, inputs)
            times.append((time.perf_counter() - started) / len(inputs))
        return TowerTime(round(1000 * median(times[1:]), 3), float_type_of(backend))

    def conditions(self) -> Conditions:
        """Return the conditions of the times so far."""
        return Conditions(
            machine=self._machine,
            threads=self._threads,
            backends=self._versions,
            batch={tower: len(inputs) for tower, inputs in self._inputs.items()},
            caption_tokens=self._inputs["text"].shape[1],
            repeats=REPEATS,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitSize:
    """The split that accuracy was measured on."""

    name: str
    images: int
    captions: int
    people: int | None = None
    """None if identities are unknown."""
    short_queries: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationRecord:
    """The source of activation ranges."""

    samples: Samples
    estimator: Estimator
    reused_file_sha256: str | None

    def as_dict(self) -> dict[str, Any]:
        """Return the record for report and manifest."""
        return {
            **self.samples.describe(),
            "estimator": self.estimator,
            "reused_file_sha256": self.reused_file_sha256,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantReport:
    """One variant: its accuracy, how it was made, its size and times."""

    candidates: Mapping[Tower, str]
    accuracy: Accuracy | None = None
    """Of both towers together, on the variant's first backend; None: no gate."""
    elsewhere: Mapping[str, Accuracy] = field(default_factory=dict)
    """On further backends, by name."""
    kept_float: Mapping[Tower, Sequence[LayerSensitivity]]
    """Linears left in float, most sensitive first."""
    fp16_accumulation: Mapping[Tower, Fp16Accumulation] = field(default_factory=dict)
    """Worst case of towers that have floats in float16."""
    left_out: str | None = None
    size_bytes: int
    times: Times

    @property
    def shipped(self) -> bool:
        """Whether it is in the bundle."""
        return self.left_out is None

    def measured(self, first: str) -> dict[str, Accuracy | None]:
        """Return the accuracy by backend, that on the variant's first one first."""
        return {first: self.accuracy, **self.elsewhere}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """The result of an export."""

    model: str
    split: SplitSize | None
    """None: the gate was off."""
    max_r1_drop: float | None
    min_overlap: float | None = None
    """Minimum overlap with float32's first ten pictures in percent; None if rankings did not
    decide."""
    variants: Mapping[VariantName, VariantReport]
    measured: Sequence[Measured]
    conditions: Conditions
    calibration: CalibrationRecord | None
    """None: fp32 alone was written."""
    scores: ScoreCalibration | None = None
    """None: there were no captions of enough people in a split val, or `scores_unreliable`."""
    scores_unreliable: bool = False
    """Whether scores could not be calibrated reliably on the split val."""

    def as_dict(self) -> dict[str, Any]:
        """Return the content of ``report.json``."""
        return {
            "model": self.model,
            "split": self.split and asdict(self.split),
            "max_r1_drop": self.max_r1_drop,
            "min_overlap": self.min_overlap,
            "bootstrap": None
            if self.max_r1_drop is None
            else {"captions": "by person", "short_queries": "by query", "draws": DRAWS},
            "variants": {name: _variant(row) for name, row in self.variants.items()},
            "ladder": [_measured(row) for row in self.measured],
            "latency_conditions": asdict(self.conditions),
            "calibration": self.calibration and self.calibration.as_dict(),
            "scores": self.scores
            and {"fitted_on": self.scores.fitted_on, "held_out": self.scores.held_out},
        }

    def too_few_queries(self) -> str | None:
        """Return a warning if one query of the split is more than the gate allows."""
        if self.split is None or self.max_r1_drop is None:
            return None
        one = 100 / self.split.captions
        if one <= self.max_r1_drop:
            return None
        return (
            f"one of the {self.split.captions} queries is {one:.2f} points of R@1, more than the "
            f"{self.max_r1_drop} allowed: candidates pass or fail by chance; use more queries"
        )


def _variant(row: VariantReport) -> dict[str, Any]:
    return {
        **_accuracy(row.accuracy),
        "elsewhere": {backend: _accuracy(found) for backend, found in row.elsewhere.items()},
        "rungs": dict(row.candidates),
        "kept_float": {
            tower: [asdict(layer) for layer in layers] for tower, layers in row.kept_float.items()
        },
        "half_sums": {tower: asdict(found) for tower, found in row.fp16_accumulation.items()},
        "shipped": row.shipped,
        "reason": row.left_out,
        "size_bytes": row.size_bytes,
        "latency": {
            backend: {tower: asdict(time) for tower, time in times.items()}
            for backend, times in row.times.items()
        },
    }


def _accuracy(found: Accuracy | None) -> dict[str, Any]:
    if found is None:
        return {"metrics": None, "short": None, "r1_drop": None, "float_types": {}}
    metrics = found.metrics and found.metrics.as_dict()
    short = found.short and found.short.as_dict()
    content: dict[str, Any] = {"metrics": metrics, "short": short, "r1_drop": None}
    if isinstance(found, Compared):
        lost = {measure: asdict(drop) for measure, drop in found.drops.items()}
        content |= {"r1_drop": lost.get("R@1"), "drops": lost}
        content |= {"cosine": dict(found.cosine), "top10_overlap": found.top10_overlap}
    return content | {"float_types": dict(found.float_types)}


def _measured(row: Measured) -> dict[str, Any]:
    # Every row has every key, so that the list can be read as a table.
    return {
        "variant": row.variant,
        "tower": row.tower,
        "rung": row.candidate,
        "backend": row.backend,
        "float_types": {},
        "metrics": None,
        "short": None,
        "r1_drop": None,
        "drops": None,
        "cosine": None,
        "top10_overlap": None,
        **_accuracy(row.accuracy),
        "accepted": row.accepted,
        "failure": row.failure,
    }
