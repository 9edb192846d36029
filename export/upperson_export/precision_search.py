"""Precision search: the smallest candidate of each tower and variant that keeps its accuracy.

Accuracy is R@1. Where identities are unknown, it is the overlap of the first ten pictures with
those of float32.

First each tower is searched alone, beside the other tower in float32. Then the two accepted
candidates are measured together, on every backend that they are made for. While they lose too much
on one of them, the search goes on for the tower whose replacement by float32 leaves less of that
loss.
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
"""Default for the overlap of the first ten pictures with those of float32, in percent. The demo's
model keeps 97.1 in int8, and its R@1 moves by 0.5 points."""

_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalSplit:
    """Images and captions: what accuracy is measured on."""

    name: str
    image_files: Sequence[Path]
    image_pids: npt.NDArray[np.int64] | None = None
    """Identity of each image. None, here and below, if unknown: rankings are compared."""
    captions: Sequence[str]
    caption_pids: npt.NDArray[np.int64] | None = None

    @property
    def has_identities(self) -> bool:
        """Whether it is known which images match a caption."""
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
    """Retrieval accuracy of two towers."""

    metrics: RetrievalMetrics | None
    """None if identities are unknown, as is `Compared.r1_drop`."""
    float_types: Mapping[Tower, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared(Accuracy):
    """Accuracy compared with float32, on the same queries."""

    r1_drop: Drop | None
    cosine: Mapping[str, float]
    """Quantiles of the cosine to float32: min, 1 % and median."""
    top10_overlap: float
    """Percent of float32's first ten pictures that are kept, mean over captions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One candidate, or two together, against float32 on the same queries."""

    variant: VariantName
    tower: str
    """``image``, ``text``, or ``both``."""
    candidate: str
    """As in `Variant.candidates`; for both towers ``image candidate + text candidate``."""
    backend: str
    """The backend of the candidate; the float32 towers run on ONNX Runtime."""
    accepted: bool
    accuracy: Compared | None
    """None if the candidate does not run."""
    failure: str | None = None


class SplitEmbeds(NamedTuple):
    """Embeddings of the split by a candidate."""

    rows: npt.NDArray[np.float32]
    """(items of the split, E), unit norm."""
    float_type: str


class EmbedSplit(Protocol):
    """Embeds the split with the file of a candidate."""

    def __call__(
        self, tower: Tower, variant: VariantName, candidate: str, backend: str
    ) -> SplitEmbeds:
        """Embed the split."""


def r1_drop(reference: PerQueryMetrics, candidate: PerQueryMetrics, seed: int = 0) -> Drop:
    """Compare R@1 query by query, with a paired bootstrap over queries."""
    lost = reference.hit_at(1).astype(np.int64) - candidate.hit_at(1).astype(np.int64)
    # Resampling queries only needs how often each of -1, 0, 1 is drawn.
    counts = np.array([(lost == value).sum() for value in (-1, 0, 1)])
    draws = np.random.default_rng(seed).multinomial(len(lost), counts / len(lost), size=_RESAMPLES)
    low, high = np.percentile((draws[:, 2] - draws[:, 0]) / len(lost), [2.5, 97.5])
    return Drop(100 * float(lost.mean()), 100 * float(low), 100 * float(high))


