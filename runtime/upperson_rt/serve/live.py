"""What cameras do now: read from what `watch` publishes, beside what the gallery has of them."""

import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from upperson_rt.errors import UsageError
from upperson_rt.gallery import Filter, Item
from upperson_rt.printable import one_line, shown
from upperson_rt.serve.accounts import Account
from upperson_rt.serve.desk import Desk

__all__ = ["CameraNow", "Live", "Process", "check_source"]

_STALE_S = 30.0
"""A metrics file is written every 5 s; an older one was left behind."""
_MOST_BYTES = 4 << 20
_TIMEOUT_S = 1.0
_NEWEST = 5
_LOOK_BACK_S = 600.0
_MOST_READ = 400


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process that watches cameras."""

    source: str
    problem: str | None
    """Why it cannot be read, or is not running."""
    busy: float | None = None
    """Share of the time in which its encoder worked lately, 0 to 1."""
    waiting: int = 0
    """Pictures that wait for the encoder."""


@dataclass(frozen=True, kw_only=True)
class CameraNow:
    """A camera."""

    name: str
    runs: bool | None
    """None where no process tells."""
    pictures: int
    last_time: float | None
    frames: int | None = None
    dropped: int = 0
    """Frames that nobody looked at, for whatever reason."""
    outages: int = 0
    newest: tuple[tuple[int, Item], ...] = ()


@dataclass(frozen=True)
class _Read:
    time: float
    values: dict[str, dict[str, float]]
    """Sums by metric and camera; the empty name is the whole process."""


class Live:
    """Reads what processes publish. Safe to use from several threads."""

    def __init__(self, sources: Sequence[str]) -> None:
        """Read files and addresses, see `check_source`."""
        self._sources = list(sources)
        self._lock = threading.Lock()
        self._before: dict[str, _Read] = {}
        self.has_ended = False
        """Whether the server is about to end: streams end, too."""

    def now(self, desk: Desk, account: Account) -> tuple[list[Process], list[CameraNow]]:
        """Return the processes, and the cameras that somebody may see."""
        processes, told = [], {}
        for source in self._sources:
            process, values = self._read(source)
            processes.append(process)
            for name, up in values.get("camera_up", {}).items():
                told[name] = values, up > 0 and process.problem is None
        there = desk.cameras(account)
        cameras = []
        for name in sorted({*there, *(name for name in told if account.sees(name))}):
            values, runs = told.get(name, ({}, None))
            info = there.get(name)
            cameras.append(
                CameraNow(
                    name=name,
                    runs=runs,
                    pictures=0 if info is None else info.pictures,
                    last_time=None if info is None else info.last_time,
                    frames=None if runs is None else int(_of(values, "frames_read", name)),
                    dropped=int(_of(values, "frames_dropped", name)),
                    outages=int(_of(values, "outages", name)),
                    newest=_newest(desk, name, None if info is None else info.last_time),
                )
            )
        return processes, cameras

    def _read(self, source: str) -> tuple[Process, dict[str, dict[str, float]]]:
        try:
            text, age_s = _fetched(source)
            values: dict[str, dict[str, float]] = {}
            for family in text_string_to_metric_families(text):
                name = family.name.removeprefix("upperson_")
                for sample in family.samples:
                    if sample.name.endswith(("_bucket", "_created")):
                        continue
                    camera = sample.labels.get("camera", "")
                    values.setdefault(name, {})
                    values[name][camera] = values[name].get(camera, 0.0) + sample.value
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
            return Process(source=source, problem=f"not running: {one_line(reason)}"), {}
        problem = None if age_s < _STALE_S else "ended: its file is not written any more"
        return (
            Process(
                source=source,
                problem=problem,
                busy=None if problem else self._busy(source, values),
                waiting=int(sum(values.get("queue_depth", {}).values())),
            ),
            values,
        )

    def _busy(self, source: str, values: dict[str, dict[str, float]]) -> float | None:
        """Return the encoder's share since it was last read, or since the start."""
        seconds, uptime = (
            values.get(name, {}).get("", 0.0) for name in ("encoder_busy_seconds", "uptime_seconds")
        )
        with self._lock:
            before = self._before.get(source)
            if before is None or uptime - before.time > 5 or uptime < before.time:
                self._before[source] = _Read(uptime, values)
        if before is not None and uptime > before.time:
            seconds -= before.values.get("encoder_busy_seconds", {}).get("", 0.0)
            uptime -= before.time
        return min(1.0, max(0.0, seconds / uptime)) if uptime > 0 else None


def check_source(source: str) -> str:
    """Return a metrics file or address as it is.

    Raises:
        UsageError: It is an address, but not of HTTP.
    """
    if "://" in source and not source.startswith(("http://", "https://")):
        raise UsageError(
            f"--watch takes a metrics file or an address such as http://127.0.0.1:9095/metrics, "
            f"found {shown(source)}"
        )
    return source


def _fetched(source: str) -> tuple[str, float]:
    """Return what a process publishes, and how old it is in seconds."""
    if "://" in source:
        with urllib.request.urlopen(source, timeout=_TIMEOUT_S) as answer:
            return answer.read(_MOST_BYTES).decode("utf-8"), 0.0
    path = Path(source)
    age_s = time.time() - path.stat().st_mtime
    with open(path, "rb") as file:
        return file.read(_MOST_BYTES).decode("utf-8"), age_s


def _of(values: dict[str, dict[str, float]], metric: str, camera: str) -> float:
    return values.get(metric, {}).get(camera, 0.0)


def _newest(desk: Desk, camera: str, last: float | None) -> tuple[tuple[int, Item], ...]:
    """Return the last people of a camera, a picture a track."""
    if last is None:
        return ()
    items: dict[str, Item] = {}
    for span in (60.0, _LOOK_BACK_S):
        where = Filter(camera=camera, since=last - span)
        for number, item in enumerate(desk.gallery.items(where)):
            items[item.track or item.key] = item
            if number >= _MOST_READ:
                break
        if len(items) >= _NEWEST:
            break
    newest = sorted(items.values(), key=lambda item: -(item.time or 0.0))[:_NEWEST]
    ids = desk.gallery.ids([item.key for item in newest])
    return tuple((ids[item.key], item) for item in newest if item.key in ids)
