"""Drawing in the frame of a body: its pose in one picture, shapes and shades."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from upperson_synthetic.look import Camera, Look
from upperson_synthetic.people import Person, Rgb
from upperson_synthetic.sampling import between, chance

Point = tuple[float, float]


class Ring(NamedTuple):
    """A slice through the trunk, an ellipse, in body heights."""

    y: float
    half_width: float
    half_depth: float
    forward: float = 0.0  # How far its middle is in front of the body's axis.


@dataclass(frozen=True, kw_only=True, slots=True)
class Pose:
    """One view of a body, in a body frame whose unit is the person's height.

    The body frame has ``x`` to the person's left-hand side as seen from the front, ``y`` down
    from the top of the head (0) to the soles (1), and ``z`` forward. At yaw 0 the person looks
    into the camera, at yaw pi away from it.
    """

    yaw: float  # Rotation about the vertical axis in radians.
    stride: float  # How far the left foot is in front of the right one, in body heights.
    side: int  # Which hand carries things: -1 or 1.
    width: int  # Of the canvas in pixels.
    height: int
    scale: float  # Body height in pixels.
    origin: Point  # Canvas position of the top of the head.
    tilt: float  # See `Camera`.
    roll: float  # See `Look`.
    bag_visible: bool

    def screen(self, x: float, y: float, z: float = 0.0) -> Point:
        """Project a point of the body frame to canvas pixels."""
        across = x * math.cos(self.yaw) + z * math.sin(self.yaw)
        return self.flat(across, y)

    def flat(self, across: float, y: float) -> Point:
        """Project a point that is already turned by the yaw (``across`` in body heights)."""
        # A camera looking down stretches what is close to it: the head and the shoulders.
        down = y + self.tilt * y * (1.0 - y) if 0.0 < y < 1.0 else y
        wide = 1.0 + 0.8 * self.tilt * (0.5 - y)
        return (
            self.origin[0] + self.scale * (across * wide + self.roll * (y - 0.5)),
            self.origin[1] + self.scale * down,
        )

    def nearness(self, x: float, z: float) -> float:
        """How far a point is in front of the body's axis, towards the camera."""
        return z * math.cos(self.yaw) - x * math.sin(self.yaw)

    def half_width(self, lateral: float, depth: float) -> float:
        """Half the visible width of an elliptic slice with these half axes."""
        return math.hypot(lateral * math.cos(self.yaw), depth * math.sin(self.yaw))

    def outline(self, rings: Sequence[Ring], lean: float = 0.0) -> list[Point]:
        """The visible outline, in pixels, of elliptic slices from top to bottom.

        ``lean`` displaces the whole stack sideways, in body heights.
        """
        left, right = [], []
        for ring in rings:
            middle = lean + ring.forward * self.heading
            half = self.half_width(ring.half_width, ring.half_depth)
            left.append(self.flat(middle - half, ring.y))
            right.append(self.flat(middle + half, ring.y))
        return left + right[::-1]

    @property
    def facing(self) -> float:
        """Cosine of the yaw: 1 from the front, -1 from behind."""
        return math.cos(self.yaw)

    @property
    def heading(self) -> float:
        """Sine of the yaw: where on the screen, left to right, the person looks."""
        return math.sin(self.yaw)


def sample_pose(
    person: Person, look: Look, camera: Camera, size: tuple[int, int], rng: np.random.Generator
) -> Pose:
    """Sample a view of a person on a canvas of some width and height in pixels."""
    width, height = size
    if chance(rng, look.side_views):
        yaw = (1 if chance(rng, 0.5) else -1) * between(rng, (0.9, 2.1))
    else:
        yaw = (math.pi if chance(rng, look.back_views) else 0.0) + between(rng, (-0.6, 0.6))
    share = between(rng, look.body)
    free = 1.0 - share
    if person.accessory == "umbrella":
        share *= 0.85  # It needs room above the head.
    top = (1.0 - share - 0.45 * free) * height
    # A narrow crop cannot hold a wide body: the body may not exceed 2.9 times the width.
    scale = min(share * height, 2.95 * width)
    return Pose(
        yaw=yaw,
        stride=between(rng, (-0.2, 0.2)),
        side=1 if chance(rng, 0.5) else -1,
        width=width,
        height=height,
        scale=scale,
        origin=(
            width * (0.5 + between(rng, (-look.shift, look.shift))),
            top + height * between(rng, (-look.shift, look.shift)) * 0.5,
        ),
        tilt=between(rng, camera.tilt),
        roll=between(rng, (-look.roll, look.roll)),
        bag_visible=not chance(rng, look.hidden_bags),
    )


