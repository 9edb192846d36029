"""The benchmark of a camera pipeline that gets more than the encoder can do."""

import math
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from upperson_rt.camera import Pipeline, PipelineStats, QualityRules
from upperson_rt.camera.queues import DropPolicy
from upperson_rt.encoder import Encoder
from upperson_rt.errors import IntegrityError, UsageError
from upperson_rt.gallery import Gallery, Item

__all__ = ["PipelineBench", "bench_pipeline", "raise_problems"]

_LEAST_PEOPLE, _MOST_PEOPLE = 4, 200
_MOST_FPS = 30.0
"""Of a camera; a faster encoder gets more people a frame instead."""
_FRAME_SIZE = (720, 1280)
_PERSON_PX = (320, 120)
_CAPACITY_S = 3.0
_SAMPLE_S = 0.25
_WARM_SHARE = 0.2
"""Of the time, before memory and the encoder's work count: queues and pools fill up first."""
_STATM = Path("/proc/self/statm")


@dataclass(kw_only=True)
class PipelineBench:
    """What was measured."""

    overload: float
    cameras: int
    people_per_frame: int
    seconds: float
    capacity_per_s: float
    """Crops that the encoder alone embeds, before the pipeline starts."""
    offered_per_s: float
    """Crops in the frames that were really submitted."""
    committed_per_s: float
    encoder_busy_share: float
    """After the warm-up, until the last frame was submitted."""
    submit_ms: dict[str, float]
    """How long `Pipeline.submit` took: p50, p99 and max."""
    rss_bytes: list[int] = field(default_factory=list)
    """Resident memory, sampled after the warm-up; empty where the system does not tell."""
    problems: list[str] = field(default_factory=list)
    """Promises that were broken: frames or crops without a count, rows that are gone."""
    submitted: int
    acknowledged: int
    """Rows that the pipeline said are durable; all are found in the gallery opened anew."""
    rows: int
    drain_s: float
    """From the last frame until all that was accepted was committed."""
    stats: PipelineStats

    @property
    def growth_bytes(self) -> int | None:
        """Median memory of the last fifth of the samples against the first fifth."""
        fifth = len(self.rss_bytes) // 5
        if fifth == 0:
            return None
        first, last = self.rss_bytes[:fifth], self.rss_bytes[-fifth:]
        return int(np.median(last) - np.median(first))

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        stats = self.stats
        return {
            "overload": self.overload,
            "cameras": self.cameras,
            "people_per_frame": self.people_per_frame,
            "frame": list(_FRAME_SIZE),
            "seconds": self.seconds,
            "warm_share": _WARM_SHARE,
            "capacity_per_s": self.capacity_per_s,
            "offered_per_s": self.offered_per_s,
            "offered_to_capacity": self.offered_per_s / self.capacity_per_s,
            "committed_per_s": self.committed_per_s,
            "encoder_busy_share": self.encoder_busy_share,
            "submit_ms": self.submit_ms,
            "rss_bytes": {
                "first": self.rss_bytes[0],
                "last": self.rss_bytes[-1],
                "min": min(self.rss_bytes),
                "max": max(self.rss_bytes),
                "growth": self.growth_bytes,
            }
            if self.rss_bytes
            else None,
            "frames": {
                "submitted": self.submitted,
                "processed": stats.total("frames_processed"),
                "dropped": stats.dropped("frames_dropped"),
            },
            "crops": {
                "detections": stats.total("detections"),
                "accepted": stats.total("accepted"),
                "committed": stats.total("committed"),
                "dropped": stats.dropped("crops_dropped"),
            },
            "acknowledged": self.acknowledged,
            "rows": self.rows,
            "drain_s": self.drain_s,
            "latency_s": {"p50": stats.latency.p50_s, "p99": stats.latency.p99_s},
            "problems": self.problems,
        }


