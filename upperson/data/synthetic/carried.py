"""Things a person carries: bags, an umbrella, a phone."""

from __future__ import annotations

from PIL import ImageDraw

from upperson.data.synthetic.palette import CLOTH, Rgb, contrast, shade
from upperson.data.synthetic.people import Person
from upperson.data.synthetic.pose import Pose
from upperson.data.synthetic.shapes import line, outline, polygon
from upperson.data.synthetic.torso import hand_position


def draw_behind(draw: ImageDraw.ImageDraw, person: Person, pose: Pose) -> None:
    """Draws what the body hides in this view; call it before the body."""
    if person.accessory == "umbrella" and person.accessory_colour is not None:
        _draw_canopy(draw, person, pose, CLOTH[person.accessory_colour])
    if person.bag_colour is None or not pose.bag_visible:
        return
    colour = CLOTH[person.bag_colour]
    if person.bag == "backpack" and pose.nearness(0.0, -0.1) <= 0.0:
        _draw_backpack(draw, pose, colour)
    if person.bag == "suitcase":
        _draw_suitcase(draw, person, pose, colour)


def draw_in_front(draw: ImageDraw.ImageDraw, person: Person, pose: Pose) -> None:
    """Draws what hides the body in this view; call it after trunk and arms."""
    if person.accessory == "phone":
        x, y = hand_position(person, pose, pose.side)
        across, down = 0.014 * pose.scale, 0.032 * pose.scale
        box = (x - across, y - down, x + across, y + down * 0.6)
        draw.rounded_rectangle(box, radius=across * 0.5, fill=(22, 22, 26))
    if person.accessory == "umbrella":
        x, y = hand_position(person, pose, pose.side)
        width = max(2, round(0.012 * pose.scale))
        draw.line([(x, y + 0.03 * pose.scale), (x, pose.flat(0.0, -0.05)[1])], (60, 58, 58), width)
    if person.bag_colour is None or not pose.bag_visible:
        return
    colour = CLOTH[person.bag_colour]
    if person.bag == "backpack":
        if pose.nearness(0.0, -0.1) > 0.0:
            _draw_backpack(draw, pose, colour)
        elif pose.facing > 0.3:
            for side in (-1, 1):
                strap = [(side * 0.062, 0.168), (side * 0.068, 0.3), (side * 0.09, 0.38)]
                line(draw, pose, strap, shade(colour, 0.9), 0.026)
        else:
            half = pose.heading * 0.03
            line(draw, pose, [(-half, 0.168), (half, 0.26), (-half, 0.37)], colour, 0.024)
    if person.bag == "handbag":
        _draw_handbag(draw, person, pose, colour)
    if person.bag == "shoulder bag":
        _draw_shoulder_bag(draw, pose, colour)


def _free_side(person: Person, pose: Pose) -> int:
    # The hand with an umbrella or a phone cannot hold a bag as well.
    return -pose.side if person.accessory in {"umbrella", "phone"} else pose.side


def _clamp(value: float, limit: float) -> float:
    return max(-limit, min(limit, value))


def _draw_backpack(draw: ImageDraw.ImageDraw, pose: Pose, colour: Rgb) -> None:
    centre = -0.105 * pose.heading
    rings = (
        (0.17, 0.06, 0.03),
        (0.195, 0.096, 0.055),
        (0.4, 0.112, 0.066),
        (0.43, 0.098, 0.055),
    )
    draw.polygon(outline(pose, rings, centre), fill=colour)
    mark = contrast(colour, 0.4)
    half = pose.half_width(0.086, 0.05)
    if pose.nearness(0.0, -0.1) > 0.0 or abs(pose.heading) > 0.6:
        pocket = [(centre - half, 0.31), (centre + half, 0.31)]
        pocket += [(centre + half, 0.41), (centre - half, 0.41)]
        polygon(draw, pose, pocket, shade(colour, 0.8))
        line(draw, pose, pocket[:2], mark, 0.01)
        line(draw, pose, [(centre - half, 0.225), (centre + half, 0.225)], mark, 0.008)


