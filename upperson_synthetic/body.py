"""The dressed body: trunk and arms in the upper garment, legs, what covers them, and shoes."""

import functools
from collections.abc import Callable, Mapping

from PIL import Image, ImageDraw

from upperson_synthetic.drawing import (
    Point,
    Pose,
    Ring,
    Sketch,
    along,
    contrast,
    draw_disc,
    draw_limb,
    mix,
    shade,
)
from upperson_synthetic.people import COLOURS, JEANS_COLOURS, SKIN, Pattern, Person, Rgb, Upper

#: Height of the lower hem, how much wider than the body the garment is, and its flare at the hem.
_CUT: dict[Upper, tuple[float, float, float]] = {
    "coat": (0.74, 0.014, 0.035),
    "jacket": (0.5, 0.02, 0.0),
    "t-shirt": (0.52, 0.0, 0.004),
    "shirt": (0.57, 0.002, 0.008),
    "hoodie": (0.54, 0.014, 0.002),
    "sweater": (0.53, 0.008, 0.0),
    "dress": (0.72, -0.002, 0.05),
    "steward vest": (0.53, 0.016, 0.004),
    "porter uniform": (0.58, 0.008, 0.006),
    "school blazer": (0.56, 0.01, 0.008),
}
_SHOULDER_Y = 0.19
_HIP_Y, _KNEE_Y, _ANKLE_Y, _SOLE_Y = 0.49, 0.72, 0.94, 0.995
_LEG_X = 0.05
_THICKNESS = {True: 0.86, False: 1.08}  # Of a woman's and of a man's neck and arms.
_SOLES = {"sneakers": 0.016, "boots": 0.01, "sandals": 0.016, "leather shoes": 0.007}
_WORN_DENIM = (226, 232, 240)
_REFLECTIVE, _GOLD, _STEWARDS_SHIRT = (232, 234, 228), (234, 190, 72), (46, 48, 54)


# --- Trunk and arms


def draw_upper(sketch: Sketch) -> None:
    """Draw the trunk and both arms in the upper garment, the far arm first."""
    person, pose, draw = sketch.person, sketch.pose, sketch.draw
    colour = COLOURS[person.upper_colour].rgb
    printed = person.pattern not in {"plain", "logo"}
    mask = Image.new("L", sketch.image.size) if printed else None
    stencil = None if mask is None else ImageDraw.Draw(mask)
    near = {side: pose.nearness(side * 0.12, _swing(pose, side) * 0.4) for side in (-1, 1)}
    behind = [side for side in (-1, 1) if near[side] < -0.05]
    for side in behind:
        _draw_arm(sketch, stencil, side, shade(_sleeve(person, colour), 0.78))
    trunk = pose.outline(_rings(person, pose))
    thick = _THICKNESS[person.is_female]
    neck = pose.outline((Ring(0.1, 0.034 * thick, 0.034 * thick), Ring(0.18, 0.04 * thick, 0.036)))
    if person.upper == "hoodie" and person.headwear != "hood":
        x, y = pose.screen(0.0, 0.158, -0.035)
        across, down = 0.07 * pose.scale, 0.036 * pose.scale
        draw.ellipse((x - across, y - down, x + across, y + down), fill=shade(colour, 0.72))
    draw.polygon(trunk, fill=colour)
    draw.polygon(neck, fill=shade(SKIN[person.skin], 0.88))
    if person.upper == "sweater":
        collar = pose.outline((Ring(0.128, 0.05, 0.046), Ring(0.182, 0.062, 0.056)))
        draw.polygon(collar, fill=shade(colour, 0.8))
    if stencil is not None:
        stencil.polygon(trunk, fill=255)
    if person.upper in _DRAW_STAFF_WEAR:
        _DRAW_STAFF_WEAR[person.upper](sketch, colour)
    else:
        _draw_details(sketch, colour)
    for side in (-1, 1):
        if side not in behind:
            _draw_arm(sketch, stencil, side, shade(_sleeve(person, colour), 0.87))
    if mask is not None:
        period = max(4, round(0.052 * pose.scale))
        mask.paste(0, mask=_pattern_tile(person.pattern, sketch.image.size, period))
        sketch.image.paste(contrast(colour, 0.85), mask=mask)


def _sleeve(person: Person, colour: Rgb) -> Rgb:
    return _STEWARDS_SHIRT if person.upper == "steward vest" else colour


def hand_position(sketch: Sketch, side: int) -> Point:
    """Where a hand is on the canvas, in pixels."""
    return _arm(sketch, side)[2]


