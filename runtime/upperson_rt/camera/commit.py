"""The thread that saves the pictures of crops and commits their rows, and leaves no half behind."""

import glob
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from upperson_rt.camera.crops import EncodedCrops
from upperson_rt.camera.frames import Crop
from upperson_rt.camera.queues import BoundedQueue, LeftBehindError, Stage
from upperson_rt.camera.settings import PipelineSettings
from upperson_rt.camera.stats import Durations, Ledger
from upperson_rt.errors import InputError, UppersonError
from upperson_rt.files import make_folder, sync_folder, write_all_atomically
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.gallery.crops import crop_path
from upperson_rt.locks import lock_until_closed, try_lock
from upperson_rt.printable import count_of, get_logger
from upperson_rt.strict import parse_json, read_fields

__all__ = [
    "CommitStage",
    "CropFolder",
    "OtherWriters",
    "UnfinishedNote",
    "remove_left_behind",
]

# --- Notices that another process adds pictures of a camera of the same name, as a second box may

_LOOK_EVERY_S = 60.0


class OtherWriters:
    """Compares what a gallery holds of our cameras with what we have added to it.

    Two boxes whose cameras have one name mix up what they see: filters and retention by camera
    then mean both. What is deleted in the meantime hides as many pictures of others.
    """

    def __init__(self, gallery: Gallery, ledger: Ledger) -> None:
        self._gallery = gallery
        self._ledger = ledger
        self._expected: dict[str, int] = {}
        self._looked = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether the last look was a while ago."""
        return time.monotonic() - self._looked >= _LOOK_EVERY_S

    def know(self, cameras: Iterable[str]) -> None:
        """Count what is there of cameras whose first pictures are about to be added."""
        for camera in set(cameras) - self._expected.keys():
            self._expected[camera] = self._gallery.count(Filter(camera=camera))

    def count_ours(self, items: Sequence[Item], replaced: Sequence[str]) -> None:
        """Take what was added into account, and the keys of it that were there before."""
        before = set(replaced)
        for item in items:
            if item.camera is not None:
                self._expected[item.camera] += item.key not in before
                self._ledger.count(item.camera, "replaced", item.key in before)

    def look(self) -> None:
        """Count, and warn of, what others have added since the last look."""
        self._looked = time.monotonic()
        for camera, expected in self._expected.items():
            try:
                found = self._gallery.count(Filter(camera=camera))
            except UppersonError as error:  # Nothing is lost by it, and commits will tell.
                _log.warning("cannot tell whether others add pictures of %s: %s", camera, error)
                return
            self._expected[camera] = found
            if found > expected:
                self._ledger.count(camera, "added_by_others", found - expected)
                _log.warning(
                    "another process has added %s of a camera that is called %s as well: if it is "
                    "another camera, give it another name",
                    count_of(found - expected, "picture"),
                    camera,
                    extra={"event": "added_by_others", "camera": camera},
                )


# --- The thread that saves the pictures of crops and commits their rows, and leaves no half behind

_log = get_logger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")

_STEP_S = 0.1
_WRITERS = 8
_PREFIX = ".unfinished-"
_MOST_NOTE_BYTES = 16 << 20


class CommitStage(Stage):
    """Saves the pictures of all batches that wait, then commits their rows in one transaction."""

    def __init__(
        self,
        gallery: Gallery,
        settings: PipelineSettings,
        run_name: str,
        variant: str,
        batches: BoundedQueue[EncodedCrops],
        ledger: Ledger,
        fail: Callable[[BaseException], None],
        on_commit: Callable[[Sequence[Item]], None] | None,
    ) -> None:
        super().__init__("commit", "gallery", fail)
        self._gallery = gallery
        self._crops_dir = gallery.crops_dir if settings.save_crops else None
        self._run_name = run_name
        self._variant = variant
        self._batches = batches
        self._ledger = ledger
        self._on_commit = on_commit
        self._others = OtherWriters(gallery, ledger)
        self._folder: CropFolder | None = None
        self._crops: list[Crop] = []
        self.latency = Durations()
        self.encode_latency = Durations()

    def start(self) -> None:
        """Clear up after processes that were killed, then begin to work.

        Raises:
            InputError: The folder of pictures cannot be written to.
        """
        if self._crops_dir is not None:
            try:
                remove_left_behind(self._gallery, self._crops_dir)
            except OSError as error:
                raise InputError(f"cannot write {self._crops_dir}: {error.strerror}") from error
            self._folder = CropFolder(self._crops_dir, self._run_name)
        super().start()

    def leave(self) -> str | None:
        """Leave behind a gallery or a callback that does not return; return which one hung.

        After a callback the commits go on in another thread, and nobody is told of them.
        """
        if not self._leave():
            return None
        part = self.part
        if part == "on_commit":
            self._on_commit = None
            self._go_on()
        else:
            self._ledger.count_crops(self._crops, "crops.dropped.failed")
        return part

    def _run(self) -> None:
        try:
            while not self._batches.is_finished:
                taken = self._batches.get_all(_STEP_S)
                if taken:
                    self._crops = [crop for batch, _ in taken for crop in batch]
                    self._commit(self._crops, np.concatenate([embeds for _, embeds in taken]))
                    self._batches.done(len(taken))
                if self._others.is_due:
                    self._look_at_others()
            self._look_at_others()
        except LeftBehindError:
            raise
        except BaseException:
            self._close_folder()
            raise
        self._close_folder()

    def _look_at_others(self) -> None:
        self._crops = []  # Committed: a look that hangs takes nothing along.
        try:
            with self._calling("gallery"):
                self._others.look()
        except LeftBehindError:
            self._close_folder()
            raise

    def _commit(self, crops: list[Crop], embeds: NDArray[np.float32]) -> None:
        items = [crop.item for crop in crops]
        try:
            with (
                self._calling("gallery"),
                nullcontext() if self._folder is None else self._folder.saved(crops),
            ):
                self._others.know(crop.camera for crop in crops)
                replaced = self._gallery.add(items, embeds, self._variant)
        except LeftBehindError:
            self._close_folder()  # After a callback it is the next thread's.
            raise
        except BaseException:
            self._ledger.count_crops(crops, "crops.dropped.failed")
            raise
        now = time.monotonic()
        for crop in crops:
            self.latency.add(now - crop.arrived)
            self.encode_latency.add(now - crop.chosen)
        self._others.count_ours(items, replaced)
        self._ledger.count_crops(crops, "committed")
        if self._on_commit is not None:
            with self._calling("on_commit"):
                self._on_commit(items)

    def _close_folder(self) -> None:
        if self._folder is not None:
            self._folder.close()


class CropFolder:
    """Where the pictures of crops are saved, several at a time: each waits for the disk."""

    def __init__(self, folder: Path, run_name: str) -> None:
        """Make the folder; raise InputError if it cannot be written to."""
        self.folder = folder
        self._note = UnfinishedNote(folder, run_name)
        self._pool = _DaemonPool()

    @contextmanager
    def saved(self, crops: list[Crop]) -> Iterator[None]:
        """Write the pictures of crops; each appears complete or not at all.

        Those that were not there before are removed again after an error, also one of what is done
        in the context: it commits their rows.
        """
        pictures = {
            self.folder / crop.item.crop: crop.jpeg
            for crop in crops
            if crop.jpeg is not None and crop.item.crop is not None
        }
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
    """Threads for pictures. Python waits for those of `ThreadPoolExecutor` before a process ends.

    On a disk that hangs that would be forever.
    """

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

    Pictures come before rows, so whoever is killed in between leaves pictures that no row names,
    and no retention would ever find. The file is locked as long as its process lives.
    """

    def __init__(self, crops_dir: Path, run_name: str) -> None:
        """Make the note; raise InputError if the folder cannot be written to."""
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
            raise InputError(f"cannot write {self._path}: {error.strerror}") from error

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
            raise InputError(f"cannot write {self._path}: {error.strerror}") from error
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


def remove_left_behind(gallery: Gallery, crops_dir: Path) -> None:
    """Remove pictures that killed processes saved and did not commit."""
    removed = 0
    for path in sorted(crops_dir.glob(f"{_PREFIX}*.json")):
        try:
            file = path.open("r+b")
        except FileNotFoundError:
            continue  # Its process ended, or another one has seen to it.
        with file:
            if not try_lock(file.fileno()):
                continue  # Its process lives, or nobody can tell.
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
    """What `UnfinishedNote` wrote."""

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
        path = crop_path(crops_dir, name)
        if path is None:
            continue  # Nothing outside is ever touched, whatever a note says.
        for half in path.parent.glob(f".{glob.escape(path.name)}.*"):
            half.unlink(missing_ok=True)
        if name not in named and os.path.isfile(path):
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def _remove(path: Path) -> bool:
    """Remove a file if it is there; return whether it is gone."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("cannot remove %s: %s", path, error.strerror)
        return False
    return True
