"""`ingest`: the one path from crops to committed rows.

A picture, or a frame with boxes, becomes crops; crops are embedded in micro-batches; one
transaction adds their rows; then outputs get them. `index`, shards, Ray and cameras differ in where
crops come from and in which threads the steps run, and in nothing else.
"""

import glob
import json
import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, ParamSpec, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from upperson_rt.encoder import Encoder
from upperson_rt.errors import BackendError, InputError, UppersonError
from upperson_rt.extensions import extension_names, load_extension
from upperson_rt.files import (
    lock_until_closed,
    make_folder,
    sync_folder,
    try_lock,
    write_all_atomically,
)
from upperson_rt.gallery import Filter, Gallery, Item
from upperson_rt.gallery.crops import crop_path
from upperson_rt.ingest.detector import plugin_boundary
from upperson_rt.printable import error_text, get_logger, safe_repr
from upperson_rt.strict import parse_json, read_fields

if TYPE_CHECKING:
    from upperson_rt.gallery.outbox import Outbox, Within


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop:
    """A picture of one person, ready for the image tower."""

    item: Item
    pixels: NDArray[np.uint8]
    """RGB [H, W, 3] of the model's size, see `Encoder.prepare_image`."""
    jpeg: bytes | None = None
    """The picture to save as ``item.crop``, or None."""


# --- Pictures of crops on disk, saved before their rows are committed

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
    removed = 0
    for path in sorted(crops_dir.glob(f"{_PREFIX}*.json")):
        try:
            file = path.open("r+b")
        except FileNotFoundError:
            continue  # Its process ended, or another one has seen to it.
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
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("cannot remove %s: %s", path, error.strerror)
        return False
    return True


# --- From crops to committed rows


class Output(Protocol):
    """Gets rows after they were committed; an extension of ``upperson.outputs`` makes one."""

    def committed(self, items: Sequence[Item], replaced: Sequence[str]) -> None:
        """Take the rows of one transaction and the keys that were there before.

        An error ends the run.
        """

    def close(self) -> None:
        """Finish; called once at the end."""


class Matcher(Protocol):
    """Compares rows with standing queries; an extension of ``upperson.matchers`` makes one.

    If the extension has a static ``copy(galleries, merged)``, merged shards keep their queries.
    """

    def match(self, items: Sequence[Item], embeds_ND: NDArray[np.float32]) -> "Within | None":
        """Take rows that are about to be committed; return what to write with them, if anything.

        An error ends the run.
        """


def embed_crops(encoder: Encoder, crops: Sequence[Crop], batch_size: int) -> NDArray[np.float32]:
    """Return the (N, D) embeddings of crops."""
    return encoder.encode_pixels(np.stack([crop.pixels for crop in crops]), batch_size)


class Ingest:
    """Embeds crops and commits their rows. `embed` and `commit` may run in different threads."""

    def __init__(
        self,
        encoder: Encoder,
        gallery: Gallery,
        batch_size: int = 32,
        outputs: Sequence[Output] = (),
    ) -> None:
        self.gallery = gallery
        self.folder: CropFolder | None = None
        """Where pictures of crops are saved; None saves none."""
        self.outputs = outputs
        self._encoder = encoder
        self._batch_size = batch_size
        self._matchers = _open_matchers(encoder, gallery)

    def embed(self, crops: Sequence[Crop]) -> NDArray[np.float32]:
        """Return the (N, D) embeddings of crops."""
        return embed_crops(self._encoder, crops, self._batch_size)

    def commit(self, crops: Sequence[Crop], embeds_ND: NDArray[np.float32]) -> list[str]:
        """Save pictures of crops, then add their rows; return the replaced keys."""
        items = [crop.item for crop in crops]
        with nullcontext() if self.folder is None else self.folder.saved(crops):
            found = [matcher.match(items, embeds_ND) for matcher in self._matchers]
            within = [one for one in found if one is not None]
            if not within:
                return self.gallery.add(items, embeds_ND, self._encoder.variant)

            def write(outbox: "Outbox", ids: Mapping[str, int], replaced: Sequence[str]) -> None:
                for one in within:
                    one(outbox, ids, replaced)

            return self.gallery.add(items, embeds_ND, self._encoder.variant, write)

    def deliver(self, items: Sequence[Item], replaced: Sequence[str]) -> None:
        """Give committed rows to the outputs; ``replaced`` is what `commit` returned."""
        for output in self.outputs:
            output.committed(items, replaced)


def _open_matchers(encoder: Encoder, gallery: Gallery) -> list[Matcher]:
    """Return what the extensions of ``upperson.matchers`` make; none without an outbox."""
    if not getattr(gallery, "has_outbox", False):  # A program's own gallery may be any object.
        return []
    return [
        load_extension("matchers", name)(encoder, gallery) for name in extension_names("matchers")
    ]


def open_outputs(names: Sequence[str]) -> list[Output]:
    """Return the extensions of ``upperson.outputs`` with these names; the caller closes them.

    Raises:
        UsageError: There is none of that name.
        BackendError: One cannot be imported, or cannot be opened.
    """
    opened: list[Output] = []
    try:
        for name in names:
            make = load_extension("outputs", name)
            with plugin_boundary(partial(_not_opened, name)):
                opened.append(make())
    except BaseException:
        for output in opened:
            output.close()
        raise
    return opened


def _not_opened(name: str, error: BaseException) -> UppersonError:
    if isinstance(error, UppersonError):
        return error
    return BackendError(f"the output {safe_repr(name)} cannot be opened: {error_text(error)}")