def _rings(person: Person, pose: Pose) -> list[Ring]:
    hem, loose, flare = _CUT[person.upper]
    # Loose cloth hides a waist less than in life, and a profile too: in a crop of 40 pixels nothing
    # else distinguishes a woman in a coat, seen from behind or the side, from a man.
    if person.is_female:
        shoulder = Ring(_SHOULDER_Y, 0.097, 0.055)
        chest, waist = Ring(0.27, 0.089, 0.074, 0.022), Ring(0.41, 0.07, 0.05)
        hip = Ring(min(hem, 0.5), 0.104, 0.082, -0.014)
    else:
        shoulder = Ring(_SHOULDER_Y, 0.121, 0.062)
        chest, waist = Ring(0.27, 0.113, 0.077), Ring(0.41, 0.092, 0.077, 0.006)
        hip = Ring(min(hem, 0.5), 0.094, 0.071)
    stride = abs(pose.stride) * 0.2 if hem > 0.6 else 0.0
    rings = [Ring(0.152, 0.045, 0.04)]
    for ring in (shoulder, chest, waist, hip):
        wide, deep = ring.half_width + loose, ring.half_depth + loose
        rings.append(ring._replace(half_width=wide, half_depth=deep))
    if hem > 0.52:
        wide, deep = hip.half_width + loose + flare, 0.076 + loose + flare + stride
        rings.append(Ring(hem, wide, deep))
    return rings


def _swing(pose: Pose, side: int) -> float:
    return -side * pose.stride * 0.75  # Arms swing against the legs.


def _arm(sketch: Sketch, side: int) -> tuple[Point, Point, Point]:
    """Shoulder, elbow and hand in pixels."""
    person, pose = sketch.person, sketch.pose
    shoulder = (0.091 if person.is_female else 0.115) + _CUT[person.upper][1]
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


def _draw_arm(sketch: Sketch, stencil: ImageDraw.ImageDraw | None, side: int, cloth: Rgb) -> None:
    person = sketch.person
    start, elbow, hand = _arm(sketch, side)
    unit = sketch.pose.scale
    loose = 0.5 * _CUT[person.upper][1]
    thick = _THICKNESS[person.is_female] * unit
    skin = shade(SKIN[person.skin], 0.94)
    draw_disc(sketch.draw, hand, 0.022 * unit, skin)
    if person.sleeves == "long":
        # The sleeve ends above the hand.
        cuff = along(hand, elbow, 0.14)
        joints = [start, elbow, cuff]
        radii = [(0.034 + loose) * thick, (0.029 + loose) * thick, (0.023 + loose) * thick]
        draw_limb(sketch.draw, joints, radii, cloth)
        if person.upper in {"sweater", "hoodie"}:
            draw_limb(sketch.draw, [cuff, cuff], [radii[2], radii[2]], shade(cloth, 0.72))
        if person.upper == "porter uniform":
            draw_limb(sketch.draw, [cuff, along(cuff, elbow, 0.15)], [radii[2] * 1.1] * 2, _GOLD)
    else:
        draw_limb(
            sketch.draw, [start, elbow, hand], [0.026 * thick, 0.024 * thick, 0.018 * thick], skin
        )
        joints = [start, along(start, elbow, 0.72)]
        radii = [0.037 * thick, 0.037 * thick]
        draw_limb(sketch.draw, joints, radii, cloth)
    if stencil is not None:
        draw_limb(stencil, joints, radii, 255)


