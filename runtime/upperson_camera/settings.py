"""Settings of a pipeline and its cameras, checked once, here, and what all cameras share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, TypedDict, runtime_checkable

from upperson_camera.clips import ClipStage
from upperson_camera.disk_buffer import DiskBuffer
from upperson_camera.frames import CameraCrop, EncodedCrops, check_unix_time
from upperson_camera.queues import BoundedQueue, DropPolicy, check_policy, known_name
from upperson_camera.regions import Regions
from upperson_camera.source import Opener, Source, import_cv2, parse_source
from upperson_camera.stats import CameraStats, Counters
from upperson_camera.stream import StreamReader, guess_start_time, open_source
from upperson_camera.tracker import new_tracker
from upperson_rt.arguments import check_callable, check_fields, check_name, check_number, check_path
from upperson_rt.encoder import Encoder
from upperson_rt.errors import InputError, UsageError
from upperson_rt.ingest.boxes import QualityRules
from upperson_rt.ingest.detector import Detector, SharedDetector, plugin_boundary
from upperson_rt.printable import error_text, safe_repr, shortened

_LONGEST_S = 7 * 86_400.0
_LONGEST_COMMIT_S = 600.0
LONGEST_CLIP_S = 60.0
"""Before and after a picture."""


def _require(is_right: bool, name: str, value: object, expected: str) -> None:
    if not is_right:
        text = f"{name} must be {expected}, got {value}"
        raise UsageError(text, code="setting_out_of_range", setting=name)


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptureRules:
    """When a source counts as stalled, and how often it is opened again.

    Raises:
        UsageError: On construction, if a number is negative, or longer than a week.
    """

    stall_s: float = 10.0
    """A live source without a picture for so long is closed and opened again."""
    first_wait_s: float = 0.5
    """Before the first attempt to reconnect; doubles with each failed one."""
    longest_wait_s: float = 3.0
    """Longest wait between two attempts; with the two seconds in which FFmpeg opens a stream, a
    camera is back five seconds after its server."""

    def __post_init__(self) -> None:
        for name in ("stall_s", "first_wait_s", "longest_wait_s"):
            check_number(getattr(self, name), name, least=0.0, most=_LONGEST_S)
        _require(self.stall_s > 0, "stall_s", self.stall_s, "above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineSettings:
    """How a pipeline works; each field is also a keyword of `Pipeline`.

    Raises:
        UsageError: On construction, if a number is out of range, or there is no such tracker or
            option.
        BackendError: On construction, if the package of the tracker is not installed.
    """

    every_s: float = 2.0
    """No two crops of a track are closer than so many seconds; 0 takes all."""
    still_every_s: float = 300.0
    """Nor are those of a track that stands still and looks the same; 0 for no such rule."""
    still_score: float = 0.5
    """A track that has never moved and never had such a score gives no crop."""
    min_views: int = 2
    """A track in fewer frames, each at least `VIEW_S` after the one before, counts as a false
    detection."""
    lost_after_s: float = 2.0
    """A track ends when no box belongs to it for so long."""
    tracker: str = "upperson"
    """Our own tracker, or ``bytetrack``, ``ocsort`` or ``botsort`` of the package ``trackers``;
    options may follow, see `new_tracker`."""
    motion_gate: bool = True
    """Of a source, detectors see frames with motion, and one every 5 s without; of frames that are
    submitted, all."""
    detect_fps: float | None = None
    """Most frames a second that the detector of a camera sees; None for all."""
    quality: QualityRules = field(default_factory=QualityRules)
    """Which detections may become crops."""
    save_crops: bool = True
    """Save the pictures under ``gallery.crops_dir``."""
    jpeg_quality: int = 90
    """Quality of saved pictures, 1 to 100."""
    clip_s: float | None = None
    """Save the whole frame of each picture, and a clip from so many seconds before to so many after
    it; 0 for the frame only, None for neither."""
    clip_days: float = 7.0
    """Frames and clips are deleted after so many days."""
    clip_mb: int = 4096
    """Most MiB of all frames and clips; the oldest are deleted first."""
    batch_size: int = 16
    """Crops embedded and committed at a time."""
    max_delay_s: float = 0.5
    """Longest wait for a batch to fill up."""
    frame_queue: int = 4
    """Frames of a camera that may wait."""
    commit_every_s: float = 0.0
    """Rows wait for so long, or until there are 2,048, and are committed together, which writes
    less to flash. A power failure may lose those that wait, see `Pipeline.stats`: not yet
    ``committed``. Not for galleries on servers."""
    crop_queue: int = 256
    """Crops of all cameras that may wait for the encoder."""
    drop: DropPolicy = "oldest"
    """What a full queue drops, ``oldest`` or ``newest``. Files wait instead, but in real time."""
    end_within_s: float = 10.0
    """At the end: for how long cameras may work on what waits, and a call of an encoder, a gallery
    or ``on_commit`` may last. What takes longer is abandoned."""
    buffer: Path = Path("buffer")
    """Folder in which rows wait for a gallery on a server, see `DiskBuffer`."""
    buffer_bytes: int = 1 << 30
    """From this size on, cameras accept no more crops and files wait."""
    capture_rules: CaptureRules = CaptureRules()
    """When a live source counts as stalled, and how it is opened again."""
    opener: Opener = open_source
    """Opens the sources of cameras that bring no opener of their own."""

    def __post_init__(self) -> None:
        check_fields(self)
        for rules, kind in ((self.quality, QualityRules), (self.capture_rules, CaptureRules)):
            if not isinstance(rules, kind):
                raise UsageError(f"expected {kind.__name__}, found {safe_repr(rules)}")
        check_callable(self.opener, "opener")
        object.__setattr__(self, "buffer", Path(check_path(self.buffer, "buffer")))
        for name in ("max_delay_s", "every_s", "still_every_s"):
            _require((value := getattr(self, name)) >= 0, name, value, "at least 0")
        every_s, most = self.commit_every_s, f"0 to {_LONGEST_COMMIT_S:g}"
        _require(0 <= every_s <= _LONGEST_COMMIT_S, "commit_every_s", every_s, most)
        whole = "batch_size", "min_views", "frame_queue", "crop_queue", "buffer_bytes", "clip_mb"
        for name in whole:
            _require((value := getattr(self, name)) >= 1, name, value, "at least 1")
        clip_s, longest = self.clip_s, f"0 to {LONGEST_CLIP_S:g}"
        _require(clip_s is None or 0 <= clip_s <= LONGEST_CLIP_S, "clip_s", clip_s, longest)
        for name in ("lost_after_s", "end_within_s", "detect_fps", "clip_days"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "above 0")
        is_right = not self.save_crops or 1 <= self.jpeg_quality <= 100
        _require(is_right, "jpeg_quality", self.jpeg_quality, "1 to 100")
        new_tracker(self.tracker, self.lost_after_s)  # Is its package installed?
        if check_policy(self.drop) == "block":
            text = "only files can wait; the policy of live cameras drops something"
            raise UsageError(text, code="only_files_wait")


class CameraOptions(TypedDict, total=False):
    """The fields of `PipelineSettings` that a camera may have its own of; None is the default."""

    every_s: float | None
    still_every_s: float | None
    still_score: float | None
    min_views: int | None
    lost_after_s: float | None
    tracker: str | None
    motion_gate: bool | None
    detect_fps: float | None
    quality: QualityRules | None
    save_crops: bool | None
    jpeg_quality: int | None
    clip_s: float | None
    frame_queue: int | None
    capture_rules: CaptureRules | None


class PipelineOptions(CameraOptions, total=False):
    """The fields of `PipelineSettings`, as keywords of `Pipeline`; None is the default."""

    batch_size: int | None
    max_delay_s: float | None
    commit_every_s: float | None
    crop_queue: int | None
    drop: DropPolicy | None
    end_within_s: float | None
    buffer: Path | None
    buffer_bytes: int | None
    clip_days: float | None
    clip_mb: int | None
    opener: Opener | None


def with_options(
    settings: PipelineSettings, options: Mapping[str, Any], kind: type[Any]
) -> PipelineSettings:
    """Return settings with the options of such a `TypedDict` in their place.

    Raises:
        UsageError: An option is unknown, or what `PipelineSettings` raises.
    """
    for name in options:
        known_name(name, list(kind.__annotations__), "option", "option_unknown")
    return replace(settings, **{name: one for name, one in options.items() if one is not None})


@runtime_checkable
class CameraDetector(Protocol):
    """A detector that wants to know its camera, such as one that learns its background."""

    def for_camera(self, name: str, stats: Callable[[], CameraStats]) -> Detector:
        """Return the detector of one camera; called whenever a camera is added.

        ``stats`` tells the camera's state at any time. Cameras call their detectors at once.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class CameraSettings:
    """One camera, before it starts; see `camera_settings`.

    Raises:
        UsageError: On construction, if there is no name, a source without a detector, or a policy
            that does not fit.
        InputError: The time is none in unix seconds, or such an address cannot be read.
        BackendError: What reads a network stream is not installed.
    """

    name: str
    source: Source | None
    """None for a camera whose frames are submitted."""
    detector: Detector | None
    drop: DropPolicy
    start_time: float | None
    """Unix time of a file's first frame."""
    realtime: bool
    opener: Opener
    regions: Regions = field(default_factory=Regions)
    """Where people count."""
    own: PipelineSettings = field(default_factory=PipelineSettings)
    """The pipeline's, with the camera's own in their place."""
    snapshot: bool | None = False
    """Whether a frame is kept for the console, see `SnapshotWriter`; None while there are zones or
    masks."""

    def __post_init__(self) -> None:
        name = check_name(self.name, "the name of a camera", UsageError)
        object.__setattr__(self, "name", name)
        shown_name = shortened(name)
        if self.source is not None:
            check_name(self.source.shown, f"the source of camera {shown_name}")
        if self.detector is not None:
            check_callable(self.detector, f"the detector of camera {shown_name}")
        check_callable(self.opener, f"the opener of camera {shown_name}")
        if self.source is not None and self.detector is None:
            text = f"camera {shown_name} has a source and so needs a detector"
            raise UsageError(text, code="detector_missing", camera=name)
        is_live = self.source is not None and (self.source.is_live or self.realtime)
        if check_policy(self.drop) == "block" and is_live:
            text = (
                f"camera {shown_name} is live or a file in real time, which cannot wait: drop "
                "oldest or newest"
            )
            raise UsageError(text, code="only_files_wait", camera=name)
        if self.source is not None and self.opener in (open_source, StreamReader):
            StreamReader.require(self.source)
        check_unix_time(self.start_time)

    @property
    def is_file(self) -> bool:
        """Whether its frames can wait, and be found again by number."""
        return self.source is not None and not self.source.is_live

    @property
    def saves_frames(self) -> bool:
        """Whether whole frames are saved: of cameras that save pictures, if they are wanted."""
        return self.own.save_crops and self.own.clip_s is not None


