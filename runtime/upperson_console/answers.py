"""What a search is answered with: hits, a word for each, what there is to say, and a zip of it.

Who asked is in the log before anything is shown; `compared` alone leaves that to whoever shows it.
"""

import datetime
import hashlib
import io
import json
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from upperson_console.accounts import Account
from upperson_console.desk import Desk
from upperson_console.models import ItemOut
from upperson_console.pictures import PIECE_BYTES, Pictures
from upperson_console.problems import ProblemError
from upperson_console.search import Page, Search, page_of
from upperson_console.turns import BusyError
from upperson_rt import __version__
from upperson_rt.errors import InputError, UsageError
from upperson_rt.gallery import Filter, Gallery, Hit, Item
from upperson_rt.gallery.crops import read_crop
from upperson_rt.image_file import MOST_FILE_BYTES
from upperson_rt.search.calibration import MatchLabel
from upperson_rt.search.notices import Notice
from upperson_rt.search.request import SearchRequest

__all__ = [
    "Answer",
    "answer_of",
    "best_of",
    "compared",
    "match_of",
    "write_evidence",
]

_COUNTED = 100_000


_OF_THE_GALLERY = frozenset({"camera_unknown", "gallery_empty", "filter_matches_nothing"})
"""Notices that count what an account may not see; the console has its own words for them."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A page of a search, and what there is to say about it."""

    page: Page
    labels: list[MatchLabel]
    """One for each hit, see `ScoreCalibration`."""
    total: int | None
    """Items that pass the filter; None where counting them would take longer than the search."""
    notices: list[Notice]


def answer_of(
    desk: Desk, account: Account, search: Search, limit: int, cursor: str | None = None
) -> Answer:
    """Answer a search, and note who asked.

    Raises:
        UsageError: Nothing is asked, or the filter cannot hold.
        InputError: The sentence cannot be used.
        ProblemError: The picture or the cursor is none, or nothing can be logged.
        BusyError: Too many wait for the encoder.
    """
    if search.is_empty:
        raise UsageError("describe the person in a few words, or give a picture")
    request, notices = _request(desk, account, search)
    opened = desk.current.now()
    labels: dict[int, MatchLabel] = {}

    def best(count: int) -> list[Hit]:
        if request.where is None:
            return []
        result = opened.search.search(replace(request, k=count, calibrate=True, notices=True))
        for hit, label in zip(result.hits, result.labels, strict=True):
            labels[hit.id] = label
        for notice in result.notices:
            if notice.code not in _OF_THE_GALLERY:
                notices[notice.code] = notice
        return result.hits

    page = page_of(search, limit, cursor, best)
    desk.note_search(account, search, page.hits, limit, {"from": page.first})
    desk.searches += 1
    where = request.where
    return Answer(
        page=page,
        labels=[labels[hit.id] for hit in page.hits],
        total=0 if where is None else _counted(opened.gallery, where),
        notices=sorted(notices.values(), key=lambda notice: not notice.is_warning),
    )


def match_of(
    desk: Desk, account: Account, search: Search, id_: int
) -> tuple[float, MatchLabel] | None:
    """Return the score and label of an item in a search; None if they cannot be computed now.

    Raises:
        ProblemError: There is no such item.
    """
    _, vector_D = desk.item(account, id_)
    if search.is_empty:
        return None
    try:
        request, _ = _request(desk, account, search)
        return desk.current.last.search.match(request, vector_D)
    except (BusyError, ProblemError):  # Its picture is gone; the person is there nevertheless.
        return None


def best_of(desk: Desk, account: Account, search: Search, count: int) -> list[Hit]:
    """Return the best hits of a search for its timeline, and note who asked.

    Raises:
        ProblemError: The picture is none, or nothing can be logged.
    """
    request, _ = _request(desk, account, search)
    found = request.where is not None
    hits = desk.current.now().search.search(replace(request, k=count)).hits if found else []
    desk.note_search(account, search, hits, count, {}, action="timeline")
    return hits


def compared(desk: Desk, account: Account, search: Search, count: int) -> list[tuple[Hit, float]]:
    """Return the best hits of a search, each with its likelihood, see `ScoreCalibration`.

    Nothing is noted: whoever shows some of them calls `note_search` first.

    Raises:
        InputError: The sentence cannot be used.
        ProblemError: The picture is none.
        BusyError: Too many wait for the encoder.
    """
    request, _ = _request(desk, account, search)
    if request.where is None:
        return []
    result = desk.current.now().search.search(replace(request, k=count, calibrate=True))
    return list(zip(result.hits, result.likelihoods, strict=True))


def _request(
    desk: Desk, account: Account, search: Search
) -> tuple[SearchRequest, dict[str, Notice]]:
    """Return a search as the core takes it; ``where`` is None if the account may see nothing of it.

    Also returns the notices that depend on what the account may see, by their codes.
    """
    picture_D = None
    if search.like is not None:
        picture_D = desk.item(account, search.like)[1]
    elif search.picture is not None:
        picture_D = desk.query_pictures.get(search.picture).vector_D
    ids = [id_ for id_, _ in search.marks]
    found = desk.gallery.get(ids) if ids else {}
    seen = {id_: vector for id_, (item, vector) in found.items() if account.sees(item.camera)}

    def vectors(ids: Sequence[int]) -> NDArray[np.float32] | None:
        # In one order, whoever marked what first: the same marks give the same bits.
        there = [seen[id_] for id_ in sorted(ids) if id_ in seen]
        return np.array(there, np.float32) if there else None

    notices: dict[str, Notice] = {}
    if unknown := _unknown(desk, account, search.where):
        notices["camera_unknown"] = Notice("camera_unknown", {"cameras": unknown})
    if missing := sum(id_ not in seen for id_ in ids):
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


