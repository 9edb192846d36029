"""What the motion gate of cameras saves and whom it misses, and what a camera costs.

A day and a night on a drawn street, in 200 s: dusk and dawn, clouds, a lamp that is switched
on and off, noise that grows in the dark, headlights. Near adults are 140 to 227 pixels high, far
ones 70 to 113. Then OpenCV's street film ``vtest.avi``, where the people are the tracks of all
frames. A person is missed who is in two frames or more, but not in two that the detector sees.

The cost is that of `Pipeline` without embedding and without a wait between frames, as processor
time of the whole process, for 10 frames a second: on films without people (idle), with one person
a minute (quiet) and with a street full of people (busy). Crops are what an encoder has to embed.
"""

import math
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, TypeAlias

import av
import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.detectors import FILM
from benchmarks.report import Column, conditions, print_report, table
from upperson_camera import Pipeline, PipelineSettings, open_detector, parse_source
from upperson_camera.frames import Frame
from upperson_camera.motion import DetectionSchedule
from upperson_camera.source import import_cv2
from upperson_camera.stream import open_source
from upperson_camera.tracker import new_tracker
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug
from upperson_rt.errors import InputError
from upperson_rt.gallery import Gallery
from upperson_rt.ingest.boxes import clean_boxes
from upperson_rt.ingest.detector import Detector
from upperson_synthetic.video import Street, VideoSpec

app = new_app("Measure what the motion gate of cameras saves, and whom it misses.")

_FPS = 10
_SIZE = 960, 540
"""Of the drawn street."""
_CAMERA_SIZE = 1280, 720
_SEEDS = range(71, 81)
_PEOPLE = 20
_DAY_S = 200.0
_FRAMES = 600
"""Of a film whose cost is measured."""
_FAR = 0.5
"""Size of the far street, which lies in the middle of an empty one."""

Image: TypeAlias = NDArray[np.uint8]
Film: TypeAlias = Iterable[tuple[Image, Sequence[int]]]
"""Frames, BGR [H, W, 3], and the numbers of the people in each."""


@app.command(cls=Command)
def motion_gate(
    detector: Annotated[
        str, typer.Option("--detector", help="As of `watch`, for the film and the cost.")
    ] = "auto",
    film: Annotated[
        Path, typer.Option("--film", help="vtest.avi, as Debian's package opencv-doc has it.")
    ] = FILM,
    seconds: Annotated[
        float, typer.Option("--seconds", min=10.0, help="Length of the drawn day.")
    ] = _DAY_S,
    debug: Debug = False,
) -> None:
    """Compare cameras with and without the motion gate.

    Example: python -m benchmarks.motion --detector hog
    """
    import_cv2().setNumThreads(1)
    opened = open_detector(detector, threads=1)
    specs = [
        VideoSpec(
            people=_PEOPLE, seconds=seconds, fps=_FPS, width=_SIZE[0], height=_SIZE[1],
            seed=seed, busy=True,
        )
        for seed in _SEEDS
    ]  # fmt: skip
    films: dict[str, list[Film]] = {
        f"{len(specs)} drawn days, near": [drawn_day(spec, is_far=False) for spec in specs],
        f"{len(specs)} drawn days, far": [drawn_day(spec, is_far=True) for spec in specs],
        "vtest.avi": [_tracked(film, opened)],
    }
    rows = {name: _sum([searched(one) for one in parts]) for name, parts in films.items()}
    with tempfile.TemporaryDirectory() as folder:
        costs = _costs(Path(folder), opened)
    result = conditions("motion", "opencv-python-headless", "av", threads=1, batch_size=1, warmup=0)
    result |= {"detector": detector, "seconds": seconds, "rows": rows, "costs": costs}
    columns = {
        "people": Column("people", "{:.0f}"),
        "missed": Column("missed", "{:.0f}"),
        "frames searched": Column("searched", "{:.1f} %", 100),
    }
    cores = {
        "core": Column("core", "{:.3f}"),
        "frames searched": columns["frames searched"],
        "crops a second": Column("crops", "{:.2f}"),
    }
    width, height = _CAMERA_SIZE
    facts = [f"{_FPS} frames a second, costs at {width} x {height}; {detector}, one thread"]
    tables = [table("film", rows, columns), table("camera", costs, cores)]
    print_report(result, facts, tables)


def searched(film: Film) -> dict[str, float]:
    """Return how many people a film has and the gate misses, and the share of its frames seen."""
    schedule = DetectionSchedule(PipelineSettings(), may_skip=True)
    all_frames: Counter[int] = Counter()
    seen_frames: Counter[int] = Counter()
    frames = seen = 0
    has_tracks = False
    for index, (image, people) in enumerate(film):
        clock = index / _FPS
        frame = Frame(image=image, index=index, time=clock, clock=clock, arrived=clock)
        frames += 1
        all_frames.update(people)
        if schedule.skips(frame, has_tracks) is None:
            seen += 1
            seen_frames.update(people)
            has_tracks = bool(people)
    known = [person for person, count in all_frames.items() if count >= 2]
    missed = sum(seen_frames[person] < 2 for person in known)
    return {"people": len(known), "missed": missed, "searched": seen / frames}


def _sum(films: list[dict[str, float]]) -> dict[str, float]:
    people, missed = (sum(one[key] for one in films) for key in ("people", "missed"))
    share = sum(one["searched"] for one in films) / len(films)
    return {"people": people, "missed": missed, "searched": share}


