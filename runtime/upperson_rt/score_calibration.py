"""A calibration: what was fitted so that scores of a model become likelihoods, and on what.

An export fits one on the validation split and ships it in the bundle; ``upperson-rt calibrate``
writes one beside a gallery. No number of it stands in the code.

Shapes: N scores or pictures, D dimensions, R axes.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError
from upperson_rt.files import write_atomically
from upperson_rt.logistic import Logistic, probability
from upperson_rt.strict import Constraint, Positive, read_fields, read_json, require_version

SCHEMA_VERSION = 1
SCORES_FILE = "scores.json"
PICTURE_FEATURES, ANSWER_FEATURES = 12, 14
"""See `upperson_rt.search.features`."""
LIKELY = 0.5
"""Likelihood from which a hit or an answer is called likely."""
MatchLabel: TypeAlias = Literal["likely", "possible", "unlikely", ""]
"""Of a hit; empty where scores are not calibrated."""

_IS_BELOW_LIKELY = Constraint(lambda value: 0 <= value < LIKELY, f"a number, 0 to {LIKELY}")
_IS_SPREAD = Constraint(lambda value: value > 0, "a number above 0")
_Spread: TypeAlias = Annotated[float, _IS_SPREAD]


@dataclass(frozen=True, kw_only=True)
class Background:
    """Scores of background sentences, cosines."""

    middle: float
    spread: _Spread


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A logistic curve over standard deviations above background scores."""

    slope: float
    middle: float


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the pictures look like that the calibration was fitted on."""

    mean: tuple[float, ...]
    """(D,) their mean embedding."""
    axes: tuple[tuple[float, ...], ...]
    """(R, D) their principal axes, divided by the standard deviations along them."""
    threshold: _Spread
    """Squared distance of means from which pictures are unlike these."""

    def __post_init__(self) -> None:
        if not self.axes or any(len(axis) != len(self.mean) for axis in self.axes):
            raise InputError(
                f"expected axes of {len(self.mean)} numbers, as many as the mean has",
                code="axes_unfit",
            )

    def distance(self, vectors_ND: NDArray[np.float32]) -> float:
        """Return how far the mean of pictures is from that of the reference, squared."""
        apart_D = vectors_ND.mean(axis=0, dtype=np.float64) - np.array(self.mean)
        return float(np.square(np.array(self.axes) @ apart_D).sum())


@dataclass(frozen=True, kw_only=True)
class ScoreCalibration:
    """Everything that turns scores of one embedding space into likelihoods."""

    fingerprint: str
    """Of the embedding space, see `Manifest.fingerprint`."""
    created: str
    """ISO 8601, UTC."""
    generator: str
    version: Positive
    """1 as exported; each calibration of a site counts on."""
    fitted_on: dict[str, Any]
    """Source, people, pictures and queries; free JSON for people and reports."""
    held_out: dict[str, Any]
    """How reliable it was on people that were left out of the fit; free JSON."""
    background: Background
    picture: Logistic
    """Log-odds that a picture matches a sentence, see `SentenceFeatures.of_pictures`."""
    answer: Logistic
    """Log-odds that some picture matches, see `SentenceFeatures.of_answer`."""
    curves: dict[str, Curve]
    """By kind of query, ``sentence`` and ``picture``, where there are no phrases to compare."""
    nobody_below: Annotated[float, _IS_BELOW_LIKELY]
    """Likelihood of a result below which its verdict is `nobody`: at most 1 % of the queries with a
    match were below it."""
    reference: Reference
    schema_version: int = field(default=SCHEMA_VERSION)

    def __post_init__(self) -> None:
        for model, features in ((self.picture, PICTURE_FEATURES), (self.answer, ANSWER_FEATURES)):
            if len(model.middle) != features:
                raise InputError(
                    f"expected models of {PICTURE_FEATURES} and {ANSWER_FEATURES} features, found "
                    f"one of {len(model.middle)}",
                    code="features_unfit",
                )
        if {*self.curves} != {"sentence", "picture"}:
            raise InputError("expected the curves sentence and picture", code="curves_unfit")

    def likelihoods(
        self, picture_share: float, deviations_N: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return (N,) likelihoods by standard deviations above background scores alone."""
        own, other = self.curves["sentence"], self.curves["picture"]
        slope, middle = (
            (1 - picture_share) * getattr(own, name) + picture_share * getattr(other, name)
            for name in ("slope", "middle")
        )
        return probability(slope * (deviations_N - middle))

    def label(self, likelihood: float) -> MatchLabel:
        """Return the label of a hit."""
        if likelihood >= LIKELY:
            return "likely"
        return "possible" if likelihood >= self.nobody_below else "unlikely"

    def to_json(self) -> str:
        """Return the text of the file, which `read_score_calibration` reads back."""
        fields = asdict(self)
        ordered = {"schema_version": fields.pop("schema_version"), **fields}
        return json.dumps(_rounded(ordered), ensure_ascii=False, allow_nan=False) + "\n"


def read_score_calibration(path: str | os.PathLike[str], fingerprint: str) -> ScoreCalibration:
    """Read a calibration strictly.

    Raises:
        InputError: It cannot be read, is malformed, or is another model's.
    """
    where = os.fspath(path)
    content = read_json(path)
    update = "update with  pip install -U upperson-rt"
    require_version(content, where, range(1, SCHEMA_VERSION + 1), update)
    found = read_fields(ScoreCalibration, content, where)
    if found.fingerprint != fingerprint:
        raise InputError(
            f"{where} calibrates another model, {found.fingerprint[:19]}..., than this bundle's, "
            f"{fingerprint[:19]}...: make it again with  upperson-rt calibrate , or delete it",
            code="calibration_of_another_model",
            path=where,
        )
    return found


def site_calibration_file(location: str) -> Path | None:
    """Return where the calibration of a gallery lies; None if the gallery is no folder."""
    folder = Path(location)
    return folder / SCORES_FILE if folder.is_dir() else None


def site_calibration_stamp(location: str) -> tuple[int, ...] | None:
    """Return what differs once the calibration of a gallery was made again; None without one."""
    file = site_calibration_file(location)
    if file is None or not file.exists():
        return None
    found = file.stat()
    return found.st_ino, found.st_mtime_ns, found.st_size


def calibration_in_use(
    location: str, bundled: ScoreCalibration | None, fingerprint: str
) -> ScoreCalibration | None:
    """Return the calibration that searches of a gallery use: its own, else that of the bundle.

    Raises:
        InputError: The gallery's own cannot be used, see `read_score_calibration`.
    """
    site = site_calibration_file(location)
    if site is None or not site.exists():
        return bundled
    return read_score_calibration(site, fingerprint)


def write_score_calibration(path: Path, calibration: ScoreCalibration) -> None:
    """Write it as a whole or not at all, if `read_score_calibration` would read it."""
    text = calibration.to_json()
    read_fields(ScoreCalibration, json.loads(text), os.fspath(path))
    write_atomically(path, text)


def _rounded(value: Any) -> Any:
    """Return JSON with floats of 6 digits: the rest says nothing."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.6g}")
    return value
