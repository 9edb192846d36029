"""Backups of a gallery that may be in use: a copy, increments of it, and their way back.

A backup is a gallery without a search index and with an empty bin, and a manifest. The first one
copies the database; an increment changes the rows of the copy in one transaction, by the log of
changes and by ids. Crops are written before the rows that name them and removed after those are
gone, so a kill leaves the earlier backup or the new one, whole.
"""

import hashlib
import json
import shutil
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from upperson_maintenance.backup_files import (
    CLIPS,
    CROPS,
    Copies,
    changed_files,
    copy_clips,
    copy_crops,
    is_listed,
    unnamed_files,
)
from upperson_maintenance.follow import UnrelatedError, follow
from upperson_rt.errors import InputError, IntegrityError, UsageError
from upperson_rt.files import (
    make_folder,
    open_regular,
    put_in_place,
    require_no_links,
    require_place,
    scratch_folder,
    sync_folder,
    write_atomically,
)
from upperson_rt.gallery.crops import crop_path
from upperson_rt.gallery.protocol import made_now
from upperson_rt.gallery.sqlite.stored import (
    DATABASE_FILE,
    INDEX_FILE,
    Database,
    SqliteGallery,
    Transaction,
    forget_messages,
    leave_out,
    log_of,
)
from upperson_rt.locks import try_lock
from upperson_rt.printable import count_of, shortened
from upperson_rt.strict import Count, Positive, Sha256, read_fields, read_json

MANIFEST = "backup.json"
_LOCK = "backup.lock"
_ROUNDS = 20
_WRITERS = 8


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the rows of a database come to."""

    pictures: Count
    checksums: Count

    @classmethod
    def of(cls, transaction: Transaction) -> "Rows":
        """Return those of now."""
        sums = transaction.sums
        return cls(pictures=transaction.count(), checksums=0 if sums is None else sums.total)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a backup holds, as ``backup.json`` says it.

    Raises:
        IntegrityError: On construction, if it lists a file that no backup lists.
    """

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
    changing: tuple[Rows, ...] = ()
    """What its rows may come to as well, while the database is brought up to date."""

    def __post_init__(self) -> None:
        for name in self.files:
            if not is_listed(name):
                raise IntegrityError(
                    f"it lists {shortened(name)}, which is the name of no file that a backup "
                    "lists: it was altered. Use another backup, or back up into a new folder",
                    code="backup_name",
                    name=name,
                )

    @property
    def known_rows(self) -> tuple[Rows, ...]:
        """What the rows of the database may come to."""
        return Rows(pictures=self.pictures, checksums=self.checksums), *self.changing

    def fits(self, database: Database, rows: Rows) -> bool:
        """Whether a database with these rows is the one of this backup."""
        meta = database.meta
        about = meta.fingerprint, meta.embed_dim
        return about == (self.fingerprint, self.embed_dim) and rows in self.known_rows


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
    pictures_without_crop: int
    """Pictures without a saved crop, indexed where they lie: their files are not copied."""


def back_up(gallery: Path, destination: Path) -> BackedUp:
    """Copy a gallery that may be in use into a folder, or bring an earlier backup there up to date.

    Raises:
        UsageError: One of the folders lies in the other one.
        InputError: The folder holds something else or the backup of another gallery, a symbolic
            link lies in it, another backup writes to it, or it cannot be written to. The earlier
            backup stays as it was.
        IntegrityError: The gallery or the earlier backup is damaged.
    """
    gallery, destination = gallery.resolve(), destination.resolve()
    if destination.is_relative_to(gallery) or gallery.is_relative_to(destination):
        raise UsageError(
            f"the backup {destination} and the gallery {gallery} must not lie in one another: "
            "choose another folder",
            code="backup_in_gallery",
        )
    require_no_links(destination)
    with ExitStack() as stack:
        source = stack.enter_context(closing(Database(gallery / DATABASE_FILE)))
        lock = destination / _LOCK
        if not lock.is_file():
            require_place(destination)
        stack.enter_context(_locked(lock))
        sync_folder(destination)  # By the lock the next backup knows what this one leaves.
        copies = Copies(stack.enter_context(ThreadPoolExecutor(_WRITERS)))
        for is_increment in (_is_earlier(source, destination), False, False):
            with suppress(UnrelatedError):
                return _back_up(source, destination, copies, is_increment)
        raise _busy(gallery)


def restore(backup: Path, gallery: Path) -> Manifest:
    """Check a backup and make a gallery of it, completely or not at all.

    Raises:
        InputError: There is no backup, a symbolic link lies in its folder, there is something at
            the place of the gallery, or too little space.
        IntegrityError: The backup is damaged, or its database is not the one of its manifest.
    """
    backup, gallery = backup.resolve(), gallery.resolve()
    require_no_links(backup)
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
            _require_fit(source, manifest, scratch)
            _copy_database(source, new / DATABASE_FILE)
        copies = Copies(pool, follow_links=False)  # A backup may come from others.
        with closing(Database(new / DATABASE_FILE)) as database, database.reading() as transaction:
            copy_crops(transaction, backup / CROPS, new / CROPS, copies)
        found, listed = (copies.files, copies.bytes), (manifest.crops, manifest.crop_bytes)
        if found != listed and not manifest.changing:
            problem = f"expected {count_of(listed[0], 'crop')} of {listed[1]} bytes, found "
            raise _damaged(backup, [f"{problem}{found[0]} of {found[1]} bytes"])
        for name, digests in manifest.files.items():
            file, copy = crop_path(backup, name), crop_path(new, name)
            content = None
            if file is not None and copy is not None:
                content = copies.add(file, copy)
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


