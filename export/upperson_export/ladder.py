"""The ladder: per tower and variant, the smallest form whose retrieval accuracy is kept.

Where nobody says who is on the pictures, what is kept is the ranking: the first ten pictures that
float32 gives a sentence.

Towers climb alone first, each beside the other tower in float32. Then the chosen two are measured
together on every backend they are made for. While they lose too much on one of them, the tower
climbs on whose replacement by float32 leaves less of the loss there.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from upperson_export.variants import AS_RUN, EXACT, VARIANTS, Variant, VariantName
from upperson_rt.agreement import row_cosines, top_k_overlap
from upperson_rt.errors import AccuracyGateError, BackendError, IntegrityError
from upperson_rt.metrics import PerQueryMetrics, RetrievalMetrics, per_query_metrics
from upperson_rt.towers import TOWERS, Tower

MIN_OVERLAP = 90.0
"""Percent of float32's first ten pictures that a form must keep unless told otherwise. The demo's
model keeps 97.1 in int8, and its R@1 moves by 0.5 points."""

_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalSplit:
    """Images and captions: what accuracy is measured on."""

    name: str
    image_files: Sequence[Path]
    image_pids: npt.NDArray[np.int64] | None = None
    """Who is on each image. None, here and below, where nobody knows: rankings are compared."""

    captions: Sequence[str]
    caption_pids: npt.NDArray[np.int64] | None = None

    @property
    def has_identities(self) -> bool:
        """Whether it is known which images are right for a caption."""
        return self.image_pids is not None and self.caption_pids is not None


@dataclass(frozen=True, slots=True)
class Drop:
    """R@1 lost against a reference on the same queries, in points; negative is a gain."""

    points: float
    low: float
    """Lower end of the 95 % bootstrap interval."""

    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """How well two towers retrieve."""

    metrics: RetrievalMetrics | None
    """None where nobody knows who is on the pictures, as is `Compared.r1_drop`."""

    float_types: Mapping[Tower, str]
    """What the backend computed the floats of each form in, such as ``bf16``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared(Accuracy):
    """How well they retrieve beside float32, on the same queries."""

    r1_drop: Drop | None

    cosine: Mapping[str, float]
    """Quantiles of the cosine to float32: min, 1 % and median."""

    top10_overlap: float
    """Percent of the first ten pictures that are float32's, mean over captions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One form, or two together, against float32 on the same queries."""

    variant: VariantName
    tower: str
    """``image``, ``text``, or ``both``."""

    rung: str
    """As in `Variant.rungs`; for both, ``image rung + text rung``."""

    backend: str
    """What the files ran on; float32, which they are compared with, runs on ONNX Runtime."""

    accepted: bool
    accuracy: Compared | None
    """None if the form does not work at all."""

    failure: str | None = None
    """Why it does not work."""


class SplitEmbeds(NamedTuple):
    """What a form of a tower makes of the split."""

    rows: npt.NDArray[np.float32]
    """(items of the split, E), unit norm."""

    float_type: str
    """What the backend computed floats in, such as ``f32`` or ``bf16``."""


class EmbedSplit(Protocol):
    """Gives the embeddings of a form of a tower, measured on the built file."""

    def __call__(self, tower: Tower, variant: VariantName, rung: str, backend: str) -> SplitEmbeds:
        """Embed the split.

        Raises:
            BackendError: The form does not run there.
            IntegrityError: An embedding is not finite.
        """


def r1_drop(reference: PerQueryMetrics, candidate: PerQueryMetrics, seed: int = 0) -> Drop:
    """Compare R@1 query by query, with a paired bootstrap over queries."""
    lost = reference.hit_at(1).astype(np.int64) - candidate.hit_at(1).astype(np.int64)
    # Resampling queries only needs how often each of -1, 0, 1 is drawn.
    counts = np.array([(lost == value).sum() for value in (-1, 0, 1)])
    draws = np.random.default_rng(seed).multinomial(len(lost), counts / len(lost), size=_RESAMPLES)
    low, high = np.percentile((draws[:, 2] - draws[:, 0]) / len(lost), [2.5, 97.5])
    return Drop(100 * float(lost.mean()), 100 * float(low), 100 * float(high))


