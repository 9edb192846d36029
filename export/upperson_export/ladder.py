"""The ladder: per tower and variant, the smallest form whose retrieval accuracy is kept.

Towers climb alone first, each beside the other tower in float32. Then the chosen two are measured
together on every backend they are made for. While they lose too much on one of them, the tower
climbs on whose replacement by float32 leaves less of the loss there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from upperson_export.accuracy import Drop, RetrievalSplit, r1_drop
from upperson_export.candidates import INT8_RUNGS, RUNGS
from upperson_export.variants import Variant
from upperson_rt.agreement import row_cosines, top_k_overlap
from upperson_rt.errors import AccuracyGateError, BackendError, IntegrityError
from upperson_rt.metrics import PerQueryMetrics, per_query_metrics
from upperson_rt.towers import TOWERS, Tower

REFERENCE = "onnxruntime"
"""The backend of float32, and the one that towers climb on alone."""

SIMULATED = "onnxruntime, float16 simulated"
"""For typed variants: a CPU computes them in float32, which would hide what float16 does."""


class Embeds(NamedTuple):
    """What a form of a tower makes of the split."""

    rows: npt.NDArray[np.float32]
    """(items of the split, E), unit norm."""

    float_type: str
    """What the backend computed floats in, such as ``f32`` or ``bf16``."""


class Source(Protocol):
    """Gives the embeddings of a form of a tower, measured on the built file."""

    def __call__(self, tower: Tower, variant: Variant, rung: str, backend: str) -> Embeds:
        """Embed the split.

        Raises:
            BackendError: The form does not run there.
            IntegrityError: An embedding is not finite.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One form, or two together, against float32 on the same queries."""

    variant: Variant
    tower: str
    """``image``, ``text``, or ``both``."""

    rung: str
    """As in `RUNGS`; for both, ``image rung + text rung``."""

    backend: str
    """What the files ran on; float32, which they are compared with, runs on ONNX Runtime."""

    accepted: bool

    float_types: dict[Tower, str]
    """What the backend computed the floats of each form in; empty if it does not work at all."""

    metrics: PerQueryMetrics | None
    """None if the form does not work at all; then the three below are None, too."""

    drop: Drop | None

    cosine: dict[str, float] | None
    """Quantiles of the cosine to float32: min, 1 % and median."""

    top10_overlap: float | None
    """Percent of the first ten pictures that are float32's, mean over captions."""

    failure: str | None = None
    """Why it does not work at all."""

    def as_dict(self) -> dict[str, Any]:
        """Return what a report stores."""
        return {
            "variant": self.variant,
            "tower": self.tower,
            "rung": self.rung,
            "backend": self.backend,
            "float_types": self.float_types,
            "metrics": self.metrics and self.metrics.mean().as_dict(),
            "r1_drop": self.drop and self.drop.as_dict(),
            "cosine": self.cosine,
            "top10_overlap": self.top10_overlap,
            "accepted": self.accepted,
            "failure": self.failure,
        }


