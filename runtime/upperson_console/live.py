"""The state of the cameras: metrics that `watch` publishes, and what the gallery has of them."""

import http.client
import math
import stat
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias
from urllib.parse import urlsplit

from prometheus_client.parser import text_string_to_metric_families

from upperson_console.accounts import Account
from upperson_console.service import ConsoleService
from upperson_network.remote import http_target, http_within, may_hide_login
from upperson_rt.errors import UsageError
from upperson_rt.gallery import CameraInfo, Filter, Item
from upperson_rt.printable import one_line, safe_repr, shortened

_STALE_S = 30.0
"""Age of a metrics file, which is written every 5 s, from which its process has ended."""
_MOST_BYTES = 1 << 20
"""Of the metrics of a process; a camera has some 2 KB."""
_TIMEOUT_S = 1.0
_MOST_COUNTED = 2.0**63
_NEWEST = 5
_LOOK_BACK_S = 600.0
_MOST_READ = 400


@dataclass(frozen=True, kw_only=True)
class Process:
    """A process that watches cameras."""

    source: str
    state: Literal["running", "not running", "publishes no metrics", "ended"] = "running"
    why: str = ""
    """Why it cannot be read, or is not running."""
    busy: float | None = None
    """Share of the recent time in which its encoder worked, 0 to 1."""
    waiting: int = 0
    """Pictures that wait for the encoder."""

    @property
    def problem(self) -> str | None:
        """Why it cannot be read, or is not running; None if it is."""
        return None if self.state == "running" else f"{self.state}: {self.why}"


@dataclass(frozen=True, kw_only=True)
class CameraStatus:
    """A camera."""

    name: str
    runs: bool | None
    """None if no process publishes it."""
    pictures: int
    last_time: float | None
    frames: int | None = None
    dropped: int = 0
    """Frames that were not processed, for any reason."""
    outages: int = 0
    newest: tuple[tuple[int, Item], ...] = ()
    has_snapshot: bool = False
    """Whether its newest frame is kept."""


_Sums: TypeAlias = dict[str, dict[str, float]]
"""By metric and camera; the empty name stands for the process."""


class Live:
    """Reads the metrics of processes. Safe for several threads."""

    def __init__(self, sources: Sequence[str]) -> None:
        self._sources = list(sources)
        self._lock = threading.Lock()
        self._before: dict[str, tuple[float, float]] = {}
        """Uptime and busy seconds of each source some seconds ago."""
        self.has_ended = False
        """Whether the server ends, and with it streams."""

    def now(
        self, service: ConsoleService, account: Account
    ) -> tuple[list[Process], list[CameraStatus]]:
        """Return the processes, and the cameras that an account may see."""
        processes, published = [], {}
        for source in self._sources:
            process, values = self._read(source)
            processes.append(process)
            for name, up in values.get("camera_up", {}).items():
                published[name] = values, up > 0 and process.problem is None
        known, snapshots = service.cameras(account), service.snapshots(account)
        cameras = []
        nothing = CameraInfo(pictures=0, first_time=None, last_time=None)
        visible = {name for name in published if account.sees(name)}
        for name in sorted({*known, *snapshots, *visible}):
            values, runs = published.get(name, ({}, None))
            info = known.get(name, nothing)
            frames, dropped, outages = (
                int(values.get(metric, {}).get(name, 0.0))
                for metric in ("frames_read", "frames_dropped", "outages")
            )
            cameras.append(
                CameraStatus(
                    name=name,
                    runs=runs,
                    pictures=info.pictures,
                    last_time=info.last_time,
                    frames=None if runs is None else frames,
                    dropped=dropped,
                    outages=outages,
                    newest=_newest(service, name, info.last_time),
                    has_snapshot=name in snapshots,
                )
            )
        return processes, cameras

    def _read(self, source: str) -> tuple[Process, _Sums]:
        try:
            text, age_s = _fetched(source)
            values = _sums(text)
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or one_line(error) or type(error).__name__
            return Process(source=source, state="not running", why=shortened(reason)), {}
        except ValueError as error:
            reason = shortened(one_line(error))
            return Process(source=source, state="publishes no metrics", why=reason), {}
        waiting = int(sum(values.get("queue_depth", {}).values()))
        if age_s >= _STALE_S:
            why = "its file is not written any more"
            return Process(source=source, state="ended", why=why, waiting=waiting), values
        busy = self._busy(source, values)
        return Process(source=source, busy=busy, waiting=waiting), values

    def _busy(self, source: str, values: _Sums) -> float | None:
        """Return the encoder's share of the time since the last read, or since the start."""
        seconds, uptime = (
            values.get(name, {}).get("", 0.0) for name in ("encoder_busy_seconds", "uptime_seconds")
        )
        with self._lock:
            before = self._before.get(source)
            if before is None or uptime - before[0] > 5 or uptime < before[0]:
                self._before[source] = uptime, seconds
        if before is not None and uptime > before[0]:
            seconds, uptime = seconds - before[1], uptime - before[0]
        return min(1.0, max(0.0, seconds / uptime)) if uptime > 0 else None