def _require_fit(source: Database, manifest: Manifest, scratch: Path) -> None:
    """Refuse a database that is not the one of the manifest, or that finds no space."""
    backup = source.path.parent
    with source.reading() as transaction:
        rows = Rows.of(transaction)
    if not manifest.fits(source, rows):
        raise IntegrityError(
            f"{MANIFEST} of {backup} is of {count_of(manifest.pictures, 'picture')}, and its "
            f"{DATABASE_FILE} has {rows.pictures}, or other ones: they are of two times, or one "
            "was altered. Nothing was restored: repeat the backup, or the copy of all its files",
            code="backup_mixed",
            path=backup,
            expected=manifest.pictures,
            found=rows.pictures,
        )
    size, free = source.path.stat().st_size, shutil.disk_usage(scratch).free
    if size + manifest.crop_bytes > free:
        raise InputError(
            f"the backup {backup} takes {(size + manifest.crop_bytes) / 1e6:.1f} MB, and "
            f"{scratch.parent} has {free / 1e6:.1f} MB left: nothing was restored; free some space",
            code="disk_full",
            path=scratch.parent,
        )


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
        with suppress(FileExistsError):
            open(lock, "xb").close()
        with open_regular(lock, follow_links=False) as file:
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


def _busy(gallery: Path) -> InputError:
    text = f"gallery {gallery} is changed faster than it can be copied: try again"
    return InputError(text, code="gallery_busy", path=gallery)


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
        manifest = _read_manifest(destination)
        with copy.reading() as transaction:
            fits = manifest is None or manifest.fits(copy, Rows.of(transaction))
        return fits and copy.meta == source.meta and source.has_sums


def _back_up(source: Database, destination: Path, copies: Copies, is_increment: bool) -> BackedUp:
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
            leave_out(then)
            before = set[str]()
            for _ in range(_ROUNDS):
                if then.sums is not None:
                    with source.reading() as now:
                        counts = follow(now, then, copy.meta.embed_dim)
                    added, removed = added + counts[0], removed + counts[1]
                missing = copy_crops(then, gallery / CROPS, destination / CROPS, copies)
                if missing == before:  # None, or not because their rows were deleted meanwhile.
                    break
                before = missing
            else:
                raise _busy(gallery)
            forget_messages(then)  # Of what is in the bin.
            files = copy_clips(gallery, destination, copies, earlier.files if earlier else {})
            strays, crops, crop_bytes = unnamed_files(then, destination / CROPS)
            rows = Rows.of(then)
            # From SQLite's index: the table has the vectors.
            sql = "SELECT count(*) FROM items INDEXED BY items_by_crop WHERE crop IS NOT NULL"
            (with_crop,) = then.execute(sql).fetchone()
            if earlier is not None and rows not in earlier.known_rows:
                # A kill leaves rows of before or of now.
                between = replace(earlier, changing=(*earlier.changing, rows))
                write_atomically(destination / MANIFEST, json.dumps(asdict(between)))
        copy.close()
        if not is_increment:
            _remove_log(file)
            put_in_place(place, file)
    changed = dict(changed_files(gallery, destination, files))
    for path in [path for path in changed if not path.is_file()]:  # Whose absence is damage.
        write_atomically(path, changed[path])
    manifest = Manifest(
        time=began,
        generator=made_now()["generator"],
        fingerprint=source.meta.fingerprint,
        embed_dim=source.meta.embed_dim,
        **asdict(rows),
        crops=crops,
        crop_bytes=crop_bytes,
        missing_crops=tuple(sorted(missing)),
        files=files,
    )
    write_atomically(destination / MANIFEST, json.dumps(asdict(manifest)))
    for path, content in changed.items():  # Manifests have both hashes of these.
        write_atomically(path, content)
    known = {name for name in (earlier.files if earlier else ()) if "/" not in name}
    clips = (path for path in (destination / CLIPS).rglob("*") if not path.is_dir())
    names = known.union(path.relative_to(destination).as_posix() for path in clips)
    strays += [destination / name for name in names - files.keys()]
    for path in strays:
        path.unlink(missing_ok=True)
    if removed or not is_increment:  # A search of the copy has made an index of what is gone.
        for path in destination.glob(f"{INDEX_FILE}*"):
            path.unlink(missing_ok=True)
    for folder in {destination, *(path.parent for path in strays)}:
        sync_folder(folder)  # What is gone does not come back.
    return BackedUp(
        manifest=manifest,
        is_increment=is_increment,
        rows_added=added if is_increment else manifest.pictures,
        rows_removed=removed,
        files_copied=copies.files + len(changed),
        bytes_copied=copies.bytes + sum(map(len, changed.values())),
        files_removed=len(strays),
        pictures_without_crop=rows.pictures - with_crop,
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
    log = log_of(file)
    if log.exists():
        with closing(Database(file)) as copy, copy.writing():
            pass
    if log.exists():
        raise _in_use(file.parent)