def camera_settings(
    pipeline: PipelineSettings,
    name: str,
    source: str | Source | None = None,
    detector: Detector | None = None,
    *,
    drop: DropPolicy | None = None,
    start_time: float | None = None,
    realtime: bool = False,
    opener: Opener | None = None,
    regions: Regions | None = None,
    options: Mapping[str, Any],
) -> CameraSettings:
    """Check what `Pipeline.add_camera` gets, and return it; ``options`` are `CameraOptions`.

    Raises:
        UsageError: A source has no detector, an option is unknown, or a policy does not fit.
        InputError: The source is nothing that can be read, or the time none in unix seconds.
        BackendError: A package is missing, or it cannot read such a source.
    """
    import_cv2()
    own = with_options(pipeline, options, CameraOptions)
    if own.save_crops and not pipeline.save_crops:
        text = f"camera {safe_repr(name)} cannot save pictures: its pipeline saves none"
        raise UsageError(text, code="no_place_for_pictures")
    found = parse_source(source) if isinstance(source, str) else source
    if not isinstance(found, Source | None):
        raise UsageError(f"expected a source, found {safe_repr(found)}")
    is_file = found is not None and not found.is_live
    if drop is None:
        drop = "block" if is_file and not realtime else own.drop
    settings = CameraSettings(
        name=name,
        source=found,
        detector=detector,
        drop=drop,
        start_time=start_time,
        realtime=realtime,
        opener=own.opener if opener is None else opener,
        regions=Regions() if regions is None else regions,
        own=own,
    )
    if found is not None and is_file and start_time is None:
        return replace(settings, start_time=guess_start_time(found, settings.opener))
    return settings


