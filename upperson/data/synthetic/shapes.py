"""Shapes given in the body frame, drawn on a canvas through a pose."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import ImageDraw

from upperson.data.synthetic.palette import Rgb
from upperson.data.synthetic.pose import Point, Pose

#: A slice through the trunk: height ``y``, half width and half depth, in body heights.
Ring = tuple[float, float, float]


def outline(pose: Pose, rings: Sequence[Ring], lean: float = 0.0) -> list[Point]:
    """The visible outline of a stack of elliptic slices.

    Args:
        pose: The view.
        rings: Slices from top to bottom.
        lean: Sideways displacement of the whole stack, in body heights.

    Returns:
        The corners of the polygon in canvas pixels.
    """
    halves = [(y, pose.half_width(lateral, depth)) for y, lateral, depth in rings]
    left = [pose.flat(lean - half, y) for y, half in halves]
    right = [pose.flat(lean + half, y) for y, half in reversed(halves)]
    return left + right


def ellipse(
    draw: ImageDraw.ImageDraw,
    pose: Pose,
    centre: Point,
    radii: Point,
    colour: Rgb,
) -> None:
    """Fills an ellipse around a point of the turned body frame (radii in body heights)."""
    x, y = pose.flat(*centre)
    across = radii[0] * pose.scale * (1.0 + 0.4 * pose.tilt)
    down = radii[1] * pose.scale
    draw.ellipse((x - across, y - down, x + across, y + down), fill=colour)


def polygon(draw: ImageDraw.ImageDraw, pose: Pose, corners: Sequence[Point], colour: Rgb) -> None:
    """Fills a polygon given in the turned body frame."""
    draw.polygon([pose.flat(*corner) for corner in corners], fill=colour)


def line(
    draw: ImageDraw.ImageDraw,
    pose: Pose,
    points: Sequence[Point],
    colour: Rgb,
    thickness: float,
) -> None:
    """Draws a line given in the turned body frame, ``thickness`` in body heights."""
    width = max(1, round(thickness * pose.scale))
    draw.line([pose.flat(*point) for point in points], fill=colour, width=width, joint="curve")


def limb(
    draw: ImageDraw.ImageDraw,
    joints: Sequence[Point],
    radii: Sequence[float],
    colour: Rgb | int,
) -> None:
    """Fills a tapered limb with round joints.

    Args:
        draw: Where to draw.
        joints: Two or more joints in canvas pixels.
        radii: The radius at every joint in pixels.
        colour: The fill.
    """
    for (x, y), radius in zip(joints, radii, strict=True):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
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
            fill=colour,
        )
