"""Exact top-k by score, with ties in a fixed order; hits grouped by track."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from upperson_rt.gallery.records import Hit, TrackSpan

__all__ = ["best_of_tracks", "span_of", "top_k"]


def top_k(scores: NDArray[np.float32], k: int) -> NDArray[np.intp]:
    """Return the indices of the k largest of (N,) finite scores, best first, ties by index.

    Same as a stable descending sort cut to k, without sorting everything.
    """
    if k < len(scores):
        # argpartition alone picks arbitrary ones among equals, so it only finds the threshold.
        threshold = np.partition(scores, len(scores) - k)[len(scores) - k]
        candidates = np.flatnonzero(scores >= threshold)
    else:
        candidates = np.arange(len(scores))
    order = np.argsort(-scores[candidates], kind="stable")
    return candidates[order[:k]]


def best_of_tracks(hits: Sequence[Hit]) -> list[Hit]:
    """Return the first hit of each camera and track, and every hit without a track, in order.

    The spans are those of the hits given.
    """
    members: dict[tuple[str | None, str], list[Hit]] = {}
    for hit in hits:
        if hit.item.track is not None:
            members.setdefault((hit.item.camera, hit.item.track), []).append(hit)
    found = []
    for hit in hits:
        if hit.item.track is None:
            found.append(hit)
        elif (group := members[hit.item.camera, hit.item.track])[0] is hit:
            found.append(replace(hit, span=span_of(group)))
    return found


def span_of(hits: Sequence[Hit]) -> TrackSpan:
    """Return the span of the hits of one track."""
    times = [hit.item.time for hit in hits if hit.item.time is not None]
    return TrackSpan(
        first_time=min(times, default=None),
        last_time=max(times, default=None),
        pictures=len(hits),
    )
