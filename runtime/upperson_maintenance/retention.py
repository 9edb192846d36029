"""Retention: pictures go by age, by camera, and by the bytes that a gallery takes on disk."""

import math
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from upperson_rt.errors import InputError, UppersonError
from upperson_rt.files import bytes_on_disk
from upperson_rt.gallery.protocol import Gallery
from upperson_rt.gallery.records import Filter
from upperson_rt.printable import count_of, get_logger

__all__ = ["Retention", "RetentionThread", "counters"]

_LOG = get_logger(__name__)

_DAY_S = 86400.0
_LEAST_S, _MOST_S, _BY_BYTES_S = 60.0, 3600.0, 600.0
"""Between two rounds."""
_FILLED = 0.98
"""Share of the bytes that a round prunes down to: the next pictures need no round of their own."""
_MOST_PASSES = 8
_SETTLED_NS = 2_000_000_000


@dataclass(frozen=True, kw_only=True)
class Retention:
    """How long pictures are kept, and how many bytes."""

    keep_s: float | None = None
    """Seconds, for all cameras that have no limit of their own; None for no limit."""
    by_camera: Mapping[str, float] = field(default_factory=dict)
    keep_bytes: int | None = None
    """Of all files of a gallery in a folder: what was deleted first in its bin goes first, then the
    oldest pictures. What its database keeps free for new rows is not counted."""

    @property
    def every_s(self) -> float:
        """Seconds between two rounds: a 24th of the shortest age, a minute to an hour."""
        ages = [age for age in (self.keep_s, *self.by_camera.values()) if age is not None]
        longest = _MOST_S if self.keep_bytes is None else _BY_BYTES_S
        return max(_LEAST_S, min([longest, *(age / 24 for age in ages)]))

    def check(self, gallery: Gallery) -> None:
        """Raise an InputError for a gallery that this cannot be enforced on."""
        if self.keep_bytes is not None and (gallery.is_remote or gallery.crops_dir is None):
            raise InputError(
                f"the bytes of {gallery.location} cannot be counted: limit the age, or use a "
                "gallery in a folder",
                code="bytes_not_counted",
                path=gallery.location,
            )

    def enforce(
        self,
        gallery: Gallery,
        used: "UsedBytes | None" = None,
        *,
        sweep: bool = True,
        dry_run: bool = False,
    ) -> int:
        """Delete what is too old, then the oldest while there are too many bytes; return how many.

        Args:
            gallery: Two that enforce at once, in one process or in several, do no harm.
            used: Counts its bytes; one that is kept reads unchanged folders once.
            sweep: Also remove saved crops that belong to no picture, which reads all names.
            dry_run: Only count; by bytes that is an estimate.

        Raises:
            UppersonError: As `Gallery.prune`.
        """
        self.check(gallery)
        act = gallery.count_prunable if dry_run else gallery.prune
        now, known, count = time.time(), gallery.by_camera(), gallery.count()
        limits = {**dict.fromkeys(known, self.keep_s), **self.by_camera}
        pruned = sum(act(now - age, None, name) for name, age in limits.items() if age is not None)
        if self.keep_s is not None:
            if sum(one.pictures for one in known.values()) < count:
                old = gallery.items(Filter(until=now - self.keep_s))
                keys = [item.key for item in old if item.camera is None]
                pruned += len(keys) if dry_run else gallery.delete(keys)
            if sweep and not dry_run:
                gallery.prune(now - max(self.keep_s, *self.by_camera.values(), 0.0))
        if self.keep_bytes is not None:
            found = self._prune_bytes(gallery, used or UsedBytes(gallery), act)
            pruned = max(pruned, found) if dry_run else pruned + found
        return pruned

    def _prune_bytes(
        self,
        gallery: Gallery,
        used: "UsedBytes",
        act: Callable[[float | None, int | None], int],
    ) -> int:
        assert self.keep_bytes is not None
        pruned = 0
        for _ in range(_MOST_PASSES):
            taken, count = used.count(), gallery.count()
            if taken <= self.keep_bytes:
                break
            binned = [] if gallery.bin is None else gallery.bin.entries()  # Last deleted first.
            if not count and not binned:
                _LOG.warning("%s is empty and still has %d bytes", gallery.location, taken)
                break
            share = (taken - _FILLED * self.keep_bytes) / taken
            surplus = math.ceil((count + len(binned)) * share)
            if act == gallery.count_prunable:
                return min(count + len(binned), surplus)
            if binned:  # Pictures of the gallery stay while it holds any.
                pruned += gallery.bin.delete([entry.id for entry in binned[-surplus:]])
            else:
                pruned += act(None, count - min(count, surplus))
        return pruned


