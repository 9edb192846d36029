"""Settings of a pipeline and its cameras, checked once, here, and what all cameras share."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from upperson_camera.frames import CameraCrop, EncodedCrops, check_unix_time
from upperson_camera.queues import BoundedQueue, DropPolicy, check_policy
from upperson_camera.source import Opener, Source
from upperson_camera.stats import Counters
from upperson_camera.stream import StreamReader, open_source
from upperson_camera.tracker import TrackerName, check_tracker, new_tracker
from upperson_rt.arguments import check_callable, check_fields, check_name, check_number, check_path
from upperson_rt.encoder import Encoder
from upperson_rt.errors import UsageError
from upperson_rt.ingest.boxes import QualityRules
from upperson_rt.ingest.detector import Detector, SharedDetector
from upperson_rt.ingest.disk_buffer import DiskBuffer
from upperson_rt.printable import safe_repr, shortened

_LONGEST_S = 7 * 86_400.0


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
        UsageError: On construction, if a number is out of range or there is no such tracker.
        BackendError: On construction, if the package of the tracker is not installed.
    """

    every_s: float = 2.0
    """No two crops of a track are closer than so many seconds; 0 takes all."""
    still_every_s: float = 300.0
    """Nor are those of a track that stands still and looks the same; 0 for no such rule."""
    still_score: float = 0.5
    """A track that has never moved and never had such a score gives no crop."""
    min_views: int = 2
    """A track in fewer frames counts as a false detection."""
    lost_after_s: float = 2.0
    """A track ends when no box belongs to it for so long."""
    tracker: TrackerName = "upperson"
    """Our own tracker, or ``bytetrack``, ``ocsort`` or ``botsort`` of the package ``trackers``."""
    motion_gate: bool = True
    """Of a source, detectors see frames with motion, and one every 3 s without; of frames that are
    submitted, all."""
    detect_fps: float | None = None
    """Most frames a second that the detector of a camera sees; None for all."""
    quality: QualityRules = field(default_factory=QualityRules)
    """Which detections may become crops."""
    save_crops: bool = True
    """Save the pictures under ``gallery.crops_dir``."""
    jpeg_quality: int = 90
    """Quality of saved pictures, 1 to 100."""
    batch_size: int = 16
    """Crops embedded and committed at a time."""
    max_delay_s: float = 0.5
    """Longest wait for a batch to fill up."""
    frame_queue: int = 4
    """Frames of a camera that may wait."""
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
        for name in ("batch_size", "min_views", "frame_queue", "crop_queue", "buffer_bytes"):
            _require((value := getattr(self, name)) >= 1, name, value, "at least 1")
        for name in ("lost_after_s", "end_within_s", "detect_fps"):
            value = getattr(self, name)
            _require(value is None or value > 0, name, value, "above 0")
        is_right = not self.save_crops or 1 <= self.jpeg_quality <= 100
        _require(is_right, "jpeg_quality", self.jpeg_quality, "1 to 100")
        new_tracker(check_tracker(self.tracker), self.lost_after_s)  # Is its package installed?
        if check_policy(self.drop) == "block":
            text = "only files can wait; the policy of live cameras drops something"
            raise UsageError(text, code="only_files_wait")


class PipelineOptions(TypedDict, total=False):
    """The fields of `PipelineSettings`, as keywords of `Pipeline`; None is the default."""

    every_s: float | None
    still_every_s: float | None
    still_score: float | None
    min_views: int | None
    lost_after_s: float | None
    tracker: TrackerName | None
    motion_gate: bool | None
    detect_fps: float | None
    quality: QualityRules | None
    save_crops: bool | None
    jpeg_quality: int | None
    batch_size: int | None
    max_delay_s: float | None
    frame_queue: int | None
    crop_queue: int | None
    drop: DropPolicy | None
    end_within_s: float | None
    buffer: Path | None
    buffer_bytes: int | None
    capture_rules: CaptureRules | None
    opener: Opener | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CameraSettings:
    """One camera, before it starts; see `Pipeline.add_camera`.

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


@dataclass(frozen=True, kw_only=True)
class Shared:
    """What the stages of a pipeline have in common."""

    settings: PipelineSettings
    run_name: str
    """Unique to this run of the program; follows the camera in the names of tracks."""
    encoder: Encoder
    crops: BoundedQueue[CameraCrop]
    """Waiting for the encoder."""
    batches: BoundedQueue[EncodedCrops]
    """Waiting for the gallery."""
    buffer: DiskBuffer | None = None
    """Between the encoder and a gallery on a server."""
    counters: Counters = field(default_factory=Counters)
    detectors: dict[int, SharedDetector] = field(default_factory=dict)
    """By the `id` of a detector, for the cameras that share it."""
