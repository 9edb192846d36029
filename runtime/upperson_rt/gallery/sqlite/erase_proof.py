"""Looks for deleted rows wherever a gallery in a folder, and its copies, could have them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError, UppersonError, UsageError
from upperson_rt.gallery.clips import all_clips, clips_dir
from upperson_rt.gallery.erasures import ERASURE_LOG, ErasureLog, digest_of_keys, unpack_ids
from upperson_rt.gallery.records import Filter
from upperson_rt.gallery.snapshots import SNAPSHOTS, snapshots_passing
from upperson_rt.gallery.sqlite import rows as table
from upperson_rt.gallery.sqlite.database import DATABASE_FILE
from upperson_rt.gallery.sqlite.deletion import selected, unfinished
from upperson_rt.gallery.sqlite.index import INDEX_FILE, UnusableIndexError, read_index
from upperson_rt.gallery.sqlite.store import SqliteGallery
from upperson_rt.score_calibration import SCORES_FILE, read_score_calibration


@dataclass(frozen=True, kw_only=True)
class Place:
    """A place, and what was found there."""

    name: str
    looked_for: str
    looked_at: int
    """Rows, pages or files."""
    left: int
    """Those that should be gone."""
    advice: str = ""


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
        gallery: Its database, free pages, log, index, crops, frames, clips and calibration.
        selection: What was erased.
        backups: Folders with copies of the gallery, at any depth.

    Raises:
        InputError: The log has no such erasure (``erasure_unknown``), a folder has no copy of the
            gallery (``backup_not_found``, ``backup_of_another``), or the log cannot be written.
    """
    finished = gallery.finish_erasures()
    ids = None if selection.erasure is None else _ids_of(gallery, selection.erasure)
    rows = _rows_of(gallery)
    places = [*_places(gallery, selection, ids, rows, "")]
    left = 0 if finished else (gallery.path / f"{DATABASE_FILE}-wal").stat().st_size
    advice = "a program reads the gallery: try again"
    places.append(
        Place(name="SQLite's log", looked_for="bytes", looked_at=left, left=left, advice=advice)
    )
    for number, file in _copies(backups):
        with SqliteGallery.open(file.parent) as copy:
            assert isinstance(copy, SqliteGallery)
            places += _of_backup(gallery, copy, selection, ids, rows, f"backup {number}: ")
    about: dict[str, object] = {
        "erasure": selection.erasure,
        "about": selection.where.conditions,
        "places": {place.name: place.left for place in places},
        "left": sum(place.left for place in places),
    }
    if selection.keys:
        about["keys_sha256"] = digest_of_keys(gallery.database.meta.identity, {*selection.keys})
    with ErasureLog(gallery.path / ERASURE_LOG) as log:
        log.append("proof", about)
    return places


def _copies(folders: Sequence[Path]) -> Iterator[tuple[int, Path]]:
    for number, folder in enumerate(folders, start=1):
        files = sorted(folder.rglob(DATABASE_FILE))
        if not files:
            raise InputError(
                f"{folder} has no copy of a gallery: name a folder with {DATABASE_FILE}",
                code="backup_not_found",
                path=folder,
            )
        yield from ((number, file) for file in files)


def _of_backup(
    gallery: SqliteGallery,
    copy: SqliteGallery,
    selection: Selection,
    ids: NDArray[np.int64] | None,
    rows: NDArray[np.int64],
    prefix: str,
) -> Iterator[Place]:
    if not (selection.keys or selection.where.conditions):
        if copy.database.meta.identity != gallery.database.meta.identity:
            raise InputError(
                f"{copy.location} is a copy of another gallery: name keys or a filter",
                code="backup_of_another",
                path=copy.location,
            )
        if ids is None:
            ids = np.setdiff1d(_rows_of(copy)[:, 0], rows[:, 0])
    yield from _places(copy, selection, ids, _rows_of(copy), prefix)