def bench_pipeline(
    encoder: Encoder,
    folder: Path,
    *,
    seconds: float = 120.0,
    overload: float = 3.0,
    cameras: int = 2,
    batch_size: int = 16,
    drop: DropPolicy = "oldest",
    save_crops: bool = True,
    progress: Callable[[str, float, float], None] | None = None,
) -> PipelineBench:
    """Submit frames with people in them at a multiple of what the encoder can do.

    Every person of every frame becomes a crop, so the encoder's rate decides what is dropped. The
    gallery is a new one in ``folder``, and is opened anew and checked in the end.

    Args:
        encoder: Whose image tower to use.
        folder: Empty; for the gallery.
        seconds: How long to submit.
        overload: Offered crops, as a multiple of the encoder's capacity.
        cameras: Threads that submit, each for a camera of its own.
        batch_size: Of the encoder.
        drop: What gives way.
        save_crops: Save pictures, too.
        progress: Told what is being done, and how far it is in seconds.

    Raises:
        UsageError: A number is out of range.
        BackendError: The image tower cannot be loaded or fails.
    """
    if not 1 <= seconds < float("inf") or not 0 < overload < 1000 or cameras < 1:
        raise UsageError(
            "seconds must be a number from 1, overload above 0, and cameras at least 1"
        )
    say = progress or (lambda work, done, total: None)
    say("measuring the encoder alone", 0.0, _CAPACITY_S)
    capacity = _capacity_per_s(encoder, batch_size)
    rate = overload * capacity / cameras
    people = min(_MOST_PEOPLE, max(_LEAST_PEOPLE, math.ceil(rate / _MOST_FPS)))
    acknowledged = array("q")  # Hashes of keys, so that the benchmark's own memory hardly grows.

    def note(items: Sequence[Item]) -> None:
        acknowledged.extend(hash(item.key) for item in items)

    with Gallery.open(folder, encoder.fingerprint, encoder.embed_dim, create=True) as gallery:
        pipeline = Pipeline(
            encoder,
            gallery,
            every_s=0.0,
            min_views=1,
            quality=QualityRules(min_sharpness=0.0),
            save_crops=save_crops,
            batch_size=batch_size,
            drop=drop,
            on_commit=note,
        )
        names = [f"camera {number}" for number in range(cameras)]
        for name in names:
            pipeline.add_camera(name)
        with pipeline:
            load = _Load(pipeline, names, rate / people, seconds, people)
            load.run(lambda done: say("overload", done, seconds))
            ended = time.monotonic()
            say("committing what was accepted", seconds, seconds)
        stats = pipeline.stats()
    with Gallery.open(folder, encoder.fingerprint, encoder.embed_dim) as gallery:
        stored = {item.key for item in gallery.items()}
        problems = [*gallery.verify(), *_broken_promises(stats, load.submitted, people)]
    if lost := set(acknowledged) - set(map(hash, stored)):
        problems.append(f"{len(lost)} acknowledged rows are not in the gallery")
    if len(stored) != stats.total("committed"):
        problems.append(f"{len(stored)} rows, but {stats.total('committed')} counted as committed")
    return PipelineBench(
        overload=overload,
        cameras=cameras,
        people_per_frame=people,
        seconds=load.seconds,
        capacity_per_s=capacity,
        offered_per_s=load.submitted * people / load.seconds,
        committed_per_s=stats.total("committed") / stats.seconds,
        encoder_busy_share=load.busy_share,
        submit_ms={
            "p50": 1000 * float(np.percentile(load.submit_s, 50)),
            "p99": 1000 * float(np.percentile(load.submit_s, 99)),
            "max": 1000 * max(load.submit_s),
        },
        rss_bytes=load.rss_bytes,
        problems=problems,
        submitted=load.submitted,
        acknowledged=len(acknowledged),
        rows=len(stored),
        drain_s=stats.seconds - (ended - load.started),
        stats=stats,
    )


