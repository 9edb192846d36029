"""The files of a backup: crops, frames, clips, and what else lies in the folder of a gallery."""

import hashlib
import itertools
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor
from contextlib import suppress
from pathlib import Path

from upperson_rt.files import sha256_of_file, write_all_atomically
from upperson_rt.gallery.clips import all_clips
from upperson_rt.gallery.crops import crop_path
from upperson_rt.gallery.sqlite.stored import Transaction, unnamed_crops

CROPS = "crops"
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

        Missing folders are made.
        """
        try:
            if not self._follow_links and file.resolve() != file:
                return None
            content = file.read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
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
    names = transaction.execute("SELECT crop FROM items WHERE crop IS NOT NULL ORDER BY crop")
    for folder, group in itertools.groupby((name for (name,) in names), os.path.dirname):
        there = set[str]()
        with suppress(OSError, ValueError):
            there.update(os.listdir(copies_dir / folder))
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
        if copy.exists():
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
        if path.name.startswith((".", "gallery.", "backup.")) or path.suffix == ".lock":
            continue  # The database, what is derived from it, and locks.
        if path.is_file():
            copy, content = destination / path.name, path.read_bytes()
            digests = [hashlib.sha256(content).hexdigest()]
            if copy.is_file() and (before := sha256_of_file(copy)) != digests[0]:
                digests.append(before)
            if len(digests) > 1 or not copy.exists():
                yield copy, content
            files[path.name] = tuple(digests)


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
            size += os.path.getsize(part[name])
    return unnamed, count, size