@dataclass(kw_only=True)
class Ladder:
    """Climbs for one bundle and keeps every measurement.

    Args:
        split: What accuracy is measured on.
        source: Gives embeddings.
        max_r1_drop: Most points of R@1 a form may lose, where identities are known.
        min_overlap: Least percent of float32's first ten pictures that it must keep, where not.
        int8_only: Forbid float towers as a last resort: AccuracyGateError instead.
        also_on: More backends that towers made for CPUs must keep their accuracy on.
    """

    split: RetrievalSplit
    source: EmbedSplit
    max_r1_drop: float
    min_overlap: float = MIN_OVERLAP
    int8_only: bool = False
    also_on: tuple[str, ...] = ()
    measured: list[Measured] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._exact = {tower: self.source(tower, EXACT, EXACT, AS_RUN).rows for tower in TOWERS}
        self.reference = self._metrics(self._exact)

    def climb(self, name: VariantName) -> dict[Tower, str]:
        """Return the rung of each tower.

        Raises:
            AccuracyGateError: No form that is allowed keeps the accuracy.
        """
        variant = VARIANTS[name]
        rungs = variant.own_rungs if self.int8_only and variant.int8 else variant.rungs
        chosen = {tower: self._climb_tower(tower, variant, rungs) for tower in TOWERS}
        while (refused := self._measure_both(variant, chosen)) is not None:
            movable = [tower for tower in TOWERS if chosen[tower] != rungs[-1]]
            if not movable:
                raise self._failure(variant, refused)
            tower = min(movable, key=lambda moved: self._lost_without(moved, chosen, refused))
            above = rungs[rungs.index(chosen[tower]) + 1 :]
            chosen[tower] = self._climb_tower(tower, variant, above)
        return chosen

    def accuracy(self, variant: VariantName, rungs: Mapping[Tower, str]) -> dict[str, Accuracy]:
        """Return what two towers that were climbed to do together, by backend."""
        if variant == EXACT:
            types = dict.fromkeys(TOWERS, "f32")
            metrics = None if self.reference is None else self.reference.mean()
            return {AS_RUN: Accuracy(metrics=metrics, float_types=types)}
        rung = _together(rungs)
        return {
            found.backend: found.accuracy
            for found in self.measured
            if (found.variant, found.tower, found.rung) == (variant, "both", rung)
            and found.accuracy is not None
        }

    def _climb_tower(self, tower: Tower, variant: Variant, rungs: Sequence[str]) -> str:
        for rung in rungs:
            found = self._measure({tower: rung}, variant, variant.measured_on)
            if found.accepted:
                return rung
        raise self._failure(variant, found)

    def _measure_both(self, variant: Variant, chosen: dict[Tower, str]) -> Measured | None:
        """Measure on each backend; return the first that is refused."""
        for backend in (variant.measured_on, *(self.also_on if variant.made_for == "cpu" else ())):
            found = self._measure(chosen, variant, backend)
            if not found.accepted:
                return found
        return None

    def _lost_without(self, tower: Tower, chosen: dict[Tower, str], refused: Measured) -> float:
        """Return what is still lost where a form was refused, without one tower."""
        others = {name: rung for name, rung in chosen.items() if name != tower}
        try:
            return self._lost(self._accuracy(others, refused.variant, refused.backend))
        except (BackendError, IntegrityError):
            return math.inf

    def _measure(self, forms: dict[Tower, str], variant: Variant, backend: str) -> Measured:
        """Measure forms of one tower or both; a tower that is not named is float32."""
        # Float32 is what the others are compared with: it is always a way out.
        is_exact = set(forms.values()) == {EXACT}
        accuracy, failure = None, None
        try:
            accuracy = self._accuracy(forms, variant.name, backend)
        except (BackendError, IntegrityError) as error:
            if is_exact:
                raise
            failure = str(error)
        kept = accuracy is not None and self._lost(accuracy) <= self._allowed
        measured = Measured(
            variant=variant.name,
            tower="both" if len(forms) == len(TOWERS) else next(iter(forms)),
            rung=_together(forms),
            backend=backend,
            accepted=kept or is_exact,
            accuracy=accuracy,
            failure=failure,
        )
        self.measured.append(measured)
        return measured

    def _accuracy(self, forms: dict[Tower, str], variant: VariantName, backend: str) -> Compared:
        embeds, float_types = self._embeds(forms, variant, backend)
        metrics = self._metrics(embeds)
        cosine = [row_cosines(self._exact[name], embeds[name]) for name in forms]
        low, one, half = np.quantile(np.concatenate(cosine), [0.0, 0.01, 0.5])
        return Compared(
            metrics=None if metrics is None else metrics.mean(),
            float_types=float_types,
            r1_drop=None if metrics is None else self._r1_drop(metrics),
            cosine={"min": float(low), "1 %": float(one), "median": float(half)},
            top10_overlap=100 * _mean_overlap(self._exact, embeds),
        )

    def _r1_drop(self, metrics: PerQueryMetrics) -> Drop:
        assert self.reference is not None  # Measured on the same split.
        return r1_drop(self.reference, metrics)

    @property
    def _allowed(self) -> float:
        """Most that a form may lose."""
        return self.max_r1_drop if self.split.has_identities else 100 - self.min_overlap

    @staticmethod
    def _lost(accuracy: Compared) -> float:
        """Return points of R@1 or, where nobody knows who is right, percent of the first ten."""
        found = accuracy.r1_drop
        return 100 - accuracy.top10_overlap if found is None else found.points

    def _embeds(
        self, forms: dict[Tower, str], variant: VariantName, backend: str
    ) -> tuple[dict[Tower, npt.NDArray[np.float32]], dict[Tower, str]]:
        """Return rows, of float32 where no form is named, and float types of the forms."""
        found = {tower: self.source(tower, variant, rung, backend) for tower, rung in forms.items()}
        rows = {**self._exact, **{tower: embeds.rows for tower, embeds in found.items()}}
        return rows, {tower: embeds.float_type for tower, embeds in found.items()}

    def _metrics(self, embeds: Mapping[Tower, npt.NDArray[np.float32]]) -> PerQueryMetrics | None:
        caption_pids, image_pids = self.split.caption_pids, self.split.image_pids
        if caption_pids is None or image_pids is None:
            return None
        return per_query_metrics(embeds["text"], embeds["image"], caption_pids, image_pids)

    def _failure(self, variant: Variant, last: Measured) -> AccuracyGateError:
        where = f"{last.tower}: {last.rung}, on {last.backend}"
        option = "raise --max-r1-drop" if self.split.has_identities else "lower --min-overlap"
        if last.accuracy is None:
            problem = f"{variant.name} does not work ({where}: {last.failure})"
        elif last.accuracy.r1_drop is None:
            problem = (
                f"{variant.name} keeps {last.accuracy.top10_overlap:.1f} % of the first ten "
                f"pictures ({where}), less than the {self.min_overlap} required"
            )
        else:
            problem = (
                f"{variant.name} loses {last.accuracy.r1_drop.points:.2f} points of R@1 ({where}), "
                f"more than the {self.max_r1_drop} allowed"
            )
        return AccuracyGateError(
            f"{problem}, and no safer form is left: {option}, allow float towers "
            "(--precision auto), or calibrate with more samples"
        )


def _together(rungs: Mapping[Tower, str]) -> str:
    return " + ".join(rungs[tower] for tower in TOWERS if tower in rungs)


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
