"""Backups of a gallery that may be in use: a copy, increments of it, and their way back.

A backup is a gallery without a search index, and a manifest. The first one copies the database; an
increment changes the rows of the copy in one transaction, by the log of changes and by ids. Crops
are written before the rows that name them and removed after those are gone, so a kill leaves the
earlier backup or the new one, whole.
"""

import hashlib
import itertools
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.files import (
    make_folder,
    put_in_place,
    require_place,
    scratch_folder,
    sha256_of_file,
    try_lock,
    write_all_atomically,
    write_atomically,
)
from upperson_rt.gallery.clips import all_clips
from upperson_rt.gallery.crops import crop_path
from upperson_rt.gallery.protocol import made_now
from upperson_rt.gallery.sqlite import access
from upperson_rt.gallery.sqlite import rows as table
from upperson_rt.gallery.sqlite.database import DATABASE_FILE, Database, Transaction
from upperson_rt.gallery.sqlite.schema import ROW, Sums
from upperson_rt.gallery.sqlite.store import SqliteGallery
from upperson_rt.printable import count_of, shortened
from upperson_rt.strict import Count, Positive, Sha256, read_fields, read_json

MANIFEST = "backup.json"
_LOCK = "backup.lock"
_CROPS = "crops"
_ROUNDS = 20
_ROWS_AT_A_TIME = 4096
_NAMES_AT_A_TIME = 10_000
_FILES_AT_A_TIME, _BYTES_AT_A_TIME = 64, 32 << 20
_WRITERS = 8


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a backup holds, as ``backup.json`` says it."""

    format: Literal[1] = 1
    time: float
    """Unix seconds when the backup began."""
    generator: str
    fingerprint: str
    embed_dim: Positive
    pictures: Count
    checksums: Count
    """Sum of the checksums of all rows, modulo 2^64; 0 without checksums."""
    crops: Count
    crop_bytes: Count
    missing_crops: tuple[str, ...] = ()
    """Named by rows, and missing in the gallery itself."""
    files: dict[str, tuple[Sha256, ...]] = field(default_factory=dict)
    """Frames, clips and files of the gallery's folder: the hashes that their content may have, two
    while a changed file is replaced. Crops have theirs in their names."""


@dataclass(frozen=True, kw_only=True)
class BackedUp:
    """What a backup did."""

    manifest: Manifest
    is_increment: bool
    """Whether an earlier copy of the database was changed, instead of copied anew."""
    rows_added: int
    rows_removed: int
    files_copied: int
    bytes_copied: int
    """Of these files."""
    files_removed: int


class _UnrelatedError(Exception):
    """A copy of the database is of no earlier state: it has to be copied anew."""


def back_up(gallery: Path, destination: Path) -> BackedUp:
    """Copy a gallery that may be in use into a folder, or bring an earlier backup there up to date.

    Raises:
        UsageError: One of the folders lies in the other one.
        InputError: The folder holds something else or the backup of another gallery, another backup
            writes to it, or it cannot be written to. The earlier backup stays as it was.
        IntegrityError: The gallery or the earlier backup is damaged.
    """
    gallery, destination = gallery.resolve(), destination.resolve()
    if destination.is_relative_to(gallery) or gallery.is_relative_to(destination):
        raise UsageError(
            f"the backup {destination} and the gallery {gallery} must not lie in one another: "
            "choose another folder",
            code="backup_in_gallery",
        )
    with ExitStack() as stack:
        source = stack.enter_context(closing(Database(gallery / DATABASE_FILE)))
        lock = destination / _LOCK
        if not lock.is_file():
            require_place(destination)
        stack.enter_context(_locked(lock))
        copies = _Copies(stack.enter_context(ThreadPoolExecutor(_WRITERS)))
        try:
            return _back_up(source, destination, copies, _is_earlier(source, destination))
        except _UnrelatedError:
            return _back_up(source, destination, copies, False)


def restore(backup: Path, gallery: Path) -> Manifest:
    """Check a backup and make a gallery of it, completely or not at all.

    Raises:
        InputError: There is no backup, or there is something at the place of the gallery.
        IntegrityError: The backup is damaged.
    """
    backup, gallery = backup.resolve(), gallery.resolve()
    manifest = _read_manifest(backup)
    if manifest is None:
        raise InputError(
            f"{backup} is no backup, it has no {MANIFEST}: name a folder of  upperson-rt gallery "
            "backup",
            code="not_a_backup",
            path=backup,
        )
    require_place(gallery)
    with (
        _locked(backup / _LOCK),
        scratch_folder(gallery) as scratch,
        ThreadPoolExecutor(_WRITERS) as pool,
    ):
        (new := scratch / "gallery").mkdir()
        with closing(Database(backup / DATABASE_FILE)) as source:
            _copy_database(source, new / DATABASE_FILE)
        copies = _Copies(pool)
        with closing(Database(new / DATABASE_FILE)) as database, database.reading() as transaction:
            _copy_crops(transaction, backup / _CROPS, new / _CROPS, copies)
        for name, digests in manifest.files.items():
            file, copy = crop_path(backup, name), crop_path(new, name)
            content = None if file is None or copy is None else copies.add(file, copy)
            if content is None or hashlib.sha256(content).hexdigest() not in digests:
                raise _damaged(backup, [f"{shortened(name)} is missing or was altered"])
        copies.flush()
        known = tuple(f"its crop {shortened(one)} is missing" for one in manifest.missing_crops)
        with closing(SqliteGallery.open(new)) as restored:
            problems = [one for one in restored.verify() if not one.endswith(known)]
        if problems:
            raise _damaged(backup, problems)
        require_place(gallery)
        put_in_place(new, gallery)
    return manifest


def _damaged(backup: Path, problems: list[str]) -> IntegrityError:
    return IntegrityError(
        f"the backup {backup} has {count_of(len(problems), 'problem')}, such as: {problems[0]}; "
        "nothing was restored. What is sound of it can be used in place, with  --gallery",
        code="backup_damaged",
        path=backup,
        problems=len(problems),
    )


@contextmanager
def _locked(lock: Path) -> Iterator[None]:
    """Keep others from using a backup; make its folder and the file to lock if need be."""
    folder = lock.parent
    try:
        make_folder(folder)
        with open(lock, "rb" if lock.exists() else "xb") as file:
            if not try_lock(file.fileno()):
                raise _in_use(folder)
            yield
    except OSError as error:
        raise InputError(
            f"cannot copy to or from {folder}: {error}", code="backup_failed", path=folder
        ) from error


def _in_use(backup: Path) -> InputError:
    text = f"another process uses the backup {backup}: wait for its end, then try again"
    return InputError(text, code="backup_in_use", path=backup)


def _read_manifest(backup: Path) -> Manifest | None:
    file = backup / MANIFEST
    return read_fields(Manifest, read_json(file), str(file)) if file.is_file() else None


def _is_earlier(source: Database, destination: Path) -> bool:
    """Whether there is a copy that may be brought up to date; refuses one of another gallery."""
    file = destination / DATABASE_FILE
    if not file.exists():
        return False
    with closing(Database(file)) as copy:
        if copy.meta.identity != source.meta.identity:
            raise InputError(
                f"{destination} is the backup of another gallery: choose another folder",
                code="backup_of_other_gallery",
                path=destination,
            )
        return copy.meta == source.meta and source.has_sums


def _back_up(
    source: Database, destination: Path, copies: "_Copies", is_increment: bool
) -> BackedUp:
    began, gallery = time.time(), source.path.parent
    file, earlier = destination / DATABASE_FILE, _read_manifest(destination)
    with ExitStack() as stack:
        place = file
        if not is_increment:
            place = stack.enter_context(scratch_folder(file)) / "new" / DATABASE_FILE
            place.parent.mkdir()  # A database locks its folder, which the other one is already.
            _copy_database(source, place)
        copy = stack.enter_context(closing(Database(place)))
        with copy.writing() as then:
            added = removed = 0
            if not is_increment:
                then.check_items()
            before = set[str]()
            for _ in range(_ROUNDS):
                if then.sums is not None:
                    with source.reading() as now:
                        counts = _follow(now, then, copy.meta.embed_dim)
                    added, removed = added + counts[0], removed + counts[1]
                missing = _copy_crops(then, gallery / _CROPS, destination / _CROPS, copies)
                if missing == before:  # None, or not because their rows were deleted meanwhile.
                    break
                before = missing
            else:
                raise InputError(
                    f"pictures are deleted from gallery {gallery} faster than they can be copied: "
                    "try again",
                    code="gallery_busy",
                    path=gallery,
                )
            files = _copy_clips(gallery, destination, copies, earlier)
            strays, crops, crop_bytes = _unnamed(then, destination / _CROPS)
            pictures, sums = then.count(), then.sums
        copy.close()
        if not is_increment:
            _remove_log(file)
            put_in_place(place, file)
    changed = dict(_changed_files(gallery, destination, files))
    manifest = Manifest(
        time=began,
        generator=made_now()["generator"],
        fingerprint=source.meta.fingerprint,
        embed_dim=source.meta.embed_dim,
        pictures=pictures,
        checksums=0 if sums is None else sums.total,
        crops=crops,
        crop_bytes=crop_bytes,
        missing_crops=tuple(sorted(missing)),
        files=files,
    )
    write_atomically(destination / MANIFEST, json.dumps(asdict(manifest)))
    for path, content in changed.items():
        write_atomically(path, content)
    for name in earlier.files if earlier is not None else ():
        if name not in files and "/" not in name:
            strays.append(destination / name)
    strays += [
        path
        for path in (destination / "clips").rglob("*")
        if path.is_file() and path.relative_to(destination).as_posix() not in files
    ]
    for path in strays:
        path.unlink(missing_ok=True)
    return BackedUp(
        manifest=manifest,
        is_increment=is_increment,
        rows_added=added if is_increment else manifest.pictures,
        rows_removed=removed,
        files_copied=copies.files + len(changed),
        bytes_copied=copies.bytes + sum(map(len, changed.values())),
        files_removed=len(strays),
    )


# --- The database


def _copy_database(source: Database, file: Path) -> None:
    with source.reading() as transaction, closing(sqlite3.connect(file)) as copy:
        transaction.connection.backup(copy)


def _remove_log(file: Path) -> None:
    """Bring the log that a kill left of a copy into its file: another one is about to come there.

    Raises:
        InputError: A process reads the copy.
    """
    log = access.log_of(file)
    if log.exists():
        with closing(Database(file)) as copy, copy.writing():
            pass
    if log.exists():
        raise _in_use(file.parent)


def _follow(now: Transaction, then: Transaction, embed_dim: int) -> tuple[int, int]:
    """Make the rows of an earlier state those of another; return how many it added and removed.

    Raises:
        _UnrelatedError: It is no earlier state, or the log of changes does not reach back to it.
    """
    new, sums = now.sums, then.sums
    assert new is not None
    assert sums is not None
    changed = table.changed_since(now, sums.seq) if new.seq >= sums.seq else None
    if changed is None or new.last_id < sums.last_id or _definitions(now) != _definitions(then):
        raise _UnrelatedError
    removed, before = 0, Sums(seq=sums.seq, last_id=sums.last_id)
    changed = changed[changed <= sums.last_id]
    parts = [
        changed[start : start + _ROWS_AT_A_TIME].tolist()
        for start in range(0, len(changed), _ROWS_AT_A_TIME)
    ]
    for part in parts:
        there = table.rows_with_ids(then, part, embed_dim)
        sums.remove(there)
        removed += len(there)
        sql = "DELETE FROM items WHERE id IN (SELECT value FROM json_each(?))"
        then.execute(sql, (json.dumps(part),))
    sql = f"SELECT {ROW}, vector, checksum FROM items NOT INDEXED WHERE id > ? ORDER BY id"
    newer = now.execute(sql, (before.last_id,))
    added = 0
    for rows in itertools.chain(
        (table.rows_with_ids(now, part, embed_dim) for part in parts),
        iter(lambda: table.checked(now, newer.fetchmany(_ROWS_AT_A_TIME), embed_dim), []),
    ):
        then.connection.executemany(table.ADD, rows)
        sums.add(rows)
        added += len(rows)
    if (sums.rows, sums.total) != (new.rows, new.total):
        raise _UnrelatedError
    sums.seq, sums.last_id = new.seq, new.last_id
    then.execute("DELETE FROM changes WHERE seq > ?", (before.seq,))  # By triggers, just now.
    _copy_rows(now, then, "changes", f"WHERE seq > {before.seq}")
    (first,) = now.execute("SELECT ifnull(min(seq), 0) FROM changes").fetchone()
    then.execute("DELETE FROM changes WHERE seq < ?", (first,))
    for name in (*_other_tables(now), "sqlite_sequence"):
        then.execute(f"DELETE FROM {name}")
        _copy_rows(now, then, name)
    return added, removed


def _copy_rows(now: Transaction, then: Transaction, name: str, where: str = "") -> None:
    rows = now.execute(f"SELECT * FROM {name} {where}")
    places = ", ".join("?" * len(rows.description))
    then.connection.executemany(f"INSERT INTO {name} VALUES ({places})", rows)


def _definitions(transaction: Transaction) -> list[tuple[Any, ...]]:
    return transaction.execute("SELECT name, sql FROM sqlite_master ORDER BY name").fetchall()


def _other_tables(transaction: Transaction) -> list[str]:
    """Return the tables of the outbox, which have no checksums."""
    sql = "SELECT name FROM sqlite_master WHERE type = 'table' AND name GLOB 'outbox*'"
    return [name for (name,) in transaction.execute(sql)]


# --- Files


class _Copies:
    """Copies files, some at a time, each on disk before it gets its name."""

    def __init__(self, pool: Executor) -> None:
        self.files = self.bytes = 0
        self._pool, self._waiting = pool, dict[Path, bytes]()

    def add(self, file: Path, copy: Path) -> bytes | None:
        """Copy a file, at the latest at the next `flush`; return its content, None if it is gone.

        Missing folders are made.
        """
        try:
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


def _copy_crops(
    transaction: Transaction, crops: Path, copies_dir: Path, copies: _Copies
) -> set[str]:
    """Copy the crops that rows name and that are not there yet; return those that are missing."""
    missing = set[str]()
    names = transaction.execute("SELECT crop FROM items WHERE crop IS NOT NULL ORDER BY crop")
    for folder, group in itertools.groupby((name for (name,) in names), os.path.dirname):
        there = set[str]()
        with suppress(OSError, ValueError):
            there.update(os.listdir(copies_dir / folder))
        for name in group:
            if os.path.basename(name) in there:
                continue
            file, copy = crop_path(crops, name), crop_path(copies_dir, name)
            if file is None or copy is None or copies.add(file, copy) is None:
                missing.add(name)
    copies.flush()
    return missing


def _copy_clips(
    gallery: Path, destination: Path, copies: _Copies, earlier: Manifest | None
) -> dict[str, tuple[str, ...]]:
    """Copy frames and clips that are not there yet; return the hashes of all."""
    files = dict[str, tuple[str, ...]]()
    for clip in all_clips(gallery / _CROPS):
        name = clip.path.relative_to(gallery).as_posix()
        copy = destination / name
        if copy.exists():
            known = {} if earlier is None else earlier.files
            files[name] = known.get(name) or (sha256_of_file(copy),)
        elif (content := copies.add(clip.path, copy)) is not None:
            files[name] = (hashlib.sha256(content).hexdigest(),)
    copies.flush()
    return files


def _changed_files(
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


def _unnamed(transaction: Transaction, crops_dir: Path) -> tuple[list[Path], int, int]:
    """Return the files that no row names, and the number and bytes of those that rows name."""
    unnamed, count, size = list[Path](), 0, 0
    files: Iterable[str] = (
        os.path.join(place, name) for place, _, names in os.walk(crops_dir) for name in names
    )
    files = iter(files)
    while part := {
        Path(os.path.relpath(file, crops_dir)).as_posix(): file
        for file in itertools.islice(files, _NAMES_AT_A_TIME)
    }:
        gone = set(table.unnamed_crops(transaction, [*part]))
        unnamed += [Path(part[name]) for name in gone]
        for name in part.keys() - gone:
            count += 1
            size += os.path.getsize(part[name])
    return unnamed, count, size
