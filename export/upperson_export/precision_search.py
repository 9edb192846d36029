"""Precision search: the smallest candidate of each tower and variant that keeps its accuracy.

Accuracy is R@1 and mAP of captions and, where attributes are known, of short queries. Where
identities are unknown, it is the overlap of the first ten pictures with those of float32.

First each tower is searched alone, beside the other tower in float32. Then the two accepted
candidates are measured together, on every backend that they are made for. While they lose too much
on one of them, the search goes on for the tower whose replacement by float32 leaves less of that
loss.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from upperson_export.variants import AS_RUN, EXACT, VARIANTS, Variant, VariantName
from upperson_rt.agreement import row_cosines
from upperson_rt.errors import AccuracyGateError, BackendError, IntegrityError
from upperson_rt.towers import TOWERS, Tower
from upperson_scores.metrics import PerQueryMetrics, RetrievalMetrics, per_query_metrics
from upperson_scores.rankings import top_k_overlap

MIN_OVERLAP = 90.0
"""Default for the overlap of the first ten pictures with those of float32, in percent. The demo's
model keeps 97.1 in int8, and its R@1 moves by 0.5 points."""

SHORT_MEASURES = ("short R@1", "short mAP")
MEASURES = ("R@1", "mAP", *SHORT_MEASURES)
"""What the gate limits where identities, and for short queries attributes, are known."""

DRAWS = 2000

_Embeds: TypeAlias = Mapping[str, npt.NDArray[np.float32]]
"""Unit-norm rows of the split: ``image``, ``text`` (the captions) and ``short``."""
_Found: TypeAlias = Mapping[str, PerQueryMetrics]
"""Results of captions (``text``) and ``short`` queries, as far as the truth is known."""


@dataclass(frozen=True, slots=True)
class ShortQueries:
    """N queries such as *woman in red coat*, and the images that satisfy them."""

    texts: Sequence[str]
    satisfied_G: npt.NDArray[np.int64]
    """Place in ``texts`` of the query that an image satisfies, or -1. Each query has an image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalSplit:
    """Images and captions: what accuracy is measured on."""

    name: str
    image_files: Sequence[Path]
    image_pids: npt.NDArray[np.int64] | None = None
    """Identity of each image. None, here and below, if unknown: rankings are compared."""
    captions: Sequence[str]
    caption_pids: npt.NDArray[np.int64] | None = None
    short: ShortQueries | None = None
    """None if attributes are unknown."""

    @property
    def has_identities(self) -> bool:
        """Whether it is known which images match a caption."""
        return self.image_pids is not None and self.caption_pids is not None

    @property
    def texts(self) -> list[str]:
        """What the text tower embeds: the captions, then the short queries."""
        return [*self.captions, *(self.short.texts if self.short else ())]


@dataclass(frozen=True, slots=True)
class Drop:
    """Points lost against a reference on the same queries; negative is a gain."""

    points: float
    low: float
    """Lower end of the 95 % bootstrap interval."""
    high: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """Retrieval accuracy of two towers."""

    metrics: RetrievalMetrics | None
    """None if identities are unknown."""
    short: RetrievalMetrics | None = None
    """Of short queries; None if attributes are unknown."""
    float_types: Mapping[Tower, str]


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared(Accuracy):
    """Accuracy compared with float32, on the same queries."""

    drops: Mapping[str, Drop]
    """By name of `MEASURES`; empty if identities are unknown."""
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
    failed_by: str | None = None
    """The measure that refuses it, if one does."""
    failure: str | None = None
    """Why it is refused."""


class SplitEmbeds(NamedTuple):
    """Embeddings of the split by a candidate."""

    rows: npt.NDArray[np.float32]
    """(images or `RetrievalSplit.texts`, E), unit norm."""
    float_type: str


class EmbedSplit(Protocol):
    """Embeds the split with the file of a candidate."""

    def __call__(
        self, tower: Tower, variant: VariantName, candidate: str, backend: str
    ) -> SplitEmbeds:
        """Embed the split."""


