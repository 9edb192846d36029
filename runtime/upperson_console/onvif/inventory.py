"""The recordings: cameras of the gallery, each with one track of metadata, the people seen."""

import hashlib
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from xml.etree.ElementTree import Element

from upperson_console.accounts import Account
from upperson_console.onvif import soap
from upperson_console.onvif.filters import read_expression
from upperson_console.onvif.soap import SCHEMA, SEARCH, Fields, element, elements, invalid
from upperson_console.service import ConsoleService
from upperson_rt.gallery import CameraInfo

TRACK = "people"
"""Token of the one track of each recording."""
_PLAIN = re.compile(r"[A-Za-z0-9._-]{1,64}")
_LONGEST_NAME = 64


@dataclass(frozen=True)
class Recording:
    """A camera."""

    token: str
    camera: str
    info: CameraInfo

    @property
    def span(self) -> tuple[float, float] | None:
        """Unix seconds of the earliest and the latest picture; None if none has a time."""
        first, last = self.info.first_time, self.info.last_time
        return None if first is None or last is None else (first, last)

    def information(self) -> Element:
        """Return its RecordingInformation."""
        source = {
            "SourceId": self.token,
            "Name": self.camera[:_LONGEST_NAME],
            "Location": "",
            "Description": self.camera,
            "Address": "",
        }
        times = dict(zip(("EarliestRecording", "LatestRecording"), self.span or (), strict=False))
        known = {tag: soap.time_text(time) for tag, time in times.items()}
        return element(
            SCHEMA,
            "RecordingInformation",
            element(SCHEMA, "RecordingToken", self.token),
            element(SCHEMA, "Source", *elements(SCHEMA, source)),
            *elements(SCHEMA, {**known, "Content": f"{self.info.pictures} pictures of people"}),
            self._track("Track"),
            element(SCHEMA, "RecordingStatus", "Unknown"),
        )

    def attributes_at(self, time: float) -> Element | None:
        """Return its MediaAttributes at a time; None if it holds nothing there."""
        if self.span is None or not self.span[0] <= time <= self.span[1]:
            return None
        able = {
            "CanContainPTZ": "false",
            "CanContainAnalytics": "true",
            "CanContainNotifications": "false",
        }
        metadata = element(SCHEMA, "MetadataAttributes", *elements(SCHEMA, able))
        track = element(SCHEMA, "TrackAttributes", self._track("TrackInformation"), metadata)
        valid = dict(zip(("From", "Until"), map(soap.time_text, self.span), strict=True))
        token = element(SCHEMA, "RecordingToken", self.token)
        return element(SEARCH, "MediaAttributes", token, track, *elements(SCHEMA, valid))

    def _track(self, name: str) -> Element | None:
        if self.span is None:  # Without data there is no track.
            return None
        values = {
            "TrackToken": TRACK,
            "TrackType": "Metadata",
            "Description": "people seen by the camera",
            "DataFrom": soap.time_text(self.span[0]),
            "DataTo": soap.time_text(self.span[1]),
        }
        return element(SCHEMA, name, *elements(SCHEMA, values))


def token_of(camera: str) -> str:
    """Return a camera's name, or its hash if the name cannot be a token."""
    if _PLAIN.fullmatch(camera):
        return camera
    return "camera-" + hashlib.sha256(camera.encode("utf-8", "surrogatepass")).hexdigest()[:32]


class Inventory:
    """The recordings that accounts may see."""

    def __init__(self, service: ConsoleService) -> None:
        self._service = service

    def recordings(self, account: Account) -> dict[str, Recording]:
        """Return the recordings of an account by their tokens, in the order of these."""
        cameras = self._service.cameras(account).items()
        found = (Recording(token_of(name), name, info) for name, info in cameras)
        return {one.token: one for one in sorted(found, key=lambda one: one.token)}

    def some(
        self, account: Account, tokens: Collection[str], problem: str = "InvalidToken"
    ) -> list[Recording]:
        """Return the recordings with some tokens; ``problem`` is the fault's code if one is not."""
        known = self.recordings(account)
        if not known.keys() >= set(tokens):
            raise invalid("there is no such recording: ask FindRecordings", problem)
        return [one for token, one in known.items() if token in tokens]

    def in_scope(self, account: Account, scope: Element) -> Callable[[], list[Recording]]:
        """Read a scope; return what finds its recordings, now and later.

        Raises FaultError if it is malformed, or names a recording that the account does not see.
        """
        names = ("IncludedSources", "IncludedRecordings")
        given = Fields(scope, "RecordingInformationFilter", "Extension", repeated=names)
        tokens = {(one.text or "").strip() for one in given.all("IncludedRecordings")}
        sources = given.all("IncludedSources")
        named = {Fields(one, "Token").one("Token", soap.text) for one in sources}
        self.some(account, tokens)
        self.some(account, named, "InvalidSource")
        wanted = tokens | named
        matches = given.maybe("RecordingInformationFilter", read_expression)

        def recordings() -> list[Recording]:
            return [
                one
                for one in self.recordings(account).values()
                if (not wanted or one.token in wanted)
                and (matches is None or matches(one.information()))
            ]

        return recordings

    def answer(self, account: Account, request: Element) -> Element:
        """Answer a request about recordings, which begins no search."""
        operations = {
            "GetRecordingSummary": self._summary,
            "GetRecordingInformation": self._information,
            "GetMediaAttributes": self._media_attributes,
        }
        name = request.tag.rpartition("}")[2]
        content = operations[name](account, request)
        return element(SEARCH, f"{name}Response", *content)

    def _summary(self, account: Account, request: Element) -> list[Element]:
        Fields(request)
        recordings = self.recordings(account).values()
        spans = [one.span for one in recordings if one.span is not None]
        values = {
            "DataFrom": soap.time_text(min((first for first, _ in spans), default=0.0)),
            "DataUntil": soap.time_text(max((last for _, last in spans), default=0.0)),
            "NumberRecordings": len(recordings),
        }
        return [element(SEARCH, "Summary", *elements(SCHEMA, values))]

    def _information(self, account: Account, request: Element) -> list[Element]:
        token = Fields(request, "RecordingToken").one("RecordingToken", soap.text)
        content = self.some(account, [token])[0].information()
        content.tag = f"{{{SEARCH}}}RecordingInformation"
        return [content]

    def _media_attributes(self, account: Account, request: Element) -> list[Element]:
        given = Fields(request, "Time", repeated=["RecordingTokens"])
        time = given.one("Time", soap.unix_time)
        tokens = [(one.text or "").strip() for one in given.all("RecordingTokens")]
        chosen = self.some(account, tokens or self.recordings(account).keys())
        found = (one.attributes_at(time) for one in chosen)
        return [one for one in found if one is not None]
