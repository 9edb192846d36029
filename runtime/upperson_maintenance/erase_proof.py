"""Looks for deleted rows wherever a gallery in a folder, and its copies, could have them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError, UppersonError, UsageError
from upperson_rt.files import read_bounded
from upperson_rt.gallery.clips import all_clips, clips_dir
from upperson_rt.gallery.erasures import (
    ERASURE_LOG,
    digest_of_keys,
    open_erasure_log,
    unpack_ids,
)
from upperson_rt.gallery.protocol import known_keys
from upperson_rt.gallery.records import Filter
from upperson_rt.gallery.snapshots import SNAPSHOTS, snapshots_passing
from upperson_rt.gallery.sqlite.stored import (
    DATABASE_FILE,
    SqliteGallery,
    among,
    condition_of,
    log_of,
)
from upperson_rt.gallery.sqlite.traces import (
    Selected,
    files_of_no_row,
    free_pages,
    indexed,
    leftovers,
    messages,
    stored_ids,
)
from upperson_rt.score_calibration import SCORES_FILE, read_score_calibration

_MOST_LOG_BYTES = 512 << 20
_PRUNE = "upperson-rt gallery prune --older-than"


class Place(NamedTuple):
    """A place, and what was found there."""

    name: str
    looked_for: str
    looked_at: int
    """Rows, pages or files."""
    left: int
    """Those that should be gone."""
    advice: str
    """How to remove them."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What was erased: keys, a filter or one erasure of the log; without any, all that ever was."""

    keys: Sequence[str] = ()
    where: Filter = field(default_factory=Filter)
    erasure: str | None = None

    def __post_init__(self) -> None:
        if bool(self.keys) + (not self.where.is_empty) + (self.erasure is not None) > 1:
            raise UsageError(
                "name keys, a filter or the id of an erasure, and only one of them",
                code="selections_conflict",
            )


def prove_erasure(
    gallery: SqliteGallery, selection: Selection, backups: Sequence[Path] = ()
) -> list[Place]:
    """Finish what deletions left, look at each place, and write the result into the log.

    Args:
        gallery: Its database, free pages, log, index, crops, frames, clips, bin and calibration.
        selection: What was erased.
        backups: Folders with copies of the gallery, at any depth.

    Raises:
        InputError: The log has no such erasure (``erasure_unknown``), a folder has no copy of the
            gallery (``backup_not_found``, ``backup_of_another``), or the log cannot be written.
    """
    ids = None if selection.erasure is None else _ids_of(gallery, selection.erasure)
    log = log_of(gallery.path / DATABASE_FILE)
    left = 0 if gallery.finish_erasures() else log.stat().st_size
    rows = _stored(gallery)
    places = [Place("SQLite's log", "bytes", left, left, "a program reads it: try again")]
    places += _places(gallery, selection, ids, rows)
    for number, folder in enumerate(backups, start=1):
        found = sorted(folder.rglob(DATABASE_FILE))
        if not found:
            raise InputError(
                f"{folder} has no copy of a gallery: name a folder with {DATABASE_FILE}",
                code="backup_not_found",
                path=folder,
            )
        for file in found:
            with SqliteGallery.open(file.parent) as copy:
                assert isinstance(copy, SqliteGallery)
                of_copy, gone = _stored(copy), ids
                if not (selection.keys or selection.where.conditions):
                    if copy.database.meta.identity != gallery.database.meta.identity:
                        raise InputError(
                            f"{copy.location} is a copy of another gallery: name keys or a filter",
                            code="backup_of_another",
                            path=copy.location,
                        )
                    gone = ids
                    if ids is None:
                        gone = np.setdiff1d(of_copy[1][:, 0], rows[1][:, 0])
                advice = f"upperson-rt gallery backup -g {gallery.location} {copy.location} ; "
                advice += "delete a copy that something else made"
                for place in _places(copy, selection, gone, of_copy):
                    name = f"backup {number}: {place.name}"
                    places.append(place._replace(name=name, advice=advice))
    about = {
        "erasure": selection.erasure,
        "about": selection.where.conditions,
        "keys_sha256": digest_of_keys(gallery.database.meta.identity, selection.keys),
        "places": {place.name: place.left for place in places},
        "left": sum(place.left for place in places),
    }
    with open_erasure_log(gallery.path) as lines:
        lines.append("proof", about)
    return places


