"""Retrieval metrics of text-based person search: R@K, mAP and mINP.

Notation: Q queries, G gallery images, D embedding size. ``M_i(k)`` is 1 where rank k of query i
shows the right person, ``R_i`` is the number of right images for query i.

    R@K   = 100 * mean_i [any of M_i(1..K)]
    AP_i  = 1/R_i * sum_k M_i(k) * (right images up to k) / k        mAP  = 100 * mean_i AP_i
    INP_i = R_i / (rank of the last right image)                     mINP = 100 * mean_i INP_i

No query-gallery pair is excluded. Equal scores keep the order of the gallery.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from upperson_rt.arguments import check_count
from upperson_rt.errors import InputError
from upperson_rt.printable import safe_repr
from upperson_rt.towers import batch_slices

Rank: TypeAlias = Callable[
    [NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]],
    NDArray[np.int64],
]
"""Takes unit-norm queries (Q, D), the gallery (G, D), and pairs: indices of queries and of images,
in rising order. Returns the rank of each pair's image for its query, from 1; equal scores keep the
order."""


@dataclass(frozen=True)
class RetrievalMetrics:
    """Means over all queries, in percent (0 to 100)."""

    r1: float
    r5: float
    r10: float
    map: float
    minp: float

    def as_dict(self) -> dict[str, float]:
        """Return the metrics under the names used in reports and papers."""
        return {
            "R@1": self.r1,
            "R@5": self.r5,
            "R@10": self.r10,
            "mAP": self.map,
            "mINP": self.minp,
        }


@dataclass(frozen=True)
class PerQueryMetrics:
    """One value per query, in the order of the queries; fractions from 0 to 1, not percent."""

    first_rank: NDArray[np.int64]
    """(Q,) rank of the first right image, counted from 1."""
    ap: NDArray[np.float64]
    """(Q,) average precision."""
    inp: NDArray[np.float64]
    """(Q,) inverse negative penalty."""

    def hit_at(self, k: int) -> NDArray[np.bool_]:
        """Return (Q,) bool: whether a right image is among the first k."""
        return self.first_rank <= k

    def mean(self) -> RetrievalMetrics:
        """Average over the queries."""
        return RetrievalMetrics(
            r1=100.0 * float(self.hit_at(1).mean()),
            r5=100.0 * float(self.hit_at(5).mean()),
            r10=100.0 * float(self.hit_at(10).mean()),
            map=100.0 * float(self.ap.mean()),
            minp=100.0 * float(self.inp.mean()),
        )


def retrieval_metrics(
    query_embeds: ArrayLike,
    gallery_embeds: ArrayLike,
    query_pids: ArrayLike,
    gallery_pids: ArrayLike,
    chunk_size: int = 1024,
) -> RetrievalMetrics:
    """Rank the gallery for every query and average the metrics.

    Args:
        query_embeds: (Q, D) text embeddings of any length; normalised here to unit length, float32.
        gallery_embeds: (G, D) image embeddings, likewise.
        query_pids: (Q,) person ids, integers or strings.
        gallery_pids: (G,) person ids of the same kind.
        chunk_size: Queries ranked at a time; memory is about 6 * chunk_size * G bytes.
    """
    rows = query_embeds, gallery_embeds, query_pids, gallery_pids
    return per_query_metrics(*rows, chunk_size).mean()


def per_query_metrics(
    query_embeds: ArrayLike,
    gallery_embeds: ArrayLike,
    query_pids: ArrayLike,
    gallery_pids: ArrayLike,
    chunk_size: int = 1024,
    rank: Rank | None = None,
) -> PerQueryMetrics:
    """Like `retrieval_metrics`, without the average; ``rank`` may replace numpy by a GPU."""
    queries_QD = _unit_rows(query_embeds, "query_embeds")
    gallery_GD = _unit_rows(gallery_embeds, "gallery_embeds")
    if queries_QD.shape[1] != gallery_GD.shape[1]:
        dimensions = (
            f"{queries_QD.shape[1]} dimensions and gallery embeddings {gallery_GD.shape[1]}"
        )
        message = f"query embeddings have {dimensions}: both must come from the same model"
        raise InputError(message, code="dimensions_differ")
    pids_Q = _pids(query_pids, len(queries_QD), "query_pids")
    pids_G = _pids(gallery_pids, len(gallery_GD), "gallery_pids")
    _require_matches(pids_Q, pids_G)
    chunk_size = check_count(chunk_size, "chunk_size", InputError)

    first_rank = np.empty(len(queries_QD), dtype=np.int64)
    ap, inp = np.empty((2, len(queries_QD)), dtype=np.float64)
    right_images = _right_images(pids_Q, pids_G)
    if rank is None:
        at_once = min(chunk_size, len(queries_QD))
        rank = partial(_rank, np.empty((at_once, len(gallery_GD)), dtype=np.float32))
    for rows in batch_slices(len(queries_QD), chunk_size):
        query, image = right_images(rows)
        ranks = rank(queries_QD[rows], gallery_GD, query, image)
        first_rank[rows], ap[rows], inp[rows] = _reduce_ranks(query, ranks)
    return PerQueryMetrics(first_rank=first_rank, ap=ap, inp=inp)


def auroc(positive: NDArray[np.floating[Any]], negative: NDArray[np.floating[Any]]) -> float | None:
    """Return how often a positive is above a negative, in percent; ties count half.

    None if there are none of either.
    """
    if not len(positive) or not len(negative):
        return None
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left")
    not_above = np.searchsorted(ordered, positive, side="right")
    return 100.0 * float(((below + not_above) / (2 * len(ordered))).mean())


def _right_images(
    pids_Q: NDArray[np.generic], pids_G: NDArray[np.generic]
) -> Callable[[slice], tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Return what finds the pairs of some queries, counted from the first of them, and images."""
    if np.result_type(pids_Q, pids_G).kind == "f":  # int64 with uint64: a float would round them.
        pids_Q, pids_G = pids_Q.astype(object), pids_G.astype(object)
    order_G = np.argsort(pids_G, kind="stable")
    first_Q, last_Q = (np.searchsorted(pids_G[order_G], pids_Q, side) for side in ("left", "right"))

    def find(rows: slice) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        counts = last_Q[rows] - first_Q[rows]
        query = np.repeat(np.arange(len(counts)), counts)
        in_turn = np.arange(len(query)) - np.repeat(np.cumsum(counts) - counts, counts)
        return query, order_G[first_Q[rows][query] + in_turn]

    return find