def drawn_day(spec: VideoSpec, is_far: bool) -> Iterator[tuple[Image, Sequence[int]]]:
    """Draw a day and a night; people are those of whom half is visible."""
    cv2, random = import_cv2(), np.random.default_rng(spec.seed)
    street, size = Street(spec), (spec.width, spec.height)
    empty = street.frame(-1e6)
    noise = random.normal(0, 1, (8, spec.height, spec.width, 3)).astype(np.float32)
    for index in range(spec.frames):
        time_s = index / spec.fps
        picture = street.frame(time_s)
        if is_far:
            small = cv2.resize(picture, None, fx=_FAR, fy=_FAR, interpolation=cv2.INTER_AREA)
            picture = empty.copy()
            top, left = size[1] // 3, size[0] // 4
            picture[top : top + small.shape[0], left : left + small.shape[1]] = small
        light, lamp = _light(time_s / spec.seconds)
        lit = picture[:, :, ::-1] * np.float32(light)
        if lamp:
            lit[:, : size[0] // 2] *= 1 + lamp
        if light < 0.5 and time_s % 40 < 3:  # Headlights, from left to right.
            middle = round((time_s % 40) / 3 * size[0]), round(0.8 * size[1])
            cv2.circle(lit, middle, size[1] // 12, (220, 230, 240), -1)
        lit += noise[random.integers(len(noise))] * (2 + 6 * (1 - light))
        people = [one.person for one in street.sightings(time_s) if one.visible >= 0.5]
        yield np.clip(lit, 0, 255).astype(np.uint8), people


def _light(share: float) -> tuple[float, float]:
    """Return the light at a share of the film, 0 to 1, and how much more a lamp gives."""
    light = float(np.interp(share, [0.3, 0.5, 0.8, 0.95], [1.0, 0.15, 0.15, 1.0]))
    is_cloudy = 0.1 <= share < 0.15 or 0.2 <= share < 0.22
    return light * (0.8 if is_cloudy else 1.0), 2.0 if 0.6 <= share < 0.7 else 0.0


def _tracked(path: Path, detector: Detector) -> Iterator[tuple[Image, Sequence[int]]]:
    """Give the frames of a film and the tracks in them, all frames searched."""
    if not path.is_file():
        message = (
            f"there is no {path}: run  apt-get install opencv-doc , or name a film with --film"
        )
        raise InputError(message, code="file_missing", path=path)
    settings = PipelineSettings()
    tracker = new_tracker(settings.tracker, settings.lost_after_s)
    for index, image in enumerate(_frames(path)):
        boxes = clean_boxes(detector(image), image.shape[1], image.shape[0])
        numbers, _ = tracker.update(boxes, index / _FPS, image)
        yield image, [number for number in numbers if number >= 0]


def _frames(path: Path) -> Iterator[Image]:
    reader = open_source(parse_source(str(path)), 10.0)
    while (image := reader.read()) is not None:
        yield image.astype(np.uint8, copy=False)
    reader.close()


def _costs(folder: Path, detector: Detector) -> dict[str, dict[str, float]]:
    """Return the processor time of cameras, in cores at 10 frames a second."""
    idle, quiet, busy = (folder / f"{name}.mp4" for name in ("idle", "quiet", "busy"))
    _write_film(idle, 0)
    _write_film(quiet, 1)
    _write_film(busy, _PEOPLE)
    began = time.process_time()
    assert sum(1 for _ in _frames(idle)) == _FRAMES
    decoding_s = time.process_time() - began
    rows: dict[str, dict[str, float]] = {
        "decoding alone, idle": {"core": decoding_s / _FRAMES * _FPS}
    }
    for name, path, motion_gate, found in (
        ("idle, a detector that costs nothing", idle, True, lambda image: []),
        ("idle", idle, True, detector),
        ("idle, without the gate", idle, False, detector),
        ("quiet: one person a minute", quiet, True, detector),
        (f"busy: {_PEOPLE} people a minute", busy, True, detector),
    ):
        rows[name] = _watch(path, folder / f"gallery{len(rows)}", found, motion_gate)
    return rows


def _watch(path: Path, folder: Path, detector: Detector, motion_gate: bool) -> dict[str, float]:
    """Return the cores that a camera takes, the share of frames searched, and crops a second."""
    encoder: Any = SimpleNamespace(
        fingerprint="motion",
        variant="fp32",
        encode_pixels=lambda pixels, batch_size: np.ones((len(pixels), 8), np.float32) / 8**0.5,
        prepare_image=lambda image: image[:1, :1],
        backend=lambda tower: None,
    )
    with Gallery.open(folder, "motion", 8, create=True) as gallery:
        pipeline = Pipeline(encoder, gallery, motion_gate=motion_gate)
        pipeline.add_camera("camera", str(path), detector)
        began = time.process_time()
        with pipeline:
            pipeline.wait()
        spent_s = time.process_time() - began
    camera = pipeline.stats().cameras["camera"]
    searched = camera.frames_processed / camera.frames_read
    seconds = camera.frames_read / _FPS
    return {"core": spent_s / seconds, "searched": searched, "crops": camera.accepted / seconds}


def _write_film(path: Path, people: int) -> None:
    """Write H.264 of a street for a minute, with noise, and with people who walk through."""
    random = np.random.default_rng(7)
    width, height = _CAMERA_SIZE
    spec = VideoSpec(
        people=max(1, people), seconds=_FRAMES / _FPS, fps=_FPS, width=width, height=height,
        seed=7, busy=people > 1,
    )  # fmt: skip
    street = Street(spec)
    noise = np.round(random.normal(0, 2, (8, height, width, 3))).astype(np.int16)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=_FPS, options={"preset": "veryfast"})
        stream.width, stream.height = _CAMERA_SIZE
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for index in range(_FRAMES):
            empty = street.frame(index / _FPS if people else math.inf).astype(np.int16)
            picture = np.clip(empty + noise[index % len(noise)], 0, 255).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, "rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    run_app(app, "benchmarks.motion")
