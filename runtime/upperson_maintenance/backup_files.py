"""The files of a backup: crops, frames, clips, and what else lies in the folder of a gallery."""

import errno
import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path

from upperson_rt.errors import InputError
from upperson_rt.files import (
    IRREGULAR,
    open_regular,
    require_no_links,
    sha256_of_file,
    write_all_atomically,
)
from upperson_rt.gallery.clips import all_clips
from upperson_rt.gallery.crops import crop_path
from upperson_rt.gallery.sqlite.stored import Transaction, unnamed_crops

CROPS, CLIPS = "crops", "clips"
MOST_BYTES = 512 << 20
"""Of one file: a clip of a minute takes less, and each is read as a whole."""
_MISSING = (*IRREGULAR, errno.ENOENT, errno.ENOTDIR)
_NAMES_AT_A_TIME = 10_000
_FILES_AT_A_TIME, _BYTES_AT_A_TIME = 64, 32 << 20


class Copies:
    """Copies files, some at a time, each on disk before it gets its name."""

    def __init__(self, pool: Executor, follow_links: bool = True) -> None:
        """Without ``follow_links`` a file behind one counts as missing: it may lie anywhere."""
        self.files = self.bytes = 0
        self._follow_links = follow_links
        self._pool, self._waiting = pool, dict[Path, bytes]()

    def add(self, file: Path, copy: Path) -> bytes | None:
        """Copy a file, at the latest at the next `flush`; return its content, None if it is gone.

        Missing folders are made. What is no regular file counts as gone.

        Raises:
            InputError: It is longer than `MOST_BYTES`.
        """
        try:
            if not self._follow_links and file.resolve() != file:
                return None
            content = _read(file, follow_links=self._follow_links)
        except OSError as error:
            if error.errno in _MISSING:
                return None
            raise
        self._waiting[copy] = content
        self.files += 1
        self.bytes += len(content)
        if (
            len(self._waiting) >= _FILES_AT_A_TIME
            or sum(map(len, self._waiting.values())) > _BYTES_AT_A_TIME
        ):
            self.flush()
        return content

    def flush(self) -> None:
        """Wait until all files are on disk."""
        write_all_atomically(self._waiting, self._pool)
        self._waiting.clear()


def copy_crops(transaction: Transaction, crops: Path, copies_dir: Path, copies: Copies) -> set[str]:
    """Copy the crops that rows name and that are not there yet; return those that are missing."""
    missing = set[str]()
    binned = crops.parent / "bin" / CROPS  # A restored row is there before its crop is back.
    sql = "SELECT DISTINCT crop FROM items WHERE crop IS NOT NULL ORDER BY crop"
    names = (name for (name,) in transaction.execute(sql))
    for folder, group in itertools.groupby(names, os.path.dirname):
        there = set[str]()
        place = copies_dir / folder
        if place.is_relative_to(copies_dir) and ".." not in place.relative_to(copies_dir).parts:
            require_no_links(copies_dir.parent, os.path.join(copies_dir.name, folder))
            with suppress(OSError, ValueError), os.scandir(place) as entries:
                there = {one.name for one in entries if one.is_file(follow_symlinks=False)}
        for name in group:
            if os.path.basename(name) in there:
                continue
            copy = crop_path(copies_dir, name)
            files = (crop_path(place, name) for place in (crops, binned))
            if copy is None or all(one is None or copies.add(one, copy) is None for one in files):
                missing.add(name)
    copies.flush()
    return missing


def copy_clips(
    gallery: Path, destination: Path, copies: Copies, known: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Copy frames and clips that ``known`` does not name or that are gone; return their hashes."""
    files = dict[str, tuple[str, ...]]()
    for clip in all_clips(gallery / CROPS):
        name = clip.path.relative_to(gallery).as_posix()
        copy = destination / name
        require_no_links(destination, os.path.dirname(name))
        if name in known and copy.is_file() and not copy.is_symlink():
            files[name] = known[name]
        elif (content := copies.add(clip.path, copy)) is not None:
            files[name] = (hashlib.sha256(content).hexdigest(),)
    copies.flush()
    return files


def changed_files(
    gallery: Path, destination: Path, files: dict[str, tuple[str, ...]]
) -> Iterator[tuple[Path, bytes]]:
    """Yield the other files of the folder that are new or changed, and add the hashes of all."""
    for path in sorted(gallery.iterdir()):
        if is_listed(path.name) and path.is_file():
            copy = destination / path.name
            content = _read(path)
            digests = [hashlib.sha256(content).hexdigest()]
            if copy.is_file() and copy.stat().st_size <= MOST_BYTES:
                before = sha256_of_file(copy)
                if before == digests[0]:
                    files[path.name] = (before,)
                    continue
                digests.append(before)
            yield copy, content
            files[path.name] = tuple(digests)


def is_listed(name: str) -> bool:
    """Whether a manifest may list a file of this name: a clip, or one right in the folder.

    The database, what is derived from it, manifests, locks and crops are none, in any case: some
    file systems know no difference.
    """
    first, *more = parts = name.lower().split("/")
    if "\0" in name or not {"", ".", ".."}.isdisjoint(parts):
        return False
    own = first.startswith((".", "gallery.", "backup.")) or first.endswith(".lock")
    return first == CLIPS if more else not own and first not in (CROPS, CLIPS, "bin")


def _read(path: Path, *, follow_links: bool = True) -> bytes:
    """Read a regular file as a whole; raises InputError if it is longer than `MOST_BYTES`."""
    with open_regular(path, follow_links=follow_links) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size <= MOST_BYTES:
            return opened.read(MOST_BYTES)
        raise InputError(
            f"{path} has {size >> 20} MiB, expected {MOST_BYTES >> 20} at most: move it out of the "
            "folder, as a backup takes no larger file",
            code="file_too_large",
            path=str(path),
        )


def unnamed_files(transaction: Transaction, crops_dir: Path) -> tuple[list[Path], int, int]:
    """Return the files that no row names, and the number and bytes of those that rows name."""
    unnamed, count, size = list[Path](), 0, 0
    files = (os.path.join(place, name) for place, _, names in os.walk(crops_dir) for name in names)
    while part := {
        Path(os.path.relpath(file, crops_dir)).as_posix(): file
        for file in itertools.islice(files, _NAMES_AT_A_TIME)
    }:
        gone = set(unnamed_crops(transaction, [*part]))
        unnamed += [Path(part[name]) for name in gone]
        for name in part.keys() - gone:
            count += 1
            size += os.lstat(part[name]).st_size
    return unnamed, count, size