class Sketch:
    """A picture of one person in one pose, in the making.

    `polygon`, `line` and `ellipse` take points of the body frame that are already turned by the
    yaw, the others take pixels. Sizes are in body heights.
    """

    grow = 1.0  # How much larger than the body's are the proportions of what is drawn.

    def __init__(self, image: Image.Image, person: Person, pose: Pose) -> None:
        self.image = image
        self.person = person
        self.pose = pose
        self.draw = ImageDraw.Draw(image)

    def place(self, across: float, y: float) -> Point:
        """Project a point to canvas pixels."""
        return self.pose.flat(across, y)

    def polygon(self, corners: Sequence[Point], colour: Rgb) -> None:
        """Fill a polygon."""
        self.draw.polygon([self.place(*corner) for corner in corners], fill=colour)

    def line(self, points: Sequence[Point], colour: Rgb, thickness: float) -> None:
        """Draw a line with round corners."""
        width = max(1, round(thickness * self.grow * self.pose.scale))
        placed = [self.place(*point) for point in points]
        self.draw.line(placed, fill=colour, width=width, joint="curve")

    def band(self, half: float, y: float, colour: Rgb, thickness: float) -> None:
        """Draw a level line over the body's axis, half as long to either side."""
        self.line([(-half, y), (half, y)], colour, thickness)

    def ellipse(self, x: float, y: float, across: float, down: float, colour: Rgb) -> None:
        """Fill an ellipse around a point."""
        x, y = self.place(x, y)
        across = across * self.grow * self.pose.scale * (1.0 + 0.4 * self.pose.tilt)
        down = down * self.grow * self.pose.scale
        self.draw.ellipse((x - across, y - down, x + across, y + down), fill=colour)

    def stroke(
        self, points: Sequence[Point], colour: Rgb, thickness: float, least_px: int = 1
    ) -> None:
        """Draw a line between pixels."""
        width = max(least_px, round(thickness * self.pose.scale))
        self.draw.line(points, fill=colour, width=width)

    def limb(self, joints: Sequence[Point], radii: Sequence[float], colour: Rgb) -> None:
        """Fill a tapered limb between pixels, with round joints."""
        draw_limb(self.draw, joints, [radius * self.pose.scale for radius in radii], colour)


def draw_limb(
    draw: ImageDraw.ImageDraw, joints: Sequence[Point], radii: Sequence[float], fill: Rgb | int
) -> None:
    """Fill a tapered limb with round joints; all in pixels."""
    for joint, radius in zip(joints, radii, strict=True):
        draw_disc(draw, joint, radius, fill)
    spans = zip(joints[:-1], joints[1:], radii[:-1], radii[1:], strict=True)
    for (x0, y0), (x1, y1), start, end in spans:
        length = max(1e-6, ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5)
        normal_x, normal_y = (y0 - y1) / length, (x1 - x0) / length
        draw.polygon(
            [
                (x0 + normal_x * start, y0 + normal_y * start),
                (x1 + normal_x * end, y1 + normal_y * end),
                (x1 - normal_x * end, y1 - normal_y * end),
                (x0 - normal_x * start, y0 - normal_y * start),
            ],
            fill=fill,
        )


def draw_disc(draw: ImageDraw.ImageDraw, centre: Point, radius: float, fill: Rgb | int) -> None:
    """Fill a circle; all in pixels."""
    x, y = centre
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)


def along(start: Point, end: Point, share: float) -> Point:
    """Return the point at a share of the way between two others."""
    return (start[0] + (end[0] - start[0]) * share, start[1] + (end[1] - start[1]) * share)


def shade(colour: Rgb, factor: float) -> Rgb:
    """Darken (``factor < 1``) or brighten (``factor > 1``) a colour, clipped to 0..255."""
    red, green, blue = (min(255, max(0, round(value * factor))) for value in colour)
    return (red, green, blue)


def mix(first: Rgb, second: Rgb, share: float) -> Rgb:
    """Blend two colours; ``share`` is the part of the second, 0..1."""
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(first, second, strict=True))
    return (red, green, blue)


def contrast(colour: Rgb, share: float = 0.5) -> Rgb:
    """Move a colour towards black or white, whichever is further, for seams and prints."""
    bright = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 110
    return mix(colour, (18, 18, 20) if bright else (245, 245, 245), share)
