"""Retrieval accuracy of exported files, measured through the runtime that will use them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from upperson_rt.encoder import Encoder
from upperson_rt.metrics import PerQueryMetrics, per_query_metrics

Progress = Callable[[int, int], None]
"""Called with (done, total)."""

_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True, slots=True)
class RetrievalSplit:
    """Images and captions with identities: what accuracy is measured on."""

    name: str
    image_files: Sequence[Path]
    image_pids: npt.NDArray[np.int64]
    captions: Sequence[str]
    caption_pids: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Drop:
    """R@1 lost against a reference on the same queries, in points; negative is a gain."""

    points: float
    low: float
    """Lower end of the 95 % bootstrap interval."""

    high: float

    def as_dict(self) -> dict[str, float]:
        """Return the fields as a report stores them."""
        return {"points": self.points, "low": self.low, "high": self.high}


def measure(
    encoder: Encoder, split: RetrievalSplit, progress: Progress | None = None
) -> PerQueryMetrics:
    """Query every image of the split with every caption."""
    gallery_GE = encoder.encode_images(list(split.image_files), progress=progress)
    query_QE = encoder.encode_texts(list(split.captions))
    return per_query_metrics(query_QE, gallery_GE, split.caption_pids, split.image_pids)


def r1_drop(reference: PerQueryMetrics, candidate: PerQueryMetrics, seed: int = 0) -> Drop:
    """Compare R@1 query by query, with a paired bootstrap over queries."""
    lost = reference.hit_at(1).astype(np.int64) - candidate.hit_at(1).astype(np.int64)
    # Resampling queries only needs how often each of -1, 0, 1 is drawn.
    counts = np.array([(lost == value).sum() for value in (-1, 0, 1)])
    draws = np.random.default_rng(seed).multinomial(len(lost), counts / len(lost), size=_RESAMPLES)
    low, high = np.percentile((draws[:, 2] - draws[:, 0]) / len(lost), [2.5, 97.5])
    return Drop(100 * float(lost.mean()), 100 * float(low), 100 * float(high))


def report_row(metrics: PerQueryMetrics, drop: Drop | None) -> dict[str, Any]:
    """Return one variant's accuracy as reports store it, percentages and points."""
    return {"metrics": metrics.mean().as_dict(), "r1_drop": drop and drop.as_dict()}
