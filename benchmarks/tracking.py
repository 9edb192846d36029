"""Trackers on a busy street whose people are known: HOTA and IDF1 at several frame rates.

All contenders get the same boxes: those of the renderer, moved, missed and made up as detectors do,
or those of OpenCV's HOG detector on the drawn frames.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias

import numpy as np
import typer
from numpy.typing import NDArray
from trackers.eval import (
    aggregate_clear_metrics,
    aggregate_hota_metrics,
    aggregate_identity_metrics,
    box_iou,
    compute_clear_metrics,
    compute_hota_metrics,
    compute_identity_metrics,
)

from upperson.data.synthetic.video import Sighting, Street, VideoSpec
from upperson_rt.camera.detectors import HogDetector
from upperson_rt.camera.frames import Boxes, clean_boxes
from upperson_rt.camera.settings import PipelineSettings
from upperson_rt.camera.tracker import TRACKERS, Follower, TrackerName, new_tracker
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug, Json
from upperson_rt.cli.output import new_table, print_result, print_table, show_progress
from upperson_rt.machine import describe_machine, machine_lines

RATES = (25.0, 10.0, 5.0, 2.0)
HOG = "HOG"
_HOG_FPS = 5.0
_LEAST_VISIBLE = 0.25
"""Share of a person from which on there is something to find."""
_SURELY_VISIBLE = 0.7
_BURST_S = 0.4
"""For so long a detector that loses somebody may not find them again."""

Sequences: TypeAlias = tuple[
    list[NDArray[np.int64]], list[NDArray[np.int64]], list[NDArray[np.float64]]
]
"""For each frame the people, the tracks, and the overlap of each with each."""

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
    streets: Annotated[int, typer.Option(min=1, help="Videos, each of a street of its own.")] = 3,
    people: Annotated[int, typer.Option(min=1, help="People a video.")] = 40,
    seconds: Annotated[float, typer.Option(min=1.0, help="Length of a video.")] = 60.0,
    hog: Annotated[
        bool, typer.Option("--hog", help="OpenCV's detector, too, at 5 frames a second.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of streets and detectors.")] = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Compare trackers on a busy street whose people are known.

    People cross at a walking pace, stop, turn round, walk in twos, hide one another and pass behind
    stands. A box counts with a track only, and a track with two boxes at least, as in a pipeline.

    Example: `python -m benchmarks.tracking --streets 3 --hog`
    """
    detectors = [*NOISES, *([HOG] if hog else [])]
    runs = {
        (detector, fps, tracker): Run()
        for detector in detectors
        for fps in (RATES if detector != HOG else (_HOG_FPS,))
        for tracker in TRACKERS
    }
    with show_progress() as progress:
        for number in range(streets):
            street = Street(
                VideoSpec(people=people, seconds=seconds, seed=seed + number, busy=True)
            )
            for done, fps in enumerate(RATES):
                progress("following people", number * len(RATES) + done, streets * len(RATES))
                now = {key: run for key, run in runs.items() if key[1] == fps}
                for (_, _, tracker), run in now.items():
                    run.begin(tracker)
                watch(street, fps, now)
    result = {
        "benchmark": "tracking",
        "machine": describe_machine("trackers", "numpy", "opencv-python-headless"),
        "streets": streets,
        "people": people,
        "seconds": seconds,
        "scores": [
            {"detector": detector, "fps": fps, "tracker": tracker, **run.scores()}
            for (detector, fps, tracker), run in runs.items()
        ],
    }
    print_result(result, as_json, _show)


