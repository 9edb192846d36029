"""The trunk, the arms and the upper garment with its pattern."""

from __future__ import annotations

import functools

from PIL import Image, ImageDraw

from upperson.data.synthetic.palette import CLOTH, SKIN, Rgb, contrast, shade
from upperson.data.synthetic.people import Pattern, Person, Upper
from upperson.data.synthetic.pose import Point, Pose
from upperson.data.synthetic.shapes import Ring, limb, line, outline, polygon

#: Height of the lower hem, how much wider than the body the garment is, and its flare at the hem.
_CUT: dict[Upper, tuple[float, float, float]] = {
    "coat": (0.74, 0.014, 0.035),
    "jacket": (0.53, 0.012, 0.0),
    "t-shirt": (0.52, 0.0, 0.004),
    "shirt": (0.55, 0.002, 0.008),
    "hoodie": (0.54, 0.014, 0.002),
    "sweater": (0.53, 0.008, 0.0),
    "dress": (0.72, -0.002, 0.05),
}
_SHOULDER_Y = 0.19


def hand_position(person: Person, pose: Pose, side: int) -> Point:
    """Where a hand is on the canvas, in pixels."""
    return _arm(person, pose, side)[2]


def draw_upper(image: Image.Image, person: Person, pose: Pose) -> None:
    """Draws the trunk and both arms in the upper garment, the far arm first."""
    draw = ImageDraw.Draw(image)
    colour = CLOTH[person.upper_colour]
    mask = Image.new("L", image.size) if person.pattern not in {"plain", "logo"} else None
    stencil = None if mask is None else ImageDraw.Draw(mask)
    near = {side: pose.nearness(side * 0.12, _swing(pose, side) * 0.4) for side in (-1, 1)}
    behind = [side for side in (-1, 1) if near[side] < -0.05]
    for side in behind:
        _draw_arm(draw, stencil, person, pose, side, shade(colour, 0.78))
    trunk = outline(pose, _rings(person, pose))
    neck = outline(pose, ((0.1, 0.034, 0.034), (0.18, 0.04, 0.036)))
    if person.upper == "hoodie" and person.headwear != "hood":
        x, y = pose.screen(0.0, 0.158, -0.035)
        across, down = 0.07 * pose.scale, 0.036 * pose.scale
        draw.ellipse((x - across, y - down, x + across, y + down), fill=shade(colour, 0.72))
    draw.polygon(trunk, fill=colour)
    draw.polygon(neck, fill=shade(SKIN[person.skin], 0.88))
    if stencil is not None:
        stencil.polygon(trunk, fill=255)
    _draw_details(draw, person, pose, colour)
    for side in (-1, 1):
        if side not in behind:
            _draw_arm(draw, stencil, person, pose, side, shade(colour, 0.87))
    if mask is not None:
        print_colour = contrast(colour, 0.85)
        tile = _pattern_tile(person.pattern, image.size, max(4, round(0.052 * pose.scale)))
        mask.paste(0, mask=tile)
        image.paste(print_colour, mask=mask)


def _rings(person: Person, pose: Pose) -> list[Ring]:
    hem, loose, flare = _CUT[person.upper]
    female = person.is_female
    shoulder = 0.1 if female else 0.118
    waist = 0.074 if female and person.upper in {"dress", "shirt", "t-shirt"} else 0.088
    hip = 0.1 if female else 0.096
    stride = abs(pose.stride) * 0.2 if hem > 0.6 else 0.0
    rings: list[Ring] = [
        (0.152, 0.045, 0.04),
        (_SHOULDER_Y, shoulder + loose, 0.058 + loose),
        (0.27, shoulder - 0.008 + loose, 0.072 + loose),
        (0.41, waist + loose, 0.066 + loose),
        (min(hem, 0.5), hip + loose, 0.076 + loose),
    ]
    if hem > 0.52:
        rings.append((hem, hip + loose + flare, 0.076 + loose + flare + stride))
    return rings


def _swing(pose: Pose, side: int) -> float:
    # Arms swing against the legs.
    return -side * pose.stride * 0.75


def _arm(person: Person, pose: Pose, side: int) -> tuple[Point, Point, Point]:
    shoulder = (0.094 if person.is_female else 0.112) + _CUT[person.upper][1]
    start = pose.screen(side * shoulder, _SHOULDER_Y + 0.018)
    if side == pose.side and person.accessory in {"umbrella", "phone"}:
        # Keep the raised hand clear of the trunk in every view.
        outward = side if abs(pose.facing) > 0.5 else (1 if pose.heading > 0 else -1)
        outward = -outward if pose.facing < -0.5 else outward
        phone = person.accessory == "phone"
        elbow = pose.flat(outward * 0.15, 0.31)
        return start, elbow, pose.flat(outward * (0.075 if phone else 0.1), 0.1 if phone else 0.24)
    swing = _swing(pose, side)
    elbow = pose.screen(side * (shoulder + 0.024), 0.34, swing * 0.35 - 0.01)
    hand = pose.screen(side * (shoulder + 0.03), 0.49, swing + 0.015)
    return start, elbow, hand


