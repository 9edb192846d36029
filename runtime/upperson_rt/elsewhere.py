"""Whether a gallery holds pictures already, under the name of another folder.

Keys are paths. The same pictures, found at another mount point, are added once more, and nothing
else tells: here their names are compared, as far as a sample goes.
"""

import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePath

from upperson_rt.gallery import Gallery, Item

__all__ = ["Elsewhere", "find_elsewhere"]

_SAMPLE = 1000
_ASKED = 100
"""Pictures that are looked up by the names that they would have."""
_TRIED = 3
"""Pairs of folders that are looked up, likeliest first."""


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """Pictures that a gallery seems to hold under another name."""

    before: str
    """The folder that they have in the gallery."""
    now: str
    """The same folder as it is called now."""
    found: int
    """Of the pictures that were looked up, those that are there by that name."""
    asked: int


def find_elsewhere(
    gallery: Gallery,
    files: Sequence[str | os.PathLike[str]],
    first_keys: Callable[[str], Sequence[str]],
    is_like: Callable[[Item, Path], bool],
) -> Elsewhere | None:
    """Return where most of the pictures that are new to a gallery are in it by another name.

    Args:
        gallery: Its keys are paths, or parts of pictures at paths.
        files: Pictures that are going to be added.
        first_keys: Returns keys of which a picture at a path has one, if it is there.
        is_like: Whether all else that an item says suits a picture.
    """
    sources = [item.source for item in gallery.sample(_SAMPLE) if item.source is not None]
    known = {end for source in sources for end in _ends(source)}
    by_end: dict[str, str | os.PathLike[str]] = {}
    for file in files:
        for end in takewhile(known.__contains__, _ends(os.fspath(file))):
            by_end.setdefault(end, file)
    folders: Counter[tuple[str, str]] = Counter()
    for source in sources:
        # The last is the longest: of names such as 0001.jpg, that of the same folder.
        for likest in deque(takewhile(by_end.__contains__, _ends(source)), maxlen=1):
            before, now = _apart(PurePath(source), Path(by_end[likest]).absolute())
            folders[before, now] += before != now
    if not folders.total():
        return None
    asked = [Path(file).absolute() for file in files[:: max(1, len(files) // _ASKED)][:_ASKED]]
    own = {file: first_keys(str(file)) for file in asked}
    there = gallery.ids([key for keys in own.values() for key in keys])
    asked = [file for file, keys in own.items() if not there.keys() & set(keys)]
    for (before, now), _ in folders.most_common(_TRIED if asked else 0):
        named = {
            key: file
            for file in asked
            if file.is_relative_to(now)
            for key in first_keys(os.path.join(before, file.relative_to(now)))
        }
        items = [item for item, _ in gallery.get([*gallery.ids([*named]).values()]).values()]
        found = sum(
            is_like(item, named[item.key]) and not _is_other(item.source, named[item.key])
            for item in items
        )
        if 2 * found > len(asked):
            return Elsewhere(before=before, now=now, found=found, asked=len(asked))
    return None


def _ends(path: str) -> Iterator[str]:
    """Yield a file's name, that with its folder before it, and so on."""
    at = len(path)
    while at > 0:
        at = path.rfind(os.sep, 0, at)
        yield path[at + 1 :]


def _is_other(source: str | None, file: Path) -> bool:
    """Tell whether a path of the gallery leads to another file on this machine."""
    try:
        return source is None or not os.path.samefile(source, file)
    except (OSError, ValueError):  # It leads nowhere here: it may be another machine's.
        return False


def _apart(source: PurePath, file: PurePath) -> tuple[str, str]:
    """Return the folders that two paths begin with, before all that they end with alike."""
    one, other = source.parts, file.parts
    same = 0
    while same < min(len(one), len(other)) - 1 and one[-1 - same] == other[-1 - same]:
        same += 1
    return str(PurePath(*one[: len(one) - same])), str(PurePath(*other[: len(other) - same]))