class Run:
    """A tracker at one frame rate behind one detector, over all streets."""

    def __init__(self) -> None:
        self.videos: list[Video] = []
        self.busy_s = 0.0

    def begin(self, tracker: TrackerName) -> None:
        """Begin with the next street."""
        self.videos.append(Video(new_tracker(tracker, PipelineSettings().lost_after_s)))

    def take(
        self, there: Sequence[Sighting], boxes: Boxes, time_s: float, image: NDArray[np.uint8]
    ) -> None:
        """Follow the boxes of the next frame, BGR [H, W, 3]."""
        began = time.process_time()
        numbers, _ = self.videos[-1].tracker.update(boxes, time_s, image)
        self.busy_s += time.process_time() - began
        self.videos[-1].frames.append((list(there), boxes.edges.astype(float), numbers))

    def scores(self) -> dict[str, float]:
        """Return the scores over all streets."""
        given = [video.for_metrics() for video in self.videos]
        hota = aggregate_hota_metrics([compute_hota_metrics(*one) for one in given])
        identity = aggregate_identity_metrics([compute_identity_metrics(*one) for one in given])
        clear = aggregate_clear_metrics([compute_clear_metrics(*one) for one in given])
        return {
            **{name: 100 * hota[name] for name in ("HOTA", "AssA", "DetA")},
            "IDF1": 100 * identity["IDF1"],
            "switches": clear["IDSW"],
            "people": sum(_different(people) for people, *_ in given),
            "tracks": sum(_different(tracks) for _, tracks, _ in given),
            "cpu_ms": 1000 * self.busy_s / sum(len(video.frames) for video in self.videos),
        }


@dataclass
class Video:
    """One street as one tracker saw it."""

    tracker: Follower
    frames: list[tuple[list[Sighting], NDArray[np.float64], list[int]]] = field(
        default_factory=list
    )
    """Who is there, the (N, 4) boxes, and the numbers of their tracks."""

    def for_metrics(self) -> Sequences:
        """Return people, tracks and overlaps; a pipeline drops what has too few views."""
        views = Counter(number for *_, numbers in self.frames for number in numbers)
        people, tracks, overlaps = [], [], []
        for there, boxes, numbers in self.frames:
            kept = [
                row
                for row, number in enumerate(numbers)
                if number >= 0 and views[number] >= PipelineSettings().min_views
            ]
            truth = np.array([one.visible_box for one in there], float).reshape(-1, 4)
            people.append(np.array([one.person for one in there], int))
            tracks.append(np.array([numbers[row] for row in kept], int))
            overlaps.append(box_iou(truth, boxes[kept]))
        return people, tracks, overlaps


def _different(ids: list[NDArray[np.int64]]) -> int:
    return len({number for of_frame in ids for number in of_frame.tolist()})


def watch(street: Street, fps: float, runs: dict[tuple[str, float, TrackerName], Run]) -> None:
    """Show a street to runs at their frame rate; those of one detector get the same boxes."""
    spec = street.spec
    hog = HogDetector(width_px=spec.width) if any(key[0] == HOG for key in runs) else None
    for index in range(round(spec.seconds * fps)):
        time_s = index / fps
        seen, image = street.sightings(time_s), street.frame(time_s)[:, :, ::-1]
        image = np.ascontiguousarray(image)
        there = [one for one in seen if one.visible >= _LEAST_VISIBLE]
        found: dict[str, Boxes] = {}
        for (detector, *_), run in runs.items():
            if detector not in found:
                rows = (
                    hog(image)
                    if hog is not None and detector == HOG
                    else detect(seen, time_s, NOISES[detector], spec)
                )
                found[detector] = clean_boxes(rows, spec.width, spec.height)
            run.take(there, found[detector], time_s, image)


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


def _show(result: dict[str, Any]) -> None:
    typer.echo(
        f"{result['streets']} streets of {result['people']} people in {result['seconds']:g} s"
    )
    typer.echo(machine_lines(result["machine"], None))
    columns = ("fps", "HOTA", "AssA", "DetA", "IDF1", "switches", "tracks a person", "ms a frame")
    table = new_table("detector", "tracker", *columns, right=columns)
    for row in result["scores"]:
        table.add_row(
            row["detector"],
            row["tracker"],
            f"{row['fps']:g}",
            *(f"{row[name]:.1f}" for name in ("HOTA", "AssA", "DetA", "IDF1")),
            f"{row['switches']:.0f}",
            f"{row['tracks'] / row['people']:.2f}",
            f"{row['cpu_ms']:.2f}",
        )
    print_table(table)


if __name__ == "__main__":
    run_app(app, "python -m benchmarks.tracking")
