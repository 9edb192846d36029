"""What an export found: the content of a bundle's ``report.json``."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from upperson_calibration.calibration_file import Samples
from upperson_calibration.ranges import Estimator
from upperson_calibration.sensitivity import LayerDamage
from upperson_export.half_sums import HalfSums
from upperson_export.ladder import Accuracy, Compared, Measured, RetrievalSplit
from upperson_export.latency import Conditions, Times
from upperson_export.variants import VariantName
from upperson_rt.towers import Tower


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitSize:
    """What accuracy was measured on."""

    name: str
    images: int
    captions: int

    @classmethod
    def of(cls, split: RetrievalSplit) -> "SplitSize":
        """Count what a split holds."""
        return cls(name=split.name, images=len(split.image_files), captions=len(split.captions))


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationRecord:
    """What ranges come from."""

    samples: Samples
    estimator: Estimator
    reused_file_sha256: str | None
    """Hash of the calibration file that was taken over, if one was."""

    def as_dict(self) -> dict[str, Any]:
        """Return what report and manifest keep."""
        return {
            **self.samples.describe(),
            "estimator": self.estimator,
            "reused_file_sha256": self.reused_file_sha256,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class VariantReport:
    """One variant: how well it retrieves, how it was made, what it costs."""

    rungs: Mapping[Tower, str]

    accuracy: Accuracy | None = None
    """What the chosen towers do together, where the variant is measured first; None: no gate."""

    elsewhere: Mapping[str, Accuracy] = field(default_factory=dict)
    """What they do on further backends, by name."""

    kept_float: Mapping[Tower, Sequence[LayerDamage]]
    """Linears left in float, most harmful first."""

    half_sums: Mapping[Tower, HalfSums] = field(default_factory=dict)
    """What sums in float16 do to it in the worst case, of towers that have floats in float16."""

    left_out: str | None = None
    """Why it is not in the bundle."""

    size_bytes: int
    times: Times

    @property
    def shipped(self) -> bool:
        """Whether it is in the bundle."""
        return self.left_out is None


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """The result of an export."""

    model: str

    split: SplitSize | None
    """None: the gate was off."""

    max_r1_drop: float | None
    """Most points of R@1 that a variant may lose; None where R@1 was not measured."""

    min_overlap: float | None = None
    """Least percent of float32's first ten pictures that a variant must keep; None where rankings
    were not what decided."""

    variants: Mapping[VariantName, VariantReport]
    ladder: Sequence[Measured]
    """Every form that was measured, in order."""

    conditions: Conditions
    """What all times depend on."""

    calibration: CalibrationRecord | None
    """None: fp32 alone was written."""

    def as_dict(self) -> dict[str, Any]:
        """Return the content of ``report.json``."""
        return {
            "model": self.model,
            "split": self.split and asdict(self.split),
            "max_r1_drop": self.max_r1_drop,
            "min_overlap": self.min_overlap,
            "variants": {name: _variant(row) for name, row in self.variants.items()},
            "ladder": [_measured(row) for row in self.ladder],
            "latency_conditions": asdict(self.conditions),
            "calibration": self.calibration and self.calibration.as_dict(),
        }

    def too_few_queries(self) -> str | None:
        """Say that the split is too small for the gate, if one query is more than it allows."""
        if self.split is None or self.max_r1_drop is None:
            return None
        one = 100 / self.split.captions
        if one <= self.max_r1_drop:
            return None
        return (
            f"one of the {self.split.captions} queries is {one:.2f} points of R@1, more than the "
            f"{self.max_r1_drop} allowed: forms pass or fail by chance; measure on more queries"
        )


def _variant(row: VariantReport) -> dict[str, Any]:
    return {
        **_accuracy(row.accuracy),
        "elsewhere": {backend: _accuracy(found) for backend, found in row.elsewhere.items()},
        "rungs": dict(row.rungs),
        "kept_float": {
            tower: [asdict(layer) for layer in layers] for tower, layers in row.kept_float.items()
        },
        "half_sums": {tower: asdict(sums) for tower, sums in row.half_sums.items()},
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
        return {"metrics": None, "r1_drop": None, "float_types": {}}
    metrics = found.metrics and found.metrics.as_dict()
    content: dict[str, Any] = {"metrics": metrics, "r1_drop": None}
    if isinstance(found, Compared):
        content["r1_drop"] = found.r1_drop and asdict(found.r1_drop)
        content |= {"cosine": dict(found.cosine), "top10_overlap": found.top10_overlap}
    return content | {"float_types": dict(found.float_types)}


def _measured(row: Measured) -> dict[str, Any]:
    # Every row has every key, so that the list can be read as a table.
    return {
        "variant": row.variant,
        "tower": row.tower,
        "rung": row.rung,
        "backend": row.backend,
        "float_types": {},
        "metrics": None,
        "r1_drop": None,
        "cosine": None,
        "top10_overlap": None,
        **_accuracy(row.accuracy),
        "accepted": row.accepted,
        "failure": row.failure,
    }
