"""Timelines: hits by camera and time, and a person's tracks over cameras."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from upperson_console.search import Search
from upperson_console.service import TrackViews, span_of
from upperson_console.times import local_time
from upperson_console.translation import gettext, number, word
from upperson_rt.gallery import Hit, Item, TrackSpan
from upperson_rt.search.service import SearchResult

_STEPS_S = (1, 5, 15, 60, 300, 900, 3600, 3 * 3600, 6 * 3600, 86400, 7 * 86400, 30 * 86400)
_MOST_BARS = 60
_MOST_LINES = 8


@dataclass(frozen=True)
class Bar:
    """Hits of one camera in one interval."""

    place: float
    """Start of the interval, 0 to 1."""
    width: float
    height: float
    """Hits as a share of the highest bar, 0 to 1."""
    count: int
    text: str
    address: str
    """Query string of the search narrowed to this bar."""


@dataclass(frozen=True)
class Line:
    """The bars of one camera."""

    camera: str
    bars: list[Bar]
    address: str
    """Query string of the search narrowed to this camera."""


@dataclass(frozen=True)
class Stop:
    """A track on the line of its camera."""

    id: int
    row: int
    """Index of the camera."""
    place: float
    """Start of the track, 0 to 1."""
    width: float
    is_own: bool
    """Whether it is the track of the page, not a similar one."""
    text: str


@dataclass(frozen=True)
class Whereabouts:
    """A track and similar ones over cameras and time."""

    cameras: list[str]
    stops: list[Stop]
    """By time."""
    way: list[Stop]
    """Those that likely show the same person, this track included; empty if there is no other."""
    begin: str
    end: str


@dataclass(frozen=True)
class Timeline:
    """Hits by camera and time."""

    lines: list[Line]
    begin: str
    end: str
    hits: int


def timeline_of(search: Search, hits: Sequence[Hit]) -> Timeline | None:
    """Return the timeline of hits; None if fewer than two have a camera and a time."""
    timed = [(h.item.camera, h.item.time) for h in hits if h.item.time is not None]
    placed = [(camera, time) for camera, time in timed if camera is not None]
    if len(placed) < 2:
        return None
    first, last = min(time for _, time in placed), max(time for _, time in placed)
    span = last - first
    step = next((step for step in _STEPS_S if span / step <= _MOST_BARS), span / _MOST_BARS)
    begin = first // step * step
    counts = Counter((camera, int((time - begin) // step)) for camera, time in placed)
    parts = int((last - begin) // step) + 1
    most = max(counts.values())
    per_camera = Counter(camera for camera, _ in placed)
    lines = []
    for camera, _ in per_camera.most_common(_MOST_LINES):
        bars = []
        for part in sorted(part for name, part in counts if name == camera):
            since, count = begin + part * step, counts[camera, part]
            where = replace(search.where, camera=(camera,), since=since, until=since + step)
            bars.append(
                Bar(
                    place=part / parts,
                    width=1 / parts,
                    height=count / most,
                    count=count,
                    text=f"{camera}, {local_time(since)}{word('colon', ': ')}{number(count)}",
                    address=search.address(where=where, last=None),
                )
            )
        only = replace(search.where, camera=(camera,))
        lines.append(Line(camera, bars, search.address(where=only)))
    lines.sort(key=lambda line: line.camera)
    return Timeline(lines, local_time(begin), local_time(begin + parts * step), len(placed))


def whereabouts(person: TrackViews, elsewhere: SearchResult) -> Whereabouts | None:
    """Return a track and the nearest ones of other cameras over time; None without times."""
    own = span_of(person.views)
    tracks: list[tuple[TrackSpan, int, Item, str]] = [
        (own, person.id, person.item, gettext("this track"))
    ]
    tracks += [
        (
            hit.span or span_of([(hit.id, hit.item)]),
            hit.id,
            hit.item,
            label and word("match", label),
        )
        for hit, label in zip(elsewhere.hits, elsewhere.labels, strict=True)
    ]
    timed = [
        (span.first_time, span.last_time, id_, item.camera or gettext("no camera"), label)
        for span, id_, item, label in tracks
        if span.first_time is not None and span.last_time is not None
    ]
    if len(timed) < 2 or own.first_time is None:
        return None
    timed.sort()
    begin, end = min(first for first, *_ in timed), max(last for _, last, *_ in timed)
    length = (end - begin) or 1.0
    cameras = list(dict.fromkeys(camera for *_, camera, _ in timed))
    stops = [
        Stop(
            id=id_,
            row=cameras.index(camera),
            place=(first - begin) / length,
            width=(last - first) / length,
            is_own=id_ == person.id,
            text=f"{camera}, {local_time(first)}{label and word('colon', ': ') + label}",
        )
        for first, last, id_, camera, label in timed
    ]
    likely = {
        hit.id
        for hit, label in zip(elsewhere.hits, elsewhere.labels, strict=True)
        if label == "likely"
    }
    way = [stop for stop in stops if stop.is_own or stop.id in likely]
    way = way if len(way) > 1 else []
    return Whereabouts(cameras, stops, way, local_time(begin), local_time(end))
