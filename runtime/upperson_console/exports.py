"""What is exported: the items of a page, or all hits of a search, as an evidence package."""

import datetime
import re
import time
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from fastapi import Response
from fastapi.responses import StreamingResponse

from upperson_console.accounts import Account
from upperson_console.evidence import Written, write_package
from upperson_console.limits import BusyError
from upperson_console.models import iso_time
from upperson_console.problems import ProblemError, missing
from upperson_console.results import calibrated_hits
from upperson_console.search import MOST_BY_TIME, MOST_HITS, Search
from upperson_console.service import ConsoleService
from upperson_rt.errors import InputError
from upperson_rt.gallery import Item
from upperson_rt.printable import count_of
from upperson_rt.search.service import SearchResult

MOST_EXPORTED = 2000
"""Items of one export."""
_FIRST_PAGE = 25
"""Hits that a page of 24 asks for: the verdict depends a little on their number."""
_WORDS, _LONGEST_WORDS = 6, 60


def export_response(
    service: ConsoleService,
    account: Account,
    ids: Iterable[int] | None,
    search: Search,
    *,
    tracks: bool = False,
    reason: str = "",
) -> Response:
    """Return an evidence package of items; it is logged before it is sent.

    Args:
        service: The console.
        account: Who exports.
        ids: Of the items; None for all hits of the search.
        search: The search that found them; it may be empty.
        tracks: Whether the other items of their tracks that pass its filter are exported as well.
        reason: Why frames and clips are needed unblurred, see `ConsoleService.shows_all`.
    """
    shows_all = service.shows_all(account, reason)
    found = _found(service, account, search, needed=ids is None)
    if ids is None:
        ids = [hit.id for hit in found[-1].hits] if found else []
    chosen = _chosen(service, account, ids, search if tracks else None)
    if not chosen:
        raise missing("none of these pictures is there; they may have been deleted")
    items = chosen[:MOST_EXPORTED]
    if service.blur and shows_all:
        service.note_items(account, "unblur", items, {"export": True, "reason": reason.strip()})
    about = {name: str(getattr(account, name, None) or "") for name in ("purpose", "case")}
    about["reason"] = reason.strip()
    facts = {
        "exported_by": {"user": account.name, "role": account.role},
        "about": {name: text for name, text in about.items() if text},
        "model": {
            "fingerprint": service.encoder.fingerprint,
            "variant": service.encoder.variant,
            **service.seal.bundle,
        },
        "query": _query(service, account, search, found),
        "log": {"chain": _last_chain(service)},
    }
    written = write_package(
        items,
        service.pictures,
        facts,
        {id_: match for one in reversed(found) for id_, match in _matches(one).items()},
        service.seal,
        query_jpeg=_query_jpeg(service, account, search),
        blurred=not shows_all,
        left_out=len(chosen) - len(items),
    )
    return _sent(service, account, search, items, written)


def _found(
    service: ConsoleService, account: Account, search: Search, needed: bool
) -> list[SearchResult]:
    """Return the hits of a search as its first page judges them, and all hits.

    There are none if nothing was searched, or the search cannot be repeated and need not be.
    """
    if needed:
        search.require_query()
    if search.is_empty:
        return []
    counts = [MOST_BY_TIME] if search.order == "time" else [_FIRST_PAGE, MOST_HITS]
    try:
        results = [calibrated_hits(service, account, search, count) for count in counts]
        return [result for result in results if result is not None]
    except (BusyError, ProblemError):  # Such as a query picture that is not kept any more.
        if needed:
            raise
        return []


def _chosen(
    service: ConsoleService, account: Account, ids: Iterable[int], tracks_of: Search | None
) -> list[tuple[int, Item]]:
    """Return the items that an account may see, each once, with those of their tracks."""
    ids = list(dict.fromkeys(ids))
    found = service.gallery.get(ids)
    visible = [(id_, found[id_][0]) for id_ in ids if id_ in found]
    visible = [(id_, item) for id_, item in visible if account.sees(item.camera)]
    if tracks_of is None:
        return visible
    where = tracks_of.filter_at(time.time())
    chosen: dict[int, Item] = {}
    done = set()
    for id_, item in visible:
        chosen.setdefault(id_, item)
        track = item.camera, item.track
        if item.track is not None and track not in done:
            done.add(track)
            views = service.views(account, item.camera, item.track, where)
            chosen |= sorted(views, key=lambda view: (view[1].time or 0.0, view[0]))
    return list(chosen.items())


def _matches(found: SearchResult) -> dict[int, dict[str, Any]]:
    judged = zip(found.hits, found.likelihoods, found.labels, strict=True)
    return {
        hit.id: {
            "rank": rank,
            "score": round(hit.score, 4),
            "likelihood": round(likelihood, 4),
            "match": label,
        }
        for rank, (hit, likelihood, label) in enumerate(judged, 1)
    }


def _query(
    service: ConsoleService, account: Account, search: Search, found: list[SearchResult]
) -> dict[str, Any]:
    """Return the search as facts of a package."""
    where = search.filter_at(time.time())
    conditions = {**asdict(where), "since": iso_time(where.since), "until": iso_time(where.until)}
    verdict = found[0].verdict if found else None
    return {
        "sentence": search.sentence.strip(),
        "picture": search.picture,
        "like": None if search.like is None else str(search.like),
        "filter": {name: value for name, value in conditions.items() if value},
        "by_track": search.by_track,
        "order": search.order,
        "yes": [str(id_) for id_ in search.yes],
        "no": [str(id_) for id_ in search.no],
        "verdict": None if verdict is None else verdict.as_json(),
    }


def _query_jpeg(service: ConsoleService, account: Account, search: Search) -> bytes | None:
    try:
        if search.picture is not None:
            return service.query_pictures.get(search.picture).jpeg
        if search.like is not None:
            made = service.pictures.jpeg(service.item(account, search.like)[0], "view")
            return None if made is None else made[0]
    except (ProblemError, InputError):  # It is not kept any more, or damaged.
        pass
    return None


def _last_chain(service: ConsoleService) -> str:
    try:
        return service.log.last_chain()
    except InputError as error:
        raise ProblemError(507, str(error), code="log_not_writable") from error


def _sent(
    service: ConsoleService,
    account: Account,
    search: Search,
    items: list[tuple[int, Item]],
    written: Written,
) -> Response:
    """Log an export, and return it as a response."""
    summary, file = written.summary, written.file
    details = {
        "sha256": written.sha256,
        "pictures": summary.pictures,
        "missing": summary.missing,
        "search": search.address(),
    }
    try:
        service.note_items(account, "export", items, details)
    except ProblemError:
        file.close()
        raise

    def blocks() -> Iterator[bytes]:
        with file:
            while block := file.read(1 << 16):
                yield block

    name = _file_name(search.sentence, summary.pictures)
    headers = {"content-disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(blocks(), media_type="application/zip", headers=headers)


def _file_name(sentence: str, pictures: int) -> str:
    """Return a name with the day, the first words of a sentence, and the number of pictures."""
    plain = unicodedata.normalize("NFKD", sentence).encode("ascii", "ignore").decode().lower()
    words = "-".join(re.findall("[a-z0-9]+", plain)[:_WORDS])[:_LONGEST_WORDS].strip("-")
    day = datetime.datetime.now().astimezone().date().isoformat()
    return f"{day}-{words or 'export'}-{count_of(pictures, 'picture').replace(' ', '-')}.zip"
