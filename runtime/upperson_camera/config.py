"""The cameras of a YAML file, and what changes in a running pipeline when the file changes.

    cameras:
      gate:
        source: rtsp://10.0.0.5/stream
        min_height_px: 80
        zones: [[[0, 0.4], [1, 0.4], [1, 1], [0, 1]]]

The keys of a camera are the fields of `CameraEntry` and the settings that a camera may have its own
of (`CameraOptions`), those of `QualityRules` and `CaptureRules` among them by their own names.
"""

import dataclasses
import datetime
import os
import re
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from stat import S_ISREG
from typing import Any

from upperson_camera.access import Access
from upperson_camera.decoding import find_hwaccel
from upperson_camera.frames import check_unix_time
from upperson_camera.pipeline import Pipeline
from upperson_camera.queues import DropPolicy
from upperson_camera.regions import Regions
from upperson_camera.settings import (
    CameraOptions,
    CameraSettings,
    PipelineSettings,
    camera_settings,
)
from upperson_camera.source import Logins, Source, parse_source, without_secrets
from upperson_rt.errors import InputError, UppersonError, UsageError
from upperson_rt.files import read_bounded
from upperson_rt.ingest.detector import Detector
from upperson_rt.printable import get_logger, safe_repr, shortened
from upperson_rt.strict import read_fields
from upperson_settings.yaml_file import parse_yaml

_log = get_logger(__name__)

POLL_S = 1.0
"""Between two looks at the file."""
_MOST_BYTES = 1 << 20
_SAME_TIME_NS = 3_000_000_000
"""File systems round times of changes, FAT to 2 s."""
_SECRET = re.compile(r"(?i)user|login|pass|pwd|secret|token|auth|api_?key")

DetectorOpener = Callable[[str, str | None, str | None, float | None, str | None], Detector]
"""Opens a detector by name, layout, class, least score and input."""


@dataclass(frozen=True, kw_only=True)
class CameraEntry:
    """One camera of the file: the keys that are no `CameraOptions`."""

    source: str
    detector: str = "auto"
    detector_layout: str | None = None
    detector_class: str | None = None
    detector_score: float | None = None
    detector_input: str | None = None
    drop: DropPolicy | None = None
    start_time: Any = None
    """Unix time, or ISO 8601 text, local without an offset."""
    realtime: bool = False
    hwaccel: str = "none"
    insecure: bool = False
    ca: str | None = None
    allow_hosts: tuple[str, ...] = ()
    zones: Any = ()
    masks: Any = ()
    snapshot: bool | None = None
    """Whether the console gets a frame each minute; by default where there are zones or masks."""
    regions: Regions = field(init=False, compare=False)
    """Zones and masks; they alone change while the camera runs."""

    def __post_init__(self) -> None:
        if without_secrets(self.source) != self.source:
            raise _secret_refused("source")
        regions = Regions(zones=self.zones, masks=self.masks)
        object.__setattr__(self, "regions", regions)
        object.__setattr__(self, "start_time", _unix_time(self.start_time))

    @property
    def detector_choice(self) -> tuple[str, str | None, str | None, float | None, str | None]:
        """What `DetectorOpener` takes."""
        detector, layout, kind = self.detector, self.detector_layout, self.detector_class
        return detector, layout, kind, self.detector_score, self.detector_input

    def needs_restart(self, earlier: "CameraEntry") -> bool:
        """Return whether anything but zones and masks has changed."""
        return replace(self, zones=(), masks=()) != replace(earlier, zones=(), masks=())


def _option_keys() -> dict[str, tuple[str, Any]]:
    """Return option and type by key; those of rules have the name of the rule's field."""
    found: dict[str, tuple[str, Any]] = {}
    for name, hint in typing.get_type_hints(CameraOptions).items():
        (kind,) = (one for one in typing.get_args(hint) if one is not types.NoneType)
        if dataclasses.is_dataclass(kind):
            found |= {key: (name, each) for key, each in typing.get_type_hints(kind).items()}
        else:
            found[name] = name, kind
    return found


_OPTIONS = _option_keys()
_ENTRY = dataclasses.make_dataclass(
    "_Entry",
    [(key, kind | None, field(default=None)) for key, (_, kind) in _OPTIONS.items()],
    bases=(CameraEntry,),
    frozen=True,
    kw_only=True,
)
_KEYS = frozenset(one.name for one in dataclasses.fields(_ENTRY) if one.init)


@dataclass(frozen=True)
class _File:
    cameras: dict[str, Any]