@dataclass(kw_only=True)
class Ladder:
    """Climbs for one bundle and keeps every measurement.

    Args:
        split: What accuracy is measured on.
        source: Gives embeddings.
        max_r1_drop: Most points of R@1 a form may lose.
        int8_only: Forbid float towers as a last resort: AccuracyGateError instead.
        also_on: More backends that the chosen towers of ``int8`` must keep their accuracy on;
            typed variants are made for GPUs.
    """

    split: RetrievalSplit
    source: Source
    max_r1_drop: float
    int8_only: bool = False
    also_on: tuple[str, ...] = ()
    measured: list[Measured] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._exact = {
            tower: self.source(tower, "fp32", "fp32", REFERENCE).rows for tower in TOWERS
        }
        self.reference = self._metrics(self._exact["image"], self._exact["text"])

    def climb(self, variant: Variant) -> dict[Tower, str]:
        """Return the rung of each tower.

        Raises:
            AccuracyGateError: No form that is allowed keeps the accuracy.
        """
        rungs = RUNGS[variant]
        if self.int8_only and variant.startswith("int8"):
            rungs = INT8_RUNGS
        chosen = {tower: self._climb_tower(tower, variant, rungs) for tower in TOWERS}
        while (refused := self._measure_both(variant, chosen)) is not None:
            movable = [tower for tower in TOWERS if chosen[tower] != rungs[-1]]
            if not movable:
                raise self._failure(variant, refused)
            tower = min(movable, key=lambda name: self._lost_without(name, chosen, refused))
            above = rungs[rungs.index(chosen[tower]) + 1 :]
            chosen[tower] = self._climb_tower(tower, variant, above)
        return chosen

    def _climb_tower(self, tower: Tower, variant: Variant, rungs: Sequence[str]) -> str:
        for rung in rungs:
            found = self._measure({tower: rung}, variant, backend_of(variant))
            if found.accepted:
                return rung
        raise self._failure(variant, found)

    def _measure_both(self, variant: Variant, chosen: dict[Tower, str]) -> Measured | None:
        """Measure on each backend; return the first that is refused."""
        for backend in (backend_of(variant), *(self.also_on if variant == "int8" else ())):
            found = self._measure(chosen, variant, backend)
            if not found.accepted:
                return found
        return None

    def _lost_without(self, tower: Tower, chosen: dict[Tower, str], refused: Measured) -> float:
        """Return the points that are still lost where a form was refused, without one tower."""
        others = {name: rung for name, rung in chosen.items() if name != tower}
        try:
            embeds, _ = self._embeds(others, refused.variant, refused.backend)
        except (BackendError, IntegrityError):
            return math.inf
        return r1_drop(self.reference, self._metrics(embeds["image"], embeds["text"])).points

    def _measure(self, forms: dict[Tower, str], variant: Variant, backend: str) -> Measured:
        """Measure forms of one tower or both; a tower that is not named is float32."""
        rung = " + ".join(forms[tower] for tower in TOWERS if tower in forms)
        tower = "both" if len(forms) == len(TOWERS) else next(iter(forms))
        all_float = set(forms.values()) == {"fp32"}
        try:
            embeds, float_types = self._embeds(forms, variant, backend)
        except (BackendError, IntegrityError) as error:
            if all_float:
                raise
            measured = Measured(
                variant=variant, tower=tower, rung=rung, backend=backend, accepted=False,
                float_types={}, metrics=None, drop=None, cosine=None, top10_overlap=None,
                failure=str(error),
            )  # fmt: skip
        else:
            metrics = self._metrics(embeds["image"], embeds["text"])
            drop = r1_drop(self.reference, metrics)
            cosine = [row_cosines(self._exact[name], embeds[name]) for name in forms]
            low, one, half = np.quantile(np.concatenate(cosine), [0.0, 0.01, 0.5])
            measured = Measured(
                variant=variant,
                tower=tower,
                rung=rung,
                backend=backend,
                # Float32 is what the others are compared with: it is always a way out.
                accepted=drop.points <= self.max_r1_drop or all_float,
                float_types=float_types,
                metrics=metrics,
                drop=drop,
                cosine={"min": float(low), "1 %": float(one), "median": float(half)},
                top10_overlap=100 * _mean_overlap(self._exact, embeds),
            )
        self.measured.append(measured)
        return measured

    def _embeds(
        self, forms: dict[Tower, str], variant: Variant, backend: str
    ) -> tuple[dict[Tower, npt.NDArray[np.float32]], dict[Tower, str]]:
        """Return rows, of float32 where no form is named, and float types of the forms."""
        found = {tower: self.source(tower, variant, rung, backend) for tower, rung in forms.items()}
        rows = {**self._exact, **{tower: embeds.rows for tower, embeds in found.items()}}
        return rows, {tower: embeds.float_type for tower, embeds in found.items()}

    def _metrics(
        self, image_GE: npt.NDArray[np.float32], text_QE: npt.NDArray[np.float32]
    ) -> PerQueryMetrics:
        return per_query_metrics(text_QE, image_GE, self.split.caption_pids, self.split.image_pids)

    def _failure(self, variant: Variant, last: Measured) -> AccuracyGateError:
        where = f"{last.tower}: {last.rung}, on {last.backend}"
        if last.drop is None:
            problem = f"{variant} does not work ({where}: {last.failure})"
        else:
            problem = (
                f"{variant} loses {last.drop.points:.2f} points of R@1 ({where}), more than the "
                f"{self.max_r1_drop} allowed"
            )
        return AccuracyGateError(
            f"{problem}, and no safer form is left: raise --max-r1-drop, allow float towers "
            "(--precision auto), or calibrate with more samples"
        )


def backend_of(variant: Variant) -> str:
    """Return what a variant's towers are measured on first."""
    return SIMULATED if "fp16" in variant else REFERENCE


def _mean_overlap(
    exact: dict[Tower, npt.NDArray[np.float32]], found: dict[Tower, npt.NDArray[np.float32]]
) -> float:
    """Return the part of the first ten pictures that both name, mean over captions."""
    overlaps = []
    for start in range(0, len(exact["text"]), 512):
        exact_QG, found_QG = (
            rows["text"][start : start + 512] @ rows["image"].T for rows in (exact, found)
        )
        overlaps.append(top_k_overlap(exact_QG, found_QG))
    return float(np.concatenate(overlaps).mean())