def _draw_details(sketch: Sketch, colour: Rgb) -> None:
    """Draw what distinguishes the garments: collars, buttons, zips, pockets and ribs."""
    person, pose = sketch.person, sketch.pose
    hem = _CUT[person.upper][0]
    mark = contrast(colour, 0.5)
    faint = contrast(colour, 0.25)
    front = pose.facing > -0.25
    middle = pose.heading * 0.05  # where the middle of the chest is, seen from here
    if person.upper in {"sweater", "hoodie"}:
        sketch.band(pose.half_width(0.108, 0.086), hem - 0.012, shade(colour, 0.72), 0.024)
    if person.upper == "dress":
        sketch.band(pose.half_width(0.076, 0.066), 0.415, mark, 0.016)
    if person.upper == "coat":
        sketch.band(pose.half_width(0.1, 0.08), 0.44, faint, 0.016)
        if not front:
            sketch.line([(0.0, 0.55), (0.0, hem)], faint, 0.01)
    if person.upper == "jacket":
        half = pose.half_width(0.106, 0.086)
        sketch.band(half, hem - 0.01, mark, 0.02)
        for height in (0.25, 0.32, 0.39):  # quilted
            sketch.band(half, height, shade(colour, 0.76), 0.012)
    if person.upper == "sweater":
        for across in (-0.05, 0.05):  # cables
            x = across * max(0.4, abs(pose.facing)) + middle * (1 if front else 0)
            sketch.line([(x, 0.22), (x, hem - 0.03)], faint, 0.014)
    if person.upper == "shirt":
        sketch.band(0.05 * max(0.5, abs(pose.facing)), 0.162, mark, 0.02)
    if not front:
        if person.upper == "shirt":
            sketch.band(pose.half_width(0.09, 0.06), 0.235, mark, 0.008)
            sketch.line([(0.0, 0.235), (0.0, hem - 0.02)], faint, 0.008)
        if person.upper == "hoodie" and person.headwear != "hood":
            sketch.ellipse(0.0, 0.205, 0.066, 0.05, shade(colour, 0.68))
        return
    if person.upper in {"coat", "jacket", "shirt"}:
        thickness = {"coat": 0.009, "jacket": 0.014, "shirt": 0.006}[person.upper]
        sketch.line([(middle, 0.18), (middle, hem)], mark, thickness)
        spread = 0.05 if person.upper == "coat" else 0.03
        for side in (-1, 1):
            corners = [(middle, 0.235), (middle + side * spread, 0.165), (middle, 0.15)]
            sketch.polygon(corners, faint)
    if person.upper in {"coat", "shirt"}:
        radius = max(1.0, 0.008 * pose.scale)
        offsets = (-0.026, 0.026) if person.upper == "coat" else (0.0,)
        for height in (0.28, 0.35, 0.42, 0.49):
            for offset in offsets:
                draw_disc(sketch.draw, pose.flat(middle + offset, height), radius, mark)
    if person.upper == "hoodie":
        for side in (-1, 1):
            cord = [(middle + side * 0.018, 0.18), (middle + side * 0.022, 0.26)]
            sketch.line(cord, contrast(colour, 0.8), 0.007)
        pocket = [(-0.05, 0.42), (0.05, 0.42), (0.066, 0.5), (-0.066, 0.5)]
        sketch.polygon([(middle + x * 0.9, y) for x, y in pocket], shade(colour, 0.62))
    if person.upper in {"t-shirt", "dress", "sweater"}:
        neck, half = middle * 0.6, 0.036 * max(0.3, abs(pose.facing))
        sketch.line([(neck - half, 0.16), (neck, 0.185), (neck + half, 0.16)], mark, 0.01)
    if person.pattern == "logo":
        shape = [(-0.042, 0.25), (0.042, 0.25), (0.042, 0.32), (-0.042, 0.32)]
        shrink = max(0.45, abs(pose.facing))
        sketch.polygon([(middle + x * shrink, y) for x, y in shape], contrast(colour, 0.9))
        half = 0.024 * shrink
        sketch.line([(middle - half, 0.285), (middle + half, 0.285)], colour, 0.018)


def _draw_steward_vest(sketch: Sketch, colour: Rgb) -> None:
    """Draw reflective bands around the trunk and over the shoulders, and a V at the neck."""
    pose = sketch.pose
    across = max(0.45, abs(pose.facing))
    for height, half in ((0.33, (0.118, 0.092)), (0.45, (0.11, 0.09))):
        sketch.band(pose.half_width(*half), height, _REFLECTIVE, 0.03)
    for side in (-1, 1):
        braces = [(side * 0.066 * across, 0.175), (side * 0.066 * across, 0.52)]
        sketch.line(braces, _REFLECTIVE, 0.026)
    if pose.facing > -0.25:
        middle = pose.heading * 0.05
        neck = [(middle - 0.036 * across, 0.15), (middle + 0.036 * across, 0.15), (middle, 0.25)]
        sketch.polygon(neck, _STEWARDS_SHIRT)
        sketch.line([(middle, 0.25), (middle, 0.53)], shade(colour, 0.6), 0.01)


def _draw_porter_uniform(sketch: Sketch, colour: Rgb) -> None:
    """Draw a stand-up collar, shoulder straps, a belt and two rows of buttons, all of gold."""
    pose = sketch.pose
    sketch.band(pose.half_width(0.05, 0.046), 0.155, _GOLD, 0.026)
    across = max(0.45, abs(pose.facing))
    for side in (-1, 1):
        sketch.line([(side * 0.06 * across, 0.18), (side * 0.125 * across, 0.195)], _GOLD, 0.03)
    sketch.band(pose.half_width(0.1, 0.084), 0.425, _GOLD, 0.028)
    if pose.facing <= -0.25:
        return
    middle = pose.heading * 0.05
    for height in (0.22, 0.275, 0.33, 0.385):
        left, right = (pose.flat(middle + side * 0.042 * across, height) for side in (-1, 1))
        sketch.stroke([left, right], mix(colour, _GOLD, 0.7), 0.008)
        for place in (left, right):
            draw_disc(sketch.draw, place, max(1.5, 0.014 * pose.scale), _GOLD)