def _places(
    gallery: SqliteGallery,
    selection: Selection,
    ids: NDArray[np.int64] | None,
    rows: NDArray[np.int64],
    prefix: str,
) -> Iterator[Place]:
    """Look into one folder; ``rows`` are its ids and checksums."""
    found: tuple[int, str] | None = None
    if ids is not None:
        found = len(np.intersect1d(ids, rows[:, 0])), "erased row numbers"
    elif selection.keys:
        found = len(gallery.ids(selection.keys)), "erased keys"
    elif selection.where.conditions:
        found = gallery.count(selection.where), "rows that pass the filter"
    if found is not None:  # What was ever erased is what the database does not have.
        yield Place(
            name=f"{prefix}database",
            looked_for=found[1],
            looked_at=len(rows),
            left=found[0],
            advice="restore no copy older than the erasure" if prefix else "delete them",
        )
    pages, left = _free_pages(gallery.path / DATABASE_FILE)
    yield Place(
        name=f"{prefix}free pages",
        looked_for="pages that are not zeros",
        looked_at=pages,
        left=left,
        advice="VACUUM the database",
    )
    indexed, left = _stale_in_index(gallery.path / INDEX_FILE, rows)
    yield Place(
        name=f"{prefix}search index",
        looked_for="embeddings that the database does not have",
        looked_at=indexed,
        left=left,
        advice="upperson-rt gallery rebuild",
    )
    with gallery.database.reading() as transaction:
        crops = [*table.stray_crops(transaction, gallery.crops_dir)]
        crops += [file for one in unfinished(transaction).values() for file in one["files"]]
    yield Place(
        name=f"{prefix}crops",
        looked_for="files of no row",
        looked_at=len(rows),
        left=len(crops),
        advice="upperson-rt gallery prune --older-than",
    )
    clips, folder = list(all_clips(gallery.crops_dir)), clips_dir(gallery.crops_dir)
    stray = [
        clip
        for clip in clips
        if not (gallery.crops_dir / clip.path.relative_to(folder)).with_name(
            f"{clip.crop}.jpg"
        ).exists()
    ]  # fmt: skip
    yield Place(
        name=f"{prefix}frames and clips",
        looked_for="files without their crop",
        looked_at=len(clips),
        left=len(stray),
        advice="upperson-rt gallery prune --older-than",
    )
    frames = gallery.path / SNAPSHOTS
    names = [] if selection.where.is_empty else snapshots_passing(frames, selection.where)
    yield Place(
        name=f"{prefix}newest frames",
        looked_for="cameras that pass the filter",
        looked_at=len(list(frames.glob("*.jpg"))),
        left=len(names),
        advice="delete with the same filter",
    )
    yield _calibration(gallery, prefix)


def _calibration(gallery: SqliteGallery, prefix: str) -> Place:
    """The file of the score calibration has averages of all pictures, and of none by itself."""
    file, left = gallery.path / SCORES_FILE, 0
    if there := file.exists():
        try:
            read_score_calibration(file, gallery.fingerprint)
        except UppersonError:
            left = 1
    return Place(
        name=f"{prefix}score calibration",
        looked_for="anything but averages",
        looked_at=int(there),
        left=left,
        advice="upperson-rt calibrate",
    )


# --- What the files have


def _ids_of(gallery: SqliteGallery, erasure: str) -> NDArray[np.int64]:
    """Return the row numbers that the log has of an erasure."""
    found, file = [], gallery.path / ERASURE_LOG
    with ErasureLog(file) as log, open(log.path, "rb") as lines:
        for line in lines:
            if erasure.encode("utf-8", "replace") in line:
                with suppress(ValueError):  # What a crash cut off.
                    entry = json.loads(line)
                    if entry.get("erasure") == erasure and "ids" in entry:
                        found.append(unpack_ids(entry["ids"]))
    if not found:
        raise InputError(
            f"{file} has no erasure {erasure}: its lines have the id as  erasure",
            code="erasure_unknown",
            path=file,
        )
    return np.unique(np.concatenate(found))


def _rows_of(gallery: SqliteGallery) -> NDArray[np.int64]:
    """Return (N, 2) ids and checksums."""
    with gallery.database.reading() as transaction:
        return selected(transaction, "items NOT INDEXED", ())


def _stale_in_index(file: Path, rows: NDArray[np.int64]) -> tuple[int, int]:
    """Return how many rows the file of the index has, and of those that the database does not."""
    try:
        (_, ids, checksums), _ = read_index(file)
    except FileNotFoundError:
        return 0, 0
    except (UnusableIndexError, OSError):
        return 1, 1
    order = np.argsort(rows[:, 0])
    known, sums = rows[order, 0], rows[order, 1]
    at = np.minimum(np.searchsorted(known, ids), max(0, len(known) - 1))
    same = (known[at] == ids) & (sums[at] == checksums) if len(known) else np.zeros(len(ids), bool)
    return len(ids), int((~same).sum())


def _free_pages(file: Path) -> tuple[int, int]:
    """Return how many free pages a database file has, and how many of them are not overwritten.

    A page of the list itself has numbers of pages and nothing else.
    """
    with open(file, "rb") as opened:

        def page(number: int) -> NDArray[np.uint32]:
            opened.seek((number - 1) * size)
            return np.frombuffer(opened.read(size), ">u4")

        opened.seek(16)
        size = int.from_bytes(opened.read(2), "big")
        size = 65536 if size == 1 else size  # As SQLite writes it.
        pages, trunk, total = page(1)[7:10].tolist()
        left = 0
        for _ in range(total):
            if not trunk:
                break
            listed = page(trunk)
            trunk, count = listed[:2].tolist()
            left += int((listed > pages).any())
            left += sum(bool(page(leaf).any()) for leaf in listed[2 : 2 + count].tolist())
    return total, left
