"""Events of recordings, which follow from the rows of the gallery.

A recording begins and ends with its earliest and latest picture, its track with them. Each person
who is seen, a track of the gallery, is an event at the first picture within the range.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from xml.etree.ElementTree import Element

import numpy as np

from upperson_console.accounts import Account
from upperson_console.onvif.device import Address
from upperson_console.onvif.filters import CONCRETE_SET, Test, TopicTest
from upperson_console.onvif.inventory import TRACK, Recording, token_of
from upperson_console.onvif.results import key_of
from upperson_console.onvif.sessions import SessionResult, no_room
from upperson_console.onvif.soap import NOTIFICATION, SCHEMA, element, elements, time_text
from upperson_console.search import MOST_HITS
from upperson_console.service import ConsoleService
from upperson_rt.gallery import Filter, Hit

RECORDING_STATE = "tns1:RecordingHistory/Recording/State"
TRACK_STATE = "tns1:RecordingHistory/Track/State"
PERSON = "tns1:RuleEngine/ObjectTrack/Aggregation"
_STATES = {RECORDING_STATE: "IsRecording", TRACK_STATE: "IsDataPresent"}
"""The item of each property."""
_AT_ONCE = 2 * MOST_HITS
"""Tracks of one look into the gallery: more than a search returns in all."""
_LATEST_S = 253_402_300_800.0
_SHORTEST_S = 1.0
"""Of a part of the range; of more tracks within one some are left out."""
_MOST_LOOKS = 50
"""Parts of the range that one request looks at."""


@dataclass(frozen=True, kw_only=True)
class EventSearch:
    """A search for events; calling it returns results as a `SearchSession` needs them."""

    service: ConsoleService
    account: Account
    address: Address
    recordings: Callable[[], list[Recording]]
    """Return the recordings in scope."""
    start: float
    end: float
    """Unix seconds; before `start` if the search goes backwards."""
    takes_topic: TopicTest
    takes_message: Test
    with_start: bool
    """Whether the states at the start are returned as events."""

    def where(self) -> Filter | None:
        """Return the filter of the pictures; None if there are none to look at."""
        names = [one.camera for one in self.recordings()]
        first, last = min(self.start, self.end), max(self.start, self.end)
        until = None if last == math.inf else math.nextafter(last, math.inf)
        whole = Filter(camera=names or None, since=first, until=until)
        return self.account.visible(whole) if names else None

    def __call__(self, skip: Collection[bytes], count: int) -> list[SessionResult]:
        """Return the next events without some keys, up to a number, in the order of the search."""
        timed = [*self._changes()]
        if self.takes_topic(PERSON):
            timed += self._people(len(skip) + count)
        timed.sort(key=lambda pair: pair[0], reverse=self.end < self.start)
        events = [*self._start_states(), *(one for _, one in timed)]
        return [*islice((one for one in events if one.key not in skip), count)]

    def _start_states(self) -> Iterator[SessionResult]:
        times = [self.start, self.end] if self.end < self.start else [self.start]
        for one in self.recordings() if self.with_start else ():
            for topic in filter(self.takes_topic, _STATES):
                for time in times:
                    is_on = one.span is not None and one.span[0] <= time < one.span[1]
                    yield from self._taken(_state(one.token, topic, time, is_on, is_start=True))

    def _changes(self) -> Iterator[tuple[float, SessionResult]]:
        first, last = min(self.start, self.end), max(self.start, self.end)
        for one in self.recordings():
            for topic in filter(self.takes_topic, _STATES):
                for time, is_on in zip(one.span or (), (True, False), strict=False):
                    if first <= time <= last:
                        for event in self._taken(_state(one.token, topic, time, is_on)):
                            yield time, event

    def _people(self, count: int) -> list[tuple[float, SessionResult]]:
        """Return tracks and when they begin, at least a number, of a whole part of the range."""
        where, spans = self.where(), [one.span for one in self.recordings() if one.span]
        if where is None or not spans:
            return []
        known = min(first for first, _ in spans), max(last for _, last in spans)
        low, high = where.since or 0.0, where.until or _LATEST_S
        found: dict[bytes, tuple[float, SessionResult]] = {}
        for _ in range(_MOST_LOOKS):
            if low >= high or len(found) >= count:
                return [*found.values()]
            since, until = low, high
            while len(hits := self._hits(where, since, until)) == _AT_ONCE:
                first, last = max(since, known[0]), min(until, known[1])
                if first >= last:  # They came after the cameras were last looked at.
                    first, last = since, until
                if last - first <= _SHORTEST_S:
                    break
                middle = (first + last) / 2
                since, until = (since, middle) if self.start <= self.end else (middle, until)
            for hit in hits:
                begun = hit.item.time if hit.span is None else hit.span.first_time
                time = since if begun is None else begun
                for event in self._taken(self._person(time, hit)):
                    found.setdefault(event.key, (time, event))
            low, high = (until, high) if self.start <= self.end else (low, since)
        raise no_room("there is too much to look through: search a shorter time")

    def _hits(self, where: Filter, since: float, until: float) -> list[Hit]:
        gallery = self.service.gallery
        any_1D = np.full((1, gallery.embed_dim), gallery.embed_dim**-0.5, np.float32)
        part = replace(where, since=since, until=until)
        (hits,) = gallery.search(any_1D, _AT_ONCE, part, by_track=True)
        return [replace(hit, score=0.0) for hit in hits]

    def _taken(self, event: SessionResult) -> Iterator[SessionResult]:
        """Yield an event if the filter takes its message."""
        (message,) = event.element.iter(f"{{{SCHEMA}}}Message")
        if self.takes_message(message):
            yield event

    def _person(self, time: float, hit: Hit) -> SessionResult:
        key = key_of(hit)
        appearance = element(
            SCHEMA,
            "Appearance",
            element(SCHEMA, "Class", element(SCHEMA, "Type", "Human")),
            element(SCHEMA, "ImageRef", self.address.picture(hit.id)),
        )
        source = {"RecordingToken": token_of(hit.item.camera or ""), "Track": TRACK}
        data = {"AggregationStart": time_text(time)}
        seen = element(SCHEMA, "Object", appearance, UUID=str(key))
        item = element(SCHEMA, "ElementItem", seen, Name="Object")
        return SessionResult(key.bytes, _event(PERSON, time, source, data, item), hit)


def _state(
    token: str, topic: str, time: float, is_on: bool, is_start: bool = False
) -> SessionResult:
    """Return the event of a property that changes, or that it had a value at the start."""
    source = {"RecordingToken": token} | ({"Track": TRACK} if topic == TRACK_STATE else {})
    data = {_STATES[topic]: str(is_on).lower()}
    key = f"{topic} {token} {is_on} {time if is_start else ''}".encode()
    return SessionResult(key, _event(topic, time, source, data, is_start=is_start))


def _event(
    topic: str,
    time: float,
    source: dict[str, str],
    data: dict[str, str],
    object_item: Element | None = None,
    is_start: bool = False,
) -> Element:
    def items(values: dict[str, str]) -> list[Element]:
        return [element(SCHEMA, "SimpleItem", Name=name, Value=v) for name, v in values.items()]

    about = {"UtcTime": time_text(time)}
    if topic in _STATES:
        about["PropertyOperation"] = "Initialized" if is_start else "Changed"
    inner = (
        element(SCHEMA, "Source", *items(source)),
        element(SCHEMA, "Data", *items(data), object_item),
    )
    event = element(
        SCHEMA,
        "Event",
        element(NOTIFICATION, "Topic", topic, Dialect=CONCRETE_SET),
        element(NOTIFICATION, "Message", element(SCHEMA, "Message", *inner, **about)),
    )
    track = "" if topic == RECORDING_STATE else TRACK
    values = {"RecordingToken": source["RecordingToken"], "TrackToken": track}
    return element(
        SCHEMA,
        "Result",
        *elements(SCHEMA, values | {"Time": time_text(time)}),
        event,
        element(SCHEMA, "StartStateEvent", str(is_start).lower()),
    )