class _Load:
    """Threads that submit frames at a fixed rate, and samples of what that does."""

    def __init__(
        self, pipeline: Pipeline, names: list[str], rate: float, seconds: float, people: int
    ) -> None:
        self._pipeline = pipeline
        self._names = names
        self._people = people
        self._interval_s = 1 / rate
        self._wanted_s = seconds
        self._errors: list[BaseException] = []
        self._times = {name: array("d") for name in names}
        self.rss_bytes: list[int] = []
        self.busy_share = 0.0
        self.seconds = 0.0
        self.started = time.monotonic()

    @property
    def submit_s(self) -> list[float]:
        """Seconds that each call of `Pipeline.submit` took."""
        return [seconds for times in self._times.values() for seconds in times]

    @property
    def submitted(self) -> int:
        """Frames."""
        return len(self.submit_s)

    def run(self, progress: Callable[[float], None]) -> None:
        """Submit until the time is up."""
        self.started = time.monotonic()
        threads = [threading.Thread(target=self._guarded, args=(n,)) for n in self._names]
        for thread in threads:
            thread.start()
        warm: tuple[float, float] | None = None
        busy_s = now = 0.0
        while any(thread.is_alive() for thread in threads):
            time.sleep(_SAMPLE_S)
            now = time.monotonic() - self.started
            busy_s = self._pipeline.stats().encoder_busy_s
            if now < _WARM_SHARE * self._wanted_s:
                continue
            warm = warm or (now, busy_s)
            if (rss := _rss_bytes()) is not None:
                self.rss_bytes.append(rss)
            progress(min(now, self._wanted_s))
        for thread in threads:
            thread.join()
        self.seconds = time.monotonic() - self.started
        if self._errors:
            raise self._errors[0]
        if warm is not None and now > warm[0]:
            self.busy_share = min(1.0, (busy_s - warm[1]) / (now - warm[0]))

    def _guarded(self, name: str) -> None:
        try:
            self._submit(name)
        except BaseException as error:
            self._errors.append(error)

    def _submit(self, name: str) -> None:
        frames = _frames(self._names.index(name), self._people)
        due = self.started
        number = 0
        while (now := time.monotonic()) < self.started + self._wanted_s:
            time.sleep(max(0.0, due - now))
            frame, boxes = frames[number % len(frames)]
            began = time.perf_counter()
            self._pipeline.submit(name, frame, boxes, tracks=range(self._people))
            self._times[name].append(time.perf_counter() - began)
            number += 1
            due += self._interval_s


def _frames(seed: int, people: int) -> list[tuple[NDArray[np.uint8], list[list[int]]]]:
    """Return a few frames with people-sized boxes in them, to be submitted over and over."""
    rng = np.random.default_rng(seed)
    height, width = _FRAME_SIZE
    frames = []
    for _ in range(8):
        coarse = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
        frame = np.repeat(np.repeat(coarse, 8, axis=0), 8, axis=1)
        lefts = rng.integers(0, width - _PERSON_PX[1], people)
        tops = rng.integers(0, height - _PERSON_PX[0], people)
        boxes = np.stack([lefts, tops, lefts + _PERSON_PX[1], tops + _PERSON_PX[0]], axis=1)
        frames.append((frame, boxes.tolist()))
    return frames


def _capacity_per_s(encoder: Encoder, batch_size: int) -> float:
    """Return how many pictures a second the encoder embeds when it does nothing else."""
    image = encoder.manifest.image
    pixels = np.random.default_rng(0).integers(
        0, 256, (batch_size, image.height_px, image.width_px, 3), np.uint8
    )
    encoder.encode_pixels(pixels, batch_size)
    began, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < _CAPACITY_S:
        encoder.encode_pixels(pixels, batch_size)
        done += batch_size
    return done / passed


def _broken_promises(stats: PipelineStats, submitted: int, people: int) -> list[str]:
    """Check that every frame and every crop went somewhere that has a name."""
    problems = []
    frames = stats.total("frames_processed") + sum(stats.dropped("frames_dropped").values())
    if not frames == stats.total("frames_read") == submitted:
        problems.append(f"{submitted} frames were submitted, {frames} are accounted for")
    crops = stats.total("committed") + sum(stats.dropped("crops_dropped").values())
    if crops != stats.total("detections"):
        problems.append(f"{stats.total('detections')} detections, {crops} are accounted for")
    if stats.total("detections") != people * stats.total("frames_processed"):
        problems.append("detections are missing from frames that were processed")
    return problems


def _rss_bytes() -> int | None:
    if not _STATM.is_file():
        return None
    import resource

    return int(_STATM.read_text("ascii").split()[1]) * resource.getpagesize()


def raise_problems(found: PipelineBench) -> None:
    """Raise what must never happen, after it was printed.

    Raises:
        IntegrityError: A promise was broken.
    """
    if found.problems:
        raise IntegrityError(f"the pipeline broke its promises: {'; '.join(found.problems)}")
