"""The benchmark of an overloaded camera pipeline."""

import itertools
import math
import threading
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from upperson_camera import Pipeline, PipelineStats
from upperson_camera.queues import DropPolicy
from upperson_machine.description import resident_bytes
from upperson_rt.encoder import Encoder
from upperson_rt.errors import UsageError
from upperson_rt.gallery import Gallery, Item
from upperson_rt.ingest.boxes import QualityRules

_LEAST_PEOPLE, _MOST_PEOPLE = 4, 200
_MOST_FPS = 30.0
"""Fastest camera; a faster encoder gets more people a frame instead."""
_FRAME_SIZE = (720, 1280)
_PERSON_PX = (320, 120)
_CAPACITY_S = 3.0
_SAMPLE_S = 0.25
_WARM_SHARE = 0.2  # Queues and pools fill up first.


def bench_pipeline(
    encoder: Encoder,
    folder: Path,
    *,
    seconds: float,
    overload: float,
    cameras: int,
    batch_size: int,
    drop: DropPolicy,
    save_crops: bool,
    progress: Callable[[str, float, float], None],
) -> dict[str, Any]:
    """Submit frames with people in them for a while, at a multiple of what the encoder can do.

    Each camera has a thread that submits. Every person of every frame becomes a crop, so the
    encoder's rate decides what is dropped. The gallery is a new one in ``folder``, which is empty,
    and is opened anew and checked in the end. ``progress`` is called with the step, and
    the seconds done and in all. Returns JSON values; ``problems`` are broken promises: frames or
    crops that were not counted, rows that are gone.
    """
    if not 1 <= seconds < float("inf") or not 0 < overload < 1000 or cameras < 1:
        text = "seconds must be a number from 1, overload above 0, and cameras at least 1"
        raise UsageError(text, code="setting_out_of_range")
    progress("measuring the encoder alone", 0.0, _CAPACITY_S)
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
            load.run(lambda done: progress("overload", done, seconds))
            ended = time.monotonic()
            progress("committing what was accepted", seconds, seconds)
        stats, submit_s = pipeline.stats(), load.submit_s
    with Gallery.open(folder, encoder.fingerprint, encoder.embed_dim) as gallery:
        stored = {item.key for item in gallery.items()}
        problems = [*gallery.verify(), *_broken_promises(stats, len(submit_s), people)]
    if lost := set(acknowledged) - set(map(hash, stored)):
        problems.append(f"{len(lost)} acknowledged rows are not in the gallery")
    if len(stored) != stats.total("committed"):
        problems.append(f"{len(stored)} rows, but {stats.total('committed')} counted as committed")
    offered = len(submit_s) * people / load.seconds
    dropped = stats.dropped("crops_dropped")
    crops = {name: stats.total(name) for name in ("detections", "accepted", "committed")}
    return {
        "overload": overload,
        "cameras": cameras,
        "people_per_frame": people,
        "frame": _FRAME_SIZE,
        "seconds": load.seconds,
        "warm_share": _WARM_SHARE,
        "capacity_per_s": capacity,
        "offered_per_s": offered,
        "offered_to_capacity": offered / capacity,
        "committed_per_s": stats.total("committed") / stats.seconds,
        "encoder_busy_share": load.busy_share,
        "submit_ms": {
            "p50": 1000 * float(np.percentile(submit_s, 50)),
            "p99": 1000 * float(np.percentile(submit_s, 99)),
            "max": 1000 * max(submit_s),
        },
        "rss_bytes": _memory(load.rss_bytes),
        "frames": {
            "submitted": len(submit_s),
            "processed": stats.total("frames_processed"),
            "dropped": stats.dropped("frames_dropped"),
        },
        "crops": crops | {"dropped": dropped},
        "acknowledged": len(acknowledged),
        "rows": len(stored),
        "drain_s": stats.seconds - (ended - load.started),  # After the last frame.
        "latency_s": {"p50": stats.latency.p50_s, "p99": stats.latency.p99_s},
        "problems": problems,
    }


class _Load:
    """Threads that submit frames at a fixed rate, and samples of what that does."""

    def __init__(
        self, pipeline: Pipeline, names: list[str], rate: float, seconds: float, people: int
    ) -> None:
        self._pipeline, self._names, self._people = pipeline, names, people
        self._interval_s, self._wanted_s = 1 / rate, seconds
        self._errors: list[BaseException] = []
        self._times = {name: array("d") for name in names}
        self.rss_bytes: list[int] = []
        self.busy_share = 0.0
        self.seconds = 0.0
        self.started = time.monotonic()

    @property
    def submit_s(self) -> list[float]:
        """Seconds that each call of `Pipeline.submit` took, one a frame."""
        return [seconds for times in self._times.values() for seconds in times]

    def run(self, progress: Callable[[float], None]) -> None:
        """Submit until the time is up."""
        frames = [_frames(seed, self._people) for seed in range(len(self._names))]
        self.started = time.monotonic()
        threads = [
            threading.Thread(target=self._submit, args=given)
            for given in zip(self._names, frames, strict=True)
        ]
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
            if (rss := resident_bytes("VmRSS")) is not None:
                self.rss_bytes.append(rss)
            progress(min(now, self._wanted_s))
        for thread in threads:
            thread.join()
        self.seconds = time.monotonic() - self.started
        if self._errors:
            raise self._errors[0]
        if warm is not None and now > warm[0]:
            self.busy_share = min(1.0, (busy_s - warm[1]) / (now - warm[0]))

    def _submit(self, name: str, frames: "_Frames") -> None:
        due = self.started
        try:
            for frame, boxes in itertools.cycle(frames):
                time.sleep(max(0.0, due - time.monotonic()))
                began = time.perf_counter()
                self._pipeline.submit(name, frame, boxes, tracks=range(self._people))
                self._times[name].append(time.perf_counter() - began)
                due += self._interval_s
                if max(due, time.monotonic()) >= self.started + self._wanted_s:
                    return  # Never before a first frame, however slow the machine is.
        except BaseException as error:
            self._errors.append(error)


_Frames: TypeAlias = list[tuple[NDArray[np.uint8], list[list[int]]]]


def _frames(seed: int, people: int) -> _Frames:
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
    """Check that every frame and every crop was counted."""
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


def _memory(samples: list[int]) -> dict[str, int | None] | None:
    """Return what was resident after the warm-up; None where the system does not report it."""
    if not samples:
        return None
    growth, fifth = None, len(samples) // 5
    if fifth:
        growth = int(np.median(samples[-fifth:]) - np.median(samples[:fifth]))
    ends = {"first": samples[0], "last": samples[-1], "min": min(samples), "max": max(samples)}
    return {**ends, "growth": growth}
