"""The search index in memory: kept up with the database row by row, never the truth itself."""

import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from upperson_rt.errors import InputError, UppersonError, UsageError
from upperson_rt.files import sweep
from upperson_rt.gallery.records import Filter, IndexInfo
from upperson_rt.gallery.sqlite import list_files
from upperson_rt.gallery.sqlite.database import Transaction
from upperson_rt.gallery.sqlite.index_file import (
    OutdatedIndexError,
    UnusableIndexError,
    read_file,
    read_stamp,
    write_file,
)
from upperson_rt.gallery.sqlite.list_files import (
    EXACT,
    INDEX_FILE,
    ListFiles,
    Lists,
    Stamp,
    StoppedError,
    read_dead,
    read_exact,
)
from upperson_rt.gallery.sqlite.lists import KIND, ListPart
from upperson_rt.gallery.sqlite.rows import changed_since, stored_vectors, version_of
from upperson_rt.gallery.sqlite.schema import DamageError, SqliteMeta
from upperson_rt.gallery.sqlite.segments import (
    Candidates,
    Segment,
    Tail,
    flat_index,
    load_faiss,
    merge_flat,
    stored_rows,
)
from upperson_rt.machine import lower_priority
from upperson_rt.printable import get_logger

_LOG = get_logger(__name__)

APPROXIMATE_FROM = 1_000_000
"""Pictures from which on searches use an approximate index: until there an exact one takes up to
1 GB at 512 dimensions, and about 0.1 s on one core of a server."""
_SEAL_ROWS = 8192
"""Below, rows are searched with numpy: nothing is saved, and faiss is not even loaded."""
_MOST_SEGMENTS = 8
"""Exact segments below `_LARGE_ROWS` that may be there before they are merged."""
_LARGE_ROWS = 131_072
"""Exact segments from there on are not merged: that would need their memory twice."""
_FEWEST_OF_A_PART = 500
"""Candidates of each part of a large gallery, at least."""
_TRIES = 3
_AFTER_FAILURE_S = 600.0
_LONGEST_END_S = 5.0
_EVERY_S = 10.0
"""How often to look whether there is work beside searches, for the first time after so long."""


