"""Hits grouped by track."""

from collections.abc import Sequence
from dataclasses import replace

from upperson_rt.gallery.records import Hit, TrackSpan

__all__ = ["best_of_tracks", "span_of"]


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
