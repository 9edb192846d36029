"""``calibration.json``: the result of a calibration, to read, to compare and to use again.

It belongs to the float32 graphs it was made from. Numbers are rounded to six digits and sets are
sorted, so that two files differ only where calibrations do. The classes here are the layout of the
file: a field is a key.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_args

from upperson_calibration.ranges import Estimator
from upperson_calibration.samples import CalibrationSet
from upperson_calibration.sensitivity import LayerSensitivity
from upperson_calibration.smoothing import Smoothing
from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.files import write_atomically
from upperson_rt.printable import safe_repr
from upperson_rt.strict import (
    Constraint,
    Sha256,
    read_fields,
    read_json,
    require_version,
    suggestion,
)
from upperson_rt.towers import TOWERS

SCHEMA_VERSION = 2

Smoothness: TypeAlias = Literal["plain", "smoothed"]
"""A tower as it was folded, or with activation outliers moved into its weights."""

Range: TypeAlias = Annotated[float, Constraint(lambda value: value >= 0, "a range of at least 0")]


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleHashes:
    """The pictures, or the captions, that set the ranges."""

    source: str
    sha256: tuple[Sha256, ...]
    """One for each picture's pixels at the model's size, or each caption's ids; sorted."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "sha256", tuple(sorted(self.sha256)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Samples:
    """The samples that set the ranges."""

    images: SampleHashes
    texts: SampleHashes

    @classmethod
    def of(cls, found: CalibrationSet) -> "Samples":
        """Record a set."""
        return cls(
            images=SampleHashes(source=found.image_source, sha256=tuple(found.image_sha256)),
            texts=SampleHashes(source=found.text_source, sha256=tuple(found.text_sha256)),
        )

    @property
    def sha256(self) -> str:
        """Hash over all samples, in any order."""
        hashes = [*self.images.sha256, "", *self.texts.sha256]
        return hashlib.sha256("\n".join(hashes).encode()).hexdigest()

    def same_as(self, calibration: CalibrationSet) -> bool:
        """Whether a set has these samples, of any source."""
        return self.sha256 == Samples.of(calibration).sha256

    def describe(self) -> dict[str, Any]:
        """Return the record for manifest and report."""
        return {
            "images": len(self.images.sha256),
            "image_source": self.images.source,
            "texts": len(self.texts.sha256),
            "text_source": self.texts.source,
            "sha256": self.sha256,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranges:
    """Ranges of a tower's tensors, by name; empty if they were not measured."""

    amax: Mapping[str, Range]
    """Range of each activation that enters a block Linear."""
    largest: Mapping[str, Range]
    """Largest absolute value, by the same names: a smaller range saturates."""
    largest_anywhere: Mapping[str, Range]
    """Largest absolute value of every computed float tensor, for float16."""

    def __post_init__(self) -> None:
        if different := sorted(self.amax.keys() ^ self.largest.keys()):
            raise InputError(
                f"amax: {safe_repr(different[0])} and 'largest' name not the same tensors"
            )


NO_RANGES = Ranges(amax={}, largest={}, largest_anywhere={})


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerCalibration:
    """The calibration of one tower."""

    graph_sha256: str
    """Hash of the float32 ONNX file before smoothing."""
    forms: Mapping[Smoothness, Ranges]
    """Ranges of the plain and the smoothed tower, if measured."""
    smoothing: Mapping[str, Smoothing]
    """By site; empty if it was not chosen."""
    damage: tuple[LayerSensitivity, ...]
    """Layer sensitivity, most sensitive first; empty if it was not measured."""

    def __post_init__(self) -> None:
        _require_known(self.forms, get_args(Smoothness), "forms")


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """The content of a calibration file."""

    estimator: Estimator
    samples: Samples
    towers: Mapping[str, TowerCalibration]

    def __post_init__(self) -> None:
        _require_known(self.towers, TOWERS, "towers")

    @property
    def sha256(self) -> str:
        """Hash of what `to_json` writes."""
        return hashlib.sha256(self.to_json().encode("utf-8")).hexdigest()

    def require_estimator(self, wanted: Estimator | None) -> Estimator:
        """Return its estimator; raise UsageError if another one is wanted."""
        if wanted not in (None, self.estimator):
            raise UsageError(
                f"--estimator {wanted} does not go with a calibration whose ranges are "
                f"{self.estimator}: leave --estimator or --calibration out",
                code="estimator_differs",
                expected=self.estimator,
                found=wanted,
            )
        return self.estimator

    def for_graphs(self, sha256: Mapping[str, str]) -> "Calibration":
        """Return itself if it belongs to these float32 ONNX files.

        Raises:
            IntegrityError: A graph is another one, or was not calibrated.
        """
        for tower, found in sorted(sha256.items()):
            if tower not in self.towers:
                raise IntegrityError(
                    f"the calibration has no {tower} tower, only {', '.join(sorted(self.towers))}: "
                    "calibrate again",
                    code="tower_not_calibrated",
                    tower=tower,
                )
            expected = self.towers[tower].graph_sha256
            if expected != found:
                raise IntegrityError(
                    f"the calibration belongs to another {tower} tower: expected the fp32 graph "
                    f"with SHA-256 {expected[:12]}..., found {found[:12]}...; calibrate again",
                    code="calibration_of_other_model",
                    tower=tower,
                )
        return self

    def to_json(self) -> str:
        """Return the text of the file."""
        content = {"schema_version": SCHEMA_VERSION, **_as_json(self)}
        return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def write_calibration(path: Path, calibration: Calibration) -> None:
    """Write the file, whole or not at all.

    Raises:
        InputError: It cannot be written, or a value is not finite.
    """
    try:
        text = calibration.to_json()
    except ValueError as error:  # JSON has no NaN and no infinity.
        raise InputError(
            "the calibration measured values that are not finite: the weights are so large that "
            "sums overflow; export another run",
            code="calibration_not_finite",
        ) from error
    write_atomically(path, text)


def read_calibration(path: Path) -> Calibration:
    """Read a file that `write_calibration` wrote.

    Raises:
        InputError: It cannot be read, or a field is missing, unknown or of another type.
    """
    content = read_json(path)
    require_version(content, path.name, [SCHEMA_VERSION], "calibrate again")
    rest = {key: value for key, value in content.items() if key != "schema_version"}
    return read_fields(Calibration, rest, path.name)


def six_digits(values: Mapping[str, float]) -> dict[str, float]:
    """Round as the file does, so that what is built from fresh ranges and from a file is equal."""
    return {name: _rounded(value) for name, value in values.items()}


def _as_json(value: Any) -> Any:
    if is_dataclass(value):
        return {field.name: _as_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: _as_json(value[name]) for name in sorted(value)}
    if isinstance(value, tuple):
        return [_as_json(item) for item in value]
    return _rounded(value) if isinstance(value, float) else value


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _require_known(names: Collection[str], known: Collection[str], where: str) -> None:
    for name in names:
        if name not in known:
            raise InputError(f"{where}: unknown key {safe_repr(name)}, {suggestion(name, known)}")