def _draw_handbag(draw: ImageDraw.ImageDraw, person: Person, pose: Pose, colour: Rgb) -> None:
    hand_x, hand_y = hand_position(person, pose, _free_side(person, pose))
    unit = pose.scale
    margin = 0.062 * unit
    x = max(margin, min(pose.width - margin, hand_x))
    top = hand_y + 0.06 * unit
    width = max(2, round(0.012 * unit))
    handle = [(x - 0.035 * unit, top), (hand_x, hand_y), (x + 0.035 * unit, top)]
    draw.line(handle, fill=shade(colour, 0.8), width=width)
    corners = [(-0.046, 0.0), (0.046, 0.0), (0.062, 0.1), (-0.062, 0.1)]
    draw.polygon([(x + dx * unit, top + dy * unit) for dx, dy in corners], fill=colour)
    flap = [(x - 0.05 * unit, top + 0.03 * unit), (x + 0.05 * unit, top + 0.03 * unit)]
    draw.line(flap, fill=contrast(colour, 0.4), width=max(1, round(0.008 * unit)))


def _draw_shoulder_bag(draw: ImageDraw.ImageDraw, pose: Pose, colour: Rgb) -> None:
    side = pose.side
    hip = _clamp(side * 0.115 * pose.facing + 0.03 * pose.heading, 0.125)
    if abs(pose.facing) < 0.6:
        # From the side the bag hangs at the near hip, whichever that is.
        hip = -0.02 * pose.heading
    start = _clamp(-side * 0.06 * pose.facing, 0.06)
    line(draw, pose, [(start, 0.165), (hip, 0.46)], shade(colour, 0.85), 0.018)
    corners = [(-0.062, 0.45), (0.062, 0.45), (0.066, 0.55), (-0.066, 0.55)]
    polygon(draw, pose, [(hip + x, y) for x, y in corners], colour)
    lid = [(hip - 0.064, 0.495), (hip, 0.515), (hip + 0.064, 0.495)]
    line(draw, pose, lid, contrast(colour, 0.45), 0.01)


def _draw_suitcase(draw: ImageDraw.ImageDraw, person: Person, pose: Pose, colour: Rgb) -> None:
    side = _free_side(person, pose)
    centre = side * 0.17 * pose.facing - 0.16 * pose.heading
    limit = 0.5 * pose.width / pose.scale - 0.06
    centre = _clamp(centre, limit)
    hand = hand_position(person, pose, side)
    grip = pose.flat(centre, 0.7)
    width = max(2, round(0.012 * pose.scale))
    draw.line([hand, grip], fill=(70, 70, 74), width=width)
    corners = [(-0.062, 0.69), (0.062, 0.69), (0.062, 0.955), (-0.062, 0.955)]
    polygon(draw, pose, [(centre + x, y) for x, y in corners], colour)
    for offset in (-0.03, 0.0, 0.03):
        rib = [(centre + offset, 0.715), (centre + offset, 0.93)]
        line(draw, pose, rib, contrast(colour, 0.35), 0.008)
    for offset in (-0.042, 0.042):
        x, y = pose.flat(centre + offset, 0.968)
        radius = 0.016 * pose.scale
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(30, 30, 32))


def _draw_canopy(draw: ImageDraw.ImageDraw, person: Person, pose: Pose, colour: Rgb) -> None:
    # Over the head, pulled a little towards the hand that holds it.
    hand_x, _ = hand_position(person, pose, pose.side)
    centre = (hand_x + 2 * pose.flat(0.0, 0.0)[0]) / 3
    unit = pose.scale
    rim = pose.flat(0.0, 0.035)[1]
    half, rise = 0.2 * unit, 0.17 * unit
    box = (centre - half, rim - rise, centre + half, rim + rise)
    draw.pieslice(box, 180, 360, fill=colour)
    for index in range(4):
        left = centre - half + index * half / 2
        scallop = (left, rim - 0.02 * unit, left + half / 2, rim + 0.02 * unit)
        draw.pieslice(scallop, 180, 360, fill=shade(colour, 0.7))
    peak = (centre, rim - rise)
    for share in (-0.5, 0.0, 0.5):
        rib = [peak, (centre + share * half * 1.0, rim)]
        draw.line(rib, fill=contrast(colour, 0.35), width=max(1, round(0.007 * unit)))