def read_cameras(
    content: bytes, path: Path, defaults: Mapping[str, Any] = types.MappingProxyType({})
) -> dict[str, CameraEntry]:
    """Read cameras by name; ``defaults`` are values of keys that a camera does not have.

    Raises:
        InputError: It is no such file, with the camera (``camera``) and the key (``at``).
    """
    parsed = parse_yaml(content, path)
    _require_mapping(parsed, str(path), "", "a mapping with the key cameras")
    if "cameras" in parsed:
        expected = "a mapping from names to cameras"
        _require_mapping(parsed["cameras"], f"{path}: cameras", "cameras", expected)
    file = read_fields(_File, parsed, str(path))
    if not file.cameras:
        raise InputError(f"{path}: cameras: expected one or more, found none", code="no_cameras")
    found = {}
    for name, given in file.cameras.items():
        with _placed(path, name, is_placed=True):
            expected = "a mapping with keys such as source and detector"
            _require_mapping(given, _where(path, name), "", expected)
            for key in given.keys() - _KEYS:
                if _SECRET.search(key):
                    raise _secret_refused(f"{_where(path, name)}: {shortened(key)}")
            kept = {
                key: value
                for key, value in defaults.items()
                if not ("detector" in given and key.startswith("detector"))
            }
            merged = {**kept, **given}
            found[name] = typing.cast(CameraEntry, read_fields(_ENTRY, merged, _where(path, name)))
    return found


def _require_mapping(value: Any, where: str, at: str, expected: str) -> None:
    if not isinstance(value, Mapping):
        text = f"{where}: expected {expected}, found {safe_repr(value)}"
        raise InputError(text, code="value_unfit", at=at, expected=expected)


def _options_of(entry: CameraEntry, settings: PipelineSettings) -> dict[str, Any]:
    """Return the `CameraOptions` of a camera."""
    found: dict[str, Any] = {}
    for key, (name, _) in _OPTIONS.items():
        value = getattr(entry, key)
        if value is not None and key == name:
            found[name] = value
        elif value is not None:
            found[name] = replace(found.get(name, getattr(settings, name)), **{key: value})
    return found


def _unix_time(given: Any) -> float | None:
    if isinstance(given, str):
        try:  # Python 3.10 does not know the Z yet.
            text = given.replace("Z", "+00:00")
            return datetime.datetime.fromisoformat(text).timestamp()
        except (ValueError, OverflowError, OSError) as error:
            expected = "unix seconds or a time such as 2026-11-25T08:00:00"
            text = f"start_time: expected {expected}, found {safe_repr(given)}"
            raise InputError(text, code="time_malformed", found=given) from error
    check_unix_time(given)
    return None if given is None else float(given)


def _secret_refused(place: str) -> InputError:
    text = (
        f"{place} holds a login or a token: expected none in this file, write name and password "
        "into the file of --netrc, by host"
    )
    return InputError(text, code="secret_in_config")


def _where(path: Path, camera: str) -> str:
    return f"{path}: camera {shortened(camera)}"


@contextmanager
def _placed(path: Path, camera: str, is_placed: bool = False) -> Iterator[None]:
    """Name file and camera in an error; a fault of a call is one of the file here."""
    try:
        yield
    except UppersonError as error:
        kind = InputError if isinstance(error, UsageError) else type(error)
        text = str(error) if is_placed else f"{_where(path, camera)}: {error}"
        raise kind(text, code=error.code, **error.fields | {"camera": camera}) from error


# --- A running pipeline


@dataclass(frozen=True)
class _Plan:
    """What is to be done, all of it checked."""

    entries: dict[str, CameraEntry]
    removed: list[str]
    restarted: list[str]
    added: list[str]
    zoned: list[str]
    """Those of which zones or masks alone have changed."""
    prepared: dict[str, CameraSettings]
    """Those that are restarted or added."""

    def __str__(self) -> str:
        parts = {
            "removed": self.removed, "restarted": self.restarted, "added": self.added,
            "with other zones": self.zoned,
        }  # fmt: skip
        shown = [
            f"{', '.join(map(shortened, names))} {what}" for what, names in parts.items() if names
        ]
        return "; ".join(shown) or "no camera changed"


