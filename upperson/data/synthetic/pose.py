"""How a person stands in one picture, and the projection of their body onto the canvas."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from upperson.data.synthetic.look import Camera, Look
from upperson.data.synthetic.people import Person
from upperson.data.synthetic.sampling import between, chance

Point = tuple[float, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pose:
    """One view of a body, in a body frame whose unit is the person's height.

    The body frame has ``x`` to the person's left-hand side as seen from the front, ``y`` down
    from the top of the head (0) to the soles (1), and ``z`` forward. At yaw 0 the person looks
    into the camera, at yaw pi away from it.

    Attributes:
        yaw: Rotation about the vertical axis in radians.
        stride: How far the left foot is in front of the right one, in body heights.
        side: Which hand carries things: -1 or 1.
        width: Canvas width in pixels.
        height: Canvas height in pixels.
        scale: Body height in pixels.
        origin: Canvas position of the top of the head.
        tilt: Downward view of the camera; see `Camera.tilt`.
        roll: Sideways lean; see `Look.roll`.
        bag_visible: Whether the bag is drawn.
    """

    yaw: float
    stride: float
    side: int
    width: int
    height: int
    scale: float
    origin: Point
    tilt: float
    roll: float
    bag_visible: bool

    def screen(self, x: float, y: float, z: float = 0.0) -> Point:
        """Projects a point of the body frame to canvas pixels."""
        across = x * math.cos(self.yaw) + z * math.sin(self.yaw)
        return self.flat(across, y)

    def flat(self, across: float, y: float) -> Point:
        """Places a point that is already turned by the yaw (``across`` in body heights)."""
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

    @property
    def facing(self) -> float:
        """Cosine of the yaw: 1 from the front, -1 from behind."""
        return math.cos(self.yaw)

    @property
    def heading(self) -> float:
        """Sine of the yaw: where on the screen, left to right, the person looks."""
        return math.sin(self.yaw)


def sample_pose(
    person: Person,
    look: Look,
    camera: Camera,
    size: tuple[int, int],
    rng: np.random.Generator,
) -> Pose:
    """Samples a view of a person.

    Args:
        person: Who is seen; only an umbrella matters here, which needs room above the head.
        look: The domain, for the framing.
        camera: The camera, for its downward view.
        size: Canvas width and height in pixels.
        rng: The random generator.

    Returns:
        The pose.
    """
    width, height = size
    if chance(rng, look.side_views):
        yaw = (1 if chance(rng, 0.5) else -1) * between(rng, (0.9, 2.1))
    else:
        yaw = (math.pi if chance(rng, look.back_views) else 0.0) + between(rng, (-0.6, 0.6))
    share = between(rng, look.body)
    free = 1.0 - share
    if person.accessory == "umbrella":
        share *= 0.85
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
