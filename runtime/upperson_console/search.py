"""A search of the console: its fields, its address, and its pages of hits.

The address of a page holds the whole search, so that it can be bookmarked and sent.
"""

import base64
import hashlib
import json
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeAlias
from urllib.parse import urlencode
from zlib import crc32

from upperson_console.problems import invalid
from upperson_console.times import read_time, utc_text
from upperson_console.translation import zone_of
from upperson_rt.arguments import read_attributes
from upperson_rt.errors import UsageError
from upperson_rt.gallery import Filter, Hit
from upperson_rt.gallery.records import track_of_hit
from upperson_rt.printable import local_time, safe_repr

Order: TypeAlias = Literal["match", "time"]
LONGEST_SENTENCE = 2000
MOST_MARKS = 100
PAGE_HITS = 48
"""Of a page. One more is searched for; the verdict depends a little on their number."""
MOST_HITS = 2000
"""Limit of paging: each page costs more than the one before."""
MOST_BY_TIME = 200
"""Hits that are ordered by time: the best ones."""
LAST = {"hour": 3600.0, "day": 86400.0, "week": 7 * 86400.0}
LONGEST_CURSOR = 4000
"""Letters; each hit in order of likelihood that was shown takes five or six."""
_CLOCK_SKEW_S = 10.0
"""By which the clock of a camera may be ahead."""
_MOST_FILTERS = 200
_Key: TypeAlias = tuple[float, int]