class CamerasFile:
    """Adds the cameras of a file to a pipeline, and follows the file while the pipeline runs."""

    def __init__(
        self,
        path: Path,
        settings: PipelineSettings,
        open_detector: DetectorOpener,
        logins: Logins,
        defaults: Mapping[str, Any],
        notify: Callable[[str], None] = _log.info,
    ) -> None:
        """Read the file and open its detectors; ``settings`` are those of the pipeline.

        ``notify`` takes the lines that say which device decodes.

        Raises:
            UppersonError: Anything of it cannot be used.
        """
        self._path = path
        self._settings = settings
        self._open_detector = open_detector
        self._logins = logins
        self._defaults = defaults
        self._notify = notify
        self._entries: dict[str, CameraEntry] = {}
        self._detectors: dict[Any, Detector] = {}
        """Those in use, by choice: cameras share them."""
        self.sources: dict[str, Source] = {}
        """Of the cameras that there are now."""
        self._stat: tuple[int, ...] | None = None
        """Of the file as it was read last, if it cannot have changed since without a trace."""
        self._used = self._seen = self._look()
        self._next_look = time.monotonic() + POLL_S
        self._first = self._plan(self._used)

    def start(self, pipeline: Pipeline) -> None:
        """Add the cameras to a pipeline with these settings."""
        self._pipeline = pipeline
        self._apply(self._first)

    def poll(self) -> str | None:
        """Look at the file again, once a second; apply what has changed, and return it in a line.

        A change counts when two looks see the same: until then it may be half written. An error is
        logged once, and the cameras go on as they are.
        """
        if time.monotonic() < self._next_look:
            return None
        seen = self._look()
        self._next_look = time.monotonic() + POLL_S
        is_whole, self._seen = seen == self._seen, seen
        if not is_whole or seen == self._used:
            return None
        self._used = seen
        try:
            self._apply(plan := self._plan(seen))
        except UppersonError as error:
            text = "%s; the cameras go on as they are"
            _log.error(text, error, extra={"event": "config_refused", "code": error.code})
            return None
        return f"{self._path} has changed: {plan}"

    def _look(self) -> tuple[int, bytes | str]:
        """Return the time of the last change and the content, or why it cannot be read."""
        earlier, self._stat = self._stat, None
        try:
            found = os.stat(self._path)
            if not S_ISREG(found.st_mode):  # Opening a pipe would wait for its other end.
                return 0, f"cannot read {self._path}: not a regular file"
            times = found.st_mtime_ns, found.st_ctime_ns  # The second one cannot be set.
            stat = *times, found.st_size, found.st_ino
            if stat == earlier:
                self._stat = earlier
                return self._seen
            content = read_bounded(self._path, _MOST_BYTES)
        except OSError as error:
            return 0, f"cannot read {self._path}: {error.strerror}"
        except InputError as error:
            return 0, str(error)
        # A change right after another one may leave the same time.
        if max(times) < time.time_ns() - _SAME_TIME_NS:
            self._stat = stat
        return found.st_mtime_ns, content

    def _plan(self, seen: tuple[int, bytes | str]) -> _Plan:
        content = seen[1]
        if isinstance(content, str):
            raise InputError(content, code="config_unreadable", path=self._path)
        entries = read_cameras(content, self._path, self._defaults)
        kept = [name for name in entries if name in self._entries]
        restarted = [n for n in kept if entries[n].needs_restart(self._entries[n])]
        added = [name for name in entries if name not in self._entries]
        return _Plan(
            entries=entries,
            removed=[name for name in self._entries if name not in entries],
            restarted=restarted,
            added=added,
            zoned=[
                name
                for name in kept
                if name not in restarted and entries[name].regions != self._entries[name].regions
            ],
            prepared={name: self._prepare(name, entries[name]) for name in (*restarted, *added)},
        )

    def _prepare(self, name: str, entry: CameraEntry) -> CameraSettings:
        with _placed(self._path, name):
            access = Access(
                ca_file=None if entry.ca is None else Path(entry.ca),
                insecure=entry.insecure,
                allowed_hosts=frozenset(map(str.lower, entry.allow_hosts)),
            )
            access.context()  # A file that cannot be read is refused now.
            find_hwaccel(entry.hwaccel)
            source = self._logins.given_to(parse_source(entry.source))
            choice = entry.detector_choice
            if choice not in self._detectors:
                self._detectors[choice] = self._open_detector(*choice)
            settings = camera_settings(
                self._settings,
                name,
                replace(source, access=access, hwaccel=entry.hwaccel),
                self._detectors[choice],
                drop=entry.drop,
                start_time=entry.start_time,
                realtime=entry.realtime,
                regions=entry.regions,
                options=_options_of(entry, self._settings),
            )
            return replace(settings, snapshot=entry.snapshot)

    def _notify_hwaccel(self, plan: _Plan) -> None:
        """Say what decodes the cameras that are added or restarted and name a device."""
        named = {name: plan.entries[name].hwaccel for name in plan.prepared}
        for wanted in dict.fromkeys(named.values()):
            if wanted != "none":
                cameras = ", ".join(shortened(name) for name in named if named[name] == wanted)
                self._notify(f"{cameras}: {find_hwaccel(wanted)[1]}")

    def _apply(self, plan: _Plan) -> None:
        self._notify_hwaccel(plan)
        prepared = [self._pipeline.prepare_camera(camera) for camera in plan.prepared.values()]
        for name in (*plan.removed, *plan.restarted):
            self._pipeline.remove_camera(name)
        for camera in prepared:
            self._pipeline.add_prepared(camera)
        for name in plan.zoned:
            regions = plan.entries[name].regions
            self._pipeline.set_zones(name, regions.zones, regions.masks)
        self._entries = plan.entries
        sources = self.sources | {
            name: camera.source
            for name, camera in plan.prepared.items()
            if camera.source is not None
        }
        self.sources = {name: sources[name] for name in plan.entries}
        used = {entry.detector_choice for entry in plan.entries.values()}
        for choice in self._detectors.keys() - used:
            del self._detectors[choice]