def paired_drop(lost_Q: npt.NDArray[Any], group_Q: npt.NDArray[np.int64]) -> Drop:
    """Average what Q queries lose, with a paired bootstrap over groups of queries.

    A group is drawn with all its queries: the captions of a person are not independent. A short
    query, which all its people share, is a group of its own.
    """
    _, group_Q = np.unique(group_Q, return_inverse=True)
    lost_P, queries_P = np.bincount(group_Q, lost_Q), np.bincount(group_Q)
    share = np.full(len(lost_P), 1 / len(lost_P))
    draws_BP = np.random.default_rng(0).multinomial(len(lost_P), share, size=DRAWS)
    low, high = np.percentile((draws_BP @ lost_P) / (draws_BP @ queries_P), [2.5, 97.5])
    return Drop(100 * float(np.mean(lost_Q)), 100 * float(low), 100 * float(high))


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
        split = self.split
        self._ids: dict[str, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = {}
        if split.caption_pids is not None and split.image_pids is not None:
            self._ids["text"] = split.caption_pids, split.image_pids
        if split.short is not None:
            self._ids["short"] = np.arange(len(split.short.texts)), split.short.satisfied_G
        self._exact: dict[str, npt.NDArray[np.float32]] = {}
        for tower in TOWERS:
            self._exact |= self._rows(tower, self.source(tower, EXACT, EXACT, AS_RUN))
        self._reference = self._measure_queries(self._exact)

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
            return {AS_RUN: Accuracy(**_means(self._reference), float_types=types)}
        candidate = _together(accepted)
        return {
            found.backend: found.accuracy
            for found in self.measured
            if (found.variant, found.tower, found.candidate) == (variant, "both", candidate)
            and found.accuracy is not None
        }

    def refusals(self, variant: VariantName) -> str:
        """Return why the last refused candidate of each tower, and of both, was refused."""
        last = {row.tower: row for row in self.measured if row.variant == variant and row.failure}
        return "; ".join(
            f"{row.tower}, {row.candidate} on {row.backend}: {row.failure}" for row in last.values()
        )

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
            found = self._accuracy(others, refused.variant, refused.backend)
        except (BackendError, IntegrityError):
            return math.inf
        if found.drops:
            return found.drops[refused.failed_by or "R@1"].points
        return -found.top10_overlap

    def _measure(self, candidates: dict[Tower, str], variant: Variant, backend: str) -> Measured:
        """Measure candidates of one tower or both; a tower that is not named is float32."""
        is_exact = set(candidates.values()) == {EXACT}  # The reference, always accepted.
        accuracy, failed_by, failure = None, None, None
        try:
            accuracy = self._accuracy(candidates, variant.name, backend)
        except (BackendError, IntegrityError) as error:
            if is_exact:
                raise
            failure = f"does not work: {error}"
        if accuracy is not None and not is_exact:
            failed_by, failure = self._judge(accuracy)
        measured = Measured(
            variant=variant.name,
            tower="both" if len(candidates) == len(TOWERS) else next(iter(candidates)),
            candidate=_together(candidates),
            backend=backend,
            accepted=failure is None,
            accuracy=accuracy,
            failed_by=failed_by,
            failure=failure,
        )
        self.measured.append(measured)
        return measured

    def _judge(self, found: Compared) -> tuple[str, str] | tuple[None, None]:
        """Return the measure in which too much is lost, and the loss in words."""
        for name, drop in found.drops.items():
            # One short query of a hundred is a point, so chance must not explain the excess.
            if (drop.low if name in SHORT_MEASURES else drop.points) > self.max_r1_drop:
                return name, (
                    f"loses {drop.points:.2f} points of {name} (95 % interval {drop.low:.2f} to "
                    f"{drop.high:.2f}), more than the {self.max_r1_drop} allowed"
                )
        if not found.drops and found.top10_overlap < self.min_overlap:
            kept = f"keeps {found.top10_overlap:.1f} % of the first ten pictures"
            return "top 10", f"{kept}, less than the {self.min_overlap} required"
        return None, None

    def _accuracy(
        self, candidates: dict[Tower, str], variant: VariantName, backend: str
    ) -> Compared:
        found = {
            tower: self.source(tower, variant, candidate, backend)
            for tower, candidate in candidates.items()
        }
        embeds = self._exact.copy()
        for tower, one in found.items():
            embeds |= self._rows(tower, one)
        measured = self._measure_queries(embeds)
        cosine = [row_cosines(self._exact[tower], embeds[tower]) for tower in candidates]
        low, one, half = np.quantile(np.concatenate(cosine), [0.0, 0.01, 0.5])
        return Compared(
            **_means(measured),
            float_types={tower: one.float_type for tower, one in found.items()},
            drops=self._drops(measured),
            cosine={"min": float(low), "1 %": float(one), "median": float(half)},
            top10_overlap=100 * _mean_overlap(self._exact, embeds),
        )

    def _rows(self, tower: Tower, found: SplitEmbeds) -> _Embeds:
        """Return the embeddings of a tower by what they are of."""
        if tower == "image":
            return {"image": found.rows}
        captions = len(self.split.captions)
        return {"text": found.rows[:captions], "short": found.rows[captions:]}

    def _measure_queries(self, embeds: _Embeds) -> _Found:
        return {
            kind: per_query_metrics(embeds[kind], embeds["image"], *ids)
            for kind, ids in self._ids.items()
        }

    def _drops(self, measured: _Found) -> dict[str, Drop]:
        """Compare with float32, by name of `MEASURES`."""
        drops = {}
        for kind, found in measured.items():
            exact, (groups, _) = self._reference[kind], self._ids[kind]
            hits_lost = exact.hit_at(1).astype(float) - found.hit_at(1)
            for name, lost in (("R@1", hits_lost), ("mAP", exact.ap - found.ap)):
                drops[name if kind == "text" else f"short {name}"] = paired_drop(lost, groups)
        return drops

    def _failure(self, variant: Variant, last: Measured) -> AccuracyGateError:
        option = "raise --max-r1-drop" if self.split.has_identities else "lower --min-overlap"
        lost = last.accuracy and last.accuracy.drops.get(last.failed_by or "")
        return AccuracyGateError(
            f"{variant.name} {last.failure} ({last.tower}: {last.candidate}, on {last.backend}), "
            f"and no safer candidate is left: {option}, allow float towers (--precision auto), or "
            "calibrate with more samples",
            code="candidate_not_working" if last.accuracy is None else "accuracy_not_kept",
            variant=variant.name,
            tower=last.tower,
            candidate=last.candidate,
            backend=last.backend,
            measure=last.failed_by,
            limit=self.max_r1_drop if self.split.has_identities else self.min_overlap,
            **(asdict(lost) if lost else {}),
        )


def _means(measured: _Found) -> dict[str, RetrievalMetrics | None]:
    """Return the fields of `Accuracy` that are means over queries."""
    means = {kind: found.mean() for kind, found in measured.items()}
    return {"metrics": means.get("text"), "short": means.get("short")}


def _together(candidates: Mapping[Tower, str]) -> str:
    return " + ".join(candidates[tower] for tower in TOWERS if tower in candidates)


def _mean_overlap(exact: _Embeds, found: _Embeds) -> float:
    """Return the share of the first ten pictures that both have, mean over captions."""
    overlaps = []
    for start in range(0, len(exact["text"]), 512):
        exact_QG, found_QG = (
            rows["text"][start : start + 512] @ rows["image"].T for rows in (exact, found)
        )
        overlaps.append(top_k_overlap(exact_QG, found_QG))
    return float(np.concatenate(overlaps).mean())