@dataclass(kw_only=True)
class PrecisionSearch:
    """Searches the candidates of one bundle and keeps every measurement.

    The limits are those of `upperson_export.bundle.ExportOptions`.
    """

    split: RetrievalSplit
    source: EmbedSplit
    max_r1_drop: float
    min_overlap: float = MIN_OVERLAP
    int8_only: bool = False
    also_on: tuple[str, ...] = ()
    """Further backends on which towers made for CPUs must keep their accuracy."""
    measured: list[Measured] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._exact = {tower: self.source(tower, EXACT, EXACT, AS_RUN).rows for tower in TOWERS}
        self.reference = self._metrics(self._exact)

    def run(self, name: VariantName) -> dict[Tower, str]:
        """Return the accepted candidate of each tower.

        Raises:
            AccuracyGateError: No candidate that is allowed keeps the accuracy.
        """
        variant = VARIANTS[name]
        only_own = self.int8_only and variant.int8
        candidates = variant.own_candidates if only_own else variant.candidates
        accepted = {tower: self._search_tower(tower, variant, candidates) for tower in TOWERS}
        while (refused := self._measure_both(variant, accepted)) is not None:
            movable = [tower for tower in TOWERS if accepted[tower] != candidates[-1]]
            if not movable:
                raise self._failure(variant, refused)
            tower = min(movable, key=lambda moved: self._lost_without(moved, accepted, refused))
            safer = candidates[candidates.index(accepted[tower]) + 1 :]
            accepted[tower] = self._search_tower(tower, variant, safer)
        return accepted

    def accuracy(self, variant: VariantName, accepted: Mapping[Tower, str]) -> dict[str, Accuracy]:
        """Return the accuracy of two accepted candidates together, by backend."""
        if variant == EXACT:
            types = dict.fromkeys(TOWERS, "f32")
            metrics = None if self.reference is None else self.reference.mean()
            return {AS_RUN: Accuracy(metrics=metrics, float_types=types)}
        candidate = _together(accepted)
        return {
            found.backend: found.accuracy
            for found in self.measured
            if (found.variant, found.tower, found.candidate) == (variant, "both", candidate)
            and found.accuracy is not None
        }

    def _search_tower(self, tower: Tower, variant: Variant, candidates: Sequence[str]) -> str:
        for candidate in candidates:
            found = self._measure({tower: candidate}, variant, variant.measured_on)
            if found.accepted:
                return candidate
        raise self._failure(variant, found)

    def _measure_both(self, variant: Variant, accepted: dict[Tower, str]) -> Measured | None:
        """Measure on each backend; return the first measurement that is refused."""
        for backend in (variant.measured_on, *(self.also_on if variant.made_for == "cpu" else ())):
            found = self._measure(accepted, variant, backend)
            if not found.accepted:
                return found
        return None

    def _lost_without(self, tower: Tower, accepted: dict[Tower, str], refused: Measured) -> float:
        """Return what is still lost, on the backend that refused, with one tower in float32."""
        others = {name: candidate for name, candidate in accepted.items() if name != tower}
        try:
            return self._lost(self._accuracy(others, refused.variant, refused.backend))
        except (BackendError, IntegrityError):
            return math.inf

    def _measure(self, candidates: dict[Tower, str], variant: Variant, backend: str) -> Measured:
        """Measure candidates of one tower or both; a tower that is not named is float32."""
        is_exact = set(candidates.values()) == {EXACT}  # The reference, always accepted.
        accuracy, failure = None, None
        try:
            accuracy = self._accuracy(candidates, variant.name, backend)
        except (BackendError, IntegrityError) as error:
            if is_exact:
                raise
            failure = str(error)
        allowed = self.max_r1_drop if self.split.has_identities else 100 - self.min_overlap
        kept = accuracy is not None and self._lost(accuracy) <= allowed
        measured = Measured(
            variant=variant.name,
            tower="both" if len(candidates) == len(TOWERS) else next(iter(candidates)),
            candidate=_together(candidates),
            backend=backend,
            accepted=kept or is_exact,
            accuracy=accuracy,
            failure=failure,
        )
        self.measured.append(measured)
        return measured

    def _accuracy(
        self, candidates: dict[Tower, str], variant: VariantName, backend: str
    ) -> Compared:
        found = {
            tower: self.source(tower, variant, candidate, backend)
            for tower, candidate in candidates.items()
        }
        embeds = self._exact | {tower: one.rows for tower, one in found.items()}
        metrics, drop = self._metrics(embeds), None
        if metrics is not None and self.reference is not None:
            drop = r1_drop(self.reference, metrics)
        cosine = [row_cosines(self._exact[tower], embeds[tower]) for tower in candidates]
        low, one, half = np.quantile(np.concatenate(cosine), [0.0, 0.01, 0.5])
        return Compared(
            metrics=None if metrics is None else metrics.mean(),
            float_types={tower: one.float_type for tower, one in found.items()},
            r1_drop=drop,
            cosine={"min": float(low), "1 %": float(one), "median": float(half)},
            top10_overlap=100 * _mean_overlap(self._exact, embeds),
        )

    @staticmethod
    def _lost(accuracy: Compared) -> float:
        """Return the drop of R@1 in points or, without identities, of the overlap in percent."""
        found = accuracy.r1_drop
        return 100 - accuracy.top10_overlap if found is None else found.points

    def _metrics(self, embeds: Mapping[Tower, npt.NDArray[np.float32]]) -> PerQueryMetrics | None:
        caption_pids, image_pids = self.split.caption_pids, self.split.image_pids
        if caption_pids is None or image_pids is None:
            return None
        return per_query_metrics(embeds["text"], embeds["image"], caption_pids, image_pids)

    def _failure(self, variant: Variant, last: Measured) -> AccuracyGateError:
        where = f"{last.tower}: {last.candidate}, on {last.backend}"
        option = "raise --max-r1-drop" if self.split.has_identities else "lower --min-overlap"
        code = "accuracy_not_kept"
        if last.accuracy is None:
            code = "candidate_not_working"
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
            f"{problem}, and no safer candidate is left: {option}, allow float towers "
            "(--precision auto), or calibrate with more samples",
            code=code,
            variant=variant.name,
            tower=last.tower,
            candidate=last.candidate,
            backend=last.backend,
        )


def _together(candidates: Mapping[Tower, str]) -> str:
    return " + ".join(candidates[tower] for tower in TOWERS if tower in candidates)


def _mean_overlap(
    exact: dict[Tower, npt.NDArray[np.float32]], found: dict[Tower, npt.NDArray[np.float32]]
) -> float:
    """Return the share of the first ten pictures that both have, mean over captions."""
    overlaps = []
    for start in range(0, len(exact["text"]), 512):
        exact_QG, found_QG = (
            rows["text"][start : start + 512] @ rows["image"].T for rows in (exact, found)
        )
        overlaps.append(top_k_overlap(exact_QG, found_QG))
    return float(np.concatenate(overlaps).mean())
