"""One run of retrieval metrics, ours or by sorting the gallery for every query: what it takes.

Shapes: Q queries, G pictures, D embedding width.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.backends.measurement import time_in_turns
from upperson_rt.metrics import RetrievalMetrics, retrieval_metrics

SORTED = "the gallery sorted for each query"
OURS = "ours"

_NOISE = 2.6
"""Of an embedding around its person's: mAP is then near that of good models on ICFG-PEDES."""

_QUERIES_AT_A_TIME = 1024


def measure(name: str, queries: int, images: int, people: int, dim: int) -> dict[str, Any]:
    """Run one contender once in this process; return its times and metrics."""
    rng = np.random.default_rng(0)
    pids_G = np.concatenate([np.arange(people), rng.integers(0, people, images - people)])
    pids_Q = rng.integers(0, people, queries)
    centres = rng.standard_normal((people, dim), dtype=np.float32)
    query_QD, gallery_GD = (
        centres[pids] + np.float32(_NOISE) * rng.standard_normal((len(pids), dim), np.float32)
        for pids in (pids_Q, pids_G)
    )
    rank: Callable[..., RetrievalMetrics]
    rank = sorted_metrics if name == SORTED else retrieval_metrics
    metrics: list[RetrievalMetrics] = []
    timing = time_in_turns(
        {name: lambda: metrics.append(rank(query_QD, gallery_GD, pids_Q, pids_G))},
        warmup=0,
        rounds=1,
    )[name]
    return timing.as_dict(queries) | {"metrics": metrics[0].as_dict()}


def sorted_metrics(
    query_QD: NDArray[np.float32],
    gallery_GD: NDArray[np.float32],
    pids_Q: NDArray[np.int64],
    pids_G: NDArray[np.int64],
) -> RetrievalMetrics:
    """Compute the metrics from their definitions, over the whole ranking of each query."""
    query_QD, gallery_GD = (
        rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (query_QD, gallery_GD)
    )
    places = np.arange(1, len(pids_G) + 1)
    sums = np.zeros(5)
    for start in range(0, len(query_QD), _QUERIES_AT_A_TIME):
        rows = slice(start, start + _QUERIES_AT_A_TIME)
        order_QG = np.argsort(-(query_QD[rows] @ gallery_GD.T), axis=1, kind="stable")
        for order_G, pid in zip(order_QG, pids_Q[rows], strict=True):
            right_G = pids_G[order_G] == pid
            ranks = places[right_G]
            hits = np.arange(1, len(ranks) + 1)
            first = ranks[0] <= np.array((1, 5, 10))
            sums += *first, (hits / ranks).mean(), len(ranks) / ranks[-1]
    return RetrievalMetrics(*(100 * sums / len(query_QD)).tolist())
