"""People that detectors find and miss on 20 hand-labelled frames of a street, and what that takes.

The film is OpenCV's ``vtest.avi``, the labels are ours: `LABELS`. A box is right if it shares half
of the area (IoU) with a person that no better box has taken. Detectors run at their default score,
on one thread.
"""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.report import Column, conditions, print_report, table
from upperson_camera import open_detector
from upperson_camera.drawn_people import overlaps
from upperson_camera.source import import_cv2
from upperson_rt.backends.autotune import time_in_turns
from upperson_rt.cli.app import Command, new_app, run_app
from upperson_rt.cli.options import Debug
from upperson_rt.errors import BackendError, InputError
from upperson_rt.files import sha256_of_file
from upperson_rt.ingest.boxes import clean_boxes
from upperson_rt.ingest.detector import Detector

app = new_app("Count the people that detectors find and miss on frames of a street.")

LABELS = Path(__file__).with_name("street_people.json")
"""Boxes of people, by the number of the frame."""
FILM = Path("/usr/share/doc/opencv-doc/examples/data/vtest.avi")
_INSTALLED = ("hog", "ssdlite", "nanodet")
_SAME = 0.5
"""Intersection over union of a box and the person that it shows, and share of a box in a region
that does not count."""

Boxes: TypeAlias = NDArray[np.float64]


@app.command(cls=Command)
def people_found(
    film: Annotated[
        Path, typer.Option("--film", help="vtest.avi, as Debian's package opencv-doc has it.")
    ] = FILM,
    detector: Annotated[
        list[str] | None,
        typer.Option("--detector", help="As of `watch`; repeatable.", show_default="installed"),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed rounds.")] = 3,
    debug: Debug = False,
) -> None:
    """Compare detectors by recall, false boxes and time.

    Example: python -m benchmarks.detectors --detector hog --detector ssdlite
    """
    labels = json.loads(LABELS.read_text("utf-8"))
    frames = read_frames(film, labels["film_sha256"], [int(number) for number in labels["frames"]])
    detectors = _opened(detector)
    import_cv2().setNumThreads(1)
    found = {name: [clean(detect, frame) for frame in frames] for name, detect in detectors.items()}
    timings = time_in_turns(
        {name: partial(_all, detect, frames) for name, detect in detectors.items()},
        warmup=1,
        rounds=rounds,
    )
    people = list(labels["frames"].values())
    rows = {
        name: counted(found[name], people)
        | {"cpu_ms": 1000 * timings[name].median_cpu_s / len(frames)}
        for name in detectors
    }
    result = conditions(
        "detectors", "opencv-python-headless", "openvino", threads=1, batch_size=1, warmup=1
    )
    result |= {"frames": len(frames), "rows": rows}
    columns = {
        "people found": Column("found", "{:.0f}"),
        "recall": Column("recall", "{:.1f} %", 100),
        "false boxes a frame": Column("false_a_frame"),
        "CPU ms a frame": Column("cpu_ms", "{:.0f}"),
    }
    total = sum(len(frame["people"]) for frame in people)
    facts = [f"{total} people on {len(frames)} frames of 768 x 576, IoU {_SAME}, default scores"]
    print_report(result, facts, [table("detector", rows, columns)])


def read_frames(film: Path, sha256: str, numbers: Sequence[int]) -> list[NDArray[np.uint8]]:
    """Return frames of the labelled film, BGR [H, W, 3], by ascending numbers.

    Raises:
        InputError: There is no such film, it is another one, or it ends before.
    """
    cv2 = import_cv2()
    if not film.is_file() or sha256_of_file(film) != sha256:
        message = f"{film} is not the labelled film: run  apt-get install opencv-doc , or name its "
        message += "vtest.avi with --film"
        raise InputError(message, code="film_differs", path=film)
    capture, frames = cv2.VideoCapture(str(film)), []
    for number in range(numbers[-1] + 1):
        is_read, frame = capture.read()
        if not is_read:
            message = f"{film} ends at frame {number}"
            raise InputError(message, code="film_differs", path=film)
        if number in numbers:
            frames.append(frame)
    capture.release()
    return frames


def _opened(names: Sequence[str] | None) -> dict[str, Detector]:
    """Open the named detectors, or those that are installed."""
    found = {name: _open(name, is_named=bool(names)) for name in names or _INSTALLED}
    return {name: detector for name, detector in found.items() if detector is not None}


def _open(name: str, is_named: bool) -> Detector | None:
    try:
        return open_detector(name, threads=1)
    except BackendError as error:
        if is_named or error.code != "detector_not_installed":
            raise
        return None


def _all(detect: Detector, frames: Sequence[NDArray[np.uint8]]) -> None:
    for frame in frames:
        detect(frame)


def clean(detect: Detector, frame: NDArray[np.uint8]) -> Boxes:
    """Return the boxes (N, 4) of a detector, best first."""
    height, width = frame.shape[:2]
    boxes = clean_boxes(detect(frame), width, height)
    return boxes.edges[np.argsort(-boxes.scores)].astype(np.float64)


def counted(
    found: Sequence[Boxes], frames: Sequence[Mapping[str, Sequence[Sequence[int]]]]
) -> dict[str, Any]:
    """Return people found and false boxes, for the boxes and the labels of each frame."""
    right = false = people = 0
    for boxes, labels in zip(found, frames, strict=True):
        shown = np.array(labels["people"], float).reshape(-1, 4)
        people += len(shown)
        free = np.ones(len(shown), bool)
        unclear = np.array(labels.get("unclear", []), float).reshape(-1, 4)
        for box, shares in zip(boxes, overlaps(boxes, shown), strict=True):
            shares = np.where(free, shares, 0)
            if len(shares) and shares.max() >= _SAME:
                free[shares.argmax()] = False
                right += 1
            elif not (_inside(box, unclear) >= _SAME).any():
                false += 1
    return {"found": right, "recall": right / people, "false_a_frame": false / len(frames)}


def _inside(box: Boxes, regions: Boxes) -> NDArray[np.float64]:
    """Return the shares of a box that lie in regions (N, 4)."""
    sides = np.minimum(box[2:], regions[:, 2:]) - np.maximum(box[:2], regions[:, :2])
    shares: NDArray[np.float64] = np.prod(np.maximum(sides, 0), axis=1) / np.prod(box[2:] - box[:2])
    return shares


if __name__ == "__main__":
    run_app(app, "benchmarks.detectors")