class UsedBytes:
    """Counts the bytes on disk of all files of a gallery in a folder."""

    def __init__(self, gallery: Gallery) -> None:
        self._gallery = gallery
        self._known: dict[str, tuple[int, int, list[str]]] = {}
        """Of each folder that did not change lately: time of the change, bytes, folders in it."""

    def count(self) -> int:
        """Return how many there are now, without those that the database keeps for new rows."""
        assert self._gallery.crops_dir is not None
        folder, total = os.fspath(self._gallery.crops_dir.parent), 0
        waiting, known = [folder], self._known
        self._known = {}
        while waiting:
            place = waiting.pop()
            try:
                # A link is followed where a folder such as clips is one, and nowhere below.
                changed = os.stat(place).st_mtime_ns
                found = known.get(place)
                if found is None or found[0] != changed or place == folder:
                    found = (changed, *_bytes_in(place, links=place == folder))
            except OSError:  # It went meanwhile.
                continue
            if time.time_ns() - changed > _SETTLED_NS:
                self._known[place] = found
            total += found[1]
            waiting += found[2]
        return total - self._gallery.reusable_bytes()


def _bytes_in(place: str, links: bool) -> tuple[int, list[str]]:
    total, folders = 0, []
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=links):
                folders.append(entry.path)
            else:
                total += bytes_on_disk(entry.stat(follow_symlinks=False))
    return total, folders


class RetentionThread:
    """Enforces a retention now and again until it is closed; problems are logged and counted."""

    def __init__(self, retention: Retention, gallery: Gallery) -> None:
        """Start; the gallery must stay open until `close`.

        Raises:
            InputError: It cannot be enforced on this gallery.
        """
        retention.check(gallery)
        self._retention, self._gallery, self._used = retention, gallery, UsedBytes(gallery)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="retention", daemon=True)
        self._thread.start()

    def close(self, within_s: float = 10.0) -> None:
        """End; a round that takes longer is abandoned, and the next one finishes it."""
        self._stop.set()
        self._thread.join(within_s)

    def _run(self) -> None:
        swept = -math.inf
        while not self._stop.is_set():
            sweep = time.monotonic() - swept >= _DAY_S
            try:
                pruned = self._retention.enforce(self._gallery, self._used, sweep=sweep)
            except (UppersonError, OSError) as error:
                if not self._stop.is_set():
                    _counts["prune_failures"] += 1
                    _LOG.error("the retention failed, and is tried again: %s", error)
            else:
                swept = time.monotonic() if sweep else swept
                _counts["pruned"] += pruned
                if pruned:
                    text = "the retention deleted %s of gallery %s"
                    _LOG.info(text, count_of(pruned, "picture"), self._gallery.location)
            self._stop.wait(self._retention.every_s)


_counts: Counter[str] = Counter()


def counters() -> dict[str, tuple[str, int]]:
    """Return help text and value of what this process counted, by the end of the metric's name."""
    return {
        "pruned": ("Pictures that the retention deleted.", _counts["pruned"]),
        "prune_failures": ("Rounds of the retention that failed.", _counts["prune_failures"]),
    }