@dataclass(frozen=True)
class Snapshot:
    """The index as of one state of the database; does not change."""

    seq: int
    last_id: int
    segments: tuple[Segment, ...]
    tail: Tail
    lists: Lists | None = None
    """Of a large gallery, which has no segments."""

    @classmethod
    def of(cls, lists: Lists, embed_dim: int) -> "Snapshot":
        """Return the index as of the state of files."""
        return cls(lists.stamp.seq, lists.stamp.last_id, (), Tail(embed_dim), lists)

    @property
    def is_exact(self) -> bool:
        """Whether the candidates are the best rows for certain."""
        return self.lists is None

    def checksums_of(self, ids: NDArray[np.int64]) -> dict[int, int]:
        """Return the checksums that the rows of these items (ascending) have to have, by id."""
        found: dict[int, int] = {}
        for part in self._parts:
            found |= part.checksums_of(ids)
        return found

    def is_complete(self, transaction: Transaction) -> bool:
        """Whether it holds exactly the vectors that the gallery has to hold, by their checksums."""
        if transaction.sums is None:
            return True
        found = (
            sum(part.alive for part in self._parts),
            sum(part.total for part in self._parts) % (1 << 64),
        )
        return found == (transaction.sums.rows, transaction.sums.total)

    def lacks_checksums(self, transaction: Transaction) -> bool:
        """Whether it, or part of it, was made before the gallery got checksums."""
        has_sums = transaction.sums is not None
        return has_sums and any(part.alive and not part.total for part in self._parts)

    @property
    def _parts(self) -> "tuple[Segment | ListPart | Tail, ...]":
        lists = () if self.lists is None else self.lists.parts.values()
        return (*self.segments, *lists, self.tail)

    def search(
        self, queries: NDArray[np.float32], k: int, only: NDArray[np.int64] | None = None
    ) -> Candidates:
        """Find the k best items or more for (Q, D) queries, if there are so many.

        With ``only`` (ascending) among those items; the index has to be exact.
        """
        found = [part.search(queries, k, only) for part in self.segments]
        if self.tail.length or not found:
            found.append(self.tail.search(queries, k, only))
        return _best(found, k)

    def search_lists(
        self, queries: NDArray[np.float32], k: int, where: Filter, wider: float
    ) -> tuple[Candidates, bool]:
        """Find about the k best items that pass camera and time of a filter; has to have lists.

        Also returns whether these are all that pass: no more than k do. For ``wider`` see
        `ListPart.search`.
        """
        assert self.lists is not None
        parts = [(part, part.ranges(where)) for part in self.lists.parts.values()]
        only = None
        if where.cameras is not None or where.since is not None or where.until is not None:
            only = self.tail.passing(where)
        tail = self.tail.search(queries, k, only)
        few = sum(stop - start for _, ranges in parts for start, stop in ranges)
        if few > k:
            most = min(k, max(2 * k // len(parts), _FEWEST_OF_A_PART))
            found = [part.search(queries, most, ranges, wider) for part, ranges in parts]
            return _best([tail, *found], k), False
        ids = [part.items_in(ranges) for part, ranges in parts if ranges]
        ids.append(self.tail.alive_ids if only is None else only)
        every = np.concatenate(ids)
        shape = (len(queries), len(every))
        return (np.zeros(shape, np.float32), np.broadcast_to(every, shape)), True


def _best(found: list[Candidates], k: int) -> Candidates:
    if len(found) == 1:
        return found[0]
    scores = np.concatenate([part for part, _ in found], axis=1)
    ids = np.concatenate([part for _, part in found], axis=1)
    scores = np.where(ids < 0, -np.inf, scores)
    if k < scores.shape[1]:
        keep = np.argpartition(scores, scores.shape[1] - k, axis=1)[:, scores.shape[1] - k :]
        scores, ids = np.take_along_axis(scores, keep, 1), np.take_along_axis(ids, keep, 1)
    return scores, ids


class SearchIndex:
    """Makes, loads, saves and refreshes the snapshot."""

    def __init__(
        self,
        folder: Path,
        meta: SqliteMeta,
        writable: bool,
        reading: Callable[[], AbstractContextManager[Transaction]],
    ) -> None:
        """Load nothing before the first `refresh`; save the index in the folder if writable.

        ``reading`` gives transactions of their own to the work beside searches.
        """
        self.path = folder / INDEX_FILE
        self.lock = threading.Lock()
        """Hold it around the beginning of a transaction and `refresh`."""
        self.snapshot: Snapshot | None = None
        self.embed_dim = meta.embed_dim
        self._meta = meta
        self._writable = writable
        self._reading = reading
        self._files = ListFiles(folder, meta)
        self._seen = (0, 0)
        self._asked = time.monotonic()
        self._worker: threading.Thread | None = None

    def close(self) -> None:
        """End the work beside searches, and forget the snapshot."""
        self._files.stopped.set()
        if self._worker is not None:
            self._worker.join(_LONGEST_END_S)  # Training has no end in between.
        self.snapshot = None

    def refresh(self, transaction: Transaction) -> Snapshot:
        """Bring the index to the state that a transaction sees, and return it."""
        if self.snapshot is None or self.snapshot.lacks_checksums(transaction):
            self.snapshot = self._load(transaction)
        elif self.snapshot.lists is not None and not self.is_large(transaction):
            self.snapshot = self.build(transaction)
        elif (self.snapshot.seq, self.snapshot.last_id) != version_of(transaction):
            changed = changed_since(transaction, self.snapshot.seq)
            if changed is None:
                self.snapshot = self._load(transaction)
            else:
                followed = self._follow(transaction, self.snapshot, changed)
                self.snapshot = self._checked(transaction, followed)
        if (version := self._files.version()) != self._seen:
            self._seen = version  # Before the files are read: later ones differ.
            if self.is_large(transaction):
                self.snapshot = self._with_newer_files(transaction, self.snapshot)
        self.keep_up(transaction)
        return self.snapshot

    def keep_up(self, transaction: Transaction) -> None:
        """Work on the files of a large gallery in a thread of low priority, if that is due."""
        now = time.monotonic()
        every_s = _AFTER_FAILURE_S if self._files.failed else _EVERY_S
        if now - self._asked < every_s or not self.is_large(transaction):
            return
        self._asked = now
        if not self._writable:
            return
        seq, last_id = version_of(transaction)
        lists = self.snapshot.lists if self.snapshot is not None else None
        if self.snapshot is not None and lists is not None:
            unsaved = max(self.snapshot.tail.length, seq - lists.stamp.seq)
        else:
            unsaved = self._unsaved(seq, last_id)
        is_due = unsaved >= list_files.SEAL_ROWS
        if is_due and (self._worker is None or not self._worker.is_alive()):
            self._worker = threading.Thread(target=self._work, name="gallery-index", daemon=True)
            self._worker.start()

    def _unsaved(self, seq: int, last_id: int) -> int:
        """Return how many rows are newer than the files."""
        with suppress(UnusableIndexError, OSError):
            stamp = Stamp.read(read_stamp(self.path))
            if stamp.kind == KIND:
                return max(last_id - stamp.last_id, seq - stamp.seq)
        return last_id

    def _work(self) -> None:
        lower_priority()
        try:
            load_faiss().omp_set_num_threads(1)
            with self._files.only_one(wait=False) as is_alone:
                if is_alone:
                    self._files.failed = False
                    self._bring_up(self._read_or_empty())
            if is_alone:
                self._files.purge_if_due(self._reading)
        except StoppedError:
            pass
        except (UnusableIndexError, OSError, UppersonError, RuntimeError) as error:  # faiss's.
            self._files.failed = True
            _LOG.warning("search index %s cannot be kept up: %s", self.path, error)

    def _read_or_empty(self) -> Lists:
        with suppress(UnusableIndexError, OSError):
            return self._files.read()
        return self._files.empty()

    def _bring_up(self, lists: Lists) -> None:
        """Do all that is due, each step in a transaction of its own."""
        while not self._files.stopped.is_set():
            with self._reading() as transaction:
                try:
                    done = self._files.step(transaction, lists)
                except UnusableIndexError:
                    done = self._files.step(transaction, self._files.empty())
            if done is None or self._files.failed:
                return
            lists = done
        raise StoppedError

    def purge(self, ids: NDArray[np.int64], parts: bool) -> bool:
        """Take deleted items out of the files; those of an exact index go as a whole.

        Args:
            ids: The lowest one of each deletion.
            parts: Also of a large gallery; else the work beside searches does it sometime.

        Returns:
            Whether that is done; if not, the next deletion has to repeat it. Problems are logged.
        """
        try:
            sweep(self.path.parent, f"{INDEX_FILE}*")
            stamp = Stamp.read(read_stamp(self.path))
            if stamp.kind == EXACT and (ids <= stamp.last_id).any():
                self.path.unlink(missing_ok=True)
        except FileNotFoundError:
            pass
        except (UnusableIndexError, OSError) as error:
            _LOG.warning("search index %s cannot be used (%s): it is removed", self.path, error)
            with suppress(OSError):
                self.path.unlink(missing_ok=True)
        return not (parts and self._files.are_there) or self._files.purge(self._reading)

    def _with_newer_files(self, transaction: Transaction, snapshot: Snapshot) -> Snapshot:
        """Return the snapshot with what was saved since, if that holds almost everything."""
        known = None if snapshot.lists is None else snapshot.lists.parts
        try:
            lists = self._files.read(known)
            changed = lists.stamp.changes(transaction, self._meta)
        except (UnusableIndexError, OSError):
            return snapshot
        if lists.missing or snapshot.last_id - lists.stamp.last_id > 8 * list_files.SEAL_ROWS:
            return snapshot
        loaded = Snapshot.of(lists, self.embed_dim)
        if snapshot.lists is None:  # What exact segments hold has no cameras and times.
            followed = self._follow(transaction, loaded, changed)
        else:
            followed = replace(
                self._marked(loaded, changed),
                seq=snapshot.seq,
                last_id=snapshot.last_id,
                tail=snapshot.tail.kept(lists.stamp.last_id, changed),
            )
        return self._checked(transaction, followed)

    def _checked(self, transaction: Transaction, snapshot: Snapshot) -> Snapshot:
        """Return a snapshot that followed the log of changes, or a new one if the log was wrong."""
        if snapshot.is_complete(transaction):
            return snapshot
        if not snapshot.lacks_checksums(transaction):
            _LOG.warning(
                "search index %s is not of this database: making it again from the database",
                self.path,
            )
        return self.build(transaction)

    def info(self, transaction: Transaction, items: int) -> IndexInfo | None:
        """Return what searches use, or would load."""
        lists = None if self.snapshot is None else self.snapshot.lists
        stamp = None if lists is None else lists.stamp
        if self.snapshot is None:
            with suppress(UnusableIndexError, OSError):
                found = Stamp.read(read_stamp(self.path))
                found.changes(transaction, self._meta)
                stamp = found
        if stamp is None or stamp.kind == EXACT:
            if self.is_large(transaction) and self.snapshot is None:
                return None
            return IndexInfo(kind=EXACT, rows=items, recall_at_10=1.0)
        alive = sum(part.alive for part in stamp.parts)
        found_share = sum(part.alive * part.recall_at_10 for part in stamp.parts)
        return IndexInfo(
            kind=KIND,
            rows=min(alive, items),
            beside=max(0, items - alive),
            parameters={"parts": len(stamp.parts)},
            recall_at_10=found_share / alive if alive else None,
        )

    def problem(self, transaction: Transaction) -> str | None:
        """Say what is wrong with the files, or return None; missing and outdated ones are fine."""
        for _ in range(_TRIES - 1):  # Others may be working on the files.
            if self._problem(transaction) is None:
                return None
        return self._problem(transaction)

    def _problem(self, transaction: Transaction) -> str | None:
        try:
            _, arrays, stored = read_file(self.path)
            stamp = Stamp.read(stored)
            stamp.changes(transaction, self._meta)
            if stamp.kind == EXACT:
                read_exact(self.path, self.embed_dim)
            for part in stamp.parts:
                read = self._files.read_part(part.name)
                if part.name in arrays:
                    read_dead(arrays[part.name], read)
        except FileNotFoundError as error:
            if error.filename == str(self.path):
                return None
            return f"index {error.filename} is missing: run  upperson-rt gallery rebuild"
        except OutdatedIndexError:
            return None
        except (UnusableIndexError, OSError) as error:
            return f"index {self.path}: {error}: run  upperson-rt gallery rebuild"
        return None

    def _load(self, transaction: Transaction) -> Snapshot:
        """Read the files and what has changed since; without files worth it make the index."""
        try:
            if self.is_large(transaction):
                return self._load_lists(transaction)
            segment, stamp = read_exact(self.path, self.embed_dim)
            changed = stamp.changes(transaction, self._meta)
        except FileNotFoundError:
            return self.build(transaction)
        except (UnusableIndexError, OSError) as error:
            _LOG.warning(
                "search index %s cannot be used (%s): making it again from the database",
                self.path, error,
            )  # fmt: skip
            return self.build(transaction)
        if segment.without(changed).alive < transaction.count() // 2:
            _LOG.info("search index %s is outdated: making it again", self.path)
            return self.build(transaction)
        tail = Tail(self.embed_dim)
        loaded = Snapshot(stamp.seq, stamp.last_id, (segment,), tail)
        return self._checked(transaction, self._follow(transaction, loaded, changed))

    def _load_lists(self, transaction: Transaction) -> Snapshot:
        version = self._files.version()
        lists = self._files.read()
        changed = lists.stamp.changes(transaction, self._meta)
        newer = version_of(transaction)[1] - lists.stamp.last_id
        if self._writable and (lists.missing or newer > 8 * list_files.SEAL_ROWS):
            return self._build_lists(transaction, lists)
        if lists.missing:
            raise UnusableIndexError("a part of it cannot be used")
        self._seen = version
        loaded = Snapshot.of(lists, self.embed_dim)
        return self._checked(transaction, self._follow(transaction, loaded, changed))

    def _marked(self, snapshot: Snapshot, changed: NDArray[np.int64]) -> Snapshot:
        """Return the snapshot without items that changed."""
        if not len(changed):
            return snapshot
        lists = snapshot.lists
        if lists is not None:
            parts = {name: part.without(changed) for name, part in lists.parts.items()}
            lists = replace(lists, parts=parts)
        return replace(
            snapshot,
            lists=lists,
            segments=tuple(segment.without(changed) for segment in snapshot.segments),
            tail=snapshot.tail.without(changed),
        )

    def _follow(
        self, transaction: Transaction, snapshot: Snapshot, changed: NDArray[np.int64]
    ) -> Snapshot:
        """Return the snapshot with what is new and without what is gone."""
        again = changed[changed <= snapshot.last_id]
        with_columns = snapshot.lists is not None
        marked = self._marked(snapshot, changed)
        segments, tail = list(marked.segments), marked.tail
        for block in stored_vectors(
            transaction, self.embed_dim, snapshot.last_id, again, with_columns=with_columns
        ):
            tail = tail.plus(block)
            if tail.length >= _SEAL_ROWS and not with_columns:
                segments.append(tail.sealed())
                tail = Tail(self.embed_dim)
        seq, last_id = version_of(transaction)
        return replace(
            marked, seq=seq, last_id=last_id, segments=self._compacted(segments), tail=tail
        )

    def _compacted(self, segments: Iterable[Segment]) -> tuple[Segment, ...]:
        """Merge small exact segments where there are many, and clear those that are mostly gone."""
        kept = [part for part in segments if part.alive]
        crowded = sum(len(part.ids) < _LARGE_ROWS for part in kept) > _MOST_SEGMENTS

        def is_due(part: Segment) -> bool:
            small = crowded and len(part.ids) < _LARGE_ROWS
            return small or part.dead_count > part.alive

        if due := list(filter(is_due, kept)):
            kept = [part for part in kept if not is_due(part)]
            kept.append(merge_flat(due, self.embed_dim))
        return tuple(kept)

    def is_large(self, transaction: Transaction) -> bool:
        """Whether the index is in parts: from a size on, and then until half of that.

        Who cannot write makes none, but uses what is there.
        """
        if transaction.count() < APPROXIMATE_FROM // 2:
            return False
        if self.snapshot is not None and self.snapshot.lists is not None:
            return True
        if transaction.count() >= APPROXIMATE_FROM and self._writable:
            return True
        with suppress(UnusableIndexError, OSError):
            return Stamp.read(read_stamp(self.path)).kind == KIND
        return False

    def build(self, transaction: Transaction) -> Snapshot:
        """Make the index from the vectors that a transaction sees, save it, and return it.

        Needs no lock: searches go on with what there is until ``snapshot`` is set.
        """
        count = transaction.count()
        if self._writable and self.is_large(transaction):
            return self._build_lists(transaction, None)
        if count < _SEAL_ROWS:
            empty = Snapshot(0, 0, (), Tail(self.embed_dim))
            followed = self._follow(transaction, empty, np.empty(0, np.int64))
            if self._writable and self.path.exists():
                transaction.check_items()
                transaction.check_table()
                with suppress(OSError):  # An earlier, larger one; it does no harm either.
                    self._files.remove()
            return self._sound(transaction, followed)
        segment = self._build_exact(transaction, count)
        last_id = version_of(transaction)[1]
        stamp = Stamp.of(transaction, last_id, kind=EXACT, identity=self._meta.identity,
                         embed_dim=self.embed_dim)  # fmt: skip
        tail = Tail(self.embed_dim)
        snapshot = Snapshot(stamp.seq, last_id, (segment,), tail)
        sound = self._sound(transaction, snapshot)
        if self._writable:  # A search that is refused leaves the file of the index alone.
            transaction.check_items()
            transaction.check_table()
            self._save_exact(segment, stamp)
        return sound

    def _save_exact(self, segment: Segment, stamp: Stamp) -> None:
        arrays = {"ids": segment.ids, "checksums": segment.checksums}
        try:
            write_file(self.path, segment.index, arrays, asdict(stamp))
            self._files.remove_parts()  # Of when it was large.
        except (OSError, InputError) as error:
            _LOG.warning("search index %s cannot be saved: %s", self.path, error)

    def _build_lists(self, transaction: Transaction, lists: Lists | None) -> Snapshot:
        """Make what the files of a large gallery lack, or all of it, and follow what is newer."""
        _LOG.warning(
            "making the search index of %d pictures in %s: this takes a while",
            transaction.count(), self.path.parent,
        )  # fmt: skip
        with self._files.only_one(wait=True):
            # Made afresh it replaces what is there at the end, else what is done is not lost.
            afresh = lists is None and self.path.exists()
            made = self._files.empty()
            if lists is not None:  # Another process may have gone on meanwhile.
                made = self._read_or_empty()
            try:
                while (done := self._files.step(transaction, made, save=not afresh)) is not None:
                    made = done
            except StoppedError as error:
                raise UsageError(
                    "the gallery was closed meanwhile", code="gallery_closed"
                ) from error
            changed = made.stamp.changes(transaction, self._meta)
            loaded = Snapshot.of(made, self.embed_dim)
            followed = self._follow(transaction, loaded, changed)
            sound = self._sound(transaction, followed)
            if afresh:
                self._files.save(made)
            self._seen = self._files.version()
        self._files.purge_if_due(self._reading)
        return sound

    def _sound(self, transaction: Transaction, snapshot: Snapshot) -> Snapshot:
        """Return a snapshot of everything that is stored, if that is what has to be stored."""
        if not snapshot.is_complete(transaction):
            raise DamageError("pictures are missing, or there are others")
        return snapshot

    def _build_exact(self, transaction: Transaction, count: int) -> Segment:
        index, ids = flat_index(self.embed_dim, count), np.empty(count, np.int64)
        checksums = np.empty(count, np.int64)
        target, done = stored_rows(index), 0
        for block in stored_vectors(transaction, self.embed_dim, since=0):
            part = slice(done, done + len(block.ids))
            done += len(block.ids)
            if done > count:
                break
            ids[part], checksums[part] = block.ids, block.checksums
            target[part] = block.vectors.view(np.uint8)
        if done != count:
            raise DamageError(f"{count} pictures were stored, {done} or more are found")
        return Segment(ids=ids, checksums=checksums, index=index)