def _places(
    gallery: SqliteGallery,
    selection: Selection,
    ids: NDArray[np.int64] | None,
    stored: tuple[Selected, Selected],
) -> Iterator[Place]:
    """Look into one folder with these rows, see `stored_ids`."""
    rows, kept = stored
    found: tuple[str, int] | None = None  # What was ever erased is what the database has not.
    binned: tuple[str, list[object]] = "0", []
    if ids is not None:
        found = "erased row numbers", len(np.intersect1d(ids, rows[:, 0]))
        binned = among("id", ids.tolist())
    elif selection.keys:
        found = "erased keys", len(gallery.ids(selection.keys))
        binned = among("key", known_keys(selection.keys))
    elif selection.where.conditions:
        found = "rows that pass the filter", gallery.count(selection.where)
        binned = condition_of(selection.where)
    if found is not None:
        yield Place("database", found[0], len(rows), found[1], "delete them there")
    pages, left = free_pages(gallery.path)
    yield Place("free pages", "pages that are not zeros", pages, left, "VACUUM the database")
    with gallery.database.reading() as transaction:
        index = indexed(transaction, gallery.path, gallery.database.meta, kept)
        crops = files_of_no_row(transaction, gallery.crops_dir)
        count, left = messages(transaction)
    what, advice = "embeddings that the database has not", "upperson-rt gallery rebuild"
    yield Place("search index", what, index.rows, index.stale_rows, advice)
    what = "means of other embeddings than those of their lists"
    yield Place("index centroids", what, index.centroids, index.stale_centroids, advice)
    yield Place("alerts", "messages of no row", count, left, _PRUNE)
    yield Place("crops", "files of no row", len(rows), len(crops), _PRUNE)
    clips, folder = list(all_clips(gallery.crops_dir)), clips_dir(gallery.crops_dir)
    days = [gallery.crops_dir / clip.path.parent.relative_to(folder) for clip in clips]
    there = [(day / f"{clip.crop}.jpg").exists() for day, clip in zip(days, clips, strict=True)]
    left = there.count(False) + leftovers(folder, "unfinished")
    yield Place("frames and clips", "files of no crop", len(clips), left, _PRUNE)
    count, left = gallery.bin.traces(*binned)
    what = "what was erased, and files of no row"
    yield Place("bin", what, count, left, "upperson-rt gallery delete")
    frames, where = gallery.path / SNAPSHOTS, selection.where
    names = [] if where.is_empty else snapshots_passing(frames, where)
    count = len(list(frames.glob("*.jpg")))
    left = len(names) + leftovers(frames, "*")
    what = "cameras that pass the filter, and unfinished files"
    yield Place("newest frames", what, count, left, "delete them")
    file, left = gallery.path / SCORES_FILE, 0
    try:
        if file.exists():  # It has averages, and nothing of one picture.
            read_score_calibration(file, gallery.fingerprint)
    except UppersonError:
        left = 1
    what = "anything but averages"
    yield Place("score calibration", what, int(file.exists()), left, "upperson-rt calibrate")


def _ids_of(gallery: SqliteGallery, erasure: str) -> NDArray[np.int64]:
    """Return the row numbers that the log has of an erasure."""
    found, file = [], gallery.path / ERASURE_LOG
    text = read_bounded(file, _MOST_LOG_BYTES).decode("utf-8", "replace") if file.exists() else ""
    for line in text.splitlines():
        if erasure in line:
            with suppress(ValueError):  # What a crash cut off.
                entry = json.loads(line)
                if entry.get("erasure") == erasure and "ids" in entry:
                    found.append(unpack_ids(entry["ids"]))
    if not found:
        message = f"{file} has no erasure {erasure}: its lines have the id as  erasure"
        raise InputError(message, code="erasure_unknown", path=file)
    return np.unique(np.concatenate(found))


def _stored(gallery: SqliteGallery) -> tuple[Selected, Selected]:
    with gallery.database.reading() as transaction:
        return stored_ids(transaction)
