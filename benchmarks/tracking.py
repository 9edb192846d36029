"""Trackers on a busy street whose people are known: HOTA and IDF1 at several frame rates.

All contenders get the same boxes: those of the renderer, moved, missed and made up as detectors do,
or those of OpenCV's HOG detector on the drawn frames.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import numpy as np
import typer
from numpy.typing import NDArray

from upperson.data.synthetic.video import Sighting, Street, VideoSpec
from upperson_rt.camera.detectors import HogDetector
from upperson_rt.camera.frames import Boxes, clean_boxes
from upperson_rt.camera.settings import PipelineSettings
from upperson_rt.camera.tracker import TRACKERS, TrackerName, new_tracker
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug, Json
from upperson_rt.cli.output import new_table, print_result, print_table, show_progress
from upperson_rt.errors import BackendError
from upperson_rt.machine import describe_machine, machine_lines

RATES = (25.0, 10.0, 5.0, 2.0)
_LEAST_VISIBLE = 0.25
"""Share of a person from which on there is something to find."""
_SURELY_VISIBLE = 0.7
_BURST_S = 0.4
"""For so long a detector that loses somebody may not find them again."""
_SIZE = 960, 540
"""Width and height of a frame in pixels."""

Frame: TypeAlias = tuple[float, list[Sighting], Boxes]
"""Its time, who is there, and what was found."""
Score: TypeAlias = dict[str, float]

app = new_app("Compare trackers on a busy street whose people are known.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Noise:
    """How far a made-up detector is from the truth."""

    jitter: float
    """Standard deviation of every edge, in heights of the person."""
    missed: float
    """Share of people in full view who are missed: half frame by frame, half for 0.4 s."""
    made_up: float
    """Boxes a frame around nobody, half of them always at the same places."""
    doubled: float
    """Share of people with a second box."""


NOISES = {
    "mild": Noise(jitter=0.01, missed=0.04, made_up=0.05, doubled=0.0),
    "strong": Noise(jitter=0.03, missed=0.2, made_up=0.4, doubled=0.03),
}


@app.command(cls=Command)
def tracking(
    streets: Annotated[int, typer.Option(min=1, help="Videos, each of a street of its own.")] = 6,
    people: Annotated[int, typer.Option(min=1, help="People a video.")] = 40,
    seconds: Annotated[float, typer.Option(min=1.0, help="Length of a video.")] = 60.0,
    hog: Annotated[bool, typer.Option("--hog", help="OpenCV's detector, too; slow.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of streets and detectors.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare trackers on a busy street whose people are known.

    People cross at a walking pace, stop, turn round, walk in twos, hide one another and pass behind
    stands. A box counts with a track only, and a track with two boxes at least, as in a pipeline.

    Example: `python -m benchmarks.tracking --streets 6`
    """
    specs = [
        VideoSpec(
            people=people,
            seconds=seconds,
            width=_SIZE[0],
            height=_SIZE[1],
            seed=seed + number,
            busy=True,
        )
        for number in range(streets)
    ]
    detectors = [*NOISES, *(["HOG"] if hog else [])]
    table: dict[str, dict[str, dict[TrackerName, Score]]] = {}
    with show_progress() as progress:
        total, done = len(detectors) * len(RATES) * streets, 0
        for detector in detectors:
            for fps in RATES:
                videos = []
                for spec in specs:
                    videos.append(watch(Street(spec), fps, detector))
                    done += 1
                    progress("looking for people", done, total)
                of_rate = {name: evaluate(videos, name) for name in TRACKERS}
                table.setdefault(detector, {})[f"{fps:g}"] = of_rate
    result = {
        "benchmark": "tracking",
        "machine": describe_machine("trackers", "numpy", "opencv-python-headless"),
        "streets": streets,
        "people": people,
        "seconds": seconds,
        "scores": table,
    }
    print_result(result, as_json, _show)


def watch(street: Street, fps: float, detector: str) -> list[Frame]:
    """Return the frames of a street, with what a detector finds in them."""
    spec = street.spec
    find: Callable[[NDArray[np.uint8]], Any] | None = None
    if detector == "HOG":
        find = HogDetector(width_px=spec.width)
    frames: list[Frame] = []
    for index in range(round(spec.seconds * fps)):
        time_s = index / fps
        seen = street.sightings(time_s)
        if find is None:
            rows = detect(seen, time_s, NOISES[detector], spec)
        else:
            rows = find(np.ascontiguousarray(street.frame(time_s)[:, :, ::-1]))
        there = [one for one in seen if one.visible >= _LEAST_VISIBLE]
        frames.append((time_s, there, clean_boxes(rows, spec.width, spec.height)))
    return frames


