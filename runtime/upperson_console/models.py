"""Requests and responses of the API."""

import datetime
import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
)
from pydantic_core import PydanticCustomError

from upperson_console.accounts import Account
from upperson_console.search import LONGEST_CURSOR, LONGEST_SENTENCE, MOST_MARKS, Order, Search
from upperson_rt.gallery import Filter, Item
from upperson_rt.score_calibration import MatchLabel
from upperson_rt.search.verdict import Reason, VerdictWord

Id: TypeAlias = Annotated[
    str,
    Field(
        pattern="^[0-9]{1,19}$",
        description="A number, as text: JavaScript would round it.",
        examples=["777"],
    ),
]
Name: TypeAlias = Annotated[str, Field(min_length=1, max_length=1000)]


def _written_time(value: object) -> object:
    """Refuse numbers, which pydantic reads as seconds or milliseconds depending on their size."""
    if isinstance(value, str) and not re.match(r"\d{4}-\d\d-\d\d", value):
        value = None
    if not isinstance(value, str | datetime.datetime):
        raise PydanticCustomError(
            "moment", "expected a time with its zone, such as 2026-11-26T08:00:00+01:00"
        )
    return value


def iso_time(time: float | None) -> str | None:
    """Return unix seconds as ISO 8601 with the zone of the server."""
    if time is None:
        return None
    moment = datetime.datetime.fromtimestamp(time, datetime.timezone.utc)
    try:
        return moment.astimezone().isoformat(timespec="milliseconds")
    except (OverflowError, ValueError, OSError):  # At the ends of the calendar.
        return moment.isoformat(timespec="milliseconds")


_Moment: TypeAlias = Annotated[AwareDatetime, BeforeValidator(_written_time)]
_Time: TypeAlias = Annotated[str | None, BeforeValidator(iso_time)]
"""Made from unix seconds."""
_MOST_AT_ONCE = 500


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ProblemOut(BaseModel):
    """An error (RFC 9457)."""

    type: str = "about:blank"
    title: str = Field(examples=["Unprocessable Entity"])
    status: int = Field(examples=[422])
    detail: str = Field(description="One line: what was expected, found, and what to do.")
    code: str = Field(
        description="What went wrong; stable, for programs to compare.",
        examples=["cursor_unknown"],
    )


class FilterIn(_Strict):
    """Conditions on pictures, all of which must hold."""

    cameras: list[Name] | None = Field(
        None, min_length=1, max_length=100, examples=[["gate", "hall"]]
    )
    since: _Moment | None = Field(None, examples=["2026-11-26T08:00:00+01:00"])
    until: _Moment | None = Field(None, description="Exclusive.")
    track: Name | None = None
    attributes: dict[Name, StrictStr | StrictBool | StrictInt | StrictFloat] = Field(
        default_factory=dict, max_length=50, examples=[{"floor": 2}]
    )

    def as_filter(self) -> Filter:
        """Return the gallery's filter."""
        return Filter(
            camera=self.cameras,
            since=None if self.since is None else self.since.timestamp(),
            until=None if self.until is None else self.until.timestamp(),
            track=self.track,
            attributes=self.attributes,
        )