def _draw_school_blazer(sketch: Sketch, colour: Rgb) -> None:
    """Draw white piping along the edges, and in front a shirt, a tie and a crest."""
    pose = sketch.pose
    half, hem = pose.half_width(0.108, 0.09), _CUT["school blazer"][0]
    white = _REFLECTIVE
    sketch.band(half, hem - 0.006, white, 0.016)
    if pose.facing <= -0.25:
        sketch.line([(0.0, 0.45), (0.0, hem)], white, 0.012)
        sketch.band(0.05, 0.165, white, 0.016)
        return
    middle, across = pose.heading * 0.05, max(0.45, abs(pose.facing))
    shirt = [(middle - 0.045 * across, 0.15), (middle + 0.045 * across, 0.15), (middle, 0.36)]
    sketch.polygon(shirt, (240, 240, 238))
    sketch.line([(middle, 0.165), (middle, 0.33)], shade(colour, 0.8), 0.022)
    for side in (-1, 1):
        lapel = [(middle + side * 0.05 * across, 0.15), (middle, 0.37), (middle, hem)]
        sketch.line(lapel, white, 0.014)
    crest = (middle + 0.062 * across, 0.28)
    sketch.ellipse(*crest, 0.024, 0.03, _GOLD)
    sketch.ellipse(*crest, 0.012, 0.016, contrast(_GOLD, 0.9))


_DRAW_STAFF_WEAR: Mapping[Upper, Callable[[Sketch, Rgb], None]] = {
    "steward vest": _draw_steward_vest,
    "porter uniform": _draw_porter_uniform,
    "school blazer": _draw_school_blazer,
}


