"""Videos of synthetic people crossing a street, with the true boxes of everybody."""

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from upperson.data.synthetic.captions import describe
from upperson.data.synthetic.drawing import Pose
from upperson.data.synthetic.look import LOOKS
from upperson.data.synthetic.people import Person, sample_people
from upperson.data.synthetic.sampling import between, chance
from upperson.data.synthetic.scene import (
    OVERSAMPLING,
    draw_body,
    draw_shadow,
    draw_street,
    light_body,
)
from upperson_rt.errors import InputError, UsageError, missing_extra
from upperson_rt.files import put_in_place, scratch_folder, write_atomically

_STEPS = 12
"""Pictures of a walk's two steps."""
_CAPTIONS = 2
_LEAST_VISIBLE = 0.5
"""Share of a person's width inside the frame from which on there is a box."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSpec:
    """What a video consists of: people who cross the view, frames in pixels.

    Raises:
        UsageError: On construction, if a number is out of range.
    """

    people: int = 8
    seconds: float = 20.0
    fps: float = 10.0
    width: int = 960
    height: int = 540
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if self.people < 1 or self.seed < 0:
            raise UsageError("a video needs at least one person and a seed from 0")
        if not (0 < self.fps <= 240 and 0 < self.seconds <= 24 * 3600):
            raise UsageError("fps must be above 0 up to 240, seconds above 0 up to a day")
        if min(self.width, self.height) < 96:
            raise UsageError("a frame must be at least 96 pixels wide and high")

    @property
    def frames(self) -> int:
        """Number of frames in the video."""
        return max(1, round(self.seconds * self.fps))


@dataclass(frozen=True, slots=True)
class _Walk:
    """One person on the way through the view."""

    person: Person
    captions: list[str]
    pictures: list[Image.Image]
    """RGBA, one for each phase of the two steps; all of one size."""
    start_s: float
    duration_s: float
    feet: float
    """Height of the soles in the frame, in pixels from the top."""
    rightwards: bool

    def left_edge(self, time_s: float, width: int) -> float | None:
        """Where the picture's left edge is; None before and after the walk."""
        share = (time_s - self.start_s) / self.duration_s
        if not 0 <= share < 1:
            return None
        way = width + self.pictures[0].width
        return share * way - self.pictures[0].width if self.rightwards else width - share * way

    def picture(self, time_s: float) -> Image.Image:
        """The picture of this moment: about one step in half a second."""
        return self.pictures[int((time_s - self.start_s) * _STEPS) % _STEPS]