class SearchIn(_Strict):
    """A sentence, a picture, or both."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"sentence": "woman in a red coat", "filter": {"cameras": ["gate"]}, "limit": 5}
            ]
        },
    )

    sentence: str | None = Field(
        None, max_length=LONGEST_SENTENCE, examples=["woman in a red coat"]
    )
    picture: str | None = Field(
        None, pattern="^[0-9a-f]{32}$", description="Id of a picture sent to /api/v1/pictures."
    )
    like: Id | None = Field(None, description="Id of an item, instead of a picture.")
    picture_share: StrictFloat = Field(
        0.5, ge=0, le=1, description="Weight of the picture beside a sentence."
    )
    filter: FilterIn = Field(default_factory=lambda: FilterIn.model_validate({}))
    by_track: StrictBool = Field(True, description="One hit a track, with its best picture.")
    order: Order = Field("match", description="`time`: the best 200, newest first.")
    yes: list[Id] = Field(
        default_factory=list, max_length=MOST_MARKS, description="Items marked as right."
    )
    no: list[Id] = Field(
        default_factory=list, max_length=MOST_MARKS, description="Items marked as wrong."
    )
    limit: StrictInt = Field(24, ge=1, le=100, description="Hits a page.")
    cursor: str | None = Field(
        None, max_length=LONGEST_CURSOR, description="`next` of the page before."
    )

    def as_search(self) -> Search:
        """Return the search."""
        marks = {int(id_): True for id_ in self.yes} | {int(id_): False for id_ in self.no}
        return Search(
            sentence=self.sentence or "",
            picture=self.picture,
            like=None if self.like is None else int(self.like),
            share=self.picture_share,
            where=self.filter.as_filter(),
            by_track=self.by_track,
            order=self.order,
            marks=tuple(marks.items()),
        )


class ItemOut(BaseModel):
    """A picture of a person."""

    id: Id
    key: str = Field(description="For administrators whole, else without folders.")
    camera: str | None
    time: _Time = Field(description="ISO 8601 with the zone of the server.")
    track: str | None
    box: list[int] | None = Field(description="x0, y0, x1, y1 in the frame, in pixels.")
    source: str | None = Field(description="As `key`.")
    attributes: dict[str, Any]
    picture: str | None = Field(description="Address of the picture; null if none is kept.")


class SpanOut(BaseModel):
    """The pictures of a track that pass the filter."""

    model_config = ConfigDict(from_attributes=True)

    first_time: _Time
    last_time: _Time
    pictures: int


class HitOut(ItemOut):
    """A hit."""

    rank: int
    score: float = Field(description="Cosine; compare scores of one search only.")
    likelihood: float | None = Field(
        ge=0, le=1, description="That the hit matches; null where `match` is empty."
    )
    match: MatchLabel = Field(
        description="`likely` from a likelihood of 0.5; empty where scores are not calibrated."
    )
    span: SpanOut | None


class VerdictOut(BaseModel):
    """Whether any of the pictures that were searched matches."""

    word: VerdictWord = Field(
        description="`nobody`: hits are the nearest pictures, and none is likely to match. "
        "`uncalibrated`: it cannot be said, see `reason`."
    )
    text: str = Field(description="The verdict in one line.")
    likelihood: float | None = Field(
        ge=0, le=1, description="That some picture matches; null where `uncalibrated`."
    )
    expected_matches: float | None = Field(
        ge=0, description="Number of pictures that match, on average; null where `uncalibrated`."
    )
    expected_is_more: bool = Field(
        description="Whether there are probably more: only the best pictures were compared."
    )
    reason: Reason | None = Field(description="Why it is `uncalibrated`.")
    fields: dict[str, Any] = Field(description="Values that belong to `reason`.")


class NoticeOut(BaseModel):
    """A notice about a search."""

    code: str = Field(description="Stable, such as `words_unknown`.")
    level: Literal["warning", "note"]
    text: str
    fields: dict[str, Any] = Field(description="Values that the text names.")


class SearchOut(BaseModel):
    """A page of hits."""

    hits: list[HitOut] = Field(description="Best first: by likelihood, where it is known.")
    verdict: VerdictOut
    next: str | None = Field(description="Cursor of the next page; null at the end.")
    total: int | None = Field(
        description="Pictures that pass the filter; null if counting would take long."
    )
    notes: list[str] = Field(description="The texts of `notices` as sentences.")
    notices: list[NoticeOut] = Field(description="How the search was understood.")


class PictureOut(BaseModel):
    """A query picture."""

    picture: str = Field(pattern="^[0-9a-f]{32}$", description="Its id.")
    sha256: str
    width: int
    height: int


class TrackOut(BaseModel):
    """A track: the views of one person in one sequence of one camera."""

    camera: str | None
    track: str
    span: SpanOut
    views: list[ItemOut] = Field(description="By time; the first 500.")


class CameraOut(BaseModel):
    """A camera."""

    name: str
    pictures: int
    first_time: _Time
    last_time: _Time


class MarksIn(SearchIn):
    """A search with marks to set, which are kept with its sentence and picture; others stay."""

    remove: list[Id] = Field(
        default_factory=list, max_length=MOST_MARKS, description="Items whose marks are removed."
    )


class MarksOut(BaseModel):
    """All kept marks of the search."""

    yes: list[Id]
    no: list[Id]


class ExportIn(_Strict):
    """Pictures to export."""

    ids: list[Id] = Field(min_length=1, max_length=_MOST_AT_ONCE, examples=[["777", "299"]])
    search: SearchIn | None = Field(None, description="The search that found them, for the record.")
    tracks: StrictBool = Field(
        False, description="Also the other pictures of their tracks that pass the search's filter."
    )
    reason: str = Field(
        "", max_length=500, description="Why frames are needed unblurred, with `serve --blur`."
    )


class BinItemOut(ItemOut):
    """A picture in the bin."""

    deleted: _Time
    user: str = Field(description="Who deleted it.")
    reason: str


class BinIn(_Strict):
    """Pictures of the bin."""

    ids: list[Id] = Field(min_length=1, max_length=_MOST_AT_ONCE, examples=[["777", "299"]])
    reason: str = Field("", max_length=500, description="Why; needed to delete.")


class RestoredOut(BaseModel):
    """Number of restored pictures."""

    restored: int


class DeletedOut(BaseModel):
    """Number of deleted pictures, also of those in the bin now."""

    deleted: int
    dry_run: bool = False


class PruneIn(_Strict):
    """Pictures to delete by age or number."""

    older_than: _Moment | None = None
    keep_newest: StrictInt | None = Field(None, ge=0, le=2**31 - 1)
    camera: Name | None = None
    reason: str = Field("", max_length=500)
    dry_run: StrictBool = True


class InfoOut(BaseModel):
    """The model and gallery of this server."""

    version: str
    model: str = Field(description="Fingerprint of the embedding space.")
    variant: str
    embed_dim: int
    pictures: int
    index: str
    user: str
    role: str
    log_problem: str = Field(
        description="The break of the query log that is not acknowledged; empty if none."
    )


class HealthOut(BaseModel):
    """That the server answers."""

    status: Literal["ok"] = "ok"


class EmbeddingsIn(BaseModel):
    """A request of OpenAI's API; a picture is a data URL."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"input": ["woman in a red coat"]}]})

    input: str | Annotated[list[str], Field(min_length=1, max_length=64)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] = "float"