def _rank(
    room_NG: NDArray[np.float32],
    queries_QD: NDArray[np.float32],
    gallery_GD: NDArray[np.float32],
    query: NDArray[np.int64],
    image: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Return the rank, from 1, of each (query, image) pair in a stable descending sort.

    A person has few images: sorting the scores that reach the last of them is many times faster
    than sorting the whole gallery. Scores go to the first rows of ``room_NG``, which the chunks
    share: fresh memory costs half as much time as ranking.
    """
    scores_QG = np.matmul(queries_QD, gallery_GD.T, out=room_NG[: len(queries_QD)])
    ranks = np.empty(len(query), dtype=np.int64)
    starts = np.flatnonzero(np.diff(query, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(query)], strict=True):
        scores, right = scores_QG[query[start]], image[start:end]
        own = scores[right]
        # Taken by their places, which numpy does in half the time that it needs with a mask.
        rivals = np.sort(scores[np.flatnonzero(scores >= own.min())])
        above = len(rivals) - rivals.searchsorted(own, "right")
        equal = len(rivals) - rivals.searchsorted(own, "left") - above
        ranks[start:end] = above + 1
        for pair in np.flatnonzero(equal > 1):
            ranks[start + pair] += np.count_nonzero(scores[: right[pair]] == own[pair])
    return ranks


def _reduce_ranks(
    query: NDArray[np.int64], rank: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Return first rank, AP and INP per query from (query, rank) pairs; every query has one."""
    order = np.lexsort((rank, query))
    query, rank = query[order], rank[order]
    n_hits = np.bincount(query)
    start = np.concatenate(([0], np.cumsum(n_hits)[:-1]))
    hits_so_far = np.arange(len(query)) - start[query] + 1
    ap = np.bincount(query, weights=hits_so_far / rank) / n_hits
    return rank[start], ap, n_hits / rank[start + n_hits - 1]


def _unit_rows(embeds: ArrayLike, name: str) -> NDArray[np.float32]:
    try:
        with np.errstate(over="ignore"):  # What is too large is refused as not finite.
            rows = np.asarray(embeds, dtype=np.float32)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name} must be numbers, found {safe_repr(embeds)}") from error
    if rows.ndim != 2 or rows.size == 0:
        message = f"{name} must be a non-empty (N, D) array, got shape {rows.shape}"
        raise InputError(message, code="embeds_unfit", what=name)
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
    bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
    if count := len(bad):
        message = f"{count} of {len(rows)} rows of {name} are zero or not finite, the first at "
        message += f"index {bad[0]}: the model that made them is broken"
        fields = {"what": name, "count": count, "row": int(bad[0])}
        raise InputError(message, code="embeds_unusable", **fields)
    unit: NDArray[np.float32] = rows / norms
    return unit


def _pids(pids: ArrayLike, expected: int, name: str) -> NDArray[np.generic]:
    try:
        array = np.asarray(pids)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name} must be integers or strings, found {safe_repr(pids)}") from error
    if array.shape != (expected,):
        message = f"{name} must have shape ({expected},), got {array.shape}"
        raise InputError(message, code="ids_unfit", what=name)
    if array.dtype.kind not in "biuUS":
        raise InputError(f"{name} must be integers or strings, found {array.dtype}")
    return array


def _require_matches(query_pids: NDArray[np.generic], gallery_pids: NDArray[np.generic]) -> None:
    missing = np.flatnonzero(~np.isin(query_pids, gallery_pids))
    if count := len(missing):
        row = int(missing[0])
        message = (
            f"{count} of {len(query_pids)} queries have no image of their person in the gallery, "
            f"for example query {row} with person id {query_pids[row]}: evaluate queries and "
            "gallery of the same split"
        )
        raise InputError(message, code="person_missing", count=count, row=row)
