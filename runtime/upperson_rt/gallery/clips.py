"""Whole frames and clips of saved crops, in the folder ``clips`` beside the folder of crops.

A file is named after its crop, with the time that it shows in unix milliseconds, so that no row has
to name it: for the crop ``gate/2026-11-30/CROP.jpg`` the frame is
``gate/2026-11-30/CROP.1790000000000.jpg``, the clip ``CROP.1789999995000-1790000005000.mp4``.
A deleted person may be in the frames and clips of others, which go as well: `erase_clips`.
"""

import os
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from upperson_rt.files import sync_folder
from upperson_rt.gallery.crops import crop_path, own_path
from upperson_rt.printable import get_logger

_LOG = get_logger(__name__)

BEFORE_S = 10.0
"""A person may be in view for so long before the first crop of a track."""
AFTER_S = 310.0
"""And after the last one: who stands still has a crop every 300 s, see `still_every_s`."""
_NAME = re.compile(r"(.+)\.(\d{1,15})(?:-(\d{1,15}))?\.(jpg|mp4|mkv)")
"""Crop, first and last millisecond. No name that begins with a dot counts: it may be unfinished."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipFile:
    """A whole frame, or a clip."""

    path: Path
    crop: str
    """Name of the crop's file, without its ending and folder."""
    begin: float
    """Unix seconds."""
    end: float
    """The same as ``begin`` for a frame."""
    is_clip: bool

    @property
    def plays(self) -> bool:
        """Whether browsers may play it: H.264, HEVC, VP9 and AV1 are in MP4, all others are not."""
        return self.path.suffix == ".mp4"


@dataclass(frozen=True, kw_only=True, slots=True)
class Erased:
    """A deleted row, as far as `erase_clips` needs it."""

    crop: str
    track: str | None
    time: float | None


def clips_dir(crops_dir: Path) -> Path:
    """Return the folder of frames and clips beside a folder of crops."""
    return crops_dir.with_name("clips")


def clip_name(crop: str, suffix: str, begin: float, end: float | None = None) -> str:
    """Return the path of a file in `clips_dir`; without ``end``, in unix seconds, of a frame."""
    times = "-".join(str(max(0, round(1000 * one))) for one in (begin, end) if one is not None)
    return f"{PurePosixPath(crop).with_suffix('')}.{times}{suffix}"


def clips_in(folder: Path) -> Iterator[ClipFile]:
    """Yield the files of a folder, without those in folders in it; none if there is no folder."""
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                named = None if entry.name.startswith(".") else _NAME.fullmatch(entry.name)
                if named is None or not entry.is_file(follow_symlinks=False):
                    continue
                begin = int(named[2]) / 1000
                yield ClipFile(
                    path=Path(entry.path),
                    crop=named[1],
                    begin=begin,
                    end=begin if named[3] is None else int(named[3]) / 1000,
                    is_clip=named[3] is not None,
                )
    except (FileNotFoundError, NotADirectoryError):
        return


def all_clips(crops_dir: Path) -> Iterator[ClipFile]:
    """Yield all frames and clips of a gallery. Of links only the folder ``clips`` is followed."""
    folders = [clips_dir(crops_dir)]
    while folders:
        folder = folders.pop()
        try:  # os.walk would list all names: a day has files by the hundred thousand.
            with os.scandir(folder) as entries:
                folders += [Path(one.path) for one in entries if one.is_dir(follow_symlinks=False)]
        except OSError:
            continue
        yield from clips_in(folder)


def clips_of(crops_dir: Path, crop: str) -> list[ClipFile]:
    """Return the frame and the clip of a crop, as far as they are kept, the frame first."""
    path = crop_path(clips_dir(crops_dir), crop)
    if path is None:
        return []
    found = [file for file in clips_in(path.parent) if file.crop == path.stem]
    return sorted(found, key=lambda file: (file.is_clip, file.begin))


def remove_clips(crops_dir: Path, crops: Iterable[str]) -> None:
    """Remove the frames and clips of crops that are replaced."""
    folder, of_day = clips_dir(crops_dir), defaultdict[Path, set[str]](set)
    for crop in crops if folder.exists() else ():
        if (path := own_path(folder, crop)) is not None:
            of_day[path.parent].add(path.stem)
    for day, stems in of_day.items():
        for file in clips_in(day):
            if file.crop in stems:
                _remove(file)


def erase_clips(crops_dir: Path, rows: Iterable[Erased]) -> None:
    """Remove what shows deleted people, see `clips_showing`, durably; raises OSError."""
    changed = set()
    for file in clips_showing(crops_dir, rows):
        file.path.unlink(missing_ok=True)
        changed.add(file.path.parent)
    for folder in changed:
        sync_folder(folder)


def clips_showing(crops_dir: Path, rows: Iterable[Erased]) -> Iterator[ClipFile]:
    """Yield what may show deleted people: all frames and clips of their camera at their time.

    The rows of a track that are deleted together stand for the time between them, and each for
    `BEFORE_S` before and `AFTER_S` after. Of other people there are no crops, but their frames and
    clips of that time. Links are not followed.

    Raises:
        OSError: A folder cannot be read.
    """
    folder = clips_dir(crops_dir)
    if not folder.exists():
        return
    spans: dict[tuple[str, object], tuple[float, float]] = {}
    of_camera: dict[str, set[str]] = {}
    for row in rows:
        place = PurePosixPath(row.crop)
        camera = place.parent.parent.as_posix()
        of_camera.setdefault(camera, set()).add(place.stem)
        if row.time is not None:
            group = (camera, row.crop if row.track is None else (row.track,))
            first, last = spans.get(group, (row.time, row.time))
            spans[group] = min(first, row.time), max(last, row.time)
    for camera, crops in of_camera.items():
        around = [
            (first - BEFORE_S, last + AFTER_S) for (of, _), (first, last) in spans.items()
            if of == camera
        ]  # fmt: skip
        begins, ends = _merged(around)
        days = folder / camera
        if own_path(folder, f"{camera}/day") is None or not days.is_dir():
            continue
        for day in days.iterdir():
            for file in () if day.is_symlink() else clips_in(day):
                before = bisect_right(begins, file.end)
                if file.crop in crops or (before and ends[before - 1] >= file.begin):
                    yield file


def remove_stray_clips(crops_dir: Path, before: float) -> None:
    """Remove what ends before a time in unix seconds and has no crop any more."""
    for file in [one for one in all_clips(crops_dir) if one.end < before]:
        day = file.path.parent.relative_to(clips_dir(crops_dir))
        if not (crops_dir / day / f"{file.crop}.jpg").exists():
            _remove(file)


def _merged(spans: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Return the begins and the ends of what spans cover together, ascending."""
    begins: list[float] = []
    ends: list[float] = []
    for begin, end in sorted(spans):
        if ends and begin <= ends[-1]:
            ends[-1] = max(ends[-1], end)
        else:
            begins.append(begin)
            ends.append(end)
    return begins, ends


def _remove(file: ClipFile) -> None:
    try:
        file.path.unlink(missing_ok=True)
    except OSError as error:
        _LOG.warning("%s could not be removed: %s", file.path, error.strerror)