class EmbeddingOut(BaseModel):
    """One embedding."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class UsageOut(BaseModel):
    """Tokens of the sentences."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsOut(BaseModel):
    """Embeddings of unit length, in the order given."""

    object: Literal["list"] = "list"
    data: list[EmbeddingOut]
    model: str
    usage: UsageOut


class AlertIn(_Strict):
    """A sentence to compare with each new person."""

    sentence: str = Field(
        min_length=1, max_length=LONGEST_SENTENCE, examples=["man with a red backpack"]
    )
    cameras: list[Name] = Field(
        default_factory=list,
        max_length=100,
        description="Only these; empty for all that the account sees.",
    )
    rate: str = Field(
        "1/day",
        max_length=50,
        description="False alarms that it may raise: a number and a period, such as 2/week.",
    )
    name: Name | None = Field(None, description="For people; the sentence if null.")
    cap: StrictInt = Field(
        10, ge=1, le=1000, description="Most messages an hour; more are kept for review."
    )


class AlertOut(BaseModel):
    """An alert, and how it has fared."""

    id: str = Field(examples=["fa568753"])
    name: str
    sentence: str
    cameras: list[str] | None = Field(description="Only these; null for all.")
    rate: str = Field(description="False alarms that it may raise.", examples=["1/day"])
    cap: int = Field(description="Most messages an hour.")
    created: _Time
    state: Literal["active", "collecting", "paused", "review", "uncalibrated"] = Field(
        description="`collecting`: too few visits yet. `review`: it broke its promise. "
        "`uncalibrated`: visits score higher than before. Messages of these three are kept for "
        "review, not delivered."
    )
    visits: int = Field(description="Earlier visits that it is compared with.")
    visits_per_day: float | None = Field(description="Null if no picture has a time.")
    missing: int | None = Field(description="Visits that its rate still needs; null if unknown.")
    delivered: int = Field(description="Messages that were or will be delivered.")
    review: int = Field(description="Messages that are kept for review.")
    dismissed: int = Field(description="False alarms since it was added or resumed.")
    confirmed: int
    unjudged: int = Field(description="Delivered messages that were neither; since then.")
    days: float = Field(description="For which it was compared since then.")
    dismissed_per_day: float | None
    upper_bound: float | None = Field(
        description="Rate a day that is excluded at 95 %; null if any was dismissed or unjudged."
    )
    e_value: float = Field(description="Evidence that it breaks its promise; demoted at 20.")


class AlertAddedOut(AlertOut):
    """A new alert, and how its sentence was understood."""

    notices: list[NoticeOut]


class AlertMessageOut(BaseModel):
    """A visit that matched an alert, or a note that its cap was reached."""

    id: str = Field(examples=["8f13e24a400a22f0"])
    type: Literal["alert.raised", "alert.capped"]
    alert: str = Field(description="Id of the alert.")
    name: str = Field(description="Name of the alert.")
    sentence: str
    raised: _Time
    state: Literal["ready", "review"] = Field(
        description="`review`: it is kept, and not delivered."
    )
    reason: str | None = Field(
        None, description="Why it is kept: `collecting`, `demoted` or `cap`."
    )
    verdict: Literal["confirmed", "dismissed"] | None
    camera: str | None = None
    track: str | None = None
    time: str | None = Field(None, description="When the picture was taken, ISO 8601.")
    score: float | None = None
    p_value: float | None = None
    item: ItemOut | None = Field(description="Its picture; null if it was deleted.")


class PastVisitOut(ItemOut):
    """An earlier visit, by its best picture."""

    score: float
    p_value: float = Field(description="Share of the other visits that match as well.")
    would_raise: bool


class AlertTestOut(BaseModel):
    """What an alert would have raised."""

    alert: AlertOut
    since: _Time
    visits: int = Field(description="In this time.")
    against: Literal["earlier", "others"] = Field(
        description="What they were compared with: earlier visits or, if too few, all others."
    )
    count: int = Field(description="Visits that it would have raised.")
    raised: list[PastVisitOut] = Field(description="By time; the newest 200.")
    best: list[PastVisitOut] = Field(description="Up to five best matches, raised or not.")


def item_fields(account: Account, id_: int, item: Item, has_picture: bool) -> dict[str, Any]:
    """Return the fields of an `ItemOut`, see `Account.path`."""
    picture = f"/api/v1/items/{id_}/picture" if has_picture else None
    paths = {"key": account.path(item.key), "source": account.path(item.source)}
    return {**vars(item), **paths, "id": str(id_), "picture": picture}
