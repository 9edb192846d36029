"""Legs, what covers them, and shoes."""

from __future__ import annotations

from PIL import ImageDraw

from upperson.data.synthetic.palette import CLOTH, DENIM, SKIN, Rgb, contrast, mix, shade
from upperson.data.synthetic.people import Person
from upperson.data.synthetic.pose import Point, Pose
from upperson.data.synthetic.shapes import limb, outline

_HIP, _KNEE, _ANKLE, _SOLE = 0.49, 0.72, 0.94, 0.995
_LATERAL = 0.05


def draw_legs(draw: ImageDraw.ImageDraw, person: Person, pose: Pose) -> None:
    """Draws both legs with shoes, the far one first, and a skirt over them."""
    ahead = {side: side * pose.stride / 2 for side in (-1, 1)}
    far_first = sorted((-1, 1), key=lambda side: pose.nearness(side * _LATERAL, ahead[side]))
    for side in far_first:
        _draw_leg(draw, person, pose, side, ahead[side], light=0.86 if side == far_first[0] else 1)
    if person.lower == "skirt" and person.lower_colour is not None:
        colour = CLOTH[person.lower_colour]
        spread = abs(pose.stride) * 0.25
        rings = ((0.42, 0.085, 0.065), (0.5, 0.11, 0.09), (0.69, 0.13, 0.1 + spread))
        draw.polygon(outline(pose, rings), fill=colour)
        # Pleats tell a skirt from shorts.
        half = pose.half_width(0.12, 0.1)
        width = max(1, round(0.006 * pose.scale))
        for share in (-0.55, 0.0, 0.55):
            ends = [pose.flat(half * share * 0.8, 0.52), pose.flat(half * share, 0.685)]
            draw.line(ends, fill=contrast(colour, 0.3), width=width)


def leg_colour(person: Person) -> Rgb:
    """The colour of the cloth on the legs, or of the skin where there is none."""
    if person.lower_colour is None or person.lower == "skirt":
        return SKIN[person.skin]
    return DENIM[person.lower_colour] if person.lower == "jeans" else CLOTH[person.lower_colour]


def _draw_leg(
    draw: ImageDraw.ImageDraw, person: Person, pose: Pose, side: int, ahead: float, light: float
) -> None:
    unit = pose.scale
    # Seen from the front, the foot that is behind is higher up in the picture.
    lift = 0.12 * max(0.0, -pose.nearness(0.0, ahead))
    hip = pose.screen(side * _LATERAL, _HIP)
    knee = pose.screen(side * _LATERAL * 1.05, _KNEE - lift * 0.4, ahead * 0.55 + 0.01)
    ankle = pose.screen(side * _LATERAL, _ANKLE - lift, ahead)
    skin = shade(SKIN[person.skin], light)
    cloth = shade(leg_colour(person), light)
    if person.lower in {"jeans", "trousers"}:
        wide = person.lower == "trousers"
        radii = [0.056 * unit, 0.046 * unit, (0.04 if wide else 0.031) * unit]
        limb(draw, [hip, knee, ankle], radii, cloth)
        _draw_seams(draw, person, cloth, (hip, knee, ankle), unit)
    else:
        limb(draw, [hip, knee, ankle], [0.045 * unit, 0.032 * unit, 0.022 * unit], skin)
        if person.lower == "shorts":
            above = _between(hip, knee, 0.92)
            limb(draw, [hip, above], [0.058 * unit, 0.054 * unit], cloth)
            hem = contrast(cloth, 0.25)
            half = 0.052 * unit
            ends = [
                (above[0] - half, above[1] + half * 0.7),
                (above[0] + half, above[1] + half * 0.7),
            ]
            draw.line(ends, fill=hem, width=max(1, round(0.008 * unit)))
    _draw_shoe(draw, person, pose, (knee, ankle), light)


def _draw_seams(
    draw: ImageDraw.ImageDraw,
    person: Person,
    cloth: Rgb,
    joints: tuple[Point, Point, Point],
    unit: float,
) -> None:
    hip, knee, ankle = joints
    if person.lower == "trousers":
        crease = [_between(hip, knee, 0.3), knee, ankle]
        draw.line(crease, fill=contrast(cloth, 0.18), width=max(1, round(0.006 * unit)))
        return
    # Denim: worn thighs, a bright outer seam and a turned-up hem.
    faded = mix(cloth, (226, 232, 240), 0.28)
    limb(
        draw,
        [_between(hip, knee, 0.3), _between(hip, knee, 0.85)],
        [0.02 * unit, 0.018 * unit],
        faded,
    )
    limb(
        draw,
        [_between(ankle, knee, 0.04), _between(ankle, knee, 0.1)],
        [0.033 * unit, 0.033 * unit],
        mix(cloth, (226, 232, 240), 0.45),
    )


def _draw_shoe(
    draw: ImageDraw.ImageDraw,
    person: Person,
    pose: Pose,
    joints: tuple[Point, Point],
    light: float,
) -> None:
    knee, ankle = joints
    unit = pose.scale
    colour = shade(CLOTH[person.shoe_colour], light)
    skin = shade(SKIN[person.skin], light)
    sole = contrast(colour, 0.75)
    bottom = ankle[1] + (_SOLE - _ANKLE) * unit
    forward = pose.heading * 0.075 * unit
    half = 0.036 * unit
    left = min(ankle[0] - half, ankle[0] + forward - half * 0.6)
    right = max(ankle[0] + half, ankle[0] + forward + half * 0.6)
    if person.shoes == "boots":
        shaft = _between(ankle, knee, 0.42)
        limb(draw, [shaft, ankle], [0.042 * unit, 0.036 * unit], colour)
        cuff = contrast(colour, 0.35)
        draw.line(
            [(shaft[0] - 0.042 * unit, shaft[1]), (shaft[0] + 0.042 * unit, shaft[1])],
            fill=cuff,
            width=max(1, round(0.012 * unit)),
        )
    top = ankle[1] - (0.012 if person.shoes in {"boots", "sneakers"} else -0.012) * unit
    body = skin if person.shoes == "sandals" else colour
    draw.rounded_rectangle((left, top, right, bottom), radius=0.026 * unit, fill=body)
    thick = {"sneakers": 0.016, "boots": 0.01, "sandals": 0.016, "leather shoes": 0.007}
    sole_top = bottom - thick[person.shoes] * unit
    if person.shoes == "sneakers":
        draw.rectangle((left, sole_top, right, bottom), fill=(246, 246, 244))
        middle = (left + right) / 2 + forward * 0.1
        for step in (0.0, 0.016):
            height = top + (0.02 + step) * unit
            ends = [(middle - 0.016 * unit, height), (middle + 0.016 * unit, height)]
            draw.line(ends, fill=sole, width=max(1, round(0.006 * unit)))
    elif person.shoes == "sandals":
        draw.rectangle((left, sole_top, right, bottom), fill=colour)
        for share in (0.25, 0.75):
            across = left + (right - left) * share
            strap = [(across, top), (across + 0.008 * unit, bottom)]
            draw.line(strap, fill=colour, width=max(2, round(0.018 * unit)))
        ring = [(left, top + 0.004 * unit), (right, top + 0.004 * unit)]
        draw.line(ring, fill=colour, width=max(2, round(0.012 * unit)))
    else:
        draw.rectangle((left, sole_top, right, bottom), fill=sole)


def _between(start: Point, end: Point, share: float) -> Point:
    return (start[0] + (end[0] - start[0]) * share, start[1] + (end[1] - start[1]) * share)