@functools.lru_cache(maxsize=256)
def _pattern_tile(pattern: Pattern, size: tuple[int, int], period: int) -> Image.Image:
    """Return what of a garment does *not* take the print's colour (255), as an ``L`` image."""
    width, height = size
    tile = Image.new("L", size, 255)
    draw = ImageDraw.Draw(tile)
    if pattern == "dotted":
        step = max(6, period)
        for row in range(height // step + 2):
            for column in range(-1, width // step + 2):
                centre = (column * step + (row % 2) * step / 2, row * step * 0.9)
                draw_disc(draw, centre, step * 0.27, 0)
        return tile
    if pattern == "striped":
        for y in range(0, height, period):
            draw.rectangle((0, y, width, y + period * 0.42), fill=0)
        return tile
    # Checked: half-tone bands both ways, full colour where they cross.
    band, bars = Image.new("L", size, 0), Image.new("L", size, 0)
    for y in range(0, height, period):
        ImageDraw.Draw(band).rectangle((0, y, width, y + period * 0.4), fill=110)
    for x in range(0, width, period):
        ImageDraw.Draw(bars).rectangle((x, 0, x + period * 0.4, height), fill=110)
    return Image.eval(Image.blend(band, bars, 0.5), lambda value: 255 - min(255, value * 2))


# --- Legs and shoes


def draw_legs(sketch: Sketch) -> None:
    """Draw both legs with shoes, the far one first, and a skirt over them."""
    person, pose = sketch.person, sketch.pose
    ahead = {side: side * pose.stride / 2 for side in (-1, 1)}
    far_first = sorted((-1, 1), key=lambda side: pose.nearness(side * _LEG_X, ahead[side]))
    for side in far_first:
        _draw_leg(sketch, side, ahead[side], light=0.86 if side == far_first[0] else 1)
    if person.lower == "skirt" and person.lower_colour is not None:
        colour = COLOURS[person.lower_colour].rgb
        spread = abs(pose.stride) * 0.25
        rings = (Ring(0.42, 0.085, 0.065), Ring(0.5, 0.11, 0.09), Ring(0.69, 0.13, 0.1 + spread))
        sketch.draw.polygon(pose.outline(rings), fill=colour)
        # Pleats distinguish a skirt from shorts.
        half = pose.half_width(0.12, 0.1)
        for share in (-0.55, 0.0, 0.55):
            pleat = [pose.flat(half * share * 0.8, 0.52), pose.flat(half * share, 0.685)]
            sketch.stroke(pleat, contrast(colour, 0.3), 0.006)


def _draw_leg(sketch: Sketch, side: int, ahead: float, light: float) -> None:
    person, pose = sketch.person, sketch.pose
    # Seen from the front, the foot that is behind is higher up in the picture.
    lift = 0.12 * max(0.0, -pose.nearness(0.0, ahead))
    hip = pose.screen(side * _LEG_X, _HIP_Y)
    knee = pose.screen(side * _LEG_X * 1.05, _KNEE_Y - lift * 0.4, ahead * 0.55 + 0.01)
    ankle = pose.screen(side * _LEG_X, _ANKLE_Y - lift, ahead)
    skin = shade(SKIN[person.skin], light)
    cloth = skin
    if person.lower_colour is not None and person.lower != "skirt":
        table = JEANS_COLOURS if person.lower == "jeans" else COLOURS
        cloth = shade(table[person.lower_colour].rgb, light)
    if person.lower == "trousers":
        sketch.limb([hip, knee, ankle], [0.056, 0.046, 0.04], cloth)
        sketch.stroke([along(hip, knee, 0.3), knee, ankle], contrast(cloth, 0.18), 0.006)
    elif person.lower == "jeans":
        sketch.limb([hip, knee, ankle], [0.056, 0.046, 0.031], cloth)
        # Worn thighs and a bright, turned-up hem.
        thigh = [along(hip, knee, 0.3), along(hip, knee, 0.85)]
        sketch.limb(thigh, [0.02, 0.018], mix(cloth, _WORN_DENIM, 0.28))
        hem = [along(ankle, knee, 0.04), along(ankle, knee, 0.1)]
        sketch.limb(hem, [0.033, 0.033], mix(cloth, _WORN_DENIM, 0.45))
    else:
        sketch.limb([hip, knee, ankle], [0.045, 0.032, 0.022], skin)
    if person.lower == "shorts":
        above = along(hip, knee, 0.92)
        sketch.limb([hip, above], [0.058, 0.054], cloth)
        half = 0.052 * pose.scale
        y = above[1] + half * 0.7
        sketch.stroke([(above[0] - half, y), (above[0] + half, y)], contrast(cloth, 0.25), 0.008)
    _draw_shoe(sketch, knee, ankle, light)


def _draw_shoe(sketch: Sketch, knee: Point, ankle: Point, light: float) -> None:
    person, draw, unit = sketch.person, sketch.draw, sketch.pose.scale
    colour = shade(COLOURS[person.shoe_colour].rgb, light)
    bottom = ankle[1] + (_SOLE_Y - _ANKLE_Y) * unit
    forward = sketch.pose.heading * 0.075 * unit
    half = 0.036 * unit
    left = min(ankle[0] - half, ankle[0] + forward - half * 0.6)
    right = max(ankle[0] + half, ankle[0] + forward + half * 0.6)
    if person.shoes == "boots":
        shaft = along(ankle, knee, 0.42)
        sketch.limb([shaft, ankle], [0.042, 0.036], colour)
        cuff = [(shaft[0] - 0.042 * unit, shaft[1]), (shaft[0] + 0.042 * unit, shaft[1])]
        sketch.stroke(cuff, contrast(colour, 0.35), 0.012)
    top = ankle[1] - (0.012 if person.shoes in {"boots", "sneakers"} else -0.012) * unit
    upper = shade(SKIN[person.skin], light) if person.shoes == "sandals" else colour
    draw.rounded_rectangle((left, top, right, bottom), radius=0.026 * unit, fill=upper)
    sole_top = bottom - _SOLES[person.shoes] * unit
    sole = contrast(colour, 0.75)
    if person.shoes == "sneakers":
        draw.rectangle((left, sole_top, right, bottom), fill=(246, 246, 244))
        middle = (left + right) / 2 + forward * 0.1
        for step in (0.0, 0.016):
            y = top + (0.02 + step) * unit
            sketch.stroke([(middle - 0.016 * unit, y), (middle + 0.016 * unit, y)], sole, 0.006)
    elif person.shoes == "sandals":
        draw.rectangle((left, sole_top, right, bottom), fill=colour)
        for share in (0.25, 0.75):
            across = left + (right - left) * share
            strap = [(across, top), (across + 0.008 * unit, bottom)]
            sketch.stroke(strap, colour, 0.018, least_px=2)
        ring = [(left, top + 0.004 * unit), (right, top + 0.004 * unit)]
        sketch.stroke(ring, colour, 0.012, least_px=2)
    else:
        draw.rectangle((left, sole_top, right, bottom), fill=sole)
