"""Videos of synthetic people crossing a street, with the true boxes of all of them."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from upperson_rt.errors import InputError, UsageError, missing_extra
from upperson_rt.files import put_in_place, scratch_folder, write_atomically
from upperson_synthetic.captions import describe
from upperson_synthetic.drawing import Pose
from upperson_synthetic.look import LOOKS
from upperson_synthetic.people import Person, sample_people
from upperson_synthetic.routes import Route, straight_route, street_route
from upperson_synthetic.sampling import between, chance
from upperson_synthetic.scene import OVERSAMPLING, draw_body, draw_shadow, draw_street, light_body

_STEPS = 12  # Pictures of a walk's two steps.
_CAPTIONS = 2
_LEAST_INSIDE = 0.5  # Share of a person's width inside the frame from which on there is a box.
_ADULTS = 0.26, 0.42  # Heights of adults on a busy street, in heights of the frame.
_TOGETHER = 0.3  # How often a person on a busy street walks beside the one before.
_STANDS = 2  # Stands on a busy street, which hide who passes behind them.

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, the last two exclusive.


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoSpec:
    """What a video consists of, in pixels and seconds.

    Raises:
        UsageError: On construction, if a number is out of range.
    """

    people: int = 8
    seconds: float = 20.0
    fps: float = 10.0
    width: int = 960
    height: int = 540
    seed: int = 0
    busy: bool = False
    """People are smaller and walk at a pedestrian's pace; some stop, turn round, change their pace,
    come nearer or walk in twos, and stands hide them. Otherwise all go straight across."""

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
class Sighting:
    """A person in one frame."""

    person: int
    box: Box  # All of the person that is inside the frame, hidden or not.
    visible: float  # Visible share of it, 0 to 1.
    visible_box: Box | None  # Around what is not hidden; None if all is.


@dataclass(frozen=True, slots=True)
class _Walk:
    """One person on the way through the view."""

    person: Person
    captions: list[str]
    pictures: list[Image.Image]  # RGBA, one for each phase of the two steps; all of one size.
    route: Route
    far_feet: float  # Height of the soles in the frame at size 0, in pixels from the top.
    near_feet: float  # How far further down they are at size 1.


@dataclass(frozen=True, slots=True)
class _Placed:
    """A picture at its place in one frame."""

    picture: Image.Image  # RGBA.
    left: int
    feet: float
    person: int | None  # None for a thing.

    @property
    def top(self) -> int:
        return round(self.feet) - self.picture.height

    @property
    def extent(self) -> Box:
        """The box around what is drawn, inside the frame or not."""
        box = self.picture.getchannel("A").getbbox()
        assert box is not None  # A body is never invisible.
        return (self.left + box[0], self.top + box[1], self.left + box[2], self.top + box[3])


class Street:
    """A street and the people who cross it, at any moment.

    With equal seeds the same people do the same at the same time, whatever the frame rate.
    """

    def __init__(self, spec: VideoSpec) -> None:
        rng = np.random.default_rng(np.random.SeedSequence(spec.seed, spawn_key=(7,)))
        self.spec = spec
        # Streets are painted for small crops; a quarter of the size keeps things in proportion.
        street = draw_street((max(1, spec.width // 4), max(1, spec.height // 4)), rng)
        size = (spec.width, spec.height)
        self._background = street.resize(size, Image.Resampling.BILINEAR)
        people = sample_people(spec.people, rng, distractors=0.0)
        walks: list[_Walk] = []
        for person in people:
            walks.append(_walk(person, spec, rng, walks[-1] if walks else None))
        self._walks = sorted(walks, key=lambda walk: walk.far_feet + walk.near_feet)
        self._things = _stands(spec, rng) if spec.busy else []

    def people(self) -> list[dict[str, Any]]:
        """Return ``person``, ``captions`` and ``attributes`` of each person, as plain values."""
        return [
            {"person": number, "captions": walk.captions, "attributes": asdict(walk.person)}
            for number, walk in enumerate(self._walks)
        ]

    def frame(self, time_s: float) -> NDArray[np.uint8]:
        """Draw the moment; returns RGB [H, W, 3]."""
        frame = self._background.copy()
        for placed in self._placed(time_s):
            if placed.person is not None:
                _draw_shadow(frame, placed)
            frame.paste(placed.picture, (placed.left, placed.top), mask=placed.picture)
        return np.asarray(frame)

    def sightings(self, time_s: float) -> list[Sighting]:
        """Return who is at least half inside the frame at a moment, hidden or not, far to near."""
        width, height = self.spec.width, self.spec.height
        owners = np.full((height, width), -1, np.int32)
        found: list[tuple[int, Box, int]] = []
        for placed in self._placed(time_s):
            x0, y0 = max(0, placed.left), max(0, placed.top)
            alpha = np.asarray(placed.picture.getchannel("A"))
            inside = alpha[y0 - placed.top : height - placed.top, x0 - placed.left :]
            inside = inside[:, : max(0, width - x0)]
            number = -2 if placed.person is None else placed.person
            owners[y0 : y0 + inside.shape[0], x0 : x0 + inside.shape[1]][inside >= 128] = number
            left, top, right, bottom = placed.extent
            box = (max(0, left), max(0, top), min(width, right), min(height, bottom))
            wide_enough = box[2] - box[0] >= _LEAST_INSIDE * (right - left)
            if placed.person is not None and wide_enough and box[3] > box[1]:
                found.append((placed.person, box, int((inside >= 128).sum())))
        return [_sighting(person, box, pixels, owners) for person, box, pixels in found]

    def _placed(self, time_s: float) -> list[_Placed]:
        """Return what stands in the frame, far to near."""
        placed = list(self._things)
        for number, walk in enumerate(self._walks):
            place = walk.route.at(time_s)
            if place is None:
                continue
            picture = walk.pictures[int(place.walked_s * _STEPS) % _STEPS]
            if place.is_turned:
                picture = ImageOps.mirror(picture)
            if place.size != 1:
                picture = ImageOps.scale(picture, place.size)
            left = round(place.middle - picture.width / 2)
            feet = walk.far_feet + walk.near_feet * place.size
            placed.append(_Placed(picture, left, feet, number))
        return sorted(placed, key=lambda one: one.feet)


def write_video(
    path: Path, spec: VideoSpec, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Write a video in Motion JPEG, and its truth beside it with the suffix ``.json``.

    The truth has ``frames``, for each frame a list of ``{"box": [x0, y0, x1, y1], "person": n,
    "visible": share}``, and ``people``, for each person ``person``, ``captions``, ``first_frame``,
    ``last_frame`` and ``attributes``. A person has a box while at least half of their width is
    inside the frame; a person behind another one has one, too. ``progress`` is called after
    every frame with the number of frames done and of all. Returns the truth, as in the file.

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
    street = Street(spec)
    frames: list[list[dict[str, Any]]] = []
    with scratch_folder(path) as folder:
        unfinished = folder / path.name
        codec = cv2.VideoWriter.fourcc(*"MJPG")
        writer = cv2.VideoWriter(str(unfinished), codec, spec.fps, (spec.width, spec.height))
        if not writer.isOpened():
            raise InputError(f"cannot write {path}: OpenCV does not open it as Motion JPEG")
        for index in range(spec.frames):
            time_s = index / spec.fps
            writer.write(np.ascontiguousarray(street.frame(time_s)[:, :, ::-1]))
            frames.append(
                [
                    {"box": list(one.box), "person": one.person, "visible": round(one.visible, 2)}
                    for one in street.sightings(time_s)
                ]
            )
            if progress is not None:
                progress(index + 1, spec.frames)
        writer.release()
        truth = _truth(path, street, frames)
        put_in_place(unfinished, path)
        write_atomically(path.with_suffix(".json"), json.dumps(truth) + "\n")
    return truth


def _draw_shadow(frame: Image.Image, placed: _Placed) -> None:
    """Darken the ground under a person; only its surroundings are processed."""
    half, middle = 0.3 * placed.picture.width, placed.left + placed.picture.width / 2
    left, top = math.floor(middle - half) - 4, math.floor(placed.feet - half) - 4
    ground = frame.crop((left, top, left + math.ceil(2 * half) + 9, top + math.ceil(2 * half) + 9))
    draw_shadow(ground, (middle - left, placed.feet - 1 - top), half, 0.35, 0.0)
    frame.paste(ground, (left, top))


def _stands(spec: VideoSpec, rng: np.random.Generator) -> list[_Placed]:
    """Draw stands across the middle of the street, from left to right."""
    placed = []
    for number in range(_STANDS):
        size = (
            round(between(rng, (0.06, 0.13)) * spec.width),
            round(between(rng, (0.4, 0.5)) * spec.height),
        )
        colour = tuple(int(between(rng, (50, 170))) for _ in range(3))
        picture = Image.new("RGBA", size, (*colour, 255))
        edge = max(2, size[0] // 10)
        inner = (edge, edge, size[0] - edge, size[1] // 2)
        ImageDraw.Draw(picture).rectangle(inner, fill=(60, 70, 84, 255))
        middle = (number + between(rng, (0.3, 0.7))) / _STANDS * spec.width
        feet = between(rng, (0.84, 0.92)) * spec.height
        placed.append(_Placed(picture, round(middle - size[0] / 2), feet, None))
    return placed


def _walk(person: Person, spec: VideoSpec, rng: np.random.Generator, before: _Walk | None) -> _Walk:
    rightwards = chance(rng, 0.5)
    if spec.busy and before is not None and chance(rng, _TOGETHER):
        return _walk_along(person, spec, rng, before)
    adult = between(rng, _ADULTS if spec.busy else (0.45, 0.7)) * spec.height
    body = adult * (0.75 if person.is_child else 1.0)
    pictures = _draw_steps(person, body, rightwards, rng)
    if spec.busy:
        route = street_route(spec.seconds, spec.width, adult, rightwards, rng)
        captions = _describe(person, rng)
        # The camera hangs above: who is twice as near stands twice as far below the horizon.
        return _Walk(person, captions, pictures, route, 0.3 * spec.height, 1.6 * adult)
    duration_s = spec.seconds * between(rng, (0.3, 0.6))
    # A person who is drawn larger is closer to the camera, and so further down.
    feet = spec.height * (0.72 + 0.26 * (body / spec.height - 0.3) / 0.4)
    captions = _describe(person, rng)
    start_s = between(rng, (0.0, spec.seconds - duration_s))
    half = pictures[0].width / 2
    ends = (-half, spec.width + half) if rightwards else (spec.width + half, -half)
    route = straight_route(start_s, duration_s, ends)
    return _Walk(person, captions, pictures, route, min(feet, spec.height - 2.0), 0.0)


def _walk_along(person: Person, spec: VideoSpec, rng: np.random.Generator, before: _Walk) -> _Walk:
    """Return the walk of a companion, a little nearer to the camera."""
    adult = before.near_feet / 1.6 * between(rng, (1.01, 1.06))
    offset = between(rng, (0.25, 0.5)) * adult * (1 if chance(rng, 0.5) else -1)
    rightwards = bool(before.route.middles[1] > before.route.middles[0])
    pictures = _draw_steps(person, adult * (0.75 if person.is_child else 1.0), rightwards, rng)
    route = before.route.beside(offset)
    return _Walk(person, _describe(person, rng), pictures, route, before.far_feet, 1.6 * adult)


def _describe(person: Person, rng: np.random.Generator) -> list[str]:
    return [describe(person, LOOKS["street"], rng) for _ in range(_CAPTIONS)]


def _draw_steps(
    person: Person, body: float, rightwards: bool, rng: np.random.Generator
) -> list[Image.Image]:
    """Draw the phases of a person's two steps, ``body`` pixels tall, in RGBA of one size."""
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
    left, top, right, bottom = zip(*extents, strict=True)
    return [picture.crop((min(left), min(top), max(right), max(bottom))) for picture in pictures]


def _sighting(person: int, box: Box, pixels: int, owners: NDArray[np.int32]) -> Sighting:
    """Compare what is seen of a person with all that is inside the frame, in pixels."""
    x0, y0, x1, y1 = box
    seen = owners[y0:y1, x0:x1] == person
    if not seen.any():
        return Sighting(person, box, 0.0, None)
    rows, columns = np.nonzero(seen)
    around = (
        x0 + int(columns.min()),
        y0 + int(rows.min()),
        x0 + int(columns.max()) + 1,
        y0 + int(rows.max()) + 1,
    )
    return Sighting(person, box, float(seen.sum() / pixels), around)


def _truth(path: Path, street: Street, frames: list[list[dict[str, Any]]]) -> dict[str, Any]:
    people = street.people()
    for one in people:
        seen = [
            index
            for index, found in enumerate(frames)
            if any(entry["person"] == one["person"] for entry in found)
        ]
        one |= {"first_frame": min(seen, default=None), "last_frame": max(seen, default=None)}
    return {"video": path.name, "spec": asdict(street.spec), "people": people, "frames": frames}