def _draw_arm(
    draw: ImageDraw.ImageDraw,
    stencil: ImageDraw.ImageDraw | None,
    person: Person,
    pose: Pose,
    side: int,
    cloth: Rgb,
) -> None:
    start, elbow, hand = _arm(person, pose, side)
    unit = pose.scale
    loose = 0.5 * _CUT[person.upper][1]
    skin = shade(SKIN[person.skin], 0.94)
    x, y = hand
    radius = 0.022 * unit
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=skin)
    thick = [(0.034 + loose) * unit, (0.029 + loose) * unit, (0.023 + loose) * unit]
    if person.sleeves == "long":
        # The sleeve ends above the hand.
        cuff = (hand[0] + (elbow[0] - hand[0]) * 0.14, hand[1] + (elbow[1] - hand[1]) * 0.14)
        joints = [start, elbow, cuff]
        limb(draw, joints, thick, cloth)
        if person.upper in {"sweater", "hoodie"}:
            limb(draw, [cuff, cuff], [thick[2], thick[2]], shade(cloth, 0.72))
    else:
        limb(draw, [start, elbow, hand], [0.026 * unit, 0.024 * unit, 0.018 * unit], skin)
        end = (start[0] + (elbow[0] - start[0]) * 0.72, start[1] + (elbow[1] - start[1]) * 0.72)
        joints = [start, end]
        thick = [0.037 * unit, 0.037 * unit]
        limb(draw, joints, thick, cloth)
    if stencil is not None:
        limb(stencil, joints, thick, 255)


def _draw_details(draw: ImageDraw.ImageDraw, person: Person, pose: Pose, colour: Rgb) -> None:
    """Draws what tells the garments apart: collars, buttons, zips, pockets and ribs."""
    hem = _CUT[person.upper][0]
    mark = contrast(colour, 0.5)
    faint = contrast(colour, 0.25)
    front = pose.facing > -0.25
    middle = pose.heading * 0.05  # where the middle of the chest is, seen from here
    if person.upper in {"sweater", "hoodie"}:
        half = pose.half_width(0.108, 0.086)
        line(draw, pose, [(-half, hem - 0.012), (half, hem - 0.012)], shade(colour, 0.72), 0.024)
    if person.upper == "dress":
        half = pose.half_width(0.076, 0.066)
        line(draw, pose, [(-half, 0.415), (half, 0.415)], mark, 0.016)
    if person.upper == "coat":
        half = pose.half_width(0.1, 0.08)
        line(draw, pose, [(-half, 0.44), (half, 0.44)], faint, 0.016)
        if not front:
            line(draw, pose, [(0.0, 0.55), (0.0, hem)], faint, 0.01)
    if person.upper == "jacket":
        half = pose.half_width(0.106, 0.086)
        line(draw, pose, [(-half, hem - 0.01), (half, hem - 0.01)], mark, 0.014)
    if not front:
        return
    if person.upper in {"coat", "jacket", "shirt"}:
        thickness = {"coat": 0.009, "jacket": 0.014, "shirt": 0.006}[person.upper]
        line(draw, pose, [(middle, 0.18), (middle, hem)], mark, thickness)
        spread = 0.05 if person.upper == "coat" else 0.03
        for side in (-1, 1):
            corners = [(middle, 0.235), (middle + side * spread, 0.165), (middle, 0.15)]
            polygon(draw, pose, corners, faint)
    if person.upper in {"coat", "shirt"}:
        radius = max(1.0, 0.008 * pose.scale)
        offsets = (-0.026, 0.026) if person.upper == "coat" else (0.0,)
        for height in (0.28, 0.35, 0.42, 0.49):
            for offset in offsets:
                x, y = pose.flat(middle + offset, height)
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=mark)
    if person.upper == "hoodie":
        for side in (-1, 1):
            cord = [(middle + side * 0.018, 0.18), (middle + side * 0.022, 0.26)]
            line(draw, pose, cord, contrast(colour, 0.8), 0.007)
        pocket = [(-0.05, 0.42), (0.05, 0.42), (0.066, 0.5), (-0.066, 0.5)]
        polygon(draw, pose, [(middle + x * 0.9, y) for x, y in pocket], shade(colour, 0.74))
    if person.upper in {"t-shirt", "dress", "sweater"}:
        neck, half = middle * 0.6, 0.036 * max(0.3, abs(pose.facing))
        line(draw, pose, [(neck - half, 0.16), (neck, 0.185), (neck + half, 0.16)], mark, 0.01)
    if person.pattern == "logo":
        shape = [(-0.042, 0.25), (0.042, 0.25), (0.042, 0.32), (-0.042, 0.32)]
        shrink = max(0.45, abs(pose.facing))
        bright = contrast(colour, 0.9)
        polygon(draw, pose, [(middle + x * shrink, y) for x, y in shape], bright)
        line(
            draw,
            pose,
            [(middle - 0.024 * shrink, 0.285), (middle + 0.024 * shrink, 0.285)],
            colour,
            0.018,
        )


@functools.lru_cache(maxsize=256)
def _pattern_tile(pattern: Pattern, size: tuple[int, int], period: int) -> Image.Image:
    """Returns what of a garment does *not* take the print's colour (255), as an ``L`` image."""
    width, height = size
    tile = Image.new("L", size, 255)
    draw = ImageDraw.Draw(tile)
    if pattern == "dotted":
        step = max(6, period)
        radius = step * 0.27
        for row in range(height // step + 2):
            for column in range(-1, width // step + 2):
                x = column * step + (row % 2) * step / 2
                y = row * step * 0.9
                draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=0)
        return tile
    if pattern == "striped":
        for y in range(0, height, period):
            draw.rectangle((0, y, width, y + period * 0.42), fill=0)
        return tile
    # Checked: half-tone bands both ways, full colour where they cross.
    band = Image.new("L", size, 0)
    pencil = ImageDraw.Draw(band)
    for y in range(0, height, period):
        pencil.rectangle((0, y, width, y + period * 0.4), fill=110)
    bars = Image.new("L", size, 0)
    pencil = ImageDraw.Draw(bars)
    for x in range(0, width, period):
        pencil.rectangle((x, 0, x + period * 0.4, height), fill=110)
    return Image.eval(Image.blend(band, bars, 0.5), lambda value: 255 - min(255, value * 2))
