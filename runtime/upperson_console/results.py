"""Results of a search: hits with their match labels, notices, and an export as a zip.

Each search is in the log before its hits are shown; callers of `scored_hits` log it themselves.
"""

import datetime
import hashlib
import io
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from upperson_console.accounts import Account
from upperson_console.limits import BusyError
from upperson_console.models import ItemOut, item_fields
from upperson_console.pictures import PIECE_BYTES, GalleryPictures
from upperson_console.problems import ProblemError
from upperson_console.rendering import templates
from upperson_console.search import Page, Search, page_of
from upperson_console.service import ConsoleService
from upperson_rt import __version__
from upperson_rt.errors import InputError
from upperson_rt.gallery import Filter, Gallery, Hit, Item
from upperson_rt.gallery.clips import ClipFile
from upperson_rt.gallery.crops import read_crop
from upperson_rt.image_file import MOST_FILE_BYTES
from upperson_rt.score_calibration import MatchLabel
from upperson_rt.search.notices import Notice
from upperson_rt.search.query import SearchRequest
from upperson_rt.search.service import PictureMatch
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

    def best(count: int) -> list[Hit]:
        nonlocal verdict
        if request.where is None:
            return []
        result = opened.search.search(replace(request, k=count, calibrate=True, notices=True))
        pairs = zip(result.likelihoods, result.labels, strict=True)
        judged.update(zip((hit.id for hit in result.hits), pairs, strict=True))
        verdict = result.verdict or _NOTHING_SEARCHED
        for notice in result.notices:
            if notice.code not in _OF_THE_GALLERY:
                notices[notice.code] = notice
        return result.hits

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
    request, _ = _request(service, account, search)
    hits, is_calibrated = [], True
    if request.where is not None:
        found = service.current.now().search.search(replace(request, k=count, calibrate=True))
        is_calibrated = found.verdict is not None and found.verdict.word != "uncalibrated"
        labelled = zip(found.hits, found.labels, strict=True)
        hits = [hit for hit, label in labelled if label == "likely" or not is_calibrated]
    service.note_search(account, search, hits, count, {}, action="timeline", shown=None)
    return hits, is_calibrated


def scored_hits(
    service: ConsoleService, account: Account, search: Search, count: int
) -> list[tuple[Hit, float | None]]:
    """Return the best hits of a search with their likelihoods; None without a label.

    The caller logs those that it shows.
    """
    request, _ = _request(service, account, search)
    if request.where is None:
        return []
    result = service.current.now().search.search(replace(request, k=count, calibrate=True))
    return list(zip(result.hits, result.likelihoods, strict=True))


def _request(
    service: ConsoleService, account: Account, search: Search
) -> tuple[SearchRequest, dict[str, Notice]]:
    """Return the core's request, and the notices that depend on the account, by code.

    The request's ``where`` is None if the account may see nothing that it could find.
    """
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


# --- Export: a self-contained zip of pictures, facts and hashes, with a page to read it

_IN_MEMORY_BYTES = 8 << 20
_MOST_EXPORT_BYTES = 2 << 30
_SUFFIXES = {b"\xff\xd8\xff": ".jpg", b"\x89PNG": ".png", b"RIFF": ".webp", b"BM": ".bmp"}


