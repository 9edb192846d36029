"""The approximate index of large galleries: inverted lists of 8-bit vectors (IVF-SQ8).

Its candidates are scored again from the stored float16, so 8 bits only decide what is a candidate.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.gallery.sqlite.segments import candidates_for, load_faiss

__all__ = ["Trained", "train"]

_ROWS_PER_LIST = 50
_NPROBES = (8, 16, 32, 64, 128, 256)
_RECALL = 0.985
_RECALL_AT = 10
_QUERIES = 200
_QUERY_COSINE = 0.54  # Of a sentence and the best picture, typically.


@dataclass(frozen=True)
class Trained:
    """An index, and what was found out about it."""

    index: Any
    ids: NDArray[np.int64]
    """(N,) the item of each row."""
    nlist: int
    nprobe: int
    recall_at_10: float


def train(
    count: int,
    embed_dim: int,
    sample: Callable[[int], NDArray[np.float32]],
    blocks: Callable[[], Iterable[tuple[NDArray[np.int64], NDArray[np.float32]]]],
) -> Trained:
    """Make an index and measure it.

    nprobe is the smallest that finds 98.5 % of the ten best pictures of 200 queries which are as
    far from the pictures as sentences are: stored vectors turned away to a cosine of 0.54. The
    lists were not trained on those: theirs are found too easily.

    Args:
        count: Rows, about.
        embed_dim: D.
        sample: Gives up to that many random (N, D) rows.
        blocks: Goes through all rows in ascending order of ids: (N,) ids and (N, D) vectors.
    """
    faiss = load_faiss()

    nlist = max(1, round(2 * math.sqrt(count)))
    queries, rows = _held_out(sample(nlist * _ROWS_PER_LIST + _QUERIES))
    nlist = min(nlist, len(rows))
    quantizer = faiss.IndexFlatIP(embed_dim)
    index = faiss.IndexIVFScalarQuantizer(
        quantizer,
        embed_dim,
        nlist,
        faiss.ScalarQuantizer.QT_8bit,
        faiss.METRIC_INNER_PRODUCT,
        False,  # Residuals would need another table for every list.
    )
    index.cp.niter = 10
    index.cp.min_points_per_centroid = 1
    index.train(rows)
    del rows

    ids: list[NDArray[np.int64]] = []
    best = np.full((len(queries), _RECALL_AT), -np.inf, np.float32)
    found = np.full((len(queries), _RECALL_AT), -1, np.int64)
    done = 0
    for block_ids, vectors in blocks():
        index.add(vectors)
        scores = np.concatenate([best, queries @ vectors.T], axis=1)
        names = np.concatenate(
            [
                found,
                np.broadcast_to(np.arange(done, done + len(vectors)), (len(queries), len(vectors))),
            ],
            axis=1,
        )
        keep = np.argpartition(scores, scores.shape[1] - _RECALL_AT, axis=1)[:, -_RECALL_AT:]
        best = np.take_along_axis(scores, keep, axis=1)
        found = np.take_along_axis(names, keep, axis=1)
        ids.append(block_ids)
        done += len(vectors)

    nprobe, recall = nlist, 1.0
    for nprobe in sorted({min(value, nlist) for value in _NPROBES}):
        recall = _recall(index, queries, found, nprobe)
        if recall >= _RECALL:
            break
    return Trained(
        index=index,
        ids=np.concatenate(ids) if ids else np.empty(0, np.int64),
        nlist=nlist,
        nprobe=nprobe,
        recall_at_10=recall,
    )


def _held_out(
    rows: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return far queries made of some (N, D) rows, a tenth at most, and the other rows."""
    rng = np.random.default_rng(0)
    held = rng.choice(len(rows), min(_QUERIES, -(-len(rows) // 10)), replace=False)
    away = rng.standard_normal((len(held), rows.shape[1]), np.float32)
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    queries = rows[held] + math.sqrt(1 / _QUERY_COSINE**2 - 1) * away
    turned: NDArray[np.float32] = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    return turned, np.delete(rows, held, axis=0)


def _recall(
    index: Any, queries: NDArray[np.float32], expected: NDArray[np.int64], nprobe: int
) -> float:
    faiss = load_faiss()

    _, rows = index.search(
        queries, candidates_for(_RECALL_AT), params=faiss.SearchParametersIVF(nprobe=nprobe)
    )
    hits = sum(
        len(np.intersect1d(found, best[best >= 0]))
        for found, best in zip(rows, expected, strict=True)
    )
    return hits / max(1, int(np.count_nonzero(expected >= 0)))
