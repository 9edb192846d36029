"""The ladder: per tower and variant, the smallest form whose retrieval accuracy is kept.

Towers climb alone first, each beside the other tower in float32. Then the chosen two are measured
together on every backend they are made for, and while they lose too much on one of them, the tower
that loses more alone climbs on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from upperson_export.accuracy import Drop, RetrievalSplit, r1_drop
from upperson_export.candidates import INT8_RUNGS, RUNGS
from upperson_export.variants import Variant
from upperson_rt.canaries import Tower
from upperson_rt.errors import AccuracyGateError
from upperson_rt.metrics import PerQueryMetrics, per_query_metrics

TOP_K = 10

REFERENCE = "onnxruntime"
"""The backend of float32, and the one that towers climb on alone."""

TOWERS: tuple[Tower, ...] = ("image", "text")


class Source(Protocol):
    """Gives the embeddings of a form of a tower, measured on the built file."""

    def __call__(
        self, tower: Tower, variant: Variant, rung: str, backend: str
    ) -> npt.NDArray[np.float32]:
        """Return (items of the split, E), unit norm."""


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

    metrics: PerQueryMetrics
    drop: Drop
    cosine: dict[str, float]
    """Quantiles of the cosine to float32: min, 1 % and median."""

    top10_overlap: float
    """Percent of the first ten pictures that are float32's, mean over captions."""

    accepted: bool

    def as_dict(self) -> dict[str, Any]:
        """Return what a report stores."""
        return {
            "variant": self.variant,
            "tower": self.tower,
            "rung": self.rung,
            "backend": self.backend,
            "metrics": self.metrics.mean().as_dict(),
            "r1_drop": self.drop.as_dict(),
            "cosine": self.cosine,
            "top10_overlap": self.top10_overlap,
            "accepted": self.accepted,
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
        self._exact = {tower: self.source(tower, "fp32", "fp32", REFERENCE) for tower in TOWERS}
        self.reference = self._metrics(self._exact["image"], self._exact["text"])
        self._top = _top(self._exact["text"], self._exact["image"])

    def climb(self, variant: Variant) -> dict[Tower, str]:
        """Return the rung of each tower.

        Raises:
            AccuracyGateError: No form that is allowed keeps the accuracy.
        """
        rungs = RUNGS[variant]
        if self.int8_only and variant.startswith("int8"):
            rungs = INT8_RUNGS
        chosen: dict[Tower, str] = {}
        alone: dict[Tower, float] = {}
        for tower in TOWERS:
            found = self._climb_tower(tower, variant, rungs)
            chosen[tower], alone[tower] = found.rung, found.drop.points
        while not (both := self._measure_both(variant, chosen)).accepted:
            movable = [tower for tower in chosen if chosen[tower] != rungs[-1]]
            if not movable:
                raise self._failure(variant, both)
            tower = max(movable, key=lambda name: alone[name])
            above = rungs[rungs.index(chosen[tower]) + 1 :]
            found = self._climb_tower(tower, variant, above)
            chosen[tower], alone[tower] = found.rung, found.drop.points
        return chosen

    def _climb_tower(self, tower: Tower, variant: Variant, rungs: Sequence[str]) -> Measured:
        for rung in rungs:
            embeds = {**self._exact, tower: self.source(tower, variant, rung, REFERENCE)}
            found = self._measure(tower, variant, rung, REFERENCE, embeds["image"], embeds["text"])
            if found.accepted:
                return found
        raise self._failure(variant, found)

    def _measure_both(self, variant: Variant, chosen: dict[Tower, str]) -> Measured:
        """Return the first backend's measurement that is refused, else ONNX Runtime's."""
        rung = f"{chosen['image']} + {chosen['text']}"
        found = []
        for backend in (REFERENCE, *(self.also_on if variant == "int8" else ())):
            image_GE, text_QE = (
                self.source(tower, variant, chosen[tower], backend) for tower in TOWERS
            )
            found.append(self._measure("both", variant, rung, backend, image_GE, text_QE))
            if not found[-1].accepted:
                return found[-1]
        return found[0]

    def _measure(
        self,
        tower: str,
        variant: Variant,
        rung: str,
        backend: str,
        image_GE: npt.NDArray[np.float32],
        text_QE: npt.NDArray[np.float32],
    ) -> Measured:
        metrics = self._metrics(image_GE, text_QE)
        drop = r1_drop(self.reference, metrics)
        embeds: dict[Tower, npt.NDArray[np.float32]] = {"image": image_GE, "text": text_QE}
        cosine = [
            np.einsum("ne,ne->n", embeds[name], self._exact[name])
            for name in TOWERS
            if tower in (name, "both")
        ]
        low, one, half = np.quantile(np.concatenate(cosine), [0.0, 0.01, 0.5])
        measured = Measured(
            variant=variant,
            tower=tower,
            rung=rung,
            backend=backend,
            metrics=metrics,
            drop=drop,
            cosine={"min": float(low), "1 %": float(one), "median": float(half)},
            top10_overlap=_overlap(self._top, _top(text_QE, image_GE)),
            # Float32 is what the others are compared with: it is always a way out.
            accepted=drop.points <= self.max_r1_drop or set(rung.split(" + ")) == {"fp32"},
        )
        self.measured.append(measured)
        return measured

    def _metrics(
        self, image_GE: npt.NDArray[np.float32], text_QE: npt.NDArray[np.float32]
    ) -> PerQueryMetrics:
        return per_query_metrics(text_QE, image_GE, self.split.caption_pids, self.split.image_pids)

    def _failure(self, variant: Variant, last: Measured) -> AccuracyGateError:
        return AccuracyGateError(
            f"{variant} loses {last.drop.points:.2f} points of R@1 ({last.tower}: {last.rung}, "
            f"on {last.backend}), "
            f"more than the {self.max_r1_drop} allowed, and no safer form is left: raise "
            "--max-r1-drop, allow float towers (--precision auto), or calibrate with more samples"
        )


def _top(text_QE: npt.NDArray[np.float32], image_GE: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
    """Return the places of the first ten pictures of every caption, [Q, k]."""
    k = min(TOP_K, len(image_GE))
    rows = [
        np.argpartition(-(text_QE[start : start + 512] @ image_GE.T), k - 1, axis=1)[:, :k]
        for start in range(0, len(text_QE), 512)
    ]
    return np.concatenate(rows)


def _overlap(first_Qk: npt.NDArray[Any], second_Qk: npt.NDArray[Any]) -> float:
    same = (first_Qk[:, :, None] == second_Qk[:, None, :]).any(axis=2)
    return 100 * float(same.mean())