def check_source(source: str) -> str:
    """Return a metrics file or an HTTP address unchanged; raise UsageError for another address.

    An address with a login is refused, too: the live page would show it.
    """
    if "://" in source and not _is_http(source):
        with_login = "one that may hold a login (write %40 for @)"
        found = with_login if "@" in source else safe_repr(source)
        raise UsageError(
            f"--watch takes a metrics file or an address such as http://127.0.0.1:9095/metrics, "
            f"found {found}",
            code="watch_source_invalid",
        )
    return source


def _is_http(address: str) -> bool:
    try:
        parts = urlsplit(address)
        is_whole = bool(parts.hostname) and parts.port != 0
        is_whole &= parts.username is None and not may_hide_login(address)
        return parts.scheme in ("http", "https") and is_whole
    except ValueError:
        return False


def _fetched(source: str) -> tuple[str, float]:
    """Return the metrics of a process, and their age in seconds."""
    if "://" in source:
        content, age_s = _downloaded(source), 0.0
    else:
        path = Path(source)
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # Reading a pipe would block.
            raise ValueError("no file")
        age_s = time.time() - about.st_mtime
        with open(path, "rb") as file:
            content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise ValueError(f"longer than {_MOST_BYTES} bytes")
    return content.decode("utf-8"), age_s


def _downloaded(address: str) -> bytes:
    """Return what an address serves, cut off after the limit, within a second."""
    with http_within(_TIMEOUT_S, address) as connection:
        connection.request("GET", http_target(address))
        answer = connection.getresponse()
        if answer.status != http.HTTPStatus.OK:
            raise ValueError(f"it answers {answer.status}")
        return answer.read(_MOST_BYTES + 1)


def _sums(text: str) -> _Sums:
    values: _Sums = {}
    try:
        for family in text_string_to_metric_families(text):
            sums = values.setdefault(family.name.removeprefix("upperson_"), {})
            for sample in family.samples:
                if sample.name.endswith(("_bucket", "_created")):
                    continue
                camera = sample.labels.get("camera", "")
                sums[camera] = sums.get(camera, 0.0) + sample.value
                if not math.isfinite(sums[camera]) or abs(sums[camera]) > _MOST_COUNTED:
                    raise ValueError(f"{family.name} is {sums[camera]:g}")
    except (LookupError, TypeError, AttributeError) as error:  # The parser trusts its input.
        raise ValueError("not in the format of Prometheus") from error
    return values


def _newest(
    service: ConsoleService, camera: str, last: float | None
) -> tuple[tuple[int, Item], ...]:
    """Return the newest items of a camera, one of each track."""
    if last is None:
        return ()
    items: dict[str, Item] = {}
    for span in (60.0, _LOOK_BACK_S):
        where = Filter(camera=camera, since=last - span)
        for number, item in enumerate(service.gallery.items(where)):
            items[item.track or item.key] = item
            if number >= _MOST_READ:
                break
        if len(items) >= _NEWEST:
            break
    newest = sorted(items.values(), key=lambda item: -(item.time or 0.0))[:_NEWEST]
    ids = service.gallery.ids([item.key for item in newest])
    return tuple((ids[item.key], item) for item in newest if item.key in ids)
