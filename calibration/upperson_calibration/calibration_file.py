"""``calibration.json``: what calibration found, to read, to compare and to use again.

It belongs to the float32 graphs it was made from. Numbers are rounded to six digits, so that two
files differ where calibrations do, and everything that is a set is sorted.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from upperson_calibration.estimators import ESTIMATORS, Estimator
from upperson_calibration.samples import CalibrationSet
from upperson_calibration.sensitivity import LayerDamage
from upperson_calibration.smoothing import Smoothing
from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.files import write_atomically
from upperson_rt.strict import StrictObject, suggestion

SCHEMA_VERSION = 2

_SHA256 = re.compile(r"[0-9a-f]{64}")

Form = Literal["plain", "smoothed"]
"""A tower as it was folded, or with outliers moved into its weights."""

FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Which samples set the ranges."""

    image_source: str
    """Where the pictures came from, for people."""

    images: tuple[str, ...]
    """SHA-256 of each picture's pixels at the model's size."""

    text_source: str
    texts: tuple[str, ...]
    """SHA-256 of each caption's ids."""

    @classmethod
    def of(cls, calibration: CalibrationSet) -> "Samples":
        """Record a set, sorted by hash."""
        return cls(
            image_source=calibration.image_source,
            images=tuple(sorted(calibration.image_sha256)),
            text_source=calibration.text_source,
            texts=tuple(sorted(calibration.text_sha256)),
        )

    @property
    def sha256(self) -> str:
        """Hash over all samples: tells whether two calibrations saw the same, in any order."""
        return hashlib.sha256("\n".join([*self.images, "", *self.texts]).encode()).hexdigest()

    def same_as(self, calibration: CalibrationSet) -> bool:
        """Whether a set has these samples, wherever it came from."""
        other = Samples.of(calibration)
        return (self.images, self.texts) == (other.images, other.texts)

    def describe(self) -> dict[str, Any]:
        """Return what manifest and report record."""
        return {
            "images": len(self.images),
            "image_source": self.image_source,
            "texts": len(self.texts),
            "text_source": self.text_source,
            "sha256": self.sha256,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class FormRanges:
    """What was seen in one form of a tower, by names of tensors; empty where nobody looked."""

    amax: Mapping[str, float] = field(default_factory=dict)
    """Range of each activation that enters a block Linear."""

    largest: Mapping[str, float] = field(default_factory=dict)
    """Largest absolute value seen, by the same names: a range below it saturates."""

    largest_anywhere: Mapping[str, float] = field(default_factory=dict)
    """Largest absolute value of every computed float tensor, which float16 has to hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerCalibration:
    """What was found for one tower."""

    graph_sha256: str
    """Of the float32 ONNX file before smoothing."""

    forms: Mapping[Form, FormRanges]
    """Those that were looked at."""

    smoothing: Mapping[str, Smoothing] = field(default_factory=dict)
    """By site; empty if none was chosen."""

    damage: tuple[LayerDamage, ...] = ()
    """Most harmful first; empty if it was not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The content of a calibration file."""

    samples: Samples
    estimator: Estimator
    """How ``amax`` followed from what was seen."""

    towers: Mapping[str, TowerCalibration]
    """By ``image`` and ``text``."""

    @property
    def sha256(self) -> str:
        """Of the file."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    def require_estimator(self, asked: Estimator | None) -> Estimator:
        """Return its estimator. Raises UsageError if another one was asked for."""
        if asked not in (None, self.estimator):
            raise UsageError(
                f"--estimator {asked} does not go with a calibration whose ranges are "
                f"{self.estimator}: leave --estimator or --calibration out"
            )
        return self.estimator

    def for_graphs(self, sha256: Mapping[str, str]) -> "Calibration":
        """Return itself if it belongs to these graphs.

        Args:
            sha256: Of each tower's float32 ONNX file.

        Raises:
            IntegrityError: A graph is another one, or was not calibrated.
        """
        for tower, found in sorted(sha256.items()):
            if tower not in self.towers:
                raise IntegrityError(
                    f"the calibration has no {tower} tower, only {', '.join(sorted(self.towers))}: "
                    "calibrate again"
                )
            expected = self.towers[tower].graph_sha256
            if expected != found:
                raise IntegrityError(
                    f"the calibration belongs to another {tower} tower: expected the fp32 graph "
                    f"with SHA-256 {expected[:12]}..., found {found[:12]}...; calibrate again"
                )
        return self

    def to_json(self) -> str:
        """Return the text of the file."""
        content = {
            "schema_version": SCHEMA_VERSION,
            "estimator": self.estimator,
            "samples": {
                "images": {
                    "source": self.samples.image_source,
                    "sha256": list(self.samples.images),
                },
                "texts": {"source": self.samples.text_source, "sha256": list(self.samples.texts)},
            },
            "towers": {name: _tower_json(tower) for name, tower in sorted(self.towers.items())},
        }
        return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write the file, whole or not at all. Raises InputError where it cannot be written."""
    write_atomically(path, calibration.to_json())


def read_calibration(path: Path) -> Calibration:
    """Read a file that `write_calibration` wrote.

    Raises:
        InputError: It cannot be read, or a field is missing, unknown or of another type.
    """
    try:
        content = json.loads(path.read_text("utf-8"), parse_constant=_refuse_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"cannot read calibration {path}: {error}") from error
    fields = {"schema_version", "estimator", "samples", "towers"}
    top = StrictObject(content, f"{path.name}:", fields)
    if (version := top.count("schema_version")) != SCHEMA_VERSION:
        raise InputError(
            f"{path}: expected schema version {SCHEMA_VERSION}, found {version}: calibrate again"
        )
    estimator = top.text("estimator")
    if estimator not in ESTIMATORS:
        raise top.error("estimator", f"unknown '{estimator}', {suggestion(estimator, ESTIMATORS)}")
    samples = top.object("samples", {"images", "texts"})
    image_source, images = _read_samples(samples, "images")
    text_source, texts = _read_samples(samples, "texts")
    towers = top.object("towers", {"image", "text"})
    return Calibration(
        samples=Samples(
            image_source=image_source, images=images, text_source=text_source, texts=texts
        ),
        estimator=estimator,
        towers={name: _read_tower(towers, name) for name in sorted(towers.content)},
    )


def six_digits(values: Mapping[str, float]) -> dict[str, float]:
    """Round as the file does, so that what is built from fresh ranges and from a file is equal."""
    return {name: _rounded(value) for name, value in values.items()}


def _tower_json(tower: TowerCalibration) -> dict[str, Any]:
    return {
        "graph_sha256": tower.graph_sha256,
        "forms": {
            form: {
                name: dict(sorted(six_digits(values).items()))
                for name, values in asdict(ranges).items()
            }
            for form, ranges in sorted(tower.forms.items())
        },
        "smoothing": {
            site: {
                "alpha": smoothing.alpha,
                "error_before": _rounded(smoothing.error_before),
                "error_after": _rounded(smoothing.error_after),
                # One line, so that a site that differs is one line of a difference.
                "log2_factors_in_eighths": " ".join(map(str, smoothing.exponents.tolist())),
            }
            for site, smoothing in sorted(tower.smoothing.items())
        },
        "damage": [
            {
                key: _rounded(value) if isinstance(value, float) else value
                for key, value in asdict(layer).items()
            }
            for layer in tower.damage
        ],
    }


def _read_tower(towers: StrictObject, name: str) -> TowerCalibration:
    tower = towers.object(name, {"graph_sha256", "forms", "smoothing", "damage"})
    forms, smoothing = tower.object("forms", FORMS), tower.object("smoothing")
    return TowerCalibration(
        graph_sha256=tower.text("graph_sha256"),
        forms={form: _read_form(forms, form) for form in FORMS if form in forms.content},
        smoothing={site: _read_smoothing(smoothing, site) for site in smoothing.content},
        damage=tuple(_read_damage(item, tower.path) for item in _items(tower, "damage")),
    )


def _read_form(forms: StrictObject, form: Form) -> FormRanges:
    entry = forms.object(form, FormRanges.__dataclass_fields__)
    ranges = {name: _ranges(entry.object(name)) for name in FormRanges.__dataclass_fields__}
    if different := sorted(ranges["amax"].keys() ^ ranges["largest"].keys()):
        raise entry.error("amax", f"'{different[0]}' and 'largest' name not the same tensors")
    return FormRanges(**ranges)


def _read_smoothing(sites: StrictObject, site: str) -> Smoothing:
    entry = sites.object(site, {"alpha", "error_before", "error_after", "log2_factors_in_eighths"})
    try:
        exponents = np.array([int(word) for word in entry.text("log2_factors_in_eighths").split()])
    except ValueError as error:
        raise entry.error("log2_factors_in_eighths", f"expected whole numbers: {error}") from error
    if not len(exponents):
        raise entry.error("log2_factors_in_eighths", "expected numbers, found none")
    if np.abs(exponents).max() > 100:
        raise entry.error("log2_factors_in_eighths", "expected numbers from -100 to 100")
    return Smoothing(
        alpha=None if entry.content.get("alpha", 0) is None else _finite(entry, "alpha"),
        exponents=exponents,
        error_before=_finite(entry, "error_before"),
        error_after=_finite(entry, "error_after"),
    )


def _read_damage(item: Any, path: str) -> LayerDamage:
    entry = StrictObject(
        item, f"{path}.damage", {"node", "order_loss", "overlap_loss", "cosine_loss"}
    )
    return LayerDamage(
        node=entry.text("node"),
        order_loss=_finite(entry, "order_loss"),
        overlap_loss=_finite(entry, "overlap_loss"),
        cosine_loss=_finite(entry, "cosine_loss"),
    )


def _finite(entry: StrictObject, key: str) -> float:
    value = entry.number(key)
    if not math.isfinite(value):  # Such as 1e999.
        raise entry.error(key, f"expected a finite number, found {value}")
    return value


def _ranges(values: StrictObject) -> dict[str, float]:
    ranges = {name: _finite(values, name) for name in values.content}
    for name, value in ranges.items():
        if value < 0:
            raise values.error(name, f"expected a range of at least 0, found {value}")
    return ranges


def _read_samples(samples: StrictObject, kind: str) -> tuple[str, tuple[str, ...]]:
    """Return source and hashes."""
    entry = samples.object(kind, {"source", "sha256"})
    hashes = _items(entry, "sha256")
    for value in hashes:
        if not isinstance(value, str) or not _SHA256.fullmatch(value):
            raise entry.error("sha256", f"expected SHA-256 hashes, found {value!r}")
    return entry.text("source"), tuple(sorted(hashes))


def _items(entry: StrictObject, key: str) -> list[Any]:
    value = entry.content.get(key)
    if not isinstance(value, list):
        raise entry.error(key, f"expected a list, found {type(value).__name__}")
    return value


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