@dataclass(frozen=True, kw_only=True)
class Search:
    """A search."""

    sentence: str = ""
    picture: str | None = None
    """Id of a query picture."""
    like: int | None = None
    """Id of an item to search with, instead of a query picture."""
    share: float = 0.5
    """Weight of the picture beside a sentence, 0 to 1."""
    where: Filter = field(default_factory=Filter)
    last: str | None = None
    """``hour``, ``day`` or ``week`` before now, instead of `Filter.since`."""
    by_track: bool = True
    order: Order = "match"
    marks: tuple[tuple[int, bool], ...] = ()
    """Marked items, and whether they are right, in the order of marking."""

    def __post_init__(self) -> None:
        if len(self.sentence) > LONGEST_SENTENCE:
            raise UsageError(
                f"the sentence has {len(self.sentence):,} letters, at most {LONGEST_SENTENCE:,} "
                "are taken: describe the person in a few words",
                code="sentence_too_long",
                found=len(self.sentence),
            )
        if self.picture is not None and self.like is not None:
            raise UsageError(
                "a picture and 'like' exclude each other: leave one of them out",
                code="two_pictures",
            )
        for id_ in (self.like or 0, *(id_ for id_, _ in self.marks)):
            if not 0 <= id_ < 1 << 63:
                raise UsageError(
                    f"there is no picture {id_}: ids have up to 63 bits", code="id_malformed"
                )
        if len(self.marks) > MOST_MARKS:
            raise UsageError(
                f"a search takes {MOST_MARKS} marks at most: undo some", code="too_many_marks"
            )

    @property
    def yes(self) -> tuple[int, ...]:
        """Items marked as right."""
        return tuple(id_ for id_, right in self.marks if right)

    @property
    def no(self) -> tuple[int, ...]:
        """Items marked as wrong."""
        return tuple(id_ for id_, right in self.marks if not right)

    @property
    def is_empty(self) -> bool:
        """Whether there is neither sentence nor picture."""
        return not self.sentence.strip() and self.picture is None and self.like is None

    @property
    def browses(self) -> bool:
        """Whether there is no query, but a filter, or the newest are wanted."""
        is_narrowed = not self.where.is_empty or self.last is not None
        return self.is_empty and (is_narrowed or self.order == "time")

    @property
    def has_both(self) -> bool:
        """Whether there are a sentence and a picture."""
        return bool(self.sentence.strip()) and (self.picture is not None or self.like is not None)

    @property
    def marks_key(self) -> str:
        """Key of kept marks: sentence and picture, whatever the filter."""
        query = (self.sentence.strip(), self.picture, self.like)
        return hashlib.sha256(json.dumps(query).encode()).hexdigest()[:32]

    @property
    def digest(self) -> str:
        """Hash of all fields, which a cursor carries."""
        text = json.dumps(asdict(self), default=str, sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def require_query(self) -> None:
        """Raise UsageError if there is neither sentence nor picture."""
        if self.is_empty:
            raise UsageError(
                "describe the person in a few words, or give a picture", code="query_empty"
            )

    def filter_at(self, now: float) -> Filter:
        """Return the filter, with `last` counted back from a time."""
        if self.last is None:
            return self.where
        return replace(self.where, since=now - LAST[self.last], until=now + _CLOCK_SKEW_S)

    @classmethod
    def from_address(cls, pairs: Sequence[tuple[str, str]]) -> "Search":
        """Read the query string of the search page, where empty values count as missing."""
        given: dict[str, list[str]] = {}
        for name, value in pairs:
            if value.strip():
                given.setdefault(name, []).append(value)
        if sum(map(len, given.values())) > _MOST_FILTERS:
            raise UsageError(f"an address has {_MOST_FILTERS} values at most")

        def one(name: str) -> str | None:
            return given[name][-1] if name in given else None

        last = one("last") if one("last") in LAST else None
        zone = zone_of(one("zone") or "")  # Of typed times; addresses that pages make have UTC.
        since = None if last else read_time(one("since"), "from", zone)
        until = None if last else read_time(one("until"), "to", zone, is_end=True)
        if since is not None and until is not None and since >= until:
            raise UsageError(
                f"'from' must be before 'to': {local_time(since)} is not before "
                f"{local_time(until)}",
                code="times_reversed",
            )
        return cls(
            sentence=one("q") or "",
            picture=one("picture"),
            like=None if (like := one("like")) is None else read_id(like),
            share=_share(one("share")),
            where=Filter(
                camera=given.get("camera"),
                since=since,
                until=until,
                track=one("track"),
                attributes=read_attributes(given.get("where"), "the filter"),
            ),
            last=last,
            by_track=one("by") != "picture",
            order="time" if one("order") == "time" else "match",
            marks=_marks(one("marks")),
        )

    @property
    def pairs(self) -> list[str]:
        """The attributes of the filter as ``KEY=VALUE``."""
        return [_pair(name, value) for name, value in self.where.attributes.items()]

    @property
    def marks_text(self) -> str:
        """The marks in the form of an address: ``y12.n7``."""
        return ".".join(f"{'y' if right else 'n'}{id_}" for id_, right in self.marks)

    def without_filter(self) -> str:
        """Return the address without its filter."""
        return self.address(where=Filter(), last=None)

    def with_marks(self, kept: Mapping[int, bool]) -> "Search":
        """Return the search with kept marks in addition to its own; the newest if too many."""
        own = {id_: right for id_, right in self.marks if id_ not in kept}
        return replace(self, marks=(*own.items(), *kept.items())[-MOST_MARKS:])

    def address(self, **changes: Any) -> str:
        """Return the query string of this search, with some fields changed."""
        search = replace(self, **changes)
        where, timeless = search.where, search.last is not None
        pairs = [
            ("q", search.sentence),
            ("picture", search.picture),
            ("like", search.like),
            ("share", f"{search.share:g}" if search.has_both and search.share != 0.5 else None),
            *(("camera", name) for name in where.cameras or ()),
            ("last", search.last),
            ("since", None if timeless else utc_text(where.since)),
            ("until", None if timeless else utc_text(where.until)),
            ("track", where.track),
            *(("where", pair) for pair in search.pairs),
            ("by", None if search.by_track else "picture"),
            ("order", None if search.order == "match" else search.order),
            ("marks", search.marks_text),
        ]
        return urlencode([(name, value) for name, value in pairs if value not in (None, "")])


@dataclass(frozen=True)
class Page:
    """A page of hits, in the order of the search."""

    hits: list[Hit]
    first: int
    """Rank of the first hit, from 1."""
    cursor: str | None
    """Cursor of the next page; None at the end."""


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where a page ends."""

    offset: int = 0
    """Hits of the pages so far."""
    last: _Key | None = None
    """Of the last hit that was not in order of likelihood."""
    shown: frozenset[int] = frozenset()
    """Marks of the hits in order of likelihood."""

    def is_new(self, hit: Hit, order: Order) -> bool:
        """Return whether a hit is still to be shown."""
        return _mark(hit) not in self.shown and (self.last is None or _key(hit, order) > self.last)

    def after(self, page: Sequence[tuple[Hit, bool]], order: Order) -> "Cursor":
        """Return the end of the next page; of its hits, whether they are in order of likelihood."""
        keys = [_key(hit, order) for hit, is_likeliest in page if not is_likeliest]
        return Cursor(
            offset=self.offset + len(page),
            last=keys[-1] if keys else self.last,
            shown=self.shown | {_mark(hit) for hit, is_likeliest in page if is_likeliest},
        )


def page_of(
    search: Search,
    limit: int,
    cursor: str | None,
    best: Callable[[int], tuple[Sequence[Hit], int]],
) -> Page:
    """Return a page of a search, of ``limit`` hits.

    ``best`` returns the k best hits, and how many of the first are in order of likelihood. A page
    begins after the last hit of the page before, by score and id, so that no hit is shown twice if
    items are added between pages. Likelihoods change then: those hits are remembered. A page ends
    only where all hits of its last score are known: ``best`` may order equal ones otherwise.
    """
    start = Cursor() if cursor is None else read_cursor(cursor, search)
    by_time = search.order == "time"
    most = MOST_BY_TIME if by_time else MOST_HITS
    count = most if by_time else min(most, start.offset + limit + 1)
    while True:
        hits, likeliest = best(count)
        likeliest = 0 if by_time else likeliest
        by_score = sorted(hits[likeliest:], key=lambda hit: _key(hit, search.order))
        ordered = [*((hit, True) for hit in hits[:likeliest]), *((hit, False) for hit in by_score)]
        rest = [one for one in ordered if start.is_new(one[0], search.order)]
        if len(hits) < count or count >= most:
            break
        if len(rest) > limit and (rest[limit - 1][1] or hits[-1].score < rest[limit - 1][0].score):
            break
        count = min(most, 2 * count)
    page, following = rest[:limit], None
    if len(rest) > limit:
        following = make_cursor(search, start.after(page, search.order))
    return Page([hit for hit, _ in page], start.offset + 1, following)


def _mark(hit: Hit) -> int:
    """Return four bytes of an id, or of a track's name: a cursor is part of an address."""
    track = None if hit.span is None else track_of_hit(hit)
    return hit.id & 0xFFFFFFFF if track is None else crc32(json.dumps(track).encode())


def _key(hit: Hit, order: Order) -> _Key:
    if order == "match":
        return -hit.score, hit.id
    time = hit.span.last_time if hit.span is not None else hit.item.time
    return (float("inf") if time is None else -time), hit.id


def make_cursor(search: Search, end: Cursor) -> str:
    """Return the text of a cursor of a search."""
    key = None if end.last is None else [end.last[0].hex(), str(end.last[1])]
    shown = struct.pack(f">{len(end.shown)}I", *end.shown)
    text = json.dumps([search.digest, end.offset, key])
    return f"{_base64(text.encode())}.{_base64(shown)}"


def read_cursor(cursor: str, search: Search) -> Cursor:
    """Read a cursor; raises ProblemError if it is not of the search."""
    try:
        if len(cursor) > LONGEST_CURSOR:
            raise ValueError
        text, shown = map(_bytes, cursor.split("."))
        digest, offset, key = json.loads(text)
        found = Cursor(
            offset=offset,
            last=None if key is None else (float.fromhex(key[0]), int(key[1])),
            shown=frozenset(value for (value,) in struct.iter_unpack(">I", shown)),
        )
        if type(offset) is not int or not 0 <= offset <= MOST_HITS:
            raise ValueError
    except (ValueError, TypeError, LookupError, RecursionError, OverflowError, struct.error):
        raise invalid(
            "this cursor is none that a search gave: begin again without one", "cursor_unknown"
        ) from None
    if digest != search.digest:
        raise invalid(
            "this cursor belongs to another search: repeat the search that gave it as it was",
            "cursor_of_other_search",
        )
    return found


def _base64(value: bytes) -> str:
    return base64.urlsafe_b64encode(value).decode().rstrip("=")


def _bytes(text: str) -> bytes:
    return base64.urlsafe_b64decode(text.encode() + b"=" * (-len(text) % 4))


def _share(text: str | None) -> float:
    try:
        share = 0.5 if text is None else float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise UsageError(
            f"the share of the picture must be from 0 to 1, found {safe_repr(text)}",
            code="share_out_of_range",
            found=text,
        )
    return share


def _marks(text: str | None) -> tuple[tuple[int, bool], ...]:
    marks: dict[int, bool] = {}
    for one in () if text is None else text.split("."):
        if one[:1] not in ("y", "n"):
            raise UsageError(
                f"a mark is such as y12 or n12, found {safe_repr(one)}",
                code="mark_malformed",
                found=one,
            )
        marks[read_id(one[1:])] = one[0] == "y"
    return tuple(marks.items())


def read_id(text: str) -> int:
    """Read the id of a picture; raises UsageError if it is malformed."""
    if not re.fullmatch("[0-9]{1,19}", text):
        raise UsageError(
            f"the id of a picture is a whole number, found {safe_repr(text)}", code="id_malformed"
        )
    return int(text)


def _pair(name: str, value: str | int | float | bool) -> str:
    """Return a pair that `read_attributes` reads: texts that look like numbers are quoted."""
    if isinstance(value, str) and read_attributes([f"k={value}"], "")["k"] == value:
        return f"{name}={value}"
    return f"{name}={json.dumps(value)}"