def write_evidence(
    account: Account,
    items: Sequence[tuple[int, Item]],
    pictures: GalleryPictures,
    query: Mapping[str, Any],
    model: Mapping[str, Any],
) -> tuple[IO[bytes], str]:
    """Write a zip of items; return its file, at its beginning, and its SHA-256.

    Pictures are copied byte by byte. ``manifest.json`` has the SHA-256 of each other file.
    """
    exported = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    hashes: dict[str, str] = {}
    with ExitStack() as stack:
        file = stack.enter_context(tempfile.SpooledTemporaryFile(_IN_MEMORY_BYTES))
        stack.enter_context(_disk_errors())
        archive = stack.enter_context(zipfile.ZipFile(file, "w", zipfile.ZIP_STORED))

        def put(name: str, content: bytes) -> None:
            hashes[name] = hashlib.sha256(content).hexdigest()
            archive.writestr(_entry(name), content)

        rows = []
        clips: dict[tuple[int, int], tuple[str, str]] = {}
        for id_, item in items:
            name = None
            if (picture := _opened(pictures, item)) is not None:
                with picture:
                    name, hashes[name] = _copied(picture, f"pictures/{id_}", archive)
            fields = item_fields(account, id_, item, has_picture=False)
            facts = ItemOut.model_validate(fields).model_dump(exclude={"picture"})
            more = {"frame": pictures.saved_frame(item), "clip": pictures.clip(item)}
            about = {
                kind: None if kept is None else _with_clip(kept, id_, archive, clips)
                for kind, kept in more.items()
            }
            sha256 = None if name is None else hashes[name]
            rows.append({**facts, "file": name, "sha256": sha256, **about})
        hashes.update(clips.values())
        facts = {
            "exported": exported,
            "program": f"upperson-rt {__version__}",
            "model": dict(model),
            "query": dict(query),
            "items": rows,
        }
        put("items.json", _json(facts))
        page = templates().get_template("evidence.html.j2").render(**facts)
        put("index.html", page.encode("utf-8"))
        archive.writestr("manifest.json", _json({"sha256": hashes}))
        archive.close()
        digest = hashlib.sha256()
        file.seek(0)
        while block := file.read(PIECE_BYTES):
            digest.update(block)
        file.seek(0)
        stack.pop_all()  # The caller closes it.
    return file, digest.hexdigest()


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # Large ones are on disk until they are sent.
        raise ProblemError(507, f"cannot write the export: {error.strerror or error}") from error


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, default=str) + "\n").encode("ascii")


def _entry(name: str) -> zipfile.ZipInfo:
    return zipfile.ZipInfo(name, datetime.datetime.now().timetuple()[:6])


def _opened(pictures: GalleryPictures, item: Item) -> IO[bytes] | None:
    """Open a picture's file; None if it is missing or damaged."""
    file: Path | None = pictures.file(item)
    try:  # Decoding it refuses damaged and overlong files.
        made = None if file is None else pictures.jpeg(item, "thumb")
    except InputError:
        return None
    if file is None or made is None:
        return None
    crop = read_crop(file)  # Read again: the cache may have answered.
    return file.open("rb") if crop is None else io.BytesIO(crop)


def _with_clip(
    kept: ClipFile,
    id_: int,
    archive: zipfile.ZipFile,
    copied: dict[tuple[int, int], tuple[str, str]],
) -> dict[str, Any] | None:
    """Copy a whole frame or a clip into a zip, and describe it; None if it went meanwhile.

    Items that share a clip share the copy; ``copied`` has name and SHA-256 by device and file.
    """
    try:
        file = kept.path.open("rb")
    except FileNotFoundError:
        return None
    with file:
        found = os.fstat(file.fileno())
        key = found.st_dev, found.st_ino
        if key not in copied:
            stem = f"{'clips' if kept.is_clip else 'frames'}/{id_}"
            copied[key] = _copied(file, stem, archive, kept.path.suffix)
    name, digest = copied[key]
    begin, end = (
        datetime.datetime.fromtimestamp(one).astimezone().isoformat(timespec="milliseconds")
        for one in (kept.begin, kept.end)
    )
    return {"file": name, "sha256": digest, "begin": begin, "end": end}


def _copied(
    picture: IO[bytes], stem: str, archive: zipfile.ZipFile, suffix: str | None = None
) -> tuple[str, str]:
    """Copy a file into a zip; return its name there, with a picture's ending, and its SHA-256."""
    left = min(picture.seek(0, io.SEEK_END), MOST_FILE_BYTES)
    picture.seek(0)
    if sum(one.file_size for one in archive.infolist()) + left > _MOST_EXPORT_BYTES:
        raise ProblemError(
            413,
            f"the export has more than {_MOST_EXPORT_BYTES >> 30} GiB: export fewer pictures",
            code="export_too_large",
        )
    digest, piece = hashlib.sha256(), picture.read(min(left, PIECE_BYTES))
    known = (end for start, end in _SUFFIXES.items() if piece.startswith(start))
    suffix = suffix or next(known, ".bin")
    with archive.open(_entry(stem + suffix), "w") as copy:
        while piece:
            left -= len(piece)
            digest.update(piece)
            copy.write(piece)
            piece = picture.read(min(left, PIECE_BYTES))
    return stem + suffix, digest.hexdigest()
