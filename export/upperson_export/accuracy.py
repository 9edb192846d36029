"""What accuracy is measured on, and how much of it is lost."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from upperson_rt.metrics import PerQueryMetrics

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


def r1_drop(reference: PerQueryMetrics, candidate: PerQueryMetrics, seed: int = 0) -> Drop:
    """Compare R@1 query by query, with a paired bootstrap over queries."""
    lost = reference.hit_at(1).astype(np.int64) - candidate.hit_at(1).astype(np.int64)
    # Resampling queries only needs how often each of -1, 0, 1 is drawn.
    counts = np.array([(lost == value).sum() for value in (-1, 0, 1)])
    draws = np.random.default_rng(seed).multinomial(len(lost), counts / len(lost), size=_RESAMPLES)
    low, high = np.percentile((draws[:, 2] - draws[:, 0]) / len(lost), [2.5, 97.5])
    return Drop(100 * float(lost.mean()), 100 * float(low), 100 * float(high))
