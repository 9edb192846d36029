"""How alike two rankings of the same gallery are.

Shapes: Q queries, G gallery items, E embedding width.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from upperson_rt.agreement import TOP_K, top_k_overlap


@dataclass(frozen=True, kw_only=True, slots=True)
class RankingAgreement:
    """Agreement of the rankings of Q queries; 1 is the same, for tau 0 is chance."""

    top_k: int
    """TOP_K, or the whole gallery if it is smaller."""
    mean_overlap: float
    """Share of the first `top_k` that both rankings name."""
    min_overlap: float
    mean_tau: float
    """Kendall's tau-b over the whole gallery."""
    min_tau: float

    def as_dict(self) -> dict[str, float]:
        """Return the fields for JSON."""
        return asdict(self)


def compare_rankings(
    expected_QG: npt.NDArray[Any], found_QG: npt.NDArray[Any], top_k: int = TOP_K
) -> RankingAgreement:
    """Compare how two similarity matrices order the gallery; one that is not finite counts as 0."""
    found_QG = np.nan_to_num(found_QG, nan=0.0, posinf=0.0, neginf=0.0)
    top_k = min(top_k, expected_QG.shape[1])
    overlap_Q = top_k_overlap(expected_QG, found_QG, top_k)
    tau_Q = np.array([kendall_tau_b(a, b) for a, b in zip(expected_QG, found_QG, strict=True)])
    return RankingAgreement(
        top_k=top_k,
        mean_overlap=float(overlap_Q.mean()),
        min_overlap=float(overlap_Q.min()),
        mean_tau=float(tau_Q.mean()),
        min_tau=float(tau_Q.min()),
    )


def kendall_tau_b(a_G: npt.NDArray[Any], b_G: npt.NDArray[Any]) -> float:
    """Return Kendall's tau-b of two score vectors.

        tau_b = (concordant - discordant) / sqrt(pairs not tied in a * pairs not tied in b)

    0 if either ranks nothing (all its values are equal). Takes O(G^2) time and memory, which is
    right for galleries of up to a few thousand.
    """
    upper = np.triu_indices(len(a_G), k=1)
    sign_a = np.sign(a_G[:, None] - a_G[None, :])[upper]
    sign_b = np.sign(b_G[:, None] - b_G[None, :])[upper]
    untied = float(np.count_nonzero(sign_a)) * float(np.count_nonzero(sign_b))
    return float((sign_a * sign_b).sum() / np.sqrt(untied)) if untied else 0.0
