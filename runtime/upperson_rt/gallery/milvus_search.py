"""Exact order and hits by track on top of a search that only knows the best rows.

Milvus decides by itself which of several rows with equal scores it returns, and 2.3 has no grouping
by two fields. So more rows than needed are fetched, until the order of the first k is certain.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_rt.gallery.milvus_rows import decode_text, decode_time, expression_of_tracks
from upperson_rt.gallery.ranking import best_of_tracks
from upperson_rt.gallery.records import Hit, TrackSpan

__all__ = ["MOST_HITS", "Search", "best_of_each_track", "best_rows", "with_spans"]

MOST_HITS = 16_384
"""The server's limit for rows per query."""

Search: TypeAlias = Callable[[NDArray[np.float32], int, str], Sequence[list[Hit]]]
"""Takes (Q, D) queries, a limit and an expression; gives up to that many hits each, sorted by
falling score, then by id."""
_Track: TypeAlias = tuple[str | None, str]
_TRACKS_AT_A_TIME = 500


def best_rows(
    search: Search, queries: NDArray[np.float32], k: int, condition: str
) -> list[list[Hit]]:
    """Return the k best hits of each query, ties by id."""
    found = []
    for row, hits in enumerate(search(queries, k + 1, condition)):
        limit, best = k + 1, hits
        while len(best) == limit < MOST_HITS and best[k - 1].score == best[-1].score:
            limit = min(MOST_HITS, 2 * limit)
            (best,) = search(queries[row : row + 1], limit, condition)
        found.append(best[:k])
    return found


def best_of_each_track(
    search: Search, query: NDArray[np.float32], k: int, condition: str
) -> list[Hit]:
    """Return the best hit of each of the k best tracks for one (1, D) query, without spans."""
    found: list[Hit] = []
    remaining = condition
    limit = min(MOST_HITS, 4 * k + 64)
    while True:
        (hits,) = search(query, limit, remaining)
        best = best_of_tracks(hits)
        if len(hits) < limit:
            return [*found, *best][:k]
        # A row with the last score may have been left out for one that comes after it by id.
        certain = [hit for hit in best if hit.score > hits[-1].score]
        if len(found) + len(certain) >= k:
            return [*found, *certain][:k]
        if limit < MOST_HITS:
            limit = min(MOST_HITS, 4 * limit)
            continue
        # So many pictures of so few tracks: go on without those tracks.
        found += certain or best
        remaining = " and ".join(filter(None, [condition, _none_of(found)]))


def _none_of(hits: Iterable[Hit]) -> str:
    alone = [hit.id for hit in hits if hit.item.track is None]
    tracks = expression_of_tracks(set(filter(None, map(_track_of, hits))))
    parts = [f"id not in {alone}" if alone else "", f"not ({tracks})" if tracks else ""]
    return " and ".join(filter(None, parts))


def _track_of(hit: Hit) -> _Track | None:
    return None if hit.item.track is None else (hit.item.camera, hit.item.track)


def with_spans(
    found: Sequence[Sequence[Hit]],
    condition: str,
    read: Callable[[str, Sequence[str]], Iterable[Mapping[str, Any]]],
) -> list[list[Hit]]:
    """Return hits by track with their spans.

    Args:
        found: Hits of each query.
        condition: Of the search.
        read: Takes an expression and fields, gives rows.
    """
    tracks = sorted({*filter(None, (_track_of(hit) for hits in found for hit in hits))}, key=str)
    spans: dict[_Track, TrackSpan] = {}
    for start in range(0, len(tracks), _TRACKS_AT_A_TIME):
        part = expression_of_tracks(tracks[start : start + _TRACKS_AT_A_TIME])
        both = f"({condition}) and ({part})" if condition else part
        for row in read(both, ("camera", "track", "time")):
            name = (decode_text(row["camera"]), decode_text(row["track"]) or "")
            spans[name] = _longer(spans.get(name), decode_time(row["time"]))
    return [
        [
            hit if (track := _track_of(hit)) is None else replace(hit, span=spans.get(track))
            for hit in hits
        ]
        for hits in found
    ]


def _longer(span: TrackSpan | None, time: float | None) -> TrackSpan:
    if span is None:
        return TrackSpan(first_time=time, last_time=time, pictures=1)
    times = [t for t in (span.first_time, span.last_time, time) if t is not None]
    return TrackSpan(
        first_time=min(times, default=None),
        last_time=max(times, default=None),
        pictures=span.pictures + 1,
    )
