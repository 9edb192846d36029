"""The operations of the ONVIF search service; a camera of the gallery is a recording.

Searches take the same path as those of the console: the same hits, only cameras that the account
may see, and a line in the query log before a result is returned.
"""

import math
import re
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from xml.etree.ElementTree import Element

from starlette.concurrency import run_in_threadpool

from upperson_console.accounts import Account
from upperson_console.onvif import soap
from upperson_console.onvif.device import Address
from upperson_console.onvif.events import EventSearch
from upperson_console.onvif.filters import read_event_filter
from upperson_console.onvif.inventory import Inventory, Recording
from upperson_console.onvif.results import key_of, result_of
from upperson_console.onvif.sessions import (
    LONGEST_S,
    Find,
    Kind,
    SearchSession,
    SearchSessions,
    SessionResult,
)
from upperson_console.onvif.soap import SCHEMA, SEARCH, Fields, element, invalid
from upperson_console.results import scored_hits
from upperson_console.search import MOST_HITS, Search
from upperson_console.service import ConsoleService
from upperson_rt.gallery import Filter, Hit

_MOST_BELOW = 200
"""Hits below a client's least likelihood that a search looks past."""
_UNCALIBRATED = 0.49
"""Similarity of a hit without a likelihood, at most: a client's threshold of 0.5 drops it."""
_LISTS: dict[str, tuple[Kind, str]] = {
    "GetRecordingSearchResults": ("recordings", "GetRecordingSearchResultsResponse"),
    "GetEventSearchResults": ("events", "GetEventSearchResultsResponse"),
    "GetNLSearchResultsRequest": ("sentence", "GetNLSearchResultsResponse"),
    "GetImageSearchResultsRequest": ("image", "GetImageSearchResultsResponse"),
}
"""By request for results: the kind of search, and the response."""


@dataclass(frozen=True)
class Call:
    """An authenticated request."""

    request: Element
    account: Account
    address: Address
    is_gone: Callable[[], Awaitable[bool]]
    """Return whether the client has disconnected."""


