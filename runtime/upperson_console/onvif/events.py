"""Events of recordings, which follow from the rows of the gallery.

A recording begins and ends with its earliest and latest picture, its track with them. Each person
who is seen, a track of the gallery, is an event at the first picture within the range.
"""

import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from uuid import UUID
from xml.etree.ElementTree import Element

from upperson_console.accounts import Account
from upperson_console.onvif.device import Address
from upperson_console.onvif.filters import CONCRETE_SET, Test, TopicTest
from upperson_console.onvif.inventory import TRACK, Recording, token_of
from upperson_console.onvif.results import key_of
from upperson_console.onvif.sessions import SessionResult
from upperson_console.onvif.soap import NOTIFICATION, SCHEMA, element, elements, time_text
from upperson_console.service import ConsoleService
from upperson_rt.gallery import Filter, Hit, Item

RECORDING_STATE = "tns1:RecordingHistory/Recording/State"
TRACK_STATE = "tns1:RecordingHistory/Track/State"
PERSON = "tns1:RuleEngine/ObjectTrack/Aggregation"
_STATES = {RECORDING_STATE: "IsRecording", TRACK_STATE: "IsDataPresent"}
"""The item of each property."""
_AT_ONCE = 10_000
"""Pictures that are looked at together."""
_LATEST_S = 253_402_300_800.0
_SHORTEST_S = 1.0
"""A part of the range that is not divided further."""
_MOST_PARTS = 5
"""Parts of the range that are looked at before what was found is returned."""


@dataclass(kw_only=True)
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
    passed: float | None = None
    """Unix seconds up to which all people were found, in the direction of the search."""
    found: dict[bytes, tuple[float, SessionResult]] = field(default_factory=dict)
    """Those that were not returned yet, and when they came."""

    def where(self) -> Filter | None:
        """Return the filter of the pictures; None if there are none to look at."""
        names = [one.camera for one in self.recordings()]
        first, last = min(self.start, self.end), max(self.start, self.end)
        until = None if last == math.inf else math.nextafter(last, math.inf)
        whole = Filter(camera=names or None, since=first, until=until)
        return self.account.visible(whole) if names else None

    def __call__(self, skip: Collection[bytes], count: int) -> tuple[list[SessionResult], bool]:
        """Return the next events without some keys, and whether there may be more."""
        reached, timed = None, [*self._changes()]
        if self.takes_topic(PERSON):
            people, reached = self._people(skip, count + 1)
            timed += people
        if reached is not None:  # People may come before what lies further on.
            timed = [one for one in timed if (one[0] < reached) == self._is_forward]
        timed.sort(key=lambda pair: pair[0], reverse=not self._is_forward)
        events = [*self._start_states(), *(one for _, one in timed)]
        fresh = [one for one in events if one.key not in skip]
        return fresh[:count], reached is not None or len(fresh) > count

    @property
    def _is_forward(self) -> bool:
        return self.start <= self.end

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

    def _people(
        self, skip: Collection[bytes], count: int
    ) -> tuple[list[tuple[float, SessionResult]], float | None]:
        """Return people without some keys and when they come, and up to where was looked.

        That is a time, up to which all are returned, or None if it was the end of the range.
        """
        where, spans = self.where(), [one.span for one in self.recordings() if one.span]
        if where is None or not spans:
            return [], None
        known = min(first for first, _ in spans), max(last for _, last in spans)
        low, high = where.since or 0.0, where.until or _LATEST_S
        if self.passed is not None:
            low, high = (self.passed, high) if self._is_forward else (low, self.passed)
        self.found = {key: one for key, one in self.found.items() if key not in skip}
        last: dict[bytes, tuple[float, SessionResult]] = {}
        for _ in range(_MOST_PARTS):
            if low >= high or len(self.found) >= count:
                break
            part = self._part(replace(where, since=low, until=high), known)
            for time, hit in self._first_hits(part):
                key = key_of(hit)
                if key.bytes not in skip and key.bytes not in self.found:
                    last.update((key.bytes, (time, one)) for one in self._person(key, time, hit))
            if self._is_forward:
                low = part.until or high
            else:
                high = part.since or low
            if low < high:  # New pictures are expected in the last part only.
                self.passed = low if self._is_forward else high
                self.found |= last
                last = {}
        edge = low if self._is_forward else high
        return [*(self.found | last).values()], edge if low < high else None

    def _part(self, where: Filter, known: tuple[float, float]) -> Filter:
        """Return the part of a range that comes first, with few enough pictures to look at."""
        since, until = where.since or 0.0, where.until or _LATEST_S
        while self.service.gallery.count(where) > _AT_ONCE:
            first, last = max(since, known[0]), min(until, known[1])
            if first >= last:  # They came after the cameras were last looked at.
                first, last = since, until
            if last - first <= _SHORTEST_S:
                break
            middle = (first + last) / 2
            since, until = (since, middle) if self._is_forward else (middle, until)
            where = replace(where, since=since, until=until)
        return where

    def _first_hits(self, where: Filter) -> list[tuple[float, Hit]]:
        """Return the first picture of each track, and of each that has no track, with its time."""
        gallery = self.service.gallery
        firsts: dict[tuple[str | None, ...], Item] = {}
        for item in gallery.items(where):
            name = ("", item.key) if item.track is None else (item.camera, item.track)
            if name not in firsts or (item.time or 0.0) < (firsts[name].time or 0.0):
                firsts[name] = item
        ids = gallery.ids([item.key for item in firsts.values()])
        return [
            (item.time or 0.0, Hit(id=ids[item.key], score=0.0, item=item))
            for item in firsts.values()
            if item.key in ids
        ]

    def _taken(self, event: SessionResult) -> Iterator[SessionResult]:
        """Yield an event if the filter takes its message."""
        (message,) = event.element.iter(f"{{{SCHEMA}}}Message")
        if self.takes_message(message):
            yield event

    def _person(self, key: UUID, time: float, hit: Hit) -> Iterator[SessionResult]:
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
        event = _event(PERSON, time, source, data, item)
        yield from self._taken(SessionResult(key.bytes, event, hit))


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
