"""Results of a search: hits with their match labels, and notices.

Each search is in the log before its hits are shown; callers of `calibrated_hits` log it themselves.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from upperson_console.accounts import Account
from upperson_console.limits import BusyError
from upperson_console.problems import ProblemError
from upperson_console.search import Page, Search, page_of
from upperson_console.service import ConsoleService
from upperson_rt.gallery import Filter, Gallery, Hit
from upperson_rt.score_calibration import MatchLabel
from upperson_rt.search.notices import Notice
from upperson_rt.search.query import SearchRequest
from upperson_rt.search.service import PictureMatch, SearchResult
from upperson_rt.search.verdict import Verdict

_COUNTED = 100_000
_NOTHING_SEARCHED = Verdict(
    word="uncalibrated", likelihood=None, expected=None, reason="nothing_searched"
)
_OF_THE_GALLERY = frozenset({"camera_unknown", "gallery_empty", "filter_matches_nothing"})
"""Notices whose counts include hidden cameras; the console makes its own."""


@dataclass(frozen=True, kw_only=True)
class ConsoleResult:
    """One page of a search."""

    page: Page
    likelihoods: list[float | None]
    """0 to 1, one a hit; None where its label is empty."""
    labels: list[MatchLabel]
    """One a hit."""
    verdict: Verdict
    """Whether some picture matches in what the account may see."""
    total: int | None
    """Items that pass the filter; None if counting would take longer than the search."""
    notices: list[Notice]


def run_search(
    service: ConsoleService, account: Account, search: Search, limit: int, cursor: str | None = None
) -> ConsoleResult:
    """Run a search, and log it."""
    search.require_query()
    request, notices = _request(service, account, search)
    opened = service.current.now()
    judged: dict[int, tuple[float | None, MatchLabel]] = {}
    verdict = _NOTHING_SEARCHED
    hidden = _OF_THE_GALLERY if account.cameras is None else _OF_THE_GALLERY | {"indistinct"}

    def best(count: int) -> tuple[list[Hit], int]:
        nonlocal verdict
        if request.where is None:
            return [], 0
        result = opened.search.search(replace(request, k=count, calibrate=True, notices=True))
        pairs = zip(result.likelihoods, result.labels, strict=True)
        judged.update(zip((hit.id for hit in result.hits), pairs, strict=True))
        verdict = result.verdict or _NOTHING_SEARCHED
        for notice in result.notices:
            if notice.code not in hidden:
                notices[notice.code] = notice
        return result.hits, result.ranked

    page = page_of(search, limit, cursor, best)
    if verdict.reason == "few_pictures":  # It counts hidden cameras.
        fields = verdict.fields | {"pictures": service.count(account, Filter())}
        verdict = replace(verdict, fields=fields)
    more = {"from": page.first, **verdict.for_log()}
    service.note_search(account, search, page.hits, limit, more)
    service.searches += 1
    where = request.where
    return ConsoleResult(
        page=page,
        likelihoods=[judged[hit.id][0] for hit in page.hits],
        labels=[judged[hit.id][1] for hit in page.hits],
        verdict=verdict,
        total=0 if where is None else _counted(opened.gallery, where),
        notices=sorted(notices.values(), key=lambda notice: not notice.is_warning),
    )


def match_of(
    service: ConsoleService, account: Account, search: Search, id_: int
) -> PictureMatch | None:
    """Return how well an item matches a search; None if that cannot be computed."""
    item, vector_D = service.item(account, id_)
    if search.is_empty:
        return None
    try:
        request, _ = _request(service, account, search)
        return service.current.last.search.match(request, id_, item, vector_D)
    except (BusyError, ProblemError):  # Such as a query picture that is not kept any more.
        return None


def timeline_hits(
    service: ConsoleService, account: Account, search: Search, count: int
) -> tuple[list[Hit], bool]:
    """Return the likely ones of the best hits of a search for its timeline, and log it.

    Where scores are not calibrated, all are returned, and the second value is False.
    """
    hits, is_calibrated = [], True
    if (found := calibrated_hits(service, account, search, count)) is not None:
        is_calibrated = found.verdict is not None and found.verdict.word != "uncalibrated"
        labelled = zip(found.hits, found.labels, strict=True)
        hits = [hit for hit, label in labelled if label == "likely" or not is_calibrated]
    service.note_search(account, search, hits, count, {}, action="timeline", shown=None)
    return hits, is_calibrated


def calibrated_hits(
    service: ConsoleService, account: Account, search: Search, count: int
) -> SearchResult | None:
    """Return the best hits of a search, calibrated; None if the account may see nothing of it.

    The caller logs those that it shows.
    """
    request, _ = _request(service, account, search)
    if request.where is None:
        return None
    return service.current.now().search.search(replace(request, k=count, calibrate=True))


def _request(
    service: ConsoleService, account: Account, search: Search
) -> tuple[SearchRequest, dict[str, Notice]]:
    """Return the core's request, and the notices that depend on the account, by code.

    The request's ``where`` is None if the account may see nothing that it could find.
    """
    service.require_allowed(account, search.sentence)
    picture_D = None
    if search.like is not None:
        picture_D = service.item(account, search.like)[1]
    elif search.picture is not None:
        picture_D = service.query_pictures.get(search.picture).vector_D
    ids = [id_ for id_, _ in search.marks]
    found = service.gallery.get(ids) if ids else {}
    visible = {id_: vector for id_, (item, vector) in found.items() if account.sees(item.camera)}

    def vectors(ids: Sequence[int]) -> NDArray[np.float32] | None:
        # Sorted, so that the same marks give the same result to the bit.
        known = [visible[id_] for id_ in sorted(ids) if id_ in visible]
        return np.array(known, np.float32) if known else None

    notices: dict[str, Notice] = {}
    if unknown := _unknown(service, account, search.where):
        notices["camera_unknown"] = Notice("camera_unknown", {"cameras": unknown})
    if missing := sum(id_ not in visible for id_ in ids):
        notices["feedback_missing"] = Notice("feedback_missing", {"count": missing})
    request = SearchRequest(
        sentence=search.sentence if search.sentence.strip() else None,
        picture=picture_D,
        picture_share=search.share,
        relevant_ND=vectors(search.yes),
        not_relevant_ND=vectors(search.no),
        where=account.visible(search.filter_at(time.time())),
        by_track=search.by_track,
    )
    return request, notices


def _unknown(service: ConsoleService, account: Account, where: Filter) -> list[str]:
    """Return the cameras of a filter that have no pictures, or that the account may not see."""

    def is_known(name: str) -> bool:
        # A new camera is counted itself: the list of cameras may be some seconds old.
        return account.sees(name) and bool(
            name in service.cameras(account) or service.gallery.count(Filter(camera=name))
        )

    return [name for name in where.cameras or () if not is_known(name)]


def _counted(gallery: Gallery, where: Filter) -> int | None:
    """Count items; None for attributes in a large gallery, as no index has them."""
    return None if where.attributes and gallery.count() > _COUNTED else gallery.count(where)