class Recordings:
    """The search service over a gallery."""

    def __init__(self, service: ConsoleService, sessions: SearchSessions) -> None:
        self.sessions = sessions
        self._service = service
        self._inventory = Inventory(service)
        self.operations: dict[str, Callable[[Call], Awaitable[Element]]] = {
            "FindRecordings": self._find_recordings,
            "FindEvents": self._find_events,
            "SearchImageByNLRequest": self._by_sentence,
            "SearchImageByImageRequest": self._by_image,
            "GetSearchState": self._state,
            "EndSearch": self._end,
            **dict.fromkeys(_LISTS, self._results),
            "GetRecordingSummary": self._of_inventory,
            "GetRecordingInformation": self._of_inventory,
            "GetMediaAttributes": self._of_inventory,
        }
        """Operations that need authentication, by the local name of the request."""

    async def _of_inventory(self, call: Call) -> Element:
        return await run_in_threadpool(self._inventory.answer, call.account, call.request)

    # Begin a search.

    async def _by_sentence(self, call: Call) -> Element:
        given = Fields(
            call.request,
            "StartPoint", "EndPoint", "RecordingToken", "Text", "Similarity", "MaxMatches",
            "KeepAliveTime",
        )  # fmt: skip
        sentence = given.one("Text", soap.text)
        if not sentence:
            raise invalid("Text is empty: describe the person in a few words")
        least = given.maybe("Similarity", soap.similarity)
        return await self._by_query(call, given, Search(sentence=sentence), least or 0.0)

    async def _by_image(self, call: Call) -> Element:
        given = Fields(
            call.request,
            "StartPoint", "EndPoint", "RecordingToken", "TargetImageURI", "TargetImageData",
            "MaxMatches", "KeepAliveTime",
        )  # fmt: skip
        content = given.maybe("TargetImageData", soap.picture)
        place = given.maybe("TargetImageURI", soap.text)
        if content:
            kept = await run_in_threadpool(self._service.query_pictures.add, BytesIO(content))
            return await self._by_query(call, given, Search(picture=kept.id))
        if not place:
            raise invalid("TargetImageData or TargetImageURI must be given")
        # Other addresses are not fetched: a client could reach hosts beside this server.
        own = re.fullmatch(re.escape(call.address.picture(0)[:-1]) + "([0-9]{1,19})", place)
        if own is None:
            raise invalid(
                "TargetImageURI must be that of a result of this server: send other pictures as "
                "TargetImageData"
            )
        return await self._by_query(call, given, Search(like=int(own[1])))

    async def _by_query(
        self, call: Call, given: Fields, search: Search, least: float = 0.0
    ) -> Element:
        start, end = _range(given)
        first, last = (start, end) if end is None else (min(start, end), max(start, end))
        token = given.maybe("RecordingToken", soap.text)
        if token is not None:
            self._inventory.some(call.account, [token])
        where = Filter(since=first, until=None if last is None else math.nextafter(last, math.inf))
        search = replace(search, where=where)

        def recordings() -> list[Recording]:
            known = self._inventory.recordings(call.account).values()
            return [one for one in known if token in (None, one.token)]

        def find(skip: Collection[bytes], count: int) -> list[SessionResult]:
            names = [one.camera for one in recordings()]
            if not names:
                return []
            narrowed = replace(search, where=replace(where, camera=names))
            # Likelihoods do not fall with scores alone: hits below the client's least one count.
            wanted = len(skip) + count + (_MOST_BELOW if least else 0)
            hits = scored_hits(self._service, call.account, narrowed, wanted)
            fresh = (
                (key, hit, similarity)
                for hit, likelihood in hits
                if (similarity := _similarity(hit, likelihood)) >= least
                and (key := key_of(hit)).bytes not in skip
            )
            return [
                SessionResult(key.bytes, result_of(key, hit, similarity, call.address), hit)
                for key, hit, similarity in islice(fresh, count)
            ]

        def note(found: Sequence[SessionResult], count: int) -> None:
            hits = [one.hit for one in found if one.hit is not None]
            names = [one.camera for one in recordings()]
            narrowed = replace(search, where=replace(where, camera=names or None))
            more = _details(call, names)
            self._service.note_search(call.account, narrowed, hits, count, more)

        kind: Kind = "sentence" if search.sentence else "image"
        return await self._begin(call, given, kind, _paged(find), note, recordings, start, end)

    async def _find_recordings(self, call: Call) -> Element:
        given = Fields(call.request, "Scope", "MaxMatches", "KeepAliveTime")
        recordings = self._scope(call, given)

        def find(skip: Collection[bytes], count: int) -> list[SessionResult]:
            left = (one for one in recordings() if one.token.encode() not in skip)
            return [
                SessionResult(one.token.encode(), one.information()) for one in islice(left, count)
            ]

        def note(found: Sequence[SessionResult], count: int) -> None:
            """Write nothing: a list of cameras is no search."""

        now = self.sessions.now()
        return await self._begin(call, given, "recordings", _paged(find), note, recordings, now)

    async def _find_events(self, call: Call) -> Element:
        given = Fields(
            call.request,
            "StartPoint", "EndPoint", "Scope", "SearchFilter", "IncludeStartState", "MaxMatches",
            "KeepAliveTime",
        )  # fmt: skip
        start, end = _range(given)
        filters = given.all("SearchFilter")
        takes_topic, takes_message = read_event_filter(filters[0] if filters else Element("none"))
        search = EventSearch(
            service=self._service,
            account=call.account,
            address=call.address,
            recordings=self._scope(call, given),
            start=start,
            end=math.inf if end is None else end,
            takes_topic=takes_topic,
            takes_message=takes_message,
            with_start=given.one("IncludeStartState", soap.is_true),
        )

        def note(found: Sequence[SessionResult], count: int) -> None:
            hits = [one.hit for one in found if one.hit is not None]
            more = _details(call, [one.camera for one in search.recordings()])
            self._service.note(
                call.account, "query", hits, more, search.where(), k=count, by_track=True
            )

        return await self._begin(call, given, "events", search, note, search.recordings, start, end)

    def _scope(self, call: Call, given: Fields) -> Callable[[], list[Recording]]:
        scopes = given.all("Scope")
        return self._inventory.in_scope(call.account, scopes[0] if scopes else Element("Scope"))

    async def _begin(
        self,
        call: Call,
        given: Fields,
        kind: Kind,
        search: Find,
        note: Callable[[list[SessionResult], int], None],
        recordings: Callable[[], list[Recording]],
        start: float,
        end: float | None = None,
    ) -> Element:
        """Begin a session, and report now what is wrong with its search."""

        def reached() -> float:
            if end is not None:
                return min(end, self.sessions.now()) if end > start else end
            return max([start, *(one.span[1] for one in recordings() if one.span is not None)])

        def check() -> None:
            session.search((), 1)
            session.note([], session.most)

        session = SearchSession(
            account=call.account,
            kind=kind,
            keep_s=min(given.one("KeepAliveTime", soap.seconds), LONGEST_S),
            search=search,
            note=note,
            reached=reached,
            start=start,
            until=None if end is None else max(start, end),
            most=min(given.maybe("MaxMatches", soap.number(1)) or MOST_HITS, MOST_HITS),
        )
        self.sessions.begin(session)  # First, so that a full server does not search.
        try:
            with self.sessions.answering(session):
                await run_in_threadpool(check)
        except BaseException:
            self.sessions.end(session)
            raise
        name = call.request.tag.rpartition("}")[2].removesuffix("Request")
        return element(SEARCH, f"{name}Response", element(SEARCH, "SearchToken", session.token))

    # Return results, and end a search.

    async def _results(self, call: Call) -> Element:
        given = Fields(call.request, "SearchToken", "MinResults", "MaxResults", "WaitTime")
        name = call.request.tag.rpartition("}")[2]
        kind, answer = _LISTS[name]
        session = self.sessions.find(call.account, given.one("SearchToken", soap.text), kind)
        most = given.maybe("MaxResults", soap.number(1))
        wait_s = given.maybe("WaitTime", soap.seconds)
        least = given.maybe("MinResults", soap.number(0))
        if least is None:  # With a wait time, wait for all; without one, for none.
            least = (most or MOST_HITS) if wait_s else 0
        state, found = await self.sessions.results(
            session,
            least,
            MOST_HITS if most is None else most,
            LONGEST_S if wait_s is None else wait_s,
            call.is_gone,
        )
        results = element(
            SEARCH,
            "ResultList",
            element(SCHEMA, "SearchState", state),
            *(one.element for one in found),
        )
        return element(SEARCH, answer, results)

    async def _end(self, call: Call) -> Element:
        token = Fields(call.request, "SearchToken").one("SearchToken", soap.text)
        session = self.sessions.find(call.account, token)
        self.sessions.end(session)
        has_begun = session.state != "Queued"
        reached = await run_in_threadpool(session.reached) if has_begun else session.start
        return element(
            SEARCH, "EndSearchResponse", element(SEARCH, "Endpoint", soap.time_text(reached))
        )

    async def _state(self, call: Call) -> Element:
        token = Fields(call.request, "SearchToken").one("SearchToken", soap.text)
        state = self.sessions.find(call.account, token).state
        return element(SEARCH, "GetSearchStateResponse", element(SEARCH, "State", state))


def _paged(find: Callable[[Collection[bytes], int], list[SessionResult]]) -> Find:
    """Let one result more than is returned show whether these were all."""

    def search(skip: Collection[bytes], count: int) -> tuple[list[SessionResult], bool]:
        found = find(skip, count + 1)
        return found[:count], len(found) > count

    return search


def _range(given: Fields) -> tuple[float, float | None]:
    return given.one("StartPoint", soap.unix_time), given.maybe("EndPoint", soap.unix_time)


def _details(call: Call, cameras: Sequence[str]) -> dict[str, object]:
    """Return what the query log says of a search; a filter without a camera would mean all."""
    name = call.request.tag.rpartition("}")[2].removesuffix("Request")
    return {"onvif": name} if cameras else {"onvif": name, "cameras": []}


def _similarity(hit: Hit, likelihood: float | None) -> float:
    """Return a likelihood; where there is none, a value in the order of the scores."""
    if likelihood is not None:
        return likelihood
    return _UNCALIBRATED * min(1.0, max(0.0, (hit.score + 1) / 2))
