"""``calibration.json``: what calibration found, to read, to compare and to use again.

It belongs to the float32 graphs it was made from. Numbers are rounded to six digits, so that two
files differ where calibrations do, and everything that is a set is sorted.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from upperson_calibration.estimators import ESTIMATORS, Estimator
from upperson_calibration.samples import CalibrationSet
from upperson_calibration.sensitivity import LayerDamage
from upperson_calibration.smoothing import Smoothing
from upperson_rt._strict_json import StrictObject, suggestion
from upperson_rt.atomic import write_atomically
from upperson_rt.errors import InputError, IntegrityError

SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """Which samples set the ranges."""

    source: str
    images: tuple[str, ...]
    """SHA-256 of each picture's pixels at the model's size."""

    texts: tuple[str, ...]
    """SHA-256 of each caption's ids."""

    @classmethod
    def of(cls, calibration: CalibrationSet) -> "Samples":
        """Record a set, sorted by hash."""
        return cls(
            source=calibration.source,
            images=tuple(sorted(calibration.image_sha256)),
            texts=tuple(sorted(calibration.text_sha256)),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerCalibration:
    """What was found for one tower."""

    graph_sha256: str
    """Of the float32 ONNX file before smoothing."""

    estimator: Estimator
    amax: Mapping[str, float]
    """Range by activation tensor, after smoothing."""

    largest: Mapping[str, float]
    """Largest absolute value seen, by the same names: a range below it saturates."""

    smoothing: Mapping[str, Smoothing] = field(default_factory=dict)
    """By site; empty if there is none."""

    damage: tuple[LayerDamage, ...] = ()
    """Most harmful first; empty if it was not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The content of a calibration file."""

    samples: Samples
    towers: Mapping[str, TowerCalibration]
    """By ``image`` and ``text``."""

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
            "samples": {
                "source": self.samples.source,
                "images": list(self.samples.images),
                "texts": list(self.samples.texts),
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
    top = StrictObject(content, f"{path.name}:", {"schema_version", "samples", "towers"})
    if (version := top.count("schema_version")) != SCHEMA_VERSION:
        raise InputError(
            f"{path}: expected schema version {SCHEMA_VERSION}, found {version}: calibrate again"
        )
    samples = top.object("samples", {"source", "images", "texts"})
    towers = top.object("towers", {"image", "text"})
    return Calibration(
        samples=Samples(
            source=samples.text("source"),
            images=_hashes(samples, "images"),
            texts=_hashes(samples, "texts"),
        ),
        towers={name: _read_tower(towers, name) for name in sorted(towers.content)},
    )


def _tower_json(tower: TowerCalibration) -> dict[str, Any]:
    return {
        "graph_sha256": tower.graph_sha256,
        "estimator": tower.estimator,
        "amax": {name: _rounded(value) for name, value in sorted(tower.amax.items())},
        "largest": {name: _rounded(value) for name, value in sorted(tower.largest.items())},
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
    fields = {"graph_sha256", "estimator", "amax", "largest", "smoothing", "damage"}
    tower = towers.object(name, fields)
    estimator = tower.text("estimator")
    if estimator not in ESTIMATORS:
        raise tower.error(
            "estimator", f"unknown '{estimator}', {suggestion(estimator, ESTIMATORS)}"
        )
    smoothing = tower.object("smoothing")
    amax, largest = _ranges(tower.object("amax")), _ranges(tower.object("largest"))
    if different := sorted(amax.keys() ^ largest.keys()):
        raise tower.error("amax", f"'{different[0]}' and 'largest' name not the same tensors")
    return TowerCalibration(
        graph_sha256=tower.text("graph_sha256"),
        estimator=estimator,
        amax=amax,
        largest=largest,
        smoothing={site: _read_smoothing(smoothing, site) for site in smoothing.content},
        damage=tuple(_read_damage(item, tower.path) for item in _items(tower, "damage")),
    )


def _read_smoothing(sites: StrictObject, site: str) -> Smoothing:
    entry = sites.object(site, {"alpha", "error_before", "error_after", "log2_factors_in_eighths"})
    try:
        exponents = np.array([int(word) for word in entry.text("log2_factors_in_eighths").split()])
    except ValueError as error:
        raise entry.error("log2_factors_in_eighths", f"expected whole numbers: {error}") from error
    if np.abs(exponents).max() > 100:
        raise entry.error("log2_factors_in_eighths", "expected numbers from -100 to 100")
    return Smoothing(
        alpha=None if entry.content.get("alpha") is None else entry.number("alpha"),
        exponents=exponents,
        error_before=entry.number("error_before"),
        error_after=entry.number("error_after"),
    )


def _read_damage(item: Any, path: str) -> LayerDamage:
    entry = StrictObject(
        item, f"{path}.damage", {"node", "order_loss", "overlap_loss", "cosine_loss"}
    )
    return LayerDamage(
        node=entry.text("node"),
        order_loss=entry.number("order_loss"),
        overlap_loss=entry.number("overlap_loss"),
        cosine_loss=entry.number("cosine_loss"),
    )


def _ranges(values: StrictObject) -> dict[str, float]:
    ranges = {name: values.number(name) for name in values.content}
    for name, value in ranges.items():
        if not 0 <= value < np.inf:
            raise values.error(name, f"expected a range of at least 0, found {value}")
    return ranges


def _hashes(samples: StrictObject, key: str) -> tuple[str, ...]:
    hashes = _items(samples, key)
    for value in hashes:
        if not isinstance(value, str) or len(value) != 64:
            raise samples.error(key, f"expected SHA-256 hashes, found {value!r}")
    return tuple(hashes)


def _items(entry: StrictObject, key: str) -> list[Any]:
    value = entry.content.get(key)
    if not isinstance(value, list):
        raise entry.error(key, f"expected a list, found {type(value).__name__}")
    return value


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