def _unknown(desk: Desk, account: Account, where: Filter) -> list[str]:
    """Return the cameras of a filter that, for all that somebody may see, are not there."""
    asked = where.cameras or ()
    known = desk.cameras(account) if asked else {}
    # One that has just begun is there before the counts of all are made anew.
    return [
        name
        for name in asked
        if name not in known
        and not (account.sees(name) and desk.gallery.count(Filter(camera=name)))
    ]


def _counted(gallery: Gallery, where: Filter) -> int | None:
    """Return how many items pass: metadata stand in no index, every row would be read."""
    return None if where.attributes and gallery.count() > _COUNTED else gallery.count(where)


# --- What was found as a zip that stands by itself: pictures, facts, hashes, and a page to read
# it

_IN_MEMORY_BYTES = 8 << 20
_MOST_EXPORT_BYTES = 2 << 30
_SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"BM": ".bmp"}


def write_evidence(
    items: Sequence[tuple[int, Item]],
    pictures: Pictures,
    query: Mapping[str, Any],
    model: Mapping[str, Any],
    templates: jinja2.Environment,
) -> tuple[IO[bytes], str]:
    """Write a zip; return it, to be read from its beginning, and its SHA-256.

    Pictures are the files as they are kept, byte by byte. ``manifest.json`` has the SHA-256 of
    every other file.

    Args:
        items: What to export.
        pictures: Where their pictures are.
        query: What was asked, by whom and when.
        model: Fingerprint and variant of the model.
        templates: Have ``evidence.html.j2``.

    Raises:
        ProblemError: There is no room for it, or it is too large.
        IntegrityError: A crop was altered.
    """
    exported = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    hashes: dict[str, str] = {}
    with ExitStack() as stack:
        file = stack.enter_context(tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES))
        stack.enter_context(_told())
        archive = stack.enter_context(zipfile.ZipFile(file, "w", zipfile.ZIP_STORED))

        def put(name: str, content: bytes) -> None:
            hashes[name] = hashlib.sha256(content).hexdigest()
            archive.writestr(_entry(name), content)

        rows = []
        for id_, item in items:
            name = None
            if (picture := _opened(pictures, item)) is not None:
                with picture:
                    name, hashes[name] = _copied(picture, f"pictures/{id_}", archive)
            facts = ItemOut.of(id_, item, name is not None).model_dump(exclude={"picture"})
            rows.append({**facts, "file": name, "sha256": None if name is None else hashes[name]})
        facts = {
            "exported": exported,
            "program": f"upperson-rt {__version__}",
            "model": dict(model),
            "query": dict(query),
            "items": rows,
        }
        put("items.json", _json(facts))
        page = templates.get_template("evidence.html.j2").render(**facts)
        put("index.html", page.encode("utf-8"))
        archive.writestr("manifest.json", _json({"sha256": hashes}))
        archive.close()
        digest = hashlib.sha256()
        file.seek(0)
        while block := file.read(1 << 20):
            digest.update(block)
        file.seek(0)
        stack.pop_all()  # The caller closes it.
    return file, digest.hexdigest()


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # Large ones lie on the disk until they are sent.
        raise ProblemError(507, f"cannot write the export: {error.strerror or error}") from error


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, default=str) + "\n").encode("ascii")


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name, datetime.datetime.now().timetuple()[:6])


def _opened(pictures: Pictures, item: Item) -> IO[bytes] | None:
    """Open a picture's file; None if none is kept or it is no picture any more."""
    file: Path | None = pictures.file(item)
    try:  # Refuses what does not decode, and any file that is larger than a picture may be.
        made = None if file is None else pictures.jpeg(item, "thumb")
    except InputError:
        return None
    if file is None or made is None:
        return None
    crop = read_crop(file)  # Again: the picture may have been in memory.
    return file.open("rb") if crop is None else io.BytesIO(crop)


def _copied(picture: IO[bytes], stem: str, archive: zipfile.ZipFile) -> tuple[str, str]:
    """Copy a picture's file into a zip, in pieces; return its name there and its SHA-256.

    Raises:
        ProblemError: All pictures together have too many bytes.
    """
    left = min(picture.seek(0, io.SEEK_END), MOST_FILE_BYTES)
    picture.seek(0)
    if sum(one.file_size for one in archive.infolist()) + left > _MOST_EXPORT_BYTES:
        raise ProblemError(
            413, f"the export has more than {_MOST_EXPORT_BYTES >> 30} GiB: export fewer pictures"
        )
    digest, piece = hashlib.sha256(), picture.read(min(left, PIECE_BYTES))
    suffix = next((end for start, end in _SUFFIXES.items() if piece.startswith(start)), ".bin")
    with archive.open(_entry(stem + suffix), "w") as copy:
        while piece:
            left -= len(piece)
            digest.update(piece)
            copy.write(piece)
            piece = picture.read(min(left, PIECE_BYTES))
    return stem + suffix, digest.hexdigest()
