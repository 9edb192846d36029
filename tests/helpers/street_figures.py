"""The figures of "A street, from camera to gallery" in docs/dev.

    python -m tests.helpers.street_figures demo/bundle

A drawn street whose people are known is written as H.264, sent by GStreamer's RTSP server at its
own pace, and watched by a pipeline with a detector; what lies in the gallery afterwards is compared
with who was to be seen.
"""

import argparse
import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import av
import numpy as np
from numpy.typing import NDArray

import upperson_rt
from tests.helpers.fake_camera import wait_for
from tests.helpers.rtsp_camera import reason_to_skip, rtsp_camera
from upperson_camera import Pipeline, PipelineSettings, open_detector
from upperson_camera.tracker import Tracker, new_tracker
from upperson_rt.gallery import Gallery, Item
from upperson_rt.ingest.boxes import Boxes
from upperson_synthetic.video import Sighting, Street, VideoSpec

_LEAST_VISIBLE = 0.25
_LEAST_OVERLAP = 0.3
_LONGEST_START_S = 15.0

Truth: TypeAlias = Sequence[Sequence[Sighting]]
"""Who is to be seen, for each frame."""


def write_film(path: Path, spec: VideoSpec) -> Truth:
    """Write a street as MP4 with a key frame a second."""
    street, truth = Street(spec), []
    with av.open(str(path), "w") as film:
        stream = film.add_stream("libx264", rate=round(spec.fps))
        stream.width, stream.height, stream.pix_fmt = spec.width, spec.height, "yuv420p"
        stream.options = {"preset": "veryfast", "g": str(round(spec.fps)), "bf": "0"}
        for index in range(spec.frames):
            time_s = index / spec.fps
            image = av.VideoFrame.from_ndarray(street.frame(time_s), format="rgb24")
            film.mux(stream.encode(image))
            truth.append([one for one in street.sightings(time_s) if one.visible >= _LEAST_VISIBLE])
        film.mux(stream.encode())
    return truth


class Timed:
    """A tracker that notes for how long each track was seen."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker
        self.seen: dict[int, tuple[float, float]] = {}

    def update(
        self, boxes: Boxes, clock: float, image: NDArray[np.uint8]
    ) -> tuple[list[int], list[int]]:
        numbers, ended = self._tracker.update(boxes, clock, image)
        for number in numbers:
            self.seen[number] = self.seen.get(number, (clock, clock))[0], clock
        return numbers, ended

    def seconds(self, track: str | None) -> float:
        """Return for how long a track was seen, by its name in the gallery."""
        first, last = self.seen[int((track or "").rpartition("-")[2])]
        return last - first


def watch(
    film: Path, bundle: Path, folder: Path, detector: str, seconds: float
) -> tuple[dict[str, Any], Timed]:
    """Watch a film until the camera has lost it; return what the pipeline counted, and tracks."""
    encoder = upperson_rt.open(bundle)
    settings = PipelineSettings()
    timed = Timed(new_tracker(settings.tracker, settings.lost_after_s))
    with (
        patch("upperson_camera.worker.new_tracker", lambda *_: timed),
        rtsp_camera(film=film, transport="tcp") as camera,
        Gallery.open(folder, encoder.fingerprint, encoder.embed_dim, create=True) as gallery,
        Pipeline(encoder, gallery) as pipeline,
    ):
        pipeline.add_camera("street", camera.address, open_detector(detector))
        until = time.monotonic() + seconds + _LONGEST_START_S
        wait_for(lambda: pipeline.stats().cameras["street"].outages or time.monotonic() > until)
        pipeline.stop()
        counts = pipeline.stats().cameras["street"]
    names = {
        "frames read": "frames_read", "frames searched": "frames_processed",
        "frames dropped": "frames_dropped", "boxes": "detections",
        "boxes left out": "crops_dropped", "tracks": "tracks", "rows": "committed",
    }  # fmt: skip
    return {name: getattr(counts, field) for name, field in names.items()}, timed


def compare(items: Sequence[Item], truth: Truth, fps: float, timed: Timed) -> dict[str, Any]:
    """Compare rows with a film; when it began is where they fit best."""
    first = min(item.time or 0.0 for item in items)
    starts = np.arange(0.0, _LONGEST_START_S, 1 / fps)
    found = max(
        (_matched(items, truth, fps, first - start) for start in starts),
        key=lambda one: sum(overlap for _, overlap in one),
    )
    tracks: dict[str | None, Counter[int | None]] = defaultdict(Counter)
    for item, (person, _) in zip(items, found, strict=True):
        tracks[item.track][person] += 1
    single = [timed.seconds(track) for track, counts in tracks.items() if counts.total() == 1]
    mostly = [counts.most_common(1)[0][0] for counts in tracks.values()]
    seen = Counter(one.person for frame in truth for one in frame)
    there = {person for person, frames in seen.items() if frames >= fps}
    return {
        "rows on a person": sum(person is not None for person, _ in found),
        "median overlap": float(np.median([one for who, one in found if who is not None])),
        "people to be seen for a second": len(there),
        "of them with a picture": len(there & set(mostly)),
        "tracks with pictures": len(tracks),
        "of nobody": mostly.count(None),
        "of two people": sum(len(set(counts) - {None}) > 1 for counts in tracks.values()),
        "with one picture": len(single),
        "seconds they were seen": sorted(round(one, 1) for one in single),
        "tracks seen for 2.5 s": sum(timed.seconds(track) >= 2.5 for track in tracks),
    }


def _matched(
    items: Sequence[Item], truth: Truth, fps: float, start: float
) -> list[tuple[int | None, float]]:
    """Return for each row the person below its box, if there is one, and how far they overlap."""
    found: list[tuple[int | None, float]] = []
    for item in items:
        index = round(((item.time or 0.0) - start) * fps)
        there = truth[index] if 0 <= index < len(truth) else ()
        assert item.box is not None
        overlaps = [(overlap(item.box, one.visible_box or one.box), one.person) for one in there]
        most, person = max(overlaps, default=(0.0, -1))
        found.append((person if most >= _LEAST_OVERLAP else None, most))
    return found


def overlap(one: Sequence[float], other: Sequence[float]) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    shared = max(0, width) * max(0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return shared / (sum(areas) - shared)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--detector", default="hog")
    for name, usual in (("--seconds", 80.0), ("--people", 48), ("--seed", 11)):
        parser.add_argument(name, type=type(usual), default=usual)
    options = parser.parse_args()
    if (reason := reason_to_skip()) is not None:
        raise SystemExit(reason)
    spec = VideoSpec(
        people=options.people, seconds=options.seconds, fps=25.0, seed=options.seed, busy=True
    )
    with tempfile.TemporaryDirectory() as name:
        film, folder = Path(name, "street.mp4"), Path(name, "gallery")
        truth = write_film(film, spec)
        counts, timed = watch(film, options.bundle, folder, options.detector, spec.seconds)
        with Gallery.open(folder) as gallery:
            items = list(gallery.items())
    print(json.dumps(counts | compare(items, truth, spec.fps, timed)))


if __name__ == "__main__":
    main()
