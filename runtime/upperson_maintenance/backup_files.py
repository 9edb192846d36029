"""The files of a backup: crops, frames, clips, and what else lies in the folder of a gallery."""

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path

from upperson_rt.errors import InputError
from upperson_rt.files import (
    open_regular,
    refuse_links,
    sha256_of_file,
    write_all_atomically,
)
from upperson_rt.gallery.clips import all_clips
from upperson_rt.gallery.crops import crop_path
from upperson_rt.gallery.sqlite.stored import Transaction, unnamed_crops

CROPS, CLIPS = "crops", "clips"
PREFIXES = ("gallery.", "backup.")
"""Of files that belong to the database or the backup, and are in no manifest."""
_NAMES_AT_A_TIME = 10_000
_FILES_AT_A_TIME, _BYTES_AT_A_TIME = 64, 32 << 20
_MOST_BYTES = 1 << 30
"""Of one file: each is read at once, and a sparse one may name more than the memory has."""


class Copies:
    """Copies files into a folder, some at a time, each on disk before it gets its name.

    A folder below it that is a link is refused, see `refuse_links`.
    """

    def __init__(self, pool: Executor, root: Path, follow_links: bool = True) -> None:
        """Without ``follow_links`` a file behind one counts as missing: it may lie anywhere."""
        self.files = self.bytes = 0
        self._follow_links = follow_links
        self._root, self._own = root, set[Path]()
        self._pool, self._waiting = pool, dict[Path, bytes]()

    def add(self, file: Path, copy: Path) -> bytes | None:
        """Copy a file, at the latest at the next `flush`; return its content, None if it is gone.

        Missing folders are made. Raises InputError for a file that is too large.
        """
        try:
            if not self._follow_links and file.resolve() != file:
                return None
            content = read_whole(file)
        except (FileNotFoundError, NotADirectoryError):
            return None
        self.require_own(copy.parent)
        self._waiting[copy] = content
        self.files += 1
        self.bytes += len(content)
        if (
            len(self._waiting) >= _FILES_AT_A_TIME
            or sum(map(len, self._waiting.values())) > _BYTES_AT_A_TIME
        ):
            self.flush()
        return content

    def require_own(self, folder: Path) -> None:
        """Refuse a folder to copy into that is a link, or lies behind one: see `refuse_links`."""
        if folder not in self._own and folder != self._root:
            refuse_links(self._root, [folder.relative_to(self._root).as_posix()])
            self._own.add(folder)

    def flush(self) -> None:
        """Wait until all files are on disk."""
        write_all_atomically(self._waiting, self._pool)
        self._waiting.clear()


def read_whole(file: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        InputError: It is too large to be copied (``file_too_large``).
        OSError: It cannot be read; FileNotFoundError if it is no regular file.
    """
    with open_regular(file) as opened:
        if os.fstat(opened.fileno()).st_size > _MOST_BYTES:
            raise InputError(
                f"{file} has more than {_MOST_BYTES >> 20} MiB, the most that a backup copies of "
                "one file: move it out of the folder",
                code="file_too_large",
                path=file,
            )
        return opened.read()


def copy_crops(transaction: Transaction, crops: Path, copies_dir: Path, copies: Copies) -> set[str]:
    """Copy the crops that rows name and that are not there yet; return those that are missing."""
    missing = set[str]()
    binned = crops.parent / "bin" / CROPS  # A restored row is there before its crop is back.
    names = transaction.execute("SELECT crop FROM items WHERE crop IS NOT NULL ORDER BY crop")
    for folder, group in itertools.groupby((name for (name,) in names), os.path.dirname):
        there = set[str]()
        if not Path(folder).is_absolute() and ".." not in Path(folder).parts and "\0" not in folder:
            copies.require_own(copies_dir / folder)
        with suppress(OSError, ValueError), os.scandir(copies_dir / folder) as entries:
            there.update(one.name for one in entries if one.is_file(follow_symlinks=False))
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
    """Copy frames and clips that are not there yet; return the hashes of all."""
    files = dict[str, tuple[str, ...]]()
    for clip in all_clips(gallery / CROPS):
        name = clip.path.relative_to(gallery).as_posix()
        copy = destination / name
        if _is_copied(copy):
            files[name] = known.get(name) or (sha256_of_file(copy),)
        elif (content := copies.add(clip.path, copy)) is not None:
            files[name] = (hashlib.sha256(content).hexdigest(),)
    copies.flush()
    return files


def changed_files(
    gallery: Path, destination: Path, files: dict[str, tuple[str, ...]]
) -> Iterator[tuple[Path, bytes]]:
    """Yield the other files of the folder that are new or changed, and add the hashes of all."""
    for path in sorted(gallery.iterdir()):
        if path.name.casefold().startswith((".", *PREFIXES)) or path.suffix == ".lock":
            continue  # The database, what is derived from it, and locks.
        if path.is_file():
            copy, content = destination / path.name, read_whole(path)
            digests = [hashlib.sha256(content).hexdigest()]
            if _is_copied(copy) and (before := sha256_of_file(copy)) != digests[0]:
                digests.append(before)
            if len(digests) > 1 or not _is_copied(copy):
                yield copy, content
            files[path.name] = tuple(digests)


def _is_copied(copy: Path) -> bool:
    """Whether a copy is there; what else has its name is replaced."""
    return copy.is_file() and not copy.is_symlink() and copy.stat().st_size <= _MOST_BYTES


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