def detect(
    sightings: Sequence[Sighting], time_s: float, noise: Noise, spec: VideoSpec
) -> NDArray[np.float64]:
    """Return (N, 5) boxes and scores as a detector would; equal moments give equal ones."""
    rng = np.random.default_rng([spec.seed, round(1000 * noise.jitter), round(1000 * time_s)])
    burst = int(time_s / _BURST_S)
    rows: list[list[float]] = []
    for one in sightings:
        x0, y0, x1, y1 = one.visible_box or one.box
        shift = rng.normal(0.0, noise.jitter * (y1 - y0), (2, 4))
        flicker, second, score = rng.random(), rng.random(), rng.normal(0.82, 0.08)
        lost = np.random.default_rng([spec.seed, one.person, burst]).random()
        seen = (one.visible - _LEAST_VISIBLE) / (_SURELY_VISIBLE - _LEAST_VISIBLE)
        if lost < noise.missed / 2 or flicker > (1 - noise.missed / 2) * seen:
            continue
        box = np.array([x0, y0, x1, y1], float)
        shown = float(np.clip(score * (0.5 + 0.5 * one.visible), 0.3, 0.99))
        rows.append([*(box + shift[0]), shown])
        if second < noise.doubled:
            rows.append([*(box + 3 * shift[1]), 0.6 * shown])
    places = np.random.default_rng([spec.seed, 1]).random((2, 2))
    for _ in range(rng.poisson(noise.made_up)):
        place = places[int(rng.integers(2))] if rng.random() < 0.5 else rng.random(2)
        height = 0.3 * spec.height
        left, top = place * (spec.width - 0.4 * height, spec.height - height)
        corners = np.array([left, top, left + 0.4 * height, top + height])
        moved = corners + rng.normal(0, 0.02 * height, 4)
        rows.append([*moved, float(rng.uniform(0.3, 0.7))])
    return np.array(rows).reshape(-1, 5)


def evaluate(videos: Sequence[list[Frame]], tracker: TrackerName) -> Score:
    """Follow the boxes of videos with a tracker; return its scores over all of them.

    Raises:
        BackendError: The package trackers is not installed.
    """
    try:
        from trackers.eval import (
            aggregate_clear_metrics,
            aggregate_hota_metrics,
            aggregate_identity_metrics,
            box_iou,
            compute_clear_metrics,
            compute_hota_metrics,
            compute_identity_metrics,
        )
    except ImportError as error:
        raise BackendError("HOTA and IDF1 are computed by the package 'trackers'") from error
    found: dict[str, list[Any]] = {"hota": [], "identity": [], "clear": []}
    busy_s, frames, tracks, people = 0.0, 0, 0, 0
    for video in videos:
        began = time.process_time()
        numbers = follow(video, tracker)
        busy_s += time.process_time() - began
        frames += len(video)
        truth_ids, track_ids, overlaps = [], [], []
        for (_, there, boxes), of_frame in zip(video, numbers, strict=True):
            kept = [row for row, number in enumerate(of_frame) if number >= 0]
            truth = np.array([one.visible_box for one in there], float).reshape(-1, 4)
            truth_ids.append(np.array([one.person for one in there], int))
            track_ids.append(np.array([of_frame[row] for row in kept], int))
            overlaps.append(box_iou(truth, boxes.edges[kept].astype(float)))
        tracks += len({number for ids in track_ids for number in ids.tolist()})
        people += len({number for ids in truth_ids for number in ids.tolist()})
        given = truth_ids, track_ids, overlaps
        found["hota"].append(compute_hota_metrics(*given))
        found["identity"].append(compute_identity_metrics(*given))
        found["clear"].append(compute_clear_metrics(*given))
    hota = aggregate_hota_metrics(found["hota"])
    return {
        "HOTA": 100 * hota["HOTA"],
        "AssA": 100 * hota["AssA"],
        "DetA": 100 * hota["DetA"],
        "IDF1": 100 * aggregate_identity_metrics(found["identity"])["IDF1"],
        "switches": aggregate_clear_metrics(found["clear"])["IDSW"],
        "tracks": tracks,
        "people": people,
        "cpu_ms": 1000 * busy_s / frames,
    }


def follow(video: Sequence[Frame], tracker: TrackerName) -> list[list[int]]:
    """Return the numbers of the tracks of every frame's boxes; -1 for what a pipeline drops."""
    settings = PipelineSettings()
    following = new_tracker(tracker, settings.lost_after_s)
    numbers = [following.update(boxes, time_s, _SIZE)[0] for time_s, _, boxes in video]
    views = Counter(number for of_frame in numbers for number in of_frame)
    return [
        [number if views[number] >= settings.min_views else -1 for number in of_frame]
        for of_frame in numbers
    ]


def _show(result: dict[str, Any]) -> None:
    typer.echo(
        f"{result['streets']} streets of {result['people']} people in {result['seconds']:g} s"
    )
    typer.echo(machine_lines(result["machine"], None))
    columns = ("fps", "HOTA", "AssA", "DetA", "IDF1", "switches", "tracks a person", "ms a frame")
    table = new_table("detector", "tracker", *columns, right=columns)
    for detector, rates in result["scores"].items():
        for fps, trackers in rates.items():
            for name, score in trackers.items():
                table.add_row(
                    detector,
                    name,
                    fps,
                    *(f"{score[key]:.1f}" for key in ("HOTA", "AssA", "DetA", "IDF1")),
                    f"{score['switches']:.0f}",
                    f"{score['tracks'] / score['people']:.2f}",
                    f"{score['cpu_ms']:.2f}",
                )
    print_table(table)


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.tracking")