def write_video(
    path: Path, spec: VideoSpec, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Write a video in Motion JPEG, and its truth beside it with the suffix ``.json``.

    The truth has ``frames``, for each frame a list of ``{"box": [x0, y0, x1, y1], "person": n}``,
    and ``people``, for each person ``person``, ``captions``, ``first_frame``, ``last_frame`` and
    ``attributes``. A person has a box while at least half of their width is inside the frame; who
    stands behind somebody else has one, too. ``progress`` is called after every frame with the
    number of frames done and of all.

    Returns:
        The truth, as in the file.

    Raises:
        UsageError: ``path`` does not end in ``.avi``.
        BackendError: OpenCV is missing.
        InputError: The files cannot be written.
    """
    try:
        import cv2
    except ImportError as error:
        raise missing_extra("cv2", "camera", "writing a video") from error
    if path.suffix.lower() != ".avi":
        raise UsageError(f"the video is Motion JPEG and must end in .avi, got {path.name}")
    rng = np.random.default_rng(np.random.SeedSequence(spec.seed, spawn_key=(7,)))
    background = _background(spec, rng)
    people = sample_people(spec.people, rng, distractors=0.0)
    walks = sorted((_walk(person, spec, rng) for person in people), key=lambda walk: walk.feet)
    boxes: list[list[dict[str, Any]]] = []
    with scratch_folder(path) as folder:
        unfinished = folder / path.name
        codec = cv2.VideoWriter.fourcc(*"MJPG")
        writer = cv2.VideoWriter(str(unfinished), codec, spec.fps, (spec.width, spec.height))
        if not writer.isOpened():
            raise InputError(f"cannot write {path}: OpenCV does not open it as Motion JPEG")
        for index in range(spec.frames):
            frame, found = _draw_frame(background, walks, index / spec.fps)
            writer.write(np.ascontiguousarray(frame[:, :, ::-1]))
            boxes.append(found)
            if progress is not None:
                progress(index + 1, spec.frames)
        writer.release()
        truth = _truth(path, spec, walks, boxes)
        put_in_place(unfinished, path)
        write_atomically(path.with_suffix(".json"), json.dumps(truth) + "\n")
    return truth


def _background(spec: VideoSpec, rng: np.random.Generator) -> Image.Image:
    # Streets are painted for small crops; a quarter of the size keeps their things in proportion.
    street = draw_street((max(1, spec.width // 4), max(1, spec.height // 4)), rng)
    return street.resize((spec.width, spec.height), Image.Resampling.BILINEAR)


def _walk(person: Person, spec: VideoSpec, rng: np.random.Generator) -> _Walk:
    rightwards = chance(rng, 0.5)
    body = between(rng, (0.45, 0.7)) * spec.height * (0.75 if person.is_child else 1.0)
    yaw = between(rng, (0.7, 1.3)) * (1 if rightwards else -1)
    side = 1 if chance(rng, 0.5) else -1
    canvas = (round(0.9 * body) * OVERSAMPLING, round(1.4 * body) * OVERSAMPLING)
    light, lit_from = between(rng, (0.8, 1.0)), 1 if chance(rng, 0.5) else -1
    pictures = []
    for step in range(_STEPS):
        pose = Pose(
            yaw=yaw,
            stride=0.2 * math.sin(2 * math.pi * step / _STEPS),
            side=side,
            width=canvas[0],
            height=canvas[1],
            scale=body * OVERSAMPLING,
            origin=(canvas[0] / 2, 0.3 * body * OVERSAMPLING),
            tilt=0.05,
            roll=0.0,
            bag_visible=True,
        )
        drawn = draw_body(person, pose).reduce(OVERSAMPLING)
        lit = light_body(drawn, light, lit_from)
        lit.putalpha(drawn.getchannel("A"))
        pictures.append(lit)
    # All phases are cut alike, or the person would jump.
    extents = [box for picture in pictures if (box := picture.getchannel("A").getbbox())]
    cut = (
        min(box[0] for box in extents),
        min(box[1] for box in extents),
        max(box[2] for box in extents),
        max(box[3] for box in extents),
    )
    duration_s = spec.seconds * between(rng, (0.3, 0.6))
    # Who is drawn larger is closer to the camera, and so further down.
    feet = spec.height * (0.72 + 0.26 * (body / spec.height - 0.3) / 0.4)
    look = LOOKS["street"]
    return _Walk(
        person=person,
        captions=[describe(person, look, rng) for _ in range(_CAPTIONS)],
        pictures=[picture.crop(cut) for picture in pictures],
        start_s=between(rng, (0.0, spec.seconds - duration_s)),
        duration_s=duration_s,
        feet=min(feet, spec.height - 2.0),
        rightwards=rightwards,
    )


def _draw_frame(
    background: Image.Image, walks: list[_Walk], time_s: float
) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    frame = background.copy()
    found: list[dict[str, Any]] = []
    for number, walk in enumerate(walks):
        edge = walk.left_edge(time_s, frame.width)
        if edge is None:
            continue
        picture = walk.picture(time_s)
        left, top = round(edge), round(walk.feet) - picture.height
        middle = (left + picture.width / 2, walk.feet - 1)
        draw_shadow(frame, middle, 0.3 * picture.width, 0.35, 0.0)
        frame.paste(picture, (left, top), mask=picture)
        extent = picture.getchannel("A").getbbox()
        assert extent is not None  # A body is never invisible.
        x0, x1 = max(0, left + extent[0]), min(frame.width, left + extent[2])
        y0, y1 = max(0, top + extent[1]), min(frame.height, top + extent[3])
        if x1 - x0 >= _LEAST_VISIBLE * (extent[2] - extent[0]) and y1 > y0:
            found.append({"box": [x0, y0, x1, y1], "person": number})
    return np.asarray(frame), found


def _truth(
    path: Path, spec: VideoSpec, walks: list[_Walk], boxes: list[list[dict[str, Any]]]
) -> dict[str, Any]:
    seen: dict[int, list[int]] = {number: [] for number in range(len(walks))}
    for index, found in enumerate(boxes):
        for entry in found:
            seen[entry["person"]].append(index)
    return {
        "video": path.name,
        "spec": dataclasses.asdict(spec),
        "people": [
            {
                "person": number,
                "captions": walk.captions,
                "first_frame": min(seen[number], default=None),
                "last_frame": max(seen[number], default=None),
                "attributes": dataclasses.asdict(walk.person),
            }
            for number, walk in enumerate(walks)
        ],
        "frames": boxes,
    }