def detector_of(camera: CameraSettings, stats: Callable[[], CameraStats]) -> Detector | None:
    """Return the detector of a camera; a `CameraDetector` makes one.

    Raises:
        InputError: It fails, or makes nothing that can be called.
    """
    detector, shown = camera.detector, shortened(camera.name)

    def failed(error: BaseException) -> InputError:
        text = f"the detector of camera {shown} fails in for_camera: {error_text(error)}"
        return InputError(text, code="detector_failed", camera=camera.name)

    with plugin_boundary(failed):
        if not isinstance(detector, CameraDetector):
            return detector
        made = detector.for_camera(camera.name, stats)
    check_callable(made, f"the detector of camera {shown}")
    return made


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What the stages of a pipeline have in common."""

    settings: PipelineSettings
    """Those of a camera in its own stages."""
    run_name: str
    """Unique to this run of the program; follows the camera in the names of tracks. A camera that
    is added again under its name has another."""
    encoder: Encoder
    crops: BoundedQueue[CameraCrop]
    """Waiting for the encoder."""
    batches: BoundedQueue[EncodedCrops]
    """Waiting for the gallery."""
    snapshots: Path | None = None
    """Folder of the cameras' newest frames; None keeps none."""
    buffer: DiskBuffer | None = None
    """Between the encoder and a gallery on a server."""
    clips: ClipStage | None = None
    """Saves whole frames and clips; None where no pictures are saved."""
    counters: Counters
    detectors: dict[int, SharedDetector] = field(default_factory=dict)
    """By the `id` of a detector, for the cameras that share it."""
