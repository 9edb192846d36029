"""What a pipeline did so far: counters that all threads share, and plain values made of them."""

import math
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from upperson_camera.frames import CameraCrop

BOUNDS_S = tuple(0.001 * 2 ** (step / 4) for step in range(81))
"""Upper edges of the bins of `Durations`: 1 ms to 17 minutes, 19 % apart."""


class Durations:
    """A histogram of durations: constant memory, however many there are."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum_s = 0.0
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        """Count one duration; negative ones count as 0."""
        with self._lock:
            self._counts[bisect_left(BOUNDS_S, seconds)] += 1
            self._sum_s += max(0.0, seconds)

    def quantile_s(self, share: float) -> float | None:
        """Return the upper edge of the bin that holds a quantile; None if nothing was counted.

        Durations beyond the last edge give infinity.
        """
        with self._lock:
            counts = list(self._counts)
        wanted, seen = share * sum(counts), 0
        if not sum(counts):
            return None
        for edge, count in zip((*BOUNDS_S, math.inf), counts, strict=True):
            seen += count
            if count and seen >= wanted:
                return edge
        raise AssertionError("a quantile lies within its histogram")

    def snapshot(self) -> tuple[list[int], float]:
        """Return the counts of the bins, the last one unbounded, and the sum in seconds."""
        with self._lock:
            return list(self._counts), self._sum_s


class Counters:
    """Counters by camera and name; safe to use from all threads.

    Names are those of `CameraStats`, with the reason behind a dot: ``crops_dropped.blurred``.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, Counter[str]] = {}

    def count(self, camera: str, name: str, number: int = 1) -> None:
        """Add to a counter."""
        with self._lock:
            self._counts.setdefault(camera, Counter())[name] += number

    def count_crops(self, crops: Iterable[CameraCrop], name: str) -> None:
        """Add each crop to a counter of its camera."""
        for crop in crops:
            self.count(crop.camera, name)

    def of(self, camera: str) -> Counter[str]:
        """Return a copy of a camera's counters as of one moment."""
        with self._lock:
            return Counter(self._counts.get(camera, Counter()))


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Quantiles in seconds, exact to 19 %; None before the first crop."""

    p50_s: float | None
    p90_s: float | None
    p99_s: float | None

    @classmethod
    def of(cls, durations: Durations) -> "Latency":
        """Read them from a histogram."""
        p50_s, p90_s, p99_s = map(durations.quantile_s, (0.5, 0.9, 0.99))
        return cls(p50_s=p50_s, p90_s=p90_s, p99_s=p99_s)


def _metric(text: str) -> Any:
    """Return a field that is published as a metric with this help."""
    return field(metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class CameraStats:
    """The counters of one camera; two sums always hold.

    ``frames_read`` = ``frames_processed`` + all of ``frames_skipped`` and ``frames_dropped`` +
    ``frames_waiting``, and ``detections`` = ``committed`` + all of ``crops_dropped`` +
    ``crops_waiting``.
    """

    state: str
    """``running``, ``connecting``, ``reconnecting``, ``ended``, ``failed``, ``stopped``,
    ``removed`` or, before the start and without a source, ``waiting``."""
    error: str | None
    """Why the camera failed, or its last loss."""
    frames_read: int = _metric("Frames that came in.")
    frames_processed: int = _metric("Frames that were searched for people.")
    frames_waiting: int
    frames_skipped: Mapping[str, int] = _metric("Frames that needed no search, by reason.")
    """``no_motion``, ``detect_fps`` (more than the detector's rate)."""
    frames_dropped: Mapping[str, int] = _metric("Frames that were dropped, by reason.")
    """``queue_full``, ``empty`` (no picture, or it could not be decoded), ``detector_error``,
    ``detector_stuck``, ``camera_failed``, ``stopped``."""
    detections: int = _metric("Boxes that came from the detector or with the frames.")
    tracks: int = _metric("Tracks seen often enough to count.")
    """Those with at least ``min_views`` frames."""
    accepted: int = _metric("Crops chosen for the encoder.")
    """Some may be dropped in its queue."""
    embedded: int = _metric("Crops embedded.")
    committed: int = _metric("Rows in the gallery.")
    replaced: int = _metric("Rows that took the place of earlier ones.")
    """Those of a file that was watched before."""
    added_by_others: int = _metric("Rows of a camera of this name that other processes added.")
    crops_waiting: int
    crops_dropped: Mapping[str, int] = _metric("Detections that did not become a row, by reason.")
    """``empty``, ``outside``, ``duplicate``, ``too_many``, ``masked``, ``no_track``,
    ``outside_zone``, ``too_small``, ``blurred``, ``at_border``, ``not_best``, ``too_soon``,
    ``still`` (stands where it was written), ``never_moved`` (and scores low), ``seen_once``,
    ``unusable``, ``queue_full``, ``buffer_full``, ``failed``."""
    whole_frames: int = _metric("Whole frames saved beside crops.")
    clips: int = _metric("Clips saved beside crops.")
    clips_dropped: Mapping[str, int] = _metric(
        "Frames and clips of committed crops that were not saved, by reason."
    )
    """``no_packets`` (the source has none, such as a device), ``no_key_frame``, ``too_late`` (the
    packets are gone), ``buffer_full``, ``not_kept``, ``queue_full``, ``disk`` (full, or it cannot
    be written to), ``not_written`` (FFmpeg refuses), ``deleted`` (a person in it, meanwhile)."""
    outages: int = _metric("Times a source that had given pictures was lost.")
    reconnects: int = _metric("Attempts to open a source again.")
    stalls: int = _metric("Times a source gave nothing for too long.")
    resolution_changes: int = _metric("Times the size of the picture changed.")
    blank_frames: int = _metric("Frames of one colour, such as black; they are searched as well.")
    decoder_errors: int = _metric("Lines of errors of the decoder, FFmpeg's.")
    failures: Mapping[str, int] = _metric(
        "What failed permanently or was stuck at the end, by reason; no camera: for all."
    )
    """``detector_error``, ``detector_stuck``, ``source_error``, ``source_stuck``, ``source_blank``
    or ``defect``."""


@dataclass(frozen=True, kw_only=True)
class PipelineStats:
    """Counts, latencies and queues of a whole pipeline."""

    seconds: float
    """Since the start."""
    failures: Mapping[str, int]
    """What stopped the pipeline, or was stuck at the end, for all cameras at once: ``encoder``,
    ``gallery`` or ``on_commit`` with ``_error`` or ``_stuck``."""
    cameras: Mapping[str, CameraStats]
    batches: int
    encoder_busy_s: float
    encoder_busy_share: float
    """Part of the time since the start, 0 to 1."""
    frame_queues: Mapping[str, int]
    """Frames that wait, by camera."""
    crop_queue: int
    """Crops that wait for the encoder."""
    commit_queue: int
    """Batches that wait for the gallery, or for the buffer on disk before it."""
    buffered: int
    """Crops that wait on disk for a gallery on a server, those of earlier runs included."""
    buffered_bytes: int
    gallery_problem: str | None
    """Why a gallery on a server has taken no rows for some seconds; None if all is well."""
    recovered: int
    """Rows in the gallery that earlier runs had left on disk."""
    latency: Latency
    """From a frame's arrival to its crop in the gallery, with the wait for a better detection."""
    encode_latency: Latency
    """From the selection of a crop to the gallery."""

    def total(self, name: str) -> int:
        """Return the sum of a number of all cameras, such as ``committed``."""
        return sum(int(getattr(camera, name)) for camera in self.cameras.values())

    def dropped(self, name: str) -> dict[str, int]:
        """Return the reasons of ``frames_dropped``, say, of all cameras together."""
        together: Counter[str] = Counter()
        for camera in self.cameras.values():
            together.update(getattr(camera, name))
        return dict(sorted(together.items()))

    @property
    def stuck(self) -> bool:
        """Whether a call did not return in time: its thread is detached."""
        every = (self.failures, *(camera.failures for camera in self.cameras.values()))
        return any(reason.endswith("_stuck") for failures in every for reason in failures)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


BY_REASON = ("frames_skipped", "frames_dropped", "crops_dropped", "clips_dropped", "failures")
HELP: Mapping[str, str] = {f.name: f.metadata["help"] for f in fields(CameraStats) if f.metadata}
"""Of the counters of a camera, by name."""


def camera_stats(counts: Counter[str], state: str, error: str | None) -> CameraStats:
    """Return the statistics of one camera from its counters."""
    values: dict[str, Any] = {name: counts[name] for name in HELP}
    values |= {name: _below(counts, f"{name}.") for name in BY_REASON}
    left_out = (*values["frames_skipped"].values(), *values["frames_dropped"].values())
    frames_done = counts["frames_processed"] + sum(left_out)
    crops_done = counts["committed"] + sum(values["crops_dropped"].values())
    return CameraStats(
        state=state,
        error=error,
        frames_waiting=counts["frames_read"] - frames_done,
        crops_waiting=counts["detections"] - crops_done,
        **values,
    )


def _below(counts: Counter[str], prefix: str) -> dict[str, int]:
    return {
        name.removeprefix(prefix): number
        for name, number in sorted(counts.items())
        if name.startswith(prefix)
    }
