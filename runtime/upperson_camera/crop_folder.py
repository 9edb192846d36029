"""Pictures of crops on disk, saved before their rows are committed."""

import glob
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

from upperson_rt.errors import InputError
from upperson_rt.files import (
    make_folder,
    open_regular,
    require_no_links,
    sync_folder,
    write_all_atomically,
)
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.gallery.crops import own_path
from upperson_rt.ingest.service import Crop
from upperson_rt.locks import lock_until_closed, try_lock
from upperson_rt.printable import get_logger
from upperson_rt.strict import parse_json, read_fields

_log = get_logger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")
_WRITERS = 8
_PREFIX = ".unfinished-"
_MOST_NOTE_BYTES = 16 << 20


class CropFolder:
    """Where the pictures of crops are saved, several at a time: each waits for the disk."""

    def __init__(self, folder: Path, run_name: str) -> None:
        self.folder = folder
        self._note = UnfinishedNote(folder, run_name)
        self._pool = _DaemonPool()

    @contextmanager
    def saved(self, crops: Sequence[Crop]) -> Iterator[None]:
        """Write the pictures of crops, all or none; an error in the context removes new ones."""
        pictures = {
            self.folder / crop.item.crop: crop.jpeg
            for crop in crops
            if crop.jpeg is not None and crop.item.crop is not None
        }
        for place in {path.parent for path in pictures}:
            require_no_links(self.folder.parent, os.path.relpath(place, self.folder.parent))
        new = [path for path in pictures if not path.exists()]
        with self._note.kept([crop.item for crop in crops]):
            try:
                write_all_atomically(pictures, self._pool)
                yield
            except BaseException:
                removed = [_remove(path) for path in new]
                self._note.needed = not all(removed)
                raise

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()
        self._note.close()


class _DaemonPool(Executor):
    """Threads that Python does not wait for at the end of a process: a disk may hang."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name="save", daemon=True) for _ in range(_WRITERS)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> "Future[_T]":
        """Call a function in one of the threads."""
        future: Future[_T] = Future()

        def work() -> None:
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:
                future.set_exception(error)

        self._jobs.put(work)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads, once all is written."""
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (work := self._jobs.get()) is not None:
            work()


class UnfinishedNote:
    """Names the pictures of a batch on disk before they are saved, until their rows are committed.

    A process that is killed in between leaves pictures that no row names: the next run removes
    them. The file is locked as long as its process lives.
    """

    def __init__(self, crops_dir: Path, run_name: str) -> None:
        self.needed = False
        """Whether pictures are left that could not be removed: the next run has to."""
        self._path = crops_dir / f"{_PREFIX}{run_name}.json"
        try:
            make_folder(self._path.parent)
            while True:
                self._file = self._path.open("wb", buffering=0)
                lock_until_closed(self._file.fileno(), wait=True)
                if self._path.exists():
                    break
                self._file.close()  # Another process swept it before it was locked.
            sync_folder(self._path.parent)
        except OSError as error:
            raise _not_writable(self._path, error) from error

    @contextmanager
    def kept(self, items: Sequence[Item]) -> Iterator[None]:
        """Keep the note while pictures are saved and their rows committed."""
        times = [item.time for item in items if item.time is not None]
        note = {
            "cameras": sorted({item.camera for item in items if item.camera is not None}),
            "since": min(times),
            "until": max(times),
            "pictures": [item.crop for item in items if item.crop is not None],
        }
        try:
            self._empty()
            self._file.write(json.dumps(note).encode("utf-8"))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _not_writable(self._path, error) from error
        try:
            yield
        finally:
            if not self.needed:
                try:
                    self._empty()
                except OSError as error:  # Pictures that have rows are kept by the next run.
                    _log.warning("cannot write %s: %s", self._path, error.strerror)

    def close(self) -> None:
        """Remove the note, unless the next run needs it."""
        self._file.close()
        if not self.needed:
            _remove(self._path)

    def _empty(self) -> None:
        self._file.seek(0)
        self._file.truncate()


def _not_writable(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot write {path}: {error.strerror}", code="file_not_writable", path=path)


def remove_unfinished(gallery: Gallery, crops_dir: Path) -> None:
    """Remove pictures that killed processes saved and did not commit."""
    require_no_links(crops_dir.parent)
    removed = 0
    for path in sorted(crops_dir.glob(f"{_PREFIX}*.json")):
        try:
            file = open_regular(path)
        except FileNotFoundError:
            continue  # Its process ended, or another one has seen to it.
        except OSError as error:
            _log.warning("note %s is not followed: %s", path, error.strerror)
            continue
        with file:
            if not try_lock(file.fileno()):
                continue  # Its process lives, or that is unknown.
            content = file.read(_MOST_NOTE_BYTES)
            # Half a note was never acted upon: its pictures were not begun.
            if content.endswith(b"}"):
                try:
                    where = f"note {path}"
                    parsed = parse_json(content.decode("utf-8", "replace"), where)
                    note = read_fields(_Note, parsed, where)
                except InputError as error:
                    _log.warning("no picture is removed, and the note stays: %s", error)
                    continue
                removed += _remove_pictures(gallery, crops_dir, note)
            path.unlink(missing_ok=True)
    if removed:
        _log.warning(
            "removed %d pictures that a killed process had not committed",
            removed,
            extra={"event": "left_behind", "pictures": removed},
        )


@dataclass(frozen=True)
class _Note:
    cameras: tuple[str, ...]
    since: float
    until: float
    pictures: tuple[str, ...]

    def __post_init__(self) -> None:
        if not self.cameras or self.since > self.until:
            raise InputError("it names no camera or no period")


def _remove_pictures(gallery: Gallery, crops_dir: Path, note: _Note) -> int:
    """Remove the pictures of a note that no row names, and halves of files beside them."""
    until = math.nextafter(note.until, math.inf)
    period = Filter(camera=note.cameras, since=note.since, until=until)
    named = {item.crop for item in gallery.items(period)}
    removed = 0
    for name in note.pictures:
        path = own_path(crops_dir, name)
        if path is None:
            continue  # Nothing outside is ever touched, whatever a note says.
        for half in path.parent.glob(f".{glob.escape(path.name)}.*"):
            half.unlink(missing_ok=True)
        if name not in named and os.path.isfile(path):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def _remove(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("cannot remove %s: %s", path, error.strerror)
        return False
    return True
