"""The operations of the ONVIF search service; a camera of the gallery is a recording.

Searches take the same path as those of the console: the same hits, only cameras that the account
may see, and a line in the query log before a result is returned.
"""

import hashlib
import json
import math
import re
import uuid
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from xml.etree.ElementTree import Element

from starlette.concurrency import run_in_threadpool

from upperson_console.accounts import Account
from upperson_console.onvif import soap
from upperson_console.onvif.device import Address, device_information
from upperson_console.onvif.sessions import (
    LONGEST_S,
    Kind,
    SearchSession,
    SearchSessions,
    SessionResult,
)
from upperson_console.onvif.soap import DEVICE, SCHEMA, SEARCH, Fields, element, elements, invalid
from upperson_console.results import scored_hits
from upperson_console.search import MOST_HITS, Search
from upperson_console.service import ConsoleService
from upperson_rt.gallery import CameraInfo, Filter, Hit

_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LONGEST_NAME = 64
_MOST_BELOW = 200
"""Hits below a client's least likelihood that a search looks past."""
_LISTS: dict[str, tuple[Kind, str]] = {
    "GetRecordingSearchResults": ("recordings", "GetRecordingSearchResultsResponse"),
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
        self.operations: dict[str, Callable[[Call], Awaitable[Element]]] = {
            f"{{{DEVICE}}}GetDeviceInformation": self._device_information,
            f"{{{SEARCH}}}FindRecordings": self._find_recordings,
            f"{{{SEARCH}}}SearchImageByNLRequest": self._by_sentence,
            f"{{{SEARCH}}}SearchImageByImageRequest": self._by_image,
            f"{{{SEARCH}}}EndSearch": self._end,
            **{f"{{{SEARCH}}}{request}": self._results for request in _LISTS},
        }
        """Operations that need authentication, by the name of the request."""

    async def _device_information(self, call: Call) -> Element:
        Fields(call.request)
        return device_information(self._service.encoder.fingerprint, self._service.encoder.variant)

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
        return await self._begin(call, given, Search(sentence=sentence), least or 0.0)

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
            return await self._begin(call, given, Search(picture=kept.id))
        if not place:
            raise invalid("TargetImageData or TargetImageURI must be given")
        # Other addresses are not fetched: a client could reach hosts beside this server.
        own = re.fullmatch(re.escape(call.address.picture(0)[:-1]) + "([0-9]{1,19})", place)
        if own is None:
            raise invalid(
                "TargetImageURI must be that of a result of this server: send other pictures as "
                "TargetImageData"
            )
        return await self._begin(call, given, Search(like=int(own[1])))

    async def _begin(
        self, call: Call, given: Fields, search: Search, least: float = 0.0
    ) -> Element:
        start = given.one("StartPoint", soap.unix_time)
        end = given.maybe("EndPoint", soap.unix_time)
        first, last = (start, end) if end is None else (min(start, end), max(start, end))
        token = given.maybe("RecordingToken", soap.text)
        if token is not None:
            self._camera(call.account, token)
        where = Filter(since=first, until=None if last is None else math.nextafter(last, math.inf))
        search = replace(search, where=where)

        def cameras() -> dict[str, CameraInfo]:
            known = self._tokens(call.account)
            chosen = known if token is None else {token} & known.keys()
            return {known[one][0]: known[one][1] for one in chosen}

        def find(skip: Collection[bytes], count: int) -> list[SessionResult]:
            names = [*cameras()]
            if not names:
                return []
            narrowed = replace(search, where=replace(where, camera=names))
            # Likelihoods do not fall with scores alone: hits below the client's least one count.
            wanted = len(skip) + count + (_MOST_BELOW if least else 0)
            hits = scored_hits(self._service, call.account, narrowed, wanted)
            fresh = (
                (key, hit, likelihood)
                for hit, likelihood in hits
                if likelihood >= least and (key := _key(hit)).bytes not in skip
            )
            return [
                SessionResult(key.bytes, _result(key, hit, likelihood, call.address), hit)
                for key, hit, likelihood in islice(fresh, count)
            ]

        def note(found: Sequence[SessionResult], count: int) -> None:
            hits = [one.hit for one in found if one.hit is not None]
            name = call.request.tag.rpartition("}")[2].removesuffix("Request")
            names = [*cameras()]
            narrowed = replace(search, where=replace(where, camera=names or None))
            more: dict[str, object] = {"onvif": name}
            if not names:  # A filter without a camera would mean all.
                more["cameras"] = []
            self._service.note_search(call.account, narrowed, hits, count, more)

        def reached() -> float:
            if end is not None:
                return min(end, self.sessions.now()) if end > start else end
            times = [info.last_time for info in cameras().values() if info.last_time is not None]
            return max([start, *times])

        session = SearchSession(
            account=call.account,
            kind="sentence" if search.sentence else "image",
            keep_s=_kept(given),
            search=find,
            note=note,
            reached=reached,
            start=start,
            until=last,
            most=_most(given),
        )

        def check() -> None:
            find((), 1)  # Reports now what is wrong with the search.
            note([], session.most)

        answer = self._begun(call, session)  # First, so that a full server does not search.
        try:
            with self.sessions.answering(session):
                await run_in_threadpool(check)
        except BaseException:
            self.sessions.end(session)
            raise
        return answer

    async def _find_recordings(self, call: Call) -> Element:
        given = Fields(call.request, "Scope", "MaxMatches", "KeepAliveTime")
        scopes = given.all("Scope")
        names = ("IncludedSources", "IncludedRecordings")
        scope = Fields(
            scopes[0] if scopes else Element("Scope"),
            "RecordingInformationFilter", "Extension", repeated=names,
        )  # fmt: skip
        if scope.maybe("RecordingInformationFilter", soap.text):
            raise invalid("RecordingInformationFilter is not supported: name IncludedRecordings")
        wanted = {(one.text or "").strip() for one in scope.all("IncludedRecordings")}
        for source in scope.all("IncludedSources"):
            token = soap.child(source, SCHEMA, "Token")
            wanted.add("" if token is None else (token.text or "").strip())

        def find(skip: Collection[bytes], count: int) -> list[SessionResult]:
            return [
                SessionResult(token.encode(), _recording(token, name, info))
                for token, (name, info) in sorted(self._tokens(call.account).items())
                if token.encode() not in skip and (not wanted or token in wanted)
            ][:count]

        session = SearchSession(
            account=call.account,
            kind="recordings",
            keep_s=_kept(given),
            search=find,
            note=lambda found, count: None,  # A list of cameras is no search.
            reached=self.sessions.now,
            start=self.sessions.now(),
            most=_most(given),
        )
        return self._begun(call, session)

    def _begun(self, call: Call, session: SearchSession) -> Element:
        self.sessions.begin(session)
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

    # Cameras as recordings.

    def _tokens(self, account: Account) -> dict[str, tuple[str, CameraInfo]]:
        """Return name and counts of each camera that an account may see, by token."""
        return {_token(name): (name, info) for name, info in self._service.cameras(account).items()}

    def _camera(self, account: Account, token: str) -> None:
        if token not in self._tokens(account):
            raise invalid("there is no such recording: ask FindRecordings", "InvalidToken")


def _kept(given: Fields) -> float:
    return min(given.one("KeepAliveTime", soap.seconds), LONGEST_S)


def _most(given: Fields) -> int:
    return min(given.maybe("MaxMatches", soap.number(1)) or MOST_HITS, MOST_HITS)


def _token(camera: str) -> str:
    """Return a camera's name, or its hash if the name cannot be a token."""
    if _PLAIN.fullmatch(camera):
        return camera
    return "camera-" + hashlib.sha256(camera.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _recording(token: str, name: str, info: CameraInfo) -> Element:
    source = {
        "SourceId": token,
        "Name": name[:_LONGEST_NAME],
        "Location": "",
        "Description": name,
        "Address": "",
    }
    times = {"EarliestRecording": info.first_time, "LatestRecording": info.last_time}
    known = {tag: soap.time_text(time) for tag, time in times.items() if time is not None}
    content = f"{info.pictures} pictures of people"
    return element(
        SCHEMA,
        "RecordingInformation",
        element(SCHEMA, "RecordingToken", token),
        element(SCHEMA, "Source", *elements(SCHEMA, source)),
        *elements(SCHEMA, {**known, "Content": content, "RecordingStatus": "Unknown"}),
    )


def _key(hit: Hit) -> uuid.UUID:
    """Return the id of a track, or of a picture without one; the same in every search."""
    item = hit.item
    name = ("track", item.camera, item.track) if item.track is not None else ("picture", item.key)
    return uuid.uuid5(uuid.NAMESPACE_OID, json.dumps(name))


def _result(key: uuid.UUID, hit: Hit, likelihood: float, address: Address) -> Element:
    """Return a hit as a result of either kind of search, whose types have the same fields."""
    values = {
        "ObjectUUID": str(key),
        "TargetImageURI": address.picture(hit.id),
        "Time": soap.time_text(hit.item.time or 0.0),
        "Similarity": f"{likelihood:.6g}",
        "RecordingToken": _token(hit.item.camera or ""),
    }
    return element(SCHEMA, "Result", *elements(SCHEMA, values))
